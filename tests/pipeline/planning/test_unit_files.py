"""Units in bounded memory are those of one sort of the whole wave, to the byte."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.planning import build
from pipeline.planning.plan import UNITS_PER_FILE, Plan, Wave
from pipeline.planning.unit_files import cut_units
from pipeline.run import Run
from pipeline.schema import UNITS
from pipeline.storage import objects as storage
from pipeline.storage import parquet


def rows(count: int, seed: int, objects: int) -> pa.Table:
    """Rows of a few objects, with equal offsets and nulls among them."""
    rng = np.random.default_rng(seed)
    names = [None, *(f"s3://b/{number}.tar" for number in range(objects)), "s3://b/é.tar"]
    columns = {
        "id": rng.permutation(10**6)[:count],
        "uri": pa.array([names[number] for number in rng.integers(0, len(names), count)], pa.string()),
        "offset": pa.array([None if value > 7 else int(value) for value in rng.integers(0, 10, count)], pa.int64()),
        "length": pa.nulls(count, pa.int64()),
        "row": pa.array(rng.integers(0, 4, count)),
        "etag": pa.nulls(count, pa.string()),
    }
    return pa.table(columns, UNITS)


def write_parts(folder: Path, wave: pa.Table, num_parts: int) -> list[str]:
    """The rows dealt out to parts, two groups each, after a group of another wave."""
    ends = [wave.num_rows * cut // (2 * num_parts) for cut in range(2 * num_parts + 1)]
    halves = [wave.slice(start, end - start) for start, end in itertools.pairwise(ends)]
    uris = [str(folder / f"part-{part}.parquet") for part in range(num_parts)]
    for part, uri in enumerate(uris):
        groups = [rows(5, 99, 3), *halves[2 * part : 2 * part + 2]]
        storage.put(uri, parquet.parquet_bytes(UNITS, groups))
    return uris


def by_one_sort(wave: pa.Table, unit_images: int) -> bytes:
    """The definition."""
    whole = wave.sort_by([(name, "ascending") for name in ("uri", "offset", "row", "id")])
    return parquet.parquet_bytes(
        UNITS, [whole.slice(start, unit_images) for start in range(0, whole.num_rows, unit_images)]
    )


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 300), st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 5), st.integers(1, 70),
    st.integers(1, 120), st.booleans(),
)  # fmt: skip
@example(4, 0, 1, 2, 1, 1, False)  # a part with an object and a null, of which the last piece has only the null
def test_the_units_are_those_of_one_sort(
    tmp_path_factory: pytest.TempPathFactory,
    count: int,
    seed: int,
    objects: int,
    num_parts: int,
    unit_images: int,
    piece_images: int,
    in_order: bool,
) -> None:
    wave = rows(count, seed, objects)
    given_rows = wave.sort_by("uri") if in_order else wave
    parts = write_parts(tmp_path_factory.mktemp("wave"), given_rows, num_parts)
    found = cut_units(parts, [1, 2], count, unit_images, piece_images)
    assert parquet.parquet_bytes(UNITS, found) == by_one_sort(wave, unit_images)


def test_the_files_of_a_wave_hold_each_unit_where_the_plan_says(tmp_path: Path) -> None:
    run, count = Run(str(tmp_path)), 2 * UNITS_PER_FILE + 3
    wave = rows(2 * count - 1, 0, 20)
    whole = parquet.parquet_bytes(UNITS, [rows(5, 99, 3), wave])
    storage.put(run.part("transformed", 0), whole)
    build.cut_wave(run, 1, 2, (Wave(2, wave.num_rows, count), range(1, 2)))
    plan = Plan("random", 0, wave.num_rows, 1, 1, 4, 2, (Wave(1, 1, 0), Wave(2, wave.num_rows, count)), "f")
    units = list(plan.units(run))
    found = [parquet.read_parquet(unit.rows_uri, UNITS.names, [unit.row_group]) for unit in units]
    assert parquet.parquet_bytes(UNITS, found) == by_one_sort(wave, 2)
    assert [table.num_rows for table in found] == [unit.images for unit in units]
    assert storage.list_files(run.path("plan")) == sorted({unit.rows_uri for unit in units})
    assert len({unit.rows_uri for unit in units}) == 3


def test_a_large_wave_is_never_in_memory_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count, sorted_rows = 5000, []
    wave = rows(count, 0, 500)
    parts = write_parts(tmp_path, wave.sort_by("uri"), 10)
    read = parquet.read_parquet

    def counting(uri: str, columns: list[str], groups: list[int]) -> pa.Table:
        table = read(uri, columns, groups)
        sorted_rows.append(table.num_rows if columns == UNITS.names else 0)
        return table

    monkeypatch.setattr(parquet, "read_parquet", counting)
    pieces = [table.num_rows for table in cut_units(parts, [1, 2], count, 100, piece_images=500)]
    assert pieces == [100] * 50
    assert sum(sorted_rows) < 3 * count  # a part is read for the pieces that it meets, not for all ten
