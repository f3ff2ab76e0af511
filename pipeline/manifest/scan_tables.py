"""Parquet and CSV lists of images: their rows in the manifest's form, with all their columns.

Each row has an absolute uri and a key. Rows of Parquet files are not copied but referred to, unless they are looked up.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import DataError
from pipeline.manifest.splits import CHUNK_BYTES, CHUNK_ROWS, ROWS, Chunk, Options, SourceSplit, SplitWriter
from pipeline.manifest.uri_schemes import check_schemes
from pipeline.storage import objects, parquet
from pipeline.storage.interface import Stat

if TYPE_CHECKING:
    import pyarrow.parquet as pq

_THREADS = 32
_CSV_BLOCK_BYTES = 8 * 2**20


def index_parquet(split: SourceSplit, options: Options, out: SplitWriter) -> None:
    """Refer to the rows of a Parquet file; with `options.stat`, write them with sizes and etags."""
    uri = split.uris[0]
    first_row = 0
    with parquet.open_parquet(uri) as file:
        schema = manifest_rows(file.schema_arrow.empty_table(), uri, 0, options).schema
        for groups, rows, num_bytes in _cut(file.metadata):
            if options.stat:
                table = manifest_rows(file.read_row_groups(groups), uri, first_row, options)
                out.write(_look_up(table, out))
            else:
                out.refer(uri, groups, rows, num_bytes, schema)
            first_row += rows


def index_csv(split: SourceSplit, options: Options, out: SplitWriter) -> None:
    """Write the rows of a CSV file; types of other columns than ours are guessed from its first megabytes.

    Raises:
        DataError: the file is not CSV, or a value does not fit its column.
    """
    uri = split.uris[0]
    first_row = 0
    for batches in _csv_batches(uri, options):
        table = manifest_rows(pa.Table.from_batches(batches), uri, first_row, options)
        out.write(_look_up(table, out) if options.stat else table)
        first_row += table.num_rows


def read_chunk(chunk: Chunk, options: Options) -> pa.Table:
    """The rows of a chunk, from our file or from the source."""
    if chunk.row_groups is None:
        return parquet.read_parquet(chunk.uri)
    rows = parquet.read_parquet(chunk.uri, row_groups=list(chunk.row_groups))
    return manifest_rows(rows, chunk.uri, chunk.first_row, options)


def manifest_rows(table: pa.Table, where: str, first_row: int, options: Options) -> pa.Table:
    """A source's rows with the manifest's columns first: always `key` and `uri`, others if the source has them.

    Raises:
        DataError: a column is missing or has a wrong type, or a uri or a key is null.
    """
    names = _names(table.schema.names, where, options)
    columns: dict[str, pa.ChunkedArray] = {}
    for field in ROWS:
        name = names.get(field.name)
        if name is None:
            continue
        keep = field.name in ("key", "label") and pa.types.is_integer(table.schema.field(name).type)
        try:
            if field.name == "uri" and _is_number(table.schema.field(name).type):
                raise pa.ArrowNotImplementedError("a number is not a uri")
            columns[field.name] = table[name] if keep else table[name].cast(field.type)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise DataError(
                f"the column for {field.name} has a wrong type",
                expected=field.type,
                found=table.schema.field(name).type,
                where=f"{where}: column {name}",
            ) from error
    check_schemes(columns["uri"], where, first_row, names["uri"])
    columns["uri"] = _absolute(columns["uri"], where)
    columns.setdefault("key", _places(columns))
    for ours in ("uri", "key"):
        if columns[ours].null_count:
            row = first_row + int(pc.index(columns[ours].is_null(), True).as_py())
            raise DataError(f"a {ours} is null", where=f"{where}: row {row}, column {names.get(ours)}")
    rest = [name for name in table.schema.names if name not in names.values()]
    ordered = {field.name: columns[field.name] for field in ROWS if field.name in columns}
    return pa.table(ordered | {name: table[name] for name in rest})


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _names(there: list[str], where: str, options: Options) -> dict[str, str]:
    """Our column -> the source's, for the columns that the source has."""
    twice = sorted({name for name in there if there.count(name) > 1}) if len(set(there)) < len(there) else []
    if twice:
        raise DataError(
            "two columns have the same name", found=", ".join(twice[:5]), where=where, remedy="rename or drop one"
        )
    ours = {"uri": options.uri_column, "key": options.key_column or "key"}
    names = {field.name: ours.get(field.name, field.name) for field in ROWS}
    needed = ["uri", *(["key"] if options.key_column else [])]
    missing = [names[name] for name in needed if names[name] not in there]
    if missing:
        raise DataError(
            "a column is missing",
            expected=missing[0],
            found=", ".join(there),
            where=where,
            remedy="name it with --uri-column or --key-column",
        )
    taken = [name for name in ("uri", "key") if name != names[name] and name in there]
    if taken:
        raise DataError(
            f"--{taken[0]}-column is `{names[taken[0]]}`, but there is also a column `{taken[0]}`",
            expected="one of them",
            where=where,
            remedy="rename or drop one",
        )
    return {name: source for name, source in names.items() if source in there}


