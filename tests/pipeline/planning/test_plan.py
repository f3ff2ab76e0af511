"""The plan: exact wave sizes, units that cover each image once, and a plan that stays what it is."""

from __future__ import annotations

import itertools
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.arrays import vectors_to_arrow
from pipeline.errors import ConfigError, IncompatibleRun
from pipeline.planning.plan import FROM_PAIRS, UNITS_PER_FILE, Plan, Wave, read_plan, read_transformed, wave_sizes
from pipeline.run import Run
from pipeline.schema import transformed_schema
from pipeline.storage import documents, objects, parquet


def make_plan(sizes: list[int], unit_images: int) -> Plan:
    waves = tuple(Wave(number + 1, size, -(-size // unit_images)) for number, size in enumerate(sizes))
    return Plan("uncertainty", 0, sum(sizes), 2, 3, 4, unit_images, waves, "f")


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(820, 10**9))
def test_a_count_makes_waves_that_are_fine_first_and_coarser_later(count: int, num_gallery: int) -> None:
    sizes = wave_sizes(count, num_gallery)
    assert len(sizes) == count
    assert sum(sizes) == num_gallery
    assert all(later >= earlier - 1 for earlier, later in itertools.pairwise(sizes))  # to one image
    ends = np.cumsum(sizes).tolist()
    for wave, end in enumerate(ends, start=1):
        exact = Fraction(wave * (wave + 1), count * (count + 1)) * num_gallery
        assert 0 <= exact - end <= 1 or end - exact < Fraction(1, 10**6)


@settings(deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=40), st.integers(4000, 10**9))
def test_fractions_are_exact_to_one_image(parts: list[int], num_gallery: int) -> None:
    sizes = wave_sizes(tuple(part / sum(parts) for part in parts), num_gallery)
    assert sum(sizes) == num_gallery
    assert len(sizes) == len(parts)
    for size, part in zip(sizes, parts, strict=True):
        assert abs(size - num_gallery * part / sum(parts)) < 1.001


@pytest.mark.parametrize(
    ("num_images", "waves"),
    [(10**9, 20), (6720, 20), (6719, 19), (600, 5), (480, 5), (479, 4), (96, 2), (95, 1), (1, 1)],
)
def test_auto_has_twenty_waves_and_fewer_for_a_small_gallery_whose_first_one_has_32_images(
    num_images: int, waves: int
) -> None:
    sizes = wave_sizes("auto", num_images)
    assert len(sizes) == waves
    assert sizes == wave_sizes(waves, num_images)
    assert sizes[0] >= 32 or waves == 1


def test_wave_numbers_units_and_row_groups_begin_with_the_wave_of_the_pairs() -> None:
    without, plan = make_plan([3, 7], 4), make_plan([9, 3, 7], 4)
    plan = replace(plan, waves=tuple(replace(wave, wave=wave.wave - 1) for wave in plan.waves))
    assert (without.first_wave, without.last_wave, without.num_from_pairs) == (1, 2, 0)
    assert (plan.first_wave, plan.last_wave, plan.num_from_pairs) == (FROM_PAIRS, 2, 9)
    for number in (1, 2):
        assert plan.wave(number) == without.wave(number)
        assert plan.unit_size(number, 0) == without.unit_size(number, 0)
    assert [list(plan.row_groups(number)) for number in (0, 1)] == [[0, 1, 2], [3, 4, 5]]
    assert list(without.row_groups(1)) == [0, 1, 2]
    assert [(unit.wave, unit.unit, unit.images) for unit in plan.units_of(Run("run"), 0)] == [
        (0, 0, 4),
        (0, 1, 4),
        (0, 2, 1),
    ]


def test_fractions_that_divide_the_gallery_are_exact() -> None:
    assert wave_sizes((0.1,) * 10, 1000) == [100] * 10
    assert sum(wave_sizes((0.1,) * 10, 10**9)) == 10**9  # ten times 0.1 is a little less than 1
    assert wave_sizes((0.05, 0.05, 0.4, 0.5), 10_000) == [500, 500, 4000, 5000]


def test_default_waves_of_cifar_are_pinned() -> None:
    sizes = wave_sizes(20, 10_000)
    assert sizes[:5] == [47, 95, 143, 191, 238]
    assert sizes[-2:] == [905, 953]


def test_one_wave_is_the_whole_gallery() -> None:
    assert wave_sizes(1, 77) == wave_sizes((1.0,), 77) == [77]


@pytest.mark.parametrize(
    ("waves", "num_gallery", "empty"),
    [(20, 100, "wave 1 of 20"), (5, 4, "wave 1 of 5"), ((0.9, 0.01, 0.09), 10, "2 of 3")],
)
def test_waves_without_an_image_are_refused(waves: int | tuple[float, ...], num_gallery: int, empty: str) -> None:
    with pytest.raises(ConfigError, match=f"{empty} is empty for {num_gallery} images"):
        wave_sizes(waves, num_gallery)


def test_the_last_wave_takes_what_is_left() -> None:
    assert wave_sizes((0.999, 0.001), 10) == [9, 1]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=10), st.integers(1, 20))
