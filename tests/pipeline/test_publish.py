"""The publisher's own part: that a driver which was taken over notices between its publications."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import publish
from pipeline.errors import SnapshotConflict
from pipeline.publish import Publisher
from pipeline.run import Run
from pipeline.snapshot import Writer
from tests.pipeline.unreliable_store import FakeTime


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


def test_a_driver_looks_once_in_ten_seconds(tmp_path: Path, time: FakeTime, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[float] = []
    look: Callable[[Writer], None] = lambda _: looks.append(time.now)  # noqa: E731
    monkeypatch.setattr(Writer, "check", look)
    publisher = waiting(Run(str(tmp_path)), time)
    for tenth in range(350):
        time.now = tenth / 10
        publisher.check()
    assert looks == [10.0, 20.0, 30.0]