def _absolute(uris: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    """Relative paths start at the folder of the file that names them."""
    absolute = pc.or_(pc.starts_with(uris, "/"), pc.match_substring(uris, "://"))
    if pc.all(absolute).as_py():
        return uris
    folder = where.rpartition("/")[0]
    return pc.if_else(absolute, uris, pc.binary_join_element_wise(pa.scalar(folder), uris, "/"))


def _places(columns: dict[str, pa.ChunkedArray]) -> pa.ChunkedArray:
    """Keys for rows without one: the uri, and the offset if there is one."""
    if "offset" not in columns:
        return columns["uri"]
    offset = columns["offset"].cast(pa.string())
    return pc.binary_join_element_wise(columns["uri"], offset, "#", null_handling="skip")


def _cut(metadata: pq.FileMetaData) -> Iterator[tuple[list[int], int, int]]:
    """Row groups, rows and bytes of each chunk."""
    groups: list[int] = []
    rows = num_bytes = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        if groups and (rows + group.num_rows > CHUNK_ROWS or num_bytes + group.total_byte_size > CHUNK_BYTES):
            yield groups, rows, num_bytes
            groups, rows, num_bytes = [], 0, 0
        groups.append(number)
        rows += group.num_rows
        num_bytes += group.total_byte_size
    if rows:
        yield groups, rows, num_bytes


def _csv_batches(uri: str, options: Options) -> Iterator[list[pa.RecordBatch]]:
    from pyarrow import csv

    ours = {options.uri_column: pa.string(), options.key_column or "key": pa.string()}
    types = {field.name: field.type for field in ROWS} | ours
    batches: list[pa.RecordBatch] = []
    try:
        with objects.open_input(uri) as file:
            reader = csv.open_csv(
                file,
                read_options=csv.ReadOptions(block_size=_CSV_BLOCK_BYTES),
                convert_options=csv.ConvertOptions(column_types=types, null_values=[""], strings_can_be_null=True),
            )
            _ = reader.schema.names  # raises if the names are not UTF-8
            for batch in reader:
                rows, num_bytes = batch.num_rows, batch.nbytes
                full = sum(item.num_rows for item in batches) + rows > CHUNK_ROWS
                if batches and (full or sum(item.nbytes for item in batches) + num_bytes > CHUNK_BYTES):
                    yield batches
                    batches = []
                batches.append(batch)
    except (pa.ArrowInvalid, UnicodeError) as error:
        raise DataError(
            "not a readable CSV file",
            expected="UTF-8, and in each column the type of the first rows",
            found=error,
            where=uri,
            remedy="correct the file, or write it as Parquet",
        ) from error
    if batches:
        yield batches


def _look_up(table: pa.Table, out: SplitWriter) -> pa.Table:
    """The rows with size and etag of their objects; null for missing objects, which are counted."""
    encoded = table["uri"].combine_chunks().dictionary_encode()
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(_stat, encoded.dictionary.to_pylist()))
    etags = pa.array([None if item is None else item.etag for item in found], pa.string()).take(encoded.indices)
    sizes = pa.array([None if item is None else item.size_bytes for item in found], pa.int64()).take(encoded.indices)
    out.notes["missing_images"] += etags.null_count
    if "length" in table.schema.names:
        sizes = pc.coalesce(table["length"], sizes)
    columns = {name: table[name] for name in table.schema.names} | {"etag": etags, "size_bytes": sizes}
    return pa.table(columns)


def _stat(uri: str) -> Stat | None:
    try:
        return objects.stat(uri)
    except (FileNotFoundError, NotADirectoryError):
        return None