def test_units_cover_each_image_of_each_wave_once_and_in_order(sizes: list[int], unit_images: int) -> None:
    run, plan = Run("run"), make_plan(sizes, unit_images)
    units = list(plan.units(run))
    assert [(unit.wave, unit.unit) for unit in units] == sorted({(unit.wave, unit.unit) for unit in units})
    for wave in plan.waves:
        mine = [unit for unit in units if unit.wave == wave.wave]
        assert sum(unit.images for unit in mine) == wave.images
        assert [unit.row_group for unit in mine] == [number % UNITS_PER_FILE for number in range(wave.units)]
        files = [run.wave_units(wave.wave, number - number % UNITS_PER_FILE) for number in range(wave.units)]
        assert [unit.rows_uri for unit in mine] == files
        assert all(unit.images == unit_images for unit in mine[:-1])
        assert 1 <= mine[-1].images <= unit_images


def test_a_plan_comes_back_from_its_file_as_it_went_in(tmp_path: Path) -> None:
    run, plan = Run(str(tmp_path)), make_plan([3, 10, 20], 4)
    assert read_plan(run) is None
    objects.put(run.plan, documents.encode(plan))
    assert read_plan(run) == plan


def test_a_plan_of_version_0_1_is_read(tmp_path: Path) -> None:
    run, plan = Run(str(tmp_path)), make_plan([3, 10, 20], 4)
    objects.put(run.plan, documents.encode(asdict(plan) | {"relearn_after": []}))
    assert read_plan(run) == plan


def test_a_plan_of_version_0_1_that_cuts_waves_again_on_the_way_is_refused(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    objects.put(run.plan, documents.encode(asdict(make_plan([3, 10, 20], 4)) | {"relearn_after": [1, 2]}))
    with pytest.raises(IncompatibleRun, match=r"found: relearn_after \[1, 2\](.|\n)*use fastfill 0\.1"):
        read_plan(run)


def test_a_wave_or_a_shard_of_it_is_read_from_all_parts(tmp_path: Path) -> None:
    run, plan = Run(str(tmp_path)), make_plan([9, 9], 4)
    rows: dict[str, list[int]] = {"id": [], "wave": [], "shard": []}
    for part in range(plan.num_parts):
        groups = []
        for wave in (1, 2):
            for shard in range(plan.num_shards):
                count = shard + part  # empty groups among them
                ids = [1000 * part + 100 * wave + 10 * shard + number for number in range(count)]
                schema = transformed_schema(plan.dim)
                nothing = {name: [None] * count for name in schema.names}
                table = nothing | {"id": ids, "wave": [wave] * count, "shard": [shard] * count}
                table["vector"] = vectors_to_arrow(np.zeros((count, plan.dim), np.float32))
                groups.append(pa.table(table, schema))
                for name in rows:
                    rows[name] += table[name]
        objects.put(run.part("transformed", part), parquet.parquet_bytes(schema, groups))
    for wave in (1, 2):
        mine = [number for number, found in zip(rows["id"], rows["wave"], strict=True) if found == wave]
        assert read_transformed(run, plan, wave, ["id"])["id"].to_pylist() == mine
        for shard in range(plan.num_shards):
            found = read_transformed(run, plan, wave, ["id", "shard"], range(shard, shard + 1))
            assert set(found["shard"].to_pylist()) <= {shard}
            assert found["id"].to_pylist() == [number for number in mine if number // 10 % 10 == shard]
