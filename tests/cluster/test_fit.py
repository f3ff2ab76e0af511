"""A fit whose node is taken away, announced or not: it goes on, and its user is not charged.

A loss that is not announced is a failure to Ray Train; `tests/training/fitting/test_retries.py` has our decision alone.
"""

from __future__ import annotations

import time
from typing import Any

import pytest

from pipeline.storage import objects
from tests.cluster.jobs import Jobs, submit, take_away
from tests.faults.scene import Scene
from tests.support.faulty_proxy import FaultyProxy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LONG_FIT = (
    "fit.transformation=fastfill",
    "fit.inner_width=512",
    "fit.epochs=150",
    "fit.max_failures=0",
)  # most of a minute; the first failure that counts would end it


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
    files = objects.list_files(scene.run(name).transformation, ".safetensors")
    return [uri.rpartition("/")[2] for uri in files]
