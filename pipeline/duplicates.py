"""Rows that repeat others, in Parquet files of any size, by sorting hashes of them.

Guarantee: nothing is reported unless rows are really equal, and not only their hashes. Memory: 16 bytes a row
of a bucket, and one file. It does not know what the columns mean.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import parquet

_BUCKET_ROWS = 50_000_000  # hashes sorted in memory at once
_EXAMPLES = 3

Row = dict[str, object]


@dataclass(frozen=True, slots=True)
class Repeats:
    """Rows that repeat others.

    Attributes:
        num_rows: how many there are, the first of each kind not counted; counted by their 64-bit hashes.
        examples: some kinds, each with its first rows.
    """

    num_rows: int
    examples: list[list[Row]]


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
    total, examples = 0, list[list[Row]]()
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


def _equal_rows(tables: Iterable[pa.Table], by: Sequence[str], wanted: NDArray[np.uint64]) -> list[list[Row]]:
    found: dict[tuple[object, ...], list[Row]] = {}
    for rows in tables:
        for row in rows.filter(pa.array(np.isin(_hashes(rows, by), wanted))).to_pylist():
            same = found.setdefault(tuple(row[name] for name in by), [])
            if len(same) < _EXAMPLES:
                same.append(row)
    return [same for same in found.values() if len(same) > 1]
