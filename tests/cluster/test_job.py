"""`ray job submit --working-dir . -- python jobs/backfill.py`, as it is used for real, on a head and two workers."""

from __future__ import annotations

import time
from typing import Any

import pytest

from pipeline import storage
from tests.cluster.jobs import STOP_SECONDS, Jobs
from tests.faults.scene import WAVES, Scene, add_worker
from tests.faults.test_kill_matrix import created_commits
from tests.faulty_proxy import FaultyProxy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LONG_FIT = ("fit.epochs=150", "fit.max_failures=0")  # half a minute; the first failure that counts would end it


@pytest.fixture(scope="module")
def jobs(scene: Scene, cluster: Any) -> Jobs:
    return Jobs(f"http://{cluster.head_node.webui_url}", scene.environment())


def submit(jobs: Jobs, scene: Scene, job: str, run: str, *settings: str, script: str = "backfill") -> None:
    jobs.submit(job, scene.config, f"run={scene.run(run).uri}", *settings, script=script)


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


def take_away(node: Any, cluster: Any, jobs: Jobs, notice_seconds: int) -> None:
    """A spot machine's notice, where there is one, and its end; another one comes."""
    if notice_seconds:
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        drain = ["drain-node", "--address", cluster.address, "--node-id", node.node_id, *reason]
        jobs.ray(*drain, "--deadline-remaining-seconds", str(notice_seconds))
        time.sleep(notice_seconds)
    cluster.remove_node(node, allow_graceful=False)
    add_worker(cluster)


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
    assert "what is durable is kept" in jobs.job("logs", "stopped-1")
    there = scene.published(name)
    assert 2 <= max(there) < WAVES, "it was not stopped in the middle"
    calm.delays.clear()
    submit(jobs, scene, "stopped-2", name)
    assert jobs.wait("stopped-2", 240) == "succeeded", jobs.job("logs", "stopped-2")
    check_same(scene, calm, name)


def test_a_node_that_is_drained_and_goes_loses_nothing(
    scene: Scene, cluster: Any, calm: FaultyProxy, jobs: Jobs
) -> None:
    name = "drained"
    scene.prepare(name, like="undisturbed")
    calm.delays[r"/images/"] = 1.0
    submit(jobs, scene, name, name)
    wait_for_commit(1, scene, name, jobs, name)
    take_away(next(iter(cluster.worker_nodes)), cluster, jobs, notice_seconds=10)
    assert jobs.wait(name, 240) == "succeeded", jobs.job("logs", name)
    check_same(scene, calm, name)


@pytest.fixture(scope="module")
def fit_alone(scene: Scene, jobs: Jobs) -> str:
    """The name of a run with nothing but a fit, from which no node was taken."""
    submit(jobs, scene, "fit-alone", "fit-alone", *LONG_FIT, script="fit")
    assert jobs.wait("fit-alone", 180) == "succeeded", jobs.job("logs", "fit-alone")
    return "fit-alone"


@pytest.mark.parametrize("notice_seconds", [10, 0], ids=["drained", "lost"])
def test_a_fit_whose_node_goes_counts_no_failure_and_gives_the_same_weights(
    scene: Scene, cluster: Any, calm: FaultyProxy, jobs: Jobs, fit_alone: str, notice_seconds: int
) -> None:
    name = f"fit-{notice_seconds}"
    before = jobs.nodes_of_actors("RayTrainWorker").keys()
    submit(jobs, scene, name, name, *LONG_FIT, script="fit")
    deadline = time.monotonic() + 90
    while not any(
        method == "PUT" and f"/{name}/" in path and "/state.pt" in path for method, path, _ in list(calm.log)
    ):
        assert time.monotonic() < deadline, jobs.job("logs", name)
        time.sleep(0.2)
    ((first, at),) = [item for item in jobs.nodes_of_actors("RayTrainWorker").items() if item[0] not in before]
    (node,) = [node for node in cluster.worker_nodes if node.node_id == at]
    take_away(node, cluster, jobs, notice_seconds)
    assert jobs.wait(name, 240) == "succeeded", jobs.job("logs", name)
    others = [item for item in jobs.nodes_of_actors("RayTrainWorker").items() if item[0] not in {*before, first}]
    assert others, "it was over before its node had gone"
    assert at not in {node for _, node in others}
    assert weights(scene, name) == weights(scene, fit_alone)


def weights(scene: Scene, name: str) -> list[str]:
    """The files of a run's transformation: their names have the sha256 of what is in them."""
    files = storage.list_files(scene.run(name).transformation, ".safetensors")
    return [uri.rpartition("/")[2] for uri in files]
