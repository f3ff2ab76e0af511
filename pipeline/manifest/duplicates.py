"""Rows that repeat others, in Parquet files of any size, by sorting hashes of them.

Guarantee: nothing is reported unless rows are really equal, and not only their hashes. Memory: 16 bytes a row
of a bucket, and one file. It does not know what the columns mean.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.errors import DataError
from pipeline.manifest.splits import HASH, Options
from pipeline.storage import parquet

_BUCKET_ROWS = 50_000_000  # hashes sorted in memory at once
_EXAMPLES = 3

RepeatedRow = dict[str, object]


@dataclass(frozen=True, slots=True)
class Repeats:
    """Rows that repeat others.

    Attributes:
        num_rows: how many there are, the first of each kind not counted; counted by their 64-bit hashes.
        examples: some kinds, each with its first rows.
    """

    num_rows: int
    examples: list[list[RepeatedRow]]


def find_repeats(
    parts: Sequence[str], by: Sequence[str], show: Sequence[str], num_rows: int, only: pc.Expression | None = None
) -> Repeats:
    """Rows that are equal in all columns `by`; rows with a null in the first of these are left out.

    Args:
        parts: Parquet files.
        by: columns to compare.
        show: further columns for the examples, and for `only`.
        num_rows: over all parts, about.
        only: the rows to compare; all by default.
    """
    buckets = max(1, -(-num_rows // _BUCKET_ROWS))
    total, examples = 0, list[list[RepeatedRow]]()
    read = functools.partial(_read, columns=[*by, *show], only=only)
    for bucket in range(buckets):
        mine = np.concatenate([_in_bucket(_hashes(read(part), by), bucket, buckets) for part in parts])
        mine.sort()
        again = mine[1:][mine[1:] == mine[:-1]]
        total += len(again)
        if len(again) and len(examples) < _EXAMPLES:
            examples += _equal_rows(map(read, parts), by, np.unique(again)[:100])
    return Repeats(total if examples else 0, examples[:_EXAMPLES])


def _read(part: str, columns: list[str], only: pc.Expression | None) -> pa.Table:
    rows = parquet.read_parquet(part, columns)
    rows = rows.filter(rows[columns[0]].is_valid())
    return rows if only is None else rows.filter(only)


def _hashes(rows: pa.Table, by: Sequence[str]) -> NDArray[np.uint64]:
    """(n,) hashes of this process: Python's differ between two."""
    values = zip(*(rows[name].to_pylist() for name in by), strict=True)
    return np.fromiter(map(hash, values), np.int64, rows.num_rows).view(np.uint64)


def _in_bucket(hashes: NDArray[np.uint64], bucket: int, buckets: int) -> NDArray[np.uint64]:
    return hashes if buckets == 1 else hashes[hashes % np.uint64(buckets) == bucket]


def _equal_rows(tables: Iterable[pa.Table], by: Sequence[str], wanted: NDArray[np.uint64]) -> list[list[RepeatedRow]]:
    found: dict[tuple[object, ...], list[RepeatedRow]] = {}
    for rows in tables:
        for row in rows.filter(pa.array(np.isin(_hashes(rows, by), wanted))).to_pylist():
            same = found.setdefault(tuple(row[name] for name in by), [])
            if len(same) < _EXAMPLES:
                same.append(row)
    return [same for same in found.values() if len(same) > 1]


def check_unique(parts: list[str], num_rows: int, folder: str) -> None:
    """Raises DataError where an image or a key is there twice."""
    images = find_repeats(parts, ["uri", "offset"], ["key"], num_rows)
    remedy = "name every source once, none inside another; then run again with --replace"
    if images.num_rows:
        found = _differences(images, _place, lambda row: f"key {row['key']!r}")
        raise DataError(
            "an image is there more than once", expected="each once", found=found, where=folder, remedy=remedy
        )
    keys = find_repeats(parts, ["key"], ["uri", "offset"], num_rows)
    if keys.num_rows:
        found = _differences(keys, lambda row: repr(row["key"]), _place)
        remedy = "rename one, or give sources a common parent so that keys have longer paths; then --replace"
        raise DataError("a key is there more than once", expected="each once", found=found, where=folder, remedy=remedy)


def _differences(repeats: Repeats, same: Callable[[RepeatedRow], str], other: Callable[[RepeatedRow], str]) -> str:
    first = repeats.examples[0]
    return f"{repeats.num_rows:,} repeated, such as {same(first[0])}: {other(first[0])} and {other(first[1])}"


def _place(row: RepeatedRow) -> str:
    return str(row["uri"]) if row["offset"] is None else f"{row['uri']} at {row['offset']}"


def find_identical(parts: list[str], num_rows: int, options: Options) -> dict[str, object]:
    """Images with the same content: by hash, or by etag and size of objects (a local file's etag is its time)."""
    if options.hash:
        by, found = [HASH.name], find_repeats(parts, [HASH.name], ["key"], num_rows)
    else:
        by = ["etag", "size_bytes"]
        whole = pc.is_null(pc.field("offset")) & pc.starts_with(pc.field("uri"), "s3://")
        found = find_repeats(parts, by, ["key", "uri", "offset"], num_rows, only=whole)
    return {"by": by, "images": found.num_rows, "examples": [[row["key"] for row in rows] for rows in found.examples]}
