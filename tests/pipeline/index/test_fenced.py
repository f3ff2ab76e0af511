"""A driver that was taken over: what it still wants to write is not written, whenever it wakes up."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.backfill.driver import open_publisher
from pipeline.backfill.promotion import Promotion
from pipeline.backfill.stop import Stop
from pipeline.config.tree import Config
from pipeline.errors import SnapshotConflict
from pipeline.index import commits, fenced, tags
from pipeline.index.writer import Writer
from pipeline.planning.plan import read_plan
from pipeline.run import Run
from pipeline.storage import objects
from tests.support.synthetic_run import Options, known, make_run


def published(folder: Path) -> tuple[Config, Run]:
    """A run with all its commits, of which prod serves none."""
    config, run = make_run(folder, known(), Options(waves=2))
    objects.delete_files([run.tag("prod")])
    probe = config.probe.model_copy(update={"images": 0})
    return config.model_copy(update={"probe": probe, "device": "cpu"}), run


def files(run: Run) -> dict[str, bytes]:
    return {uri: objects.read_bytes(uri) for uri in objects.list_files(run.uri)}


def test_settle_driver_that_was_taken_over_writes_no_standing_no_best_and_no_tag(tmp_path: Path) -> None:
    config, run = published(tmp_path)
    plan, first = read_plan(run), Writer.acquire(run)
    assert plan is not None
    promotion = Promotion(config, run, plan, Stop(), first.check)
    commit = commits.read_commit(run, 1)
    Writer.acquire(run)
    before = files(run)
    with pytest.raises(SnapshotConflict, match="another driver took this run over"):
        promotion.settle(commit)
    with pytest.raises(SnapshotConflict, match="another driver took this run over"):
        promotion.stop_now(commit, "hours>=2")
    assert files(run) == before


def test_auto_promote_driver_taken_over_after_it_has_judged_does_not_move_prod(tmp_path: Path) -> None:
    _, run = published(tmp_path)
    writer = Writer.acquire(run)
    Writer.acquire(run)
    with pytest.raises(SnapshotConflict):
        tags.auto_promote(run, 1, check=writer.check)
    assert tags.read_tag(run, "prod") is None


def test_replace_successor_that_writes_between_check_and_write_is_not_overwritten(tmp_path: Path) -> None:
    run, uri = Run(str(tmp_path)), str(tmp_path / "reports" / "standing.json")
    writer = Writer.acquire(run)

    def check() -> None:
        """The successor comes just after the first look."""
        writer.check()
        fenced.replace(uri, b"of the successor", Writer.acquire(run).check)

    with pytest.raises(SnapshotConflict):
        fenced.replace(uri, b"late", check)
    assert objects.read_bytes(uri) == b"of the successor"


def test_publisher_taken_over_at_its_end_is_refused_before_anything_writes_a_report(tmp_path: Path) -> None:
    config, run = published(tmp_path)
    plan = read_plan(run)
    assert plan is not None
    with pytest.raises(SnapshotConflict, match="another driver took this run over"), open_publisher(config, run, plan):
        Writer.acquire(run)
