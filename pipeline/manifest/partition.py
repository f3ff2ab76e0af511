"""One partition of a user's manifest: checks its rows and writes them as one part, in a Ray task of `normalised`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.arrays import Int64, vectors_from_arrow, vectors_to_arrow
from pipeline.config import tree as settings
from pipeline.errors import DataError
from pipeline.manifest.uri_schemes import check_schemes
from pipeline.schema import manifest_schema
from pipeline.storage import objects, parquet

EMBEDDINGS = ("old_embedding", "new_embedding", "side")


@dataclass(frozen=True, slots=True)
class Partition:
    """Neighbouring row groups of one manifest file; `first_row` counts over the whole manifest.

    `tag` is the file's etag at the scan, followed by a space and its sha256 if that is known.
    """

    uri: str
    row_groups: list[int]
    first_row: int
    first_row_in_file: int
    num_rows: int
    tag: str = ""


@dataclass(frozen=True, slots=True)
class WrittenPart:
    """A written part."""

    rows: int  # number of rows
    dims: dict[str, int]  # the width of each embedding column
    rooted: bool  # whether a uri was relative, and now starts at the root
    sha256: str  # sha256 of the file


def write_part(uri: str, part: Partition, source: settings.ManifestSettings, unit_rows: int, root: str) -> WrittenPart:
    """Check the rows of a partition and write them as a part.

    Args:
        uri: the file to write.
        part: the partition.
        source: the columns of the manifest.
        unit_rows: rows per row group.
        root: folder at which relative uris of images start.

    Raises:
        DataError: a null, a negative id, an embedding of a wrong width, or a number that is not finite; with
            file and row.
    """
    names = _there(source.columns, part)
    wanted = [value for role, value in names.model_dump().items() if value is not None and role != "image"]
    table = parquet.read_parquet(part.uri, sorted(set(wanted)), part.row_groups)
    _check_unchanged(part)
    count = part.num_rows
    numbers = np.arange(count, dtype=np.int64)
    ids, keys = read_ids(table, names.id, part, numbers)
    columns: dict[str, pa.Array | pa.ChunkedArray] = {"id": ids, "key": keys, **_location(table, names, part, numbers)}
    columns["uri"], rooted = _rooted(columns["uri"], root) if names.uri else (columns["uri"], False)
    for role in ("label", "group"):
        name = getattr(names, role)
        columns[role] = table[name].cast(pa.string()) if name else pa.nulls(count, pa.string())
    if names.traffic is not None:
        columns["traffic"] = _traffic(table[names.traffic], part, names.traffic)
    dims = {}
    for role in EMBEDDINGS:
        name = getattr(names, role)
        if name is not None:
            columns[role], dims[role] = _embedding(table[name], part, name)
    rows = pa.table(columns)
    schema = manifest_schema(dims, traffic=names.traffic is not None)
    groups = (rows.slice(start, unit_rows) for start in range(0, count, unit_rows))
    data = parquet.parquet_bytes(schema, groups)
    objects.put(uri, data)
    return WrittenPart(count, dims, rooted, hashlib.sha256(data).hexdigest())


def _check_unchanged(part: Partition) -> None:
    known, found = part.tag.partition(" ")[0], objects.stat(part.uri).etag
    if known and found != known:
        raise DataError(
            "a file of the manifest was replaced while it was read",
            expected=f"etag {known}",
            found=f"etag {found}",
            where=part.uri,
            remedy="run the same command again once nothing writes to the file",
        )


def read_ids(table: pa.Table, name: str | None, part: Partition, numbers: Int64) -> tuple[pa.Array, pa.Array]:
    """int64 ids, and keys: the user's ids, or row numbers if ids are missing or strings (which become keys).

    Raises:
        DataError: an id is null, negative or too large.
    """
    rows = pa.array(numbers + part.first_row)
    if name is None:
        return rows, pa.nulls(len(rows), pa.string())
    column = table[name].combine_chunks()
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError("an id is null", where=_where(part, row, name))
    if pa.types.is_integer(column.type):
        too_large = column.type == pa.uint64()
        bad = pc.greater(column, pa.scalar(2**63 - 1, pa.uint64())) if too_large else pc.less(column, 0)
        if pc.any(bad).as_py():
            row = int(np.flatnonzero(bad.to_numpy(zero_copy_only=False))[0])
            summary = "an id does not fit int64" if too_large else "an id is negative"
            raise DataError(summary, expected="0 to 2^63 - 1", found=column[row], where=_where(part, row, name))
        return column.cast(pa.int64()), pa.nulls(len(rows), pa.string())
    return rows, column.cast(pa.string())


def _there(names: settings.ColumnNames, part: Partition) -> settings.ColumnNames:
    """The columns that this file has: it may lack either `image` or the columns of `uri`."""
    if not names.place:
        return names
    with parquet.open_parquet(part.uri) as file:
        there = set(file.schema_arrow.names)
    return names.model_copy(update={role: None for role in names.place if getattr(names, role) not in there})


def _location(
    table: pa.Table, names: settings.ColumnNames, part: Partition, numbers: Int64
) -> dict[str, pa.Array | pa.ChunkedArray]:
    nothing = pa.nulls(len(numbers), pa.int64())
    found = {"uri": pa.nulls(len(numbers), pa.string()), "offset": nothing, "length": nothing, "row": nothing}
    found["etag"] = table[names.etag].cast(pa.string()) if names.etag else pa.nulls(len(numbers), pa.string())
    if names.uri is not None:
        uris = table[names.uri].cast(pa.string())
        if uris.null_count and names.image is None:
            row = int(np.flatnonzero(uris.is_null().to_numpy())[0])
            raise DataError("an image's uri is null", where=_where(part, row, names.uri))
        check_schemes(uris, part.uri, part.first_row_in_file, names.uri)
        found["uri"] = uris
        for role in ("offset", "length"):
            name = getattr(names, role)
            found[role] = _position(table[name], part, name) if name else nothing
    if names.image is not None:  # rows without a uri have their image in this file
        inside = found["uri"].is_null()
        found["uri"] = pc.if_else(inside, pa.scalar(f"{part.uri}#{names.image}"), found["uri"])
        found["row"] = pc.if_else(inside, pa.array(numbers + part.first_row_in_file), nothing)
        for role in ("offset", "length"):
            found[role] = pc.if_else(inside, pa.scalar(None, pa.int64()), found[role])
        found["etag"] = pc.if_else(inside, pa.scalar(part.tag or None, pa.string()), found["etag"])
    return found


def _position(column: pa.ChunkedArray, part: Partition, name: str) -> pa.ChunkedArray:
    """A checked offset or length in bytes, int64; null for a whole file."""
    most = pa.scalar(2**63 - 1, pa.uint64()) if column.type == pa.uint64() else None
    wrong = pc.greater(column, most) if most is not None else pc.less(column, 0)
    if pc.any(wrong).as_py():
        row = pc.index(wrong, True).as_py()
        raise DataError(
            "a position in a file is not usable",
            expected="bytes, 0 to 2^63 - 1",
            found=column[row],
            where=_where(part, row, name),
        )
    return column.cast(pa.int64())


def _rooted(uris: pa.Array | pa.ChunkedArray, root: str) -> tuple[pa.Array | pa.ChunkedArray, bool]:
    """The uris with `root` before relative ones, and whether there were any."""
    relative = pc.invert(pc.or_(pc.starts_with(uris, "/"), pc.match_substring(uris, "://")))
    if not pc.any(relative).as_py():
        return uris, False
    tails = pc.replace_substring_regex(uris, r"^(\./+)+", "")
    return pc.if_else(relative, pc.binary_join_element_wise(root.rstrip("/"), tails, "/"), uris), True


def _traffic(column: pa.ChunkedArray, part: Partition, name: str) -> pa.Array:
    """A checked weight per image, float32; counts above 2^24 are rounded."""
    weights = column.cast(pa.float32(), safe=False).to_numpy()
    wrong = np.flatnonzero(~np.isfinite(weights) | (weights < 0))
    if len(wrong):
        raise DataError(
            "a traffic weight is not usable",
            expected="a number from 0 on",
            found=column[int(wrong[0])],
            where=_where(part, int(wrong[0]), name),
        )
    return pa.array(weights)


def _embedding(column: pa.ChunkedArray, part: Partition, name: str) -> tuple[pa.Array, int]:
    """A checked embedding column as fixed-size float32 lists, and its width."""
    array = column.combine_chunks()
    if array.null_count:
        row = int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError("an embedding is null", where=_where(part, row, name))
    if not pa.types.is_fixed_size_list(array.type):
        widths = pc.list_value_length(array).to_numpy(zero_copy_only=False)
        width = max(int(widths[0]), 1)
        wrong = np.flatnonzero(widths != width)
        if len(wrong):
            row = int(wrong[0])
            raise DataError(
                "an embedding has a wrong width",
                expected=width,
                found=int(widths[row]),
                where=_where(part, row, name),
            )
        array = pa.FixedSizeListArray.from_arrays(array.flatten(), width)
    vectors = vectors_from_arrow(array)
    wrong = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(wrong):
        raise DataError(
            "an embedding is not finite",
            expected="finite numbers",
            found=f"{len(wrong)} row(s) with NaN or infinity",
            where=_where(part, int(wrong[0]), name),
        )
    return vectors_to_arrow(vectors), vectors.shape[1]


def _where(part: Partition, row: int, column: str) -> str:
    return f"{part.uri}: row {part.first_row_in_file + row}, column {column}"
