"""`backfill --retry-rejects` forgets rejects of open waves and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pytest

from jobs.steps.run_all import _retry_before_plan, _retry_rejects
from pipeline.embedding import vector_log
from pipeline.errors import SnapshotConflict
from pipeline.index import tags
from pipeline.index.writer import Writer
from pipeline.planning.plan import Plan, Wave
from pipeline.run import Run
from pipeline.storage import objects, parquet
from tests.support.whole_run import DIM, WholeRun, put_rejects


def part_of(rejects: str) -> str:
    """The part of the unit that a reject file belongs to."""
    return re.sub(r"-[0-9a-f]{16}\.parquet$", ".parquet", rejects.replace("/rejects/", "/embedded/"))


def plan_of(whole: WholeRun) -> Plan:
    waves = tuple(Wave(number + 1, whole.num // 3, 2) for number in range(3))
    return Plan("random", 0, whole.num, 2, whole.num_shards, DIM, 40, waves, "f")


def test_retry_rejects_forgets_none_before_the_run_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = WholeRun(Run(str(tmp_path))).write_inputs()
    alive = whole.publish(1)
    alive.check()
    forgotten = []

    def forget(log: vector_log.VectorLog, after_wave: int) -> int:
        with pytest.raises(SnapshotConflict):
            alive.check()
        forgotten.append(after_wave)
        return 0

    monkeypatch.setattr(vector_log, "forget_rejects", forget)
    _retry_rejects(whole.run, plan_of(whole))
    assert forgotten == [1]
    with pytest.raises(SnapshotConflict):
        alive.publish(whole.draft(2))
    assert Writer.acquire(whole.run).latest == 1


def test_retry_rejects_of_a_run_that_cannot_be_taken_over_changes_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = WholeRun(Run(str(tmp_path))).write_inputs()
    before = objects.list_files(whole.run.uri)

    def refuse(run: Run) -> Writer:
        raise SnapshotConflict("other writers kept taking the run")

    monkeypatch.setattr(Writer, "acquire", refuse)
    with pytest.raises(SnapshotConflict):
        _retry_rejects(whole.run, plan_of(whole))
    assert objects.list_files(whole.run.uri) == before


@pytest.mark.parametrize("orphan", [False, True])
def test_retry_rejects_keeps_the_log_of_an_unannounced_commit(tmp_path: Path, orphan: bool) -> None:
    whole = WholeRun(Run(str(tmp_path))).write_inputs()
    whole.publish(1)
    if orphan:  # as a driver leaves it that died between creating a commit and announcing it
        tag = objects.read_bytes(whole.run.tag("candidate"))
        whole.publish(2)
        objects.put(whole.run.tag("candidate"), tag)
    plan = plan_of(whole)
    log = plan.log(whole.run)
    before = {wave: set(objects.list_files(f"{log.rejects_uri}/wave-{wave:03d}", ".parquet")) for wave in (1, 2, 3)}
    assert all(before.values())
    _retry_rejects(whole.run, plan)
    assert Writer.acquire(whole.run).latest == (2 if orphan else 1)
    for wave, uris in before.items():
        kept = wave <= (2 if orphan else 1)
        assert all(objects.exists(uri) == kept for uri in uris)
        assert all(objects.exists(part_of(uri)) == kept for uri in uris)
    assert tags.list_commits(whole.run) == list(range(3 if orphan else 2))


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("plan", [False, True])
def test_rejects_of_pairs_and_gallery_are_forgotten_only_before_fit_and_plan(
    tmp_path: Path, pairs: bool, plan: bool
) -> None:
    run = Run(str(tmp_path))
    folders = {"pairs/old": not pairs, "pairs/new": not pairs, "gallery/old": not plan}
    rejects = {}
    for folder in folders:
        rows = pa.table({"id": [7]})
        schema = put_rejects(run.path(f"{folder}-rejects"), 0, 1, rows, rows.schema)
        (rejects[folder],) = objects.list_files(run.path(f"{folder}-rejects"))
        part = run.path(folder, "wave-000", "unit-00001.parquet")
        objects.put(part, parquet.parquet_bytes(schema, [rows.slice(0, 0)]))
        objects.put(run.path(folder, "wave-000", "unit-00002.parquet"), b"")
    if pairs:
        objects.put(run.path("pairs", "pairs.json"), b"{}")
    if plan:
        waves = '{"policy": "random", "seed": 0, "num_gallery": 1, "num_parts": 1, "num_shards": 1, "dim": 2, '
        objects.put(run.plan, (waves + '"unit_images": 1, "waves": [], "fingerprint": "f"}').encode())
    _retry_before_plan(run)
    for folder, forgotten in folders.items():
        for uri in (run.path(folder, "wave-000", "unit-00001.parquet"), rejects[folder]):
            assert objects.exists(uri) != forgotten
        assert objects.exists(run.path(folder, "wave-000", "unit-00002.parquet"))
