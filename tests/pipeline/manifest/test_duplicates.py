"""Repeated rows are found exactly, in any number of parts and buckets."""

from __future__ import annotations

import tempfile
from collections import Counter

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.manifest import duplicates
from pipeline.manifest.duplicates import find_repeats
from pipeline.storage import objects, parquet

ROWS = st.lists(st.tuples(st.sampled_from([None, "a", "b", "c", "d"]), st.sampled_from([None, 0, 7, 512])), max_size=30)


def write(folder: str, rows: list[tuple[str | None, int | None]], num_parts: int) -> list[str]:
    schema = pa.schema([("uri", pa.string()), ("offset", pa.int64()), ("row", pa.int64())])
    parts = []
    for part in range(num_parts):
        mine = [{"uri": uri, "offset": offset, "row": row} for row, (uri, offset) in enumerate(rows)][part::num_parts]
        parts.append(f"{folder}/{part}.parquet")
        objects.put(parts[-1], parquet.parquet_bytes(schema, [pa.Table.from_pylist(mine, schema=schema)]))
    return parts


@settings(max_examples=40, deadline=None)
@given(rows=ROWS, num_parts=st.integers(1, 3), bucket_rows=st.sampled_from([1, 7, 1000]))
def test_the_count_is_exact_and_examples_are_equal(
    rows: list[tuple[str | None, int | None]], num_parts: int, bucket_rows: int
) -> None:
    expected = Counter(row for row in rows if row[0] is not None)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "_BUCKET_ROWS", bucket_rows)
        found = find_repeats(write(folder, rows, num_parts), ["uri", "offset"], ["row"], len(rows))
    assert found.num_rows == sum(count - 1 for count in expected.values())
    assert bool(found.examples) == bool(found.num_rows)
    for same in found.examples:
        assert len(same) > 1
        assert len({(row["uri"], row["offset"]) for row in same}) == 1
        assert len({row["row"] for row in same}) == len(same)


def test_rows_that_are_not_asked_for_do_not_count() -> None:
    with tempfile.TemporaryDirectory() as folder:
        parts = write(folder, [("a", 1), ("a", 1), ("b", None), ("b", None)], 1)
        found = find_repeats(parts, ["uri"], ["offset"], 4, only=pc.field("offset").is_null())
    assert (found.num_rows, found.examples[0][0]["uri"]) == (1, "b")


def test_equal_hashes_are_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python hashes -1 and -2 alike, which stands for any collision."""
    assert hash(("a", -1)) == hash(("a", -2))
    with tempfile.TemporaryDirectory() as folder:
        assert find_repeats(write(folder, [("a", -1), ("a", -2)], 1), ["uri", "offset"], [], 2).num_rows == 0
