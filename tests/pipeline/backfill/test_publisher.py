"""The publisher's own part: that a driver which was taken over notices, and what it goes on with if it took over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.backfill import publisher as publish
from pipeline.backfill.driver import open_publisher
from pipeline.backfill.publisher import Publisher
from pipeline.config.load import validate
from pipeline.embedding import vector_log
from pipeline.embedding.stream import Work
from pipeline.errors import DataError, SnapshotConflict
from pipeline.index import commits, disk_reserve, seal, tags
from pipeline.index.writer import Writer
from pipeline.models.calibration import Calibration
from pipeline.planning.plan import Plan, Wave
from pipeline.reporting.audit import audit
from pipeline.run import Run
from pipeline.schema import UnitAck
from pipeline.storage import documents, objects
from tests.support.planned_backfill import backfill_in_process, begin
from tests.support.unreliable_store import FakeTime
from tests.support.whole_run import DIM, WholeRun


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(publish, "time", fake)
    return fake


def waiting(run: Run, time: FakeTime) -> Publisher:
    """A publisher with nothing to publish: made without the plan and the codebook that it would need for that."""
    publisher = object.__new__(Publisher)
    publisher._writer, publisher._futures, publisher._checked = Writer.acquire(run), [], time.now
    return publisher


def test_a_driver_that_was_taken_over_notices_within_seconds(tmp_path: Path, time: FakeTime) -> None:
    run = Run(str(tmp_path))
    publisher = waiting(run, time)
    Writer.acquire(run)
    time.now = 9.9
    publisher.check()  # called after each unit: it does not look each time
    time.now = 10.0
    with pytest.raises(SnapshotConflict, match="took this run over") as caught:
        publisher.check()
    assert caught.value.exit_code == 3


def test_publisher_checks_for_another_writer_once_in_ten_seconds(
    tmp_path: Path, time: FakeTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[float] = []
    look: Callable[[Writer], None] = lambda _: looks.append(time.now)  # noqa: E731
    monkeypatch.setattr(Writer, "check", look)
    publisher = waiting(Run(str(tmp_path)), time)
    for tenth in range(350):
        time.now = tenth / 10
        publisher.check()
    assert looks == [10.0, 20.0, 30.0]


def publisher_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch, calibration: Calibration | None = None
) -> tuple[WholeRun, Publisher]:
    """Of a run with commit 0 and a whole log; it seals in this process."""
    monkeypatch.setattr(seal, "_run", lambda function, tasks: [function(*arguments) for _, arguments in tasks])
    whole = WholeRun(Run(str(folder)), calibration=calibration).write_inputs()
    whole.publish(0)
    waves = tuple(Wave(wave, 80, 2) for wave in range(1, 4))
    plan = Plan("random", 0, whole.num, 2, whole.num_shards, DIM, 40, waves, "f")
    encoder = {"function": "my:encoder", "dim": DIM, "preprocess": {"size": 32}}
    tree = {"run": str(folder), "encoders": {"new": encoder}, "gallery": {"manifest": "x", "columns": {}}}
    tree |= {"pairs": {"manifest": "x", "columns": {}}}
    return whole, open_publisher(validate(tree, "test"), whole.run, plan)


def acknowledged(wave: int, unit: int, digest: str) -> UnitAck:
    return UnitAck(wave, unit, 40, 0, 100, 0.1, 0.2, 0.3, part_digest=digest)


def test_publisher_names_the_digest_of_each_waves_parts_in_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, publisher = publisher_of(tmp_path, monkeypatch)
    log = publisher._sealer.plan.log(whole.run)
    for wave in (1, 2):
        for unit, digest in vector_log.read_parts(log, wave)[2].items():
            publisher.expect(acknowledged(wave, unit, digest))
        publisher._commit_wave(wave)
    assert publisher._acknowledged == {}
    expected = tuple(map(whole.log_digest, (1, 2)))
    assert all(expected)
    assert commits.read_commit(whole.run, 2).log_digests == expected


def test_publisher_gives_each_commit_the_calibration_of_the_transformation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = Calibration((0.0, 1.0), (0.0, 2.0))
    whole, publisher = publisher_of(tmp_path, monkeypatch, calibration)
    publisher._commit_wave(1)
    assert commits.read_commit(whole.run, 1).calibration == calibration
    assert commits.read_commit(whole.run, 1).counts.rejected == int((whole.rejected & (whole.waves == 1)).sum())


def test_publisher_takes_a_run_over_and_leaves_gc_room_for_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher_of(tmp_path, monkeypatch)
    assert (tmp_path / "index/reserve").stat().st_size == disk_reserve.SIZE_BYTES


def test_publisher_refuses_a_wave_with_a_part_that_is_not_the_acknowledged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, publisher = publisher_of(tmp_path, monkeypatch)
    publisher.expect(acknowledged(1, 1, "another"))
    with pytest.raises(DataError, match=r"unit-00001\.parquet"):
        publisher._commit_wave(1)
    assert tags.list_commits(whole.run) == [0]


def test_a_driver_goes_on_with_the_codebook_of_a_commit_that_it_adopts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backfill_in_process(monkeypatch)
    scene = begin(tmp_path)
    config, run, plan = scene.config, scene.run, scene.plan
    config = config.model_copy(update={"index": config.index.model_copy(update={"factory": "IVF4,Flat", "nprobe": 4})})
    late = open_publisher(config.model_copy(update={"seed": 8}), run, plan)  # as on another processor: other bytes
    sealed = late._seal_initial()
    for _ in scene.encoder.stream([Work(config.encoders.new, plan.log(run), plan.units(run))], config):
        pass

    with open_publisher(config, run, plan) as publisher:
        assert publisher._sealer.codebook_sha256 != sealed.codebook_sha256
        objects.put_if_absent(run.commit(0), documents.encode(replace(sealed, attempt_id="late", epoch=1)))
        publisher.initial_commit()
        publisher.submit_all(range(1, len(plan.waves) + 1))

    found = [commits.read_commit(run, number) for number in range(len(plan.waves) + 1)]
    assert found[0].attempt_id == "late"
    assert {commit.codebook_sha256 for commit in found} == {sealed.codebook_sha256}
    assert audit(run.uri).problems == []
