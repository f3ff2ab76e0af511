"""`ray job submit --working-dir . -- python jobs/backfill.py`, as it is used for real, on a head and two workers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.faults.scene import ROOT, WAVES, Scene, add_worker
from tests.faults.test_kill_matrix import created_commits
from tests.faulty_proxy import FaultyProxy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STOP_SECONDS = 30.0  # in which a job has to end that is told to


class Jobs:
    """Ray's job commands, against the cluster's dashboard."""

    def __init__(self, scene: Scene, cluster: Any) -> None:
        self._scene = scene
        self._address = f"http://{cluster.head_node.webui_url}"

    def ray(self, *words: str, ok: bool = True) -> str:
        """One `ray` command; what it prints."""
        command = [str(Path(sys.executable).parent / "ray"), *words]
        environment = self._scene.environment(RAY_AUTH_MODE="disabled", RAY_API_SERVER_ADDRESS=self._address)
        environment.pop("PYTHONPATH", None)  # the job has what it needs in its working folder
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        assert done.returncode == 0 or not ok, done.stdout
        return done.stdout

    def job(self, action: str, *words: str, ok: bool = True) -> str:
        return self.ray("job", action, "--address", self._address, *words, ok=ok)

    def submit(self, name: str, run: str) -> None:
        """Submit a backfill, as the README says."""
        backfill = ["python", "jobs/backfill.py", "--config", str(self._scene.config)]
        self.job(
            *("submit", "--submission-id", name, "--no-wait", "--working-dir", "."),
            *("--", *backfill, "--set", f"run={self._scene.run(run).uri}"),
        )

    def status(self, name: str) -> str:
        """PENDING or RUNNING, or `stopped`, `succeeded`, `failed`: as `ray job status` says it."""
        text = self.job("status", name, ok=False)
        found = re.search(rf"Job '{name}' (?:was )?(stopped|succeeded|failed)|: (PENDING|RUNNING)", text)
        assert found is not None, text
        return found[1] or found[2]

    def wait(self, name: str, seconds: float) -> str:
        """Its status once it has ended."""
        deadline = time.monotonic() + seconds
        while (status := self.status(name)) in ("PENDING", "RUNNING"):
            assert time.monotonic() < deadline, self.job("logs", name)
            time.sleep(1.0)
        return status

    def nodes_of_actors(self) -> set[str]:
        """The nodes that have or had an embedding actor."""
        found = json.loads(self.ray("list", "actors", "--format", "json", "--limit", "1000", "--detail"))
        return {actor["node_id"] for actor in found if "EmbedStage" in (actor["class_name"] + actor["repr_name"])}


@pytest.fixture
def jobs(scene: Scene, cluster: Any) -> Jobs:
    return Jobs(scene, cluster)


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
    jobs.submit(name, name)
    assert jobs.wait(name, 240) == "succeeded", jobs.job("logs", name)
    assert jobs.nodes_of_actors() >= {node.node_id for node in cluster.worker_nodes}
    logs = jobs.job("logs", name)
    assert f"wave {WAVES} of {WAVES} published" in logs
    assert "report: " in logs
    check_same(scene, calm, name)


def test_a_stopped_job_ends_soon_and_the_next_one_goes_on(scene: Scene, calm: FaultyProxy, jobs: Jobs) -> None:
    name = "stopped"
    scene.prepare(name, like="undisturbed")
    calm.delays[r"/images/"] = 1.5
    jobs.submit("stopped-1", name)
    wait_for_commit(2, scene, name, jobs, "stopped-1")
    start = time.monotonic()
    jobs.job("stop", "stopped-1")
    assert jobs.wait("stopped-1", STOP_SECONDS) == "stopped"
    assert time.monotonic() - start < STOP_SECONDS
    assert "what is durable is kept" in jobs.job("logs", "stopped-1")
    there = scene.published(name)
    assert 2 <= max(there) < WAVES, "it was not stopped in the middle"
    calm.delays.clear()
    jobs.submit("stopped-2", name)
    assert jobs.wait("stopped-2", 240) == "succeeded", jobs.job("logs", "stopped-2")
    check_same(scene, calm, name)


def test_a_node_that_is_drained_and_goes_loses_nothing(
    scene: Scene, cluster: Any, calm: FaultyProxy, jobs: Jobs
) -> None:
    """A spot machine's notice, and its end 10 seconds later; another one comes."""
    name = "drained"
    scene.prepare(name, like="undisturbed")
    calm.delays[r"/images/"] = 1.0
    jobs.submit(name, name)
    wait_for_commit(1, scene, name, jobs, name)
    node = cluster.worker_nodes[0] if isinstance(cluster.worker_nodes, list) else next(iter(cluster.worker_nodes))
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    drain = ["drain-node", "--address", cluster.address, "--node-id", node.node_id, *reason]
    jobs.ray(*drain, "--deadline-remaining-seconds", "10")
    time.sleep(10)
    cluster.remove_node(node, allow_graceful=False)
    add_worker(cluster)
    assert jobs.wait(name, 240) == "succeeded", jobs.job("logs", name)
    check_same(scene, calm, name)
