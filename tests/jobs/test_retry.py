"""`backfill --retry-rejects`: what it forgets, and what it must not touch."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.backfill import _retry_before_plan, _retry_rejects
from pipeline import snapshot, storage
from pipeline.plan import Plan, Wave
from pipeline.run import Run
from pipeline.snapshot import Writer
from tests.pipeline.whole_run import DIM, WholeRun


@pytest.mark.parametrize("orphan", [False, True])
def test_the_log_of_a_commit_that_was_created_and_not_announced_stays(tmp_path: Path, orphan: bool) -> None:
    whole = WholeRun(Run(str(tmp_path))).write_inputs()
    whole.publish(1)
    if orphan:  # as a driver leaves it that died between creating a commit and announcing it
        tag = storage.read_bytes(whole.run.tag("candidate"))
        whole.publish(2)
        storage.put(whole.run.tag("candidate"), tag)
    waves = tuple(Wave(number + 1, whole.num // 3, 2) for number in range(3))
    plan = Plan("random", 0, whole.num, 2, whole.num_shards, DIM, 40, waves, "f")
    log = plan.log(whole.run)
    before = {wave: set(storage.list_files(f"{log.rejects_uri}/wave-{wave:03d}", ".parquet")) for wave in (1, 2, 3)}
    assert all(before.values())
    _retry_rejects(whole.run, plan)
    assert Writer.acquire(whole.run).latest == (2 if orphan else 1)
    for wave, uris in before.items():
        kept = wave <= (2 if orphan else 1)
        assert all(storage.exists(uri) == kept for uri in uris)
        assert all(storage.exists(uri.replace("/rejects/", "/embedded/")) == kept for uri in uris)
    assert snapshot.list_commits(whole.run) == list(range(3 if orphan else 2))


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("plan", [False, True])
def test_rejects_before_the_plan_are_forgotten_until_pairs_and_plan_are_made(
    tmp_path: Path, pairs: bool, plan: bool
) -> None:
    run = Run(str(tmp_path))
    folders = {"pairs/old": not pairs, "pairs/new": not pairs, "gallery/old": not plan}
    for folder in folders:
        for name in (folder, f"{folder}-rejects"):
            storage.put(run.path(name, "wave-000", "unit-00001.parquet"), b"")
        storage.put(run.path(folder, "wave-000", "unit-00002.parquet"), b"")
    if pairs:
        storage.put(run.path("pairs", "pairs.json"), b"{}")
    if plan:
        waves = '{"policy": "random", "seed": 0, "num_gallery": 1, "num_parts": 1, "num_shards": 1, "dim": 2, '
        storage.put(run.plan, (waves + '"unit_images": 1, "waves": [], "fingerprint": "f"}').encode())
    _retry_before_plan(run)
    for folder, forgotten in folders.items():
        for name in (folder, f"{folder}-rejects"):
            assert storage.exists(run.path(name, "wave-000", "unit-00001.parquet")) != forgotten
        assert storage.exists(run.path(folder, "wave-000", "unit-00002.parquet"))
