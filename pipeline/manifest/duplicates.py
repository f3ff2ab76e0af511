"""Duplicates in a manifest: the same image or key twice (an error), and images with the same content (reported).

Rows are found by sorting hashes, then compared in full. Memory: 16 bytes per row of a bucket, and one file.
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
    """Rows that are equal to earlier rows."""

    num_rows: int  # number of such rows, counted by 64-bit hashes
    examples: list[list[RepeatedRow]]  # some groups of equal rows, with the first rows of each


def find_repeats(
    parts: Sequence[str], by: Sequence[str], show: Sequence[str], num_rows: int, only: pc.Expression | None = None
) -> Repeats:
    """Find rows that are equal in all columns `by`, without rows that are null in the first of these.

    Args:
        parts: Parquet files.
        by: columns to compare.
        show: further columns for the examples, and for `only`.
        num_rows: approximate number of rows over all parts.
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


def check_unique(parts: list[str], num_rows: int, folder: str) -> None:
    """Check that no image and no key occurs twice; raises DataError."""
    images = find_repeats(parts, ["uri", "offset"], ["key"], num_rows)
    remedy = "name every source once, and none inside another; then run again with --replace"
    if images.num_rows:
        found = _differences(images, _place, lambda row: f"key {row['key']!r}")
        raise DataError(
            "an image occurs more than once", expected="each once", found=found, where=folder, remedy=remedy
        )
    keys = find_repeats(parts, ["key"], ["uri", "offset"], num_rows)
    if keys.num_rows:
        found = _differences(keys, lambda row: repr(row["key"]), _place)
        remedy = (
            "rename one, or give sources a common parent so that keys have longer paths; then run again with --replace"
        )
        raise DataError("a key occurs more than once", expected="each once", found=found, where=folder, remedy=remedy)


def find_identical(parts: list[str], num_rows: int, options: Options) -> dict[str, object]:
    """Find images with the same content: by sha256, or else by etag and size of whole S3 objects."""
    if options.hash:
        by, found = [HASH.name], find_repeats(parts, [HASH.name], ["key"], num_rows)
    else:
        by = ["etag", "size_bytes"]
        whole = pc.is_null(pc.field("offset")) & pc.starts_with(pc.field("uri"), "s3://")
        found = find_repeats(parts, by, ["key", "uri", "offset"], num_rows, only=whole)
    return {"by": by, "images": found.num_rows, "examples": [[row["key"] for row in rows] for rows in found.examples]}


def _read(part: str, columns: list[str], only: pc.Expression | None) -> pa.Table:
    rows = parquet.read_parquet(part, columns)
    rows = rows.filter(rows[columns[0]].is_valid())
    return rows if only is None else rows.filter(only)


def _hashes(rows: pa.Table, by: Sequence[str]) -> NDArray[np.uint64]:
    """(n,) hashes, which are valid in this process only: Python's hashes differ between processes."""
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


def _differences(repeats: Repeats, same: Callable[[RepeatedRow], str], other: Callable[[RepeatedRow], str]) -> str:
    first = repeats.examples[0]
    return f"{repeats.num_rows:,} repeated, such as {same(first[0])}: {other(first[0])} and {other(first[1])}"


def _place(row: RepeatedRow) -> str:
    return str(row["uri"]) if row["offset"] is None else f"{row['uri']} at {row['offset']}"
