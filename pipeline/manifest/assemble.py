"""Writes the chunks of all splits as the parts of one manifest, of about equal size and with one schema.

    pieces/*.rows, rows of Parquet sources -> part-00000.parquet ...

The rows keep the order of the chunks. A column that a source lacks is null in its rows. Each part is written alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import DataError
from pipeline.manifest.scan_tables import read_chunk
from pipeline.manifest.splits import CHUNK_BYTES, CHUNK_ROWS, ROWS, Chunk, Options, SourceKind, SplitResult
from pipeline.storage import objects, parquet


@dataclass(frozen=True, slots=True)
class Slice:
    """Some rows of a chunk."""

    kind: SourceKind
    chunk: Chunk
    start: int
    rows: int


@dataclass(frozen=True, slots=True)
class PartWork:
    """The input for writing one part."""

    uri: str
    slices: tuple[Slice, ...]
    schema: pa.Schema
    options: Options


@dataclass(frozen=True, slots=True)
class PartInfo:
    """The content of a part."""

    rows: int  # number of rows
    num_bytes: dict[SourceKind, int]  # bytes of the images with a known size, by kind of source
    unknown_sizes: int  # rows without a size
    filled: tuple[str, ...]  # columns that have a value in at least one row


def part_uri(folder: str, number: int) -> str:
    """The URI of part `number`."""
    return objects.join(folder, f"part-{number:05d}.parquet")


def lay_out(folder: str, results: Sequence[SplitResult], options: Options) -> list[PartWork]:
    """Divide the rows of all chunks, in order, into parts."""
    schema = _schema(results)
    chunks = [(result.kind, chunk) for result in results for chunk in result.chunks]
    widest = max((chunk.num_bytes // max(1, chunk.rows) for _, chunk in chunks), default=1)
    most = max(1, min(CHUNK_ROWS, CHUNK_BYTES // max(1, widest)))
    parts: list[list[Slice]] = []
    room = 0
    for kind, chunk in chunks:
        start = 0
        while start < chunk.rows:
            if room == 0:
                parts.append([])
                room = most
            rows = min(room, chunk.rows - start)
            parts[-1].append(Slice(kind, chunk, start, rows))
            start, room = start + rows, room - rows
    return [PartWork(part_uri(folder, i), tuple(slices), schema, options) for i, slices in enumerate(parts)]


def write_part(work: PartWork) -> PartInfo:
    """Write a part; the same rows give the same bytes.

    Raises:
        DataError: a Parquet source does not fit the schema.
    """
    tables, num_bytes = [], dict[SourceKind, int]()
    for item in work.slices:
        rows = read_chunk(item.chunk, work.options).slice(item.start, item.rows)
        table = _conform(rows, work.schema, item.chunk.uri)
        num_bytes[item.kind] = num_bytes.get(item.kind, 0) + (pc.sum(table["size_bytes"]).as_py() or 0)
        tables.append(table)
    whole = pa.concat_tables(tables)
    objects.put(work.uri, parquet.parquet_bytes(work.schema, [whole]))
    filled = tuple(name for name in whole.schema.names if whole[name].null_count < whole.num_rows)
    return PartInfo(whole.num_rows, num_bytes, whole["size_bytes"].null_count, filled)


def _schema(results: Sequence[SplitResult]) -> pa.Schema:
    """One schema for all: our columns first; keys and labels are integers only if all of them are."""
    schemas = [result.arrow_schema for result in results if result.chunks]
    fields: dict[str, pa.Field] = {field.name: field for field in ROWS}
    for name in ("key", "label"):
        kinds = {schema.field(name).type for schema in schemas if name in schema.names}
        if kinds and all(pa.types.is_integer(kind) for kind in kinds):
            fields[name] = pa.field(name, pa.int64())
    others = [pa.schema([field for field in schema if field.name not in fields]) for schema in schemas]
    try:
        unified = pa.unify_schemas(others, promote_options="permissive") if others else pa.schema([])
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(
            "columns of the same name have different types",
            expected="one type per column name in all sources",
            found=error,
            remedy="rename one of them, or write both with one type",
        ) from error
    return pa.schema([*fields.values(), *(field.with_nullable(True) for field in unified)])


def _conform(table: pa.Table, schema: pa.Schema, where: str) -> pa.Table:
    there = set(table.schema.names)
    try:
        columns = [
            table[field.name].cast(field.type) if field.name in there else pa.nulls(table.num_rows, field.type)
            for field in schema
        ]
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError("a column does not have the type of the manifest", found=error, where=where) from error
    return pa.Table.from_arrays(columns, schema=schema)
