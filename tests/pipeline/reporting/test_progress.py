"""Counting units: waves become whole in order, nothing counts twice, a resumed count equals an uninterrupted one."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.embedding import vector_log
from pipeline.embedding.vector_log import EmbeddedUnit, part_times
from pipeline.errors import DataError
from pipeline.planning.plan import Plan, Wave
from pipeline.reporting.progress import Progress, Tracker, recent_rate
from pipeline.run import Run
from pipeline.schema import UNITS, Unit, UnitAck
from pipeline.storage import objects, parquet

UNIT_IMAGES = 4
SIZES = [3, 9, 8, 14]


def make_plan(sizes: list[int]) -> Plan:
    waves = tuple(Wave(number + 1, size, -(-size // UNIT_IMAGES)) for number, size in enumerate(sizes))
    return Plan("uncertainty", 0, sum(sizes), 1, 2, 2, UNIT_IMAGES, waves, "f")


def tracker(folder: Path, sizes: list[int] = SIZES, max_reject_fraction: float = 1.0) -> Tracker:
    plan = make_plan(sizes)
    return Tracker(plan, plan.log(Run(str(folder))), max_reject_fraction)


def ack(unit: Unit, rejected: int = 0) -> UnitAck:
    return UnitAck(unit.wave, unit.unit, unit.images - rejected, rejected, 100, 0.1, 0.2, 0.3)


def write(folder: Path, unit: Unit, rejected: int = 0) -> None:
    """Make a unit durable as a worker does."""
    ids = np.arange(unit.images) + 1000 * unit.wave + UNIT_IMAGES * unit.unit
    nothing = {name: pa.nulls(unit.images, UNITS.field(name).type) for name in UNITS.names[1:]}
    rows = pa.table({"id": ids, **nothing})
    uri = str(folder / "rows" / f"{unit.wave}-{unit.unit}.parquet")
    objects.put(uri, parquet.parquet_bytes(UNITS, [rows]))
    words = pa.array(["decode" if number < rejected else "" for number in range(unit.images)])
    vectors = np.zeros((unit.images, 2), np.float32)
    embedded = EmbeddedUnit(ids, vectors, pa.nulls(unit.images, pa.string()), words, words)
    log = make_plan(SIZES).log(Run(str(folder)))
    vector_log.write_unit(log, Unit(unit.wave, unit.unit, uri, 0, unit.images), embedded)


def units(sizes: list[int] = SIZES) -> list[Unit]:
    return list(make_plan(sizes).units(Run("")))


def figures(progress: Progress) -> tuple[int, int, int, int]:
    return progress.durable, progress.rejected, progress.left, progress.published


@settings(max_examples=100, deadline=None)
@given(st.permutations(range(len(units()))), st.data())
def test_waves_become_whole_in_order_for_any_order_of_units(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], data: st.DataObject
) -> None:
    counting, every = tracker(tmp_path_factory.mktemp("log")), units()
    done: set[int] = set()
    told: list[int] = []
    for number in order:
        counting.add(ack(every[number]))
        done.add(number)
        if data.draw(st.booleans()):
            continue  # the driver does not ask after each unit
        told += counting.whole_waves()
        whole = [wave for wave in range(1, 5) if all(i in done for i, unit in enumerate(every) if unit.wave == wave)]
        prefix = [wave for place, wave in enumerate(whole, start=1) if wave == place]
        assert told == prefix
    assert told + counting.whole_waves() == [1, 2, 3, 4]
    assert counting.whole_waves() == []


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, len(units()) - 1), max_size=30))
def test_a_unit_counts_once_however_often_it_is_acknowledged(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[int]
) -> None:
    counting, every = tracker(tmp_path_factory.mktemp("log")), units()
    for number in numbers:
        counting.add(ack(every[number], rejected=1))
    once = [every[number] for number in set(numbers)]
    progress = counting.progress(0)
    assert progress.rejected == len(once)
    assert progress.durable == sum(unit.images for unit in once) - len(once)
    assert progress.left == sum(SIZES) - sum(unit.images for unit in once)
    assert counting.pending(Run("")) == [unit for number, unit in enumerate(every) if number not in numbers]


@pytest.mark.parametrize("first", range(len(units()) + 1))
def test_a_resumed_count_equals_an_uninterrupted_one(tmp_path: Path, first: int) -> None:
    every = units()
    rejects = [number % 3 for number in range(len(every))]
    straight = tracker(tmp_path / "never")
    for unit, rejected in zip(every, rejects, strict=True):
        straight.add(ack(unit, rejected))
    for unit, rejected in zip(every[:first], rejects, strict=False):
        write(tmp_path, unit, rejected)
    resumed = tracker(tmp_path)
    assert resumed.pending(Run("")) == every[first:]
    for unit, rejected in list(zip(every, rejects, strict=True))[max(0, first - 2) :]:  # some are told again
        resumed.add(ack(unit, rejected))
    for published in range(5):
        assert figures(resumed.progress(published)) == figures(straight.progress(published))
    assert resumed.whole_waves() == straight.whole_waves() == [1, 2, 3, 4]


def test_rejects_of_a_unit_that_died_count_once_when_it_is_done_again(tmp_path: Path) -> None:
    unit = units()[0]
    write(tmp_path, unit, rejected=2)
    objects.delete(make_plan(SIZES).log(Run(str(tmp_path))).part(1, 0))  # as if it had died between its two files
    counting = tracker(tmp_path)
    assert figures(counting.progress(0)) == (0, 0, sum(SIZES), 0)
    counting.add(ack(unit, rejected=2))
    assert counting.progress(0).rejected == 2


def test_too_many_rejects_stop_before_the_wave_is_whole(tmp_path: Path) -> None:
    counting = tracker(tmp_path, [20, 20], max_reject_fraction=0.1)
    first, second, *_ = units([20, 20])
    counting.add(ack(first, rejected=2))  # exactly at the limit
    with pytest.raises(DataError, match=r"too many images of wave 1(.|\n)*10\.00% of 20(.|\n)*3 rejects \(15\.00%\)"):
        counting.add(ack(second, rejected=1))
    assert counting.whole_waves() == []


def test_too_many_rejects_in_the_log_stop_a_resumed_run_before_the_wave_is_published(tmp_path: Path) -> None:
    for unit in units()[:1]:
        write(tmp_path, unit, rejected=2)
    with pytest.raises(DataError, match="too many images of wave 1"):
        tracker(tmp_path, max_reject_fraction=0.5).whole_waves()
    assert tracker(tmp_path, max_reject_fraction=0.7).whole_waves() == [1]


def test_progress_allows_reject_allowance_rejects_in_a_small_wave(tmp_path: Path) -> None:
    plan = make_plan([8, 200])
    counting = Tracker(plan, plan.log(Run(str(tmp_path))), 0.05, allowance=5)
    first, second, *rest = units([8, 200])
    counting.add(ack(first, rejected=4))
    counting.add(ack(second, rejected=1))
    assert counting.whole_waves() == [1]
    for number, unit in enumerate(rest):  # 5 % of 200 are more than 5
        counting.add(ack(unit, rejected=int(number < 10)))
    assert counting.whole_waves() == [2]
    counting = Tracker(plan, plan.log(Run(str(tmp_path))), 0.05, allowance=5)
    counting.add(ack(first, rejected=4))
    with pytest.raises(DataError, match=r"5\.00% of 8 images \(or 5, if that is more\)(.|\n)*6 rejects \(75\.00%\)"):
        counting.add(ack(second, rejected=2))
    with pytest.raises(DataError, match="the wave is not published"):
        counting.whole_waves()


def test_progress_with_max_reject_fraction_0_allows_no_reject(tmp_path: Path) -> None:
    plan = make_plan([8])
    counting = Tracker(plan, plan.log(Run(str(tmp_path))), 0.0, allowance=5)
    with pytest.raises(DataError, match=r"at most 0\.00% of 8 images\n"):
        counting.add(ack(units([8])[0], rejected=1))


def test_images_that_were_rejected_before_the_plan_count_as_gallery_and_as_rejected(tmp_path: Path) -> None:
    plan = replace(make_plan(SIZES), num_rejected=6)
    counting = Tracker(plan, plan.log(Run(str(tmp_path))), max_reject_fraction=0.25)
    for number, unit in enumerate(units()):
        counting.add(ack(unit, rejected=int(number == 4)))
        progress = counting.progress(0)
        assert progress.gallery == sum(SIZES) + 6 == progress.durable + progress.rejected + progress.left
    assert figures(counting.progress(4)) == (sum(SIZES) - 1, 7, 0, sum(SIZES) - 1)
    assert counting.whole_waves() == [1, 2, 3, 4]


def test_rejects_of_one_wave_do_not_count_against_another(tmp_path: Path) -> None:
    counting = tracker(tmp_path, [4, 4], max_reject_fraction=0.25)
    for unit in units([4, 4]):
        counting.add(ack(unit, rejected=1))
    assert counting.whole_waves() == [1, 2]


def test_published_are_the_embedded_images_of_published_waves(tmp_path: Path) -> None:
    counting = tracker(tmp_path)
    for unit in units():
        counting.add(ack(unit, rejected=1))
    assert [counting.progress(wave).published for wave in range(5)] == [0, 2, 8, 14, 24]
    assert counting.progress(4).published == counting.progress(4).durable


def test_there_is_no_rate_and_no_eta_before_the_second_unit_and_five_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting, every, now = tracker(tmp_path), units(), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for count, unit in enumerate(every):
        progress = counting.progress(0)
        assert (progress.images_per_second is None) == (progress.eta_seconds is None) == (count < 4)
        counting.add(ack(unit))
        now[0] += 1.3  # after four units the first one is 5.2 seconds ago
    assert counting.progress(0).eta_seconds == 0


def test_the_eta_is_what_is_left_at_the_present_rate() -> None:
    progress = Progress(gallery=100, durable=50, rejected=10, published=0, wave=0, waves=1, images_per_second=8.0)
    assert progress.left == 40
    assert progress.eta_seconds == 5.0


def test_the_rate_of_the_log_is_its_images_over_the_time_between_its_parts(tmp_path: Path) -> None:
    plan, run = make_plan(SIZES), Run(str(tmp_path))
    log = plan.log(run)
    assert recent_rate(plan, part_times(log)) is None
    for number, unit in enumerate(units()[:4]):  # 3, 4, 4, 1 images
        write(tmp_path, unit)
        seconds = 1_000_000 + [-5000, 0, 2, 10][number]  # the first lies too far back
        os.utime(log.part(unit.wave, unit.unit), (seconds, seconds))
        assert (recent_rate(plan, part_times(log)) is None) == (number < 3), "two seconds are too short for a rate"
    assert recent_rate(plan, part_times(log)) == pytest.approx((4 + 1) / 10)


def test_progress_adds_up_the_read_seconds_of_all_units(tmp_path: Path) -> None:
    counting, (first, second, *_) = tracker(tmp_path), units()
    assert counting.progress(0).reading.images == 0
    spent = {"requests": 2, "bytes_fetched": 300, "bytes_needed": 200, "retries": 1, "changed": 1}
    for unit in (first, second, second):  # done twice, paid for twice
        counting.add(replace(ack(unit), **spent))
    reading = counting.progress(0).reading
    images = first.images + 2 * second.images
    assert (reading.images, reading.requests, reading.retries, reading.changed) == (images, 6, 3, 3)
    said = str(reading)
    assert said.startswith(f"{6 / images:.3g} requests per image, 1.5 bytes fetched per byte needed, ")
    assert said.endswith(" GET/s, 3 retries, 3 changed")
