"""`ray job submit --working-dir . -- python jobs/backfill.py`, as it is used for real, on a head and two workers."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.cluster.jobs import STOP_SECONDS, Jobs, submit, take_away
from tests.faults.scene import WAVES, Scene, created_commits
from tests.support.faulty_proxy import FaultyProxy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def check_same(scene: Scene, proxy: FaultyProxy, name: str) -> None:
    """The run has published what an undisturbed one has, each wave once."""
    assert scene.published(name) == scene.published("undisturbed")
    assert set(scene.published(name)) == set(range(WAVES + 1))
    assert all(count == 1 for count in created_commits(proxy.log, name).values())
    report = scene.audit(name)
    assert report["ok"], report["problems"]


def wait_for_commit(number: int, scene: Scene, name: str, jobs: Jobs, job: str) -> None:
    """Return when a job has published this snapshot of a run."""
    deadline = time.monotonic() + 120
    while max(scene.published(name), default=-1) < number:
        assert time.monotonic() < deadline, jobs.job("logs", job)
        time.sleep(0.5)


def test_a_submitted_backfill_runs_on_all_nodes_and_publishes_the_same(
    scene: Scene, cluster: Any, calm: FaultyProxy, jobs: Jobs
) -> None:
    name = "submitted"
    scene.prepare(name, like="undisturbed")
    calm.delays[r"/images/"] = 0.3
    submit(jobs, scene, name, name)
    assert jobs.wait(name, 240) == "succeeded", jobs.job("logs", name)
    assert set(jobs.nodes_of_actors("EmbedStage").values()) >= {node.node_id for node in cluster.worker_nodes}
    logs = jobs.job("logs", name)
    assert f"wave {WAVES} of {WAVES} published" in logs
    assert "report: " in logs
    check_same(scene, calm, name)


def test_a_stopped_job_ends_soon_and_the_next_one_goes_on(scene: Scene, calm: FaultyProxy, jobs: Jobs) -> None:
    name = "stopped"
    scene.prepare(name, like="undisturbed")
    calm.delays[r"/images/"] = 1.5
    submit(jobs, scene, "stopped-1", name)
    wait_for_commit(2, scene, name, jobs, "stopped-1")
    start = time.monotonic()
    jobs.job("stop", "stopped-1")
    assert jobs.wait("stopped-1", STOP_SECONDS) == "stopped"
    assert time.monotonic() - start < STOP_SECONDS
    assert "finished work is kept" in jobs.job("logs", "stopped-1")
    there = scene.published(name)
    assert 2 <= max(there) < WAVES, "it was not stopped in the middle"
    calm.delays.clear()
    submit(jobs, scene, "stopped-2", name)
    assert jobs.wait("stopped-2", 240) == "succeeded", jobs.job("logs", "stopped-2")
    check_same(scene, calm, name)


def test_draining_and_losing_a_node_loses_no_image(scene: Scene, cluster: Any, calm: FaultyProxy, jobs: Jobs) -> None:
    name = "drained"
    scene.prepare(name, like="undisturbed")
    calm.delays[r"/images/"] = 1.0
    submit(jobs, scene, name, name)
    wait_for_commit(1, scene, name, jobs, name)
    take_away(next(iter(cluster.worker_nodes)), cluster, jobs, notice_seconds=10)
    assert jobs.wait(name, 240) == "succeeded", jobs.job("logs", name)
    check_same(scene, calm, name)
