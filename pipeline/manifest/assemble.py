"""Put the chunks of all pieces together as the parts of one manifest, of about equal size and with one schema.

    pieces/*.rows, rows of Parquet sources -> part-00000.parquet ...

Guarantee: parts hold the rows of all chunks in their order, each once; a column that a source did not have is
null in its rows. Parts are written independently of one another.
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
    """All that is needed to write one part."""

    uri: str
    slices: tuple[Slice, ...]
    schema: pa.Schema
    options: Options


@dataclass(frozen=True, slots=True)
class PartInfo:
    """What is in a part.

    Attributes:
        rows: their number.
        num_bytes: of images, by kind of source, as far as sizes are known.
        unknown_sizes: rows without a size.
        filled: columns with a value in some row.
    """

    rows: int
    num_bytes: dict[SourceKind, int]
    unknown_sizes: int
    filled: tuple[str, ...]


def part_uri(folder: str, number: int) -> str:
    """Where part `number` is."""
    return objects.join(folder, f"part-{number:05d}.parquet")


def lay_out(folder: str, ledgers: Sequence[SplitResult], options: Options) -> list[PartWork]:
    """Cut the rows of all chunks, in order, into parts."""
    schema = _schema(ledgers)
    chunks = [(ledger.kind, chunk) for ledger in ledgers for chunk in ledger.chunks]
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


def _schema(ledgers: Sequence[SplitResult]) -> pa.Schema:
    """One schema for all: ours first; keys and labels stay integers only where all of them are."""
    schemas = [ledger.arrow_schema for ledger in ledgers if ledger.chunks]
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
            "columns of one name do not fit together",
            expected="one type for a column in all sources",
            found=error,
            remedy="rename one of them, or write them with one type",
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
        raise DataError("a column does not fit the manifest", found=error, where=where) from error
    return pa.Table.from_arrays(columns, schema=schema)
