"""A gallery in a store, and a cluster whose nodes Ray's autoscaler brings: for a test, and for a benchmark."""

from __future__ import annotations

import math
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from tests.cluster.autoscaling import AutoscaledCluster
from tests.faults.scene import ROOT, WAVES, Scene, created_commits
from tests.support.faulty_proxy import FaultyProxy
from tests.support.galleries import NEW_DIM, PREPROCESS
from tests.support.seaweed import SeaweedFS
from tests.support.slow_encoder import SECONDS

NODES = 3
ON_GPUS = ["--set", "device=auto", "--set", "backfill.gpus_per_actor=1", "--set", f"backfill.max_actors={NODES}"]


@dataclass
class Fleet:
    """A gallery, a cluster that grows to `NODES` nodes, and the store's proxy."""

    scene: Scene
    cluster: AutoscaledCluster
    proxy: FaultyProxy

    def differences(self, name: str, reference: str) -> list[str]:
        """What a run has not published as the other one has, each wave once; and what an audit finds."""
        published, found = self.scene.published(name), list[str]()
        if published != self.scene.published(reference) or set(published) != set(range(WAVES + 1)):
            found.append(f"{name} has published other commits than {reference}")
        twice = [number for number, count in created_commits(self.proxy.log, name).items() if count != 1]
        found += [f"commit {number} was made twice" for number in twice]
        return found + list(self.scene.audit(name)["problems"])


@dataclass
class Sight:
    """The embedding actors of each node at some moments, and when nodes were taken away; seconds of monotonic."""

    times: list[float] = field(default_factory=list)
    actors: list[dict[str, int]] = field(default_factory=list)
    kills: list[float] = field(default_factory=list)
    struck: int = 0  # of these nodes, those that were embedding


@contextmanager
def fleet(folder: Path, image_seconds: float) -> Iterator[Fleet]:
    """Everything up; an embedding takes this long on the cluster, and no time where a command starts its own Ray."""
    (folder / "weed").mkdir()
    before = dict(os.environ)
    with SeaweedFS(folder / "weed") as server, FaultyProxy(server.endpoint, enabled=False) as proxy:
        os.environ.update(server.environment())
        os.environ.pop("FASTFILL_STORAGE", None)
        try:
            scene = Scene(folder, server, proxy, address="")
            scene.write()
            tree = yaml.safe_load(scene.config.read_text())
            function = "tests.support.slow_encoder:encoder"
            tree["encoders"]["new"] = {"function": function, "dim": NEW_DIM, "preprocess": PREPROCESS}
            scene.config.write_text(yaml.safe_dump(tree))
            environment = server.environment() | {"PYTHONPATH": str(ROOT), SECONDS: str(image_seconds)}
            with AutoscaledCluster(environment, NODES) as cluster:
                yield Fleet(scene, cluster, proxy)
        finally:
            os.environ.clear()
            os.environ.update(before)


@contextmanager
def watching(cluster: AutoscaledCluster, kill_seconds: float = 0.0) -> Iterator[Sight]:
    """Look twice a second until the block ends.

    Args:
        kill_seconds: if not 0, the node that has been there longest is taken away every so often, from the moment on
            when every node embeds. Before that there is but one, and a machine takes longer than that to start.
    """
    sight, done = Sight(), threading.Event()

    def look() -> None:
        since, due = dict[str, float](), math.inf
        while not done.wait(0.5):
            found, now = cluster.actors(), time.monotonic()
            sight.times.append(now)
            sight.actors.append(found)
            for node in found:
                since.setdefault(node, now)
            if kill_seconds and due == math.inf and sum(found.values()) >= NODES:
                due = now
            if found and now >= due:
                oldest = min(found, key=lambda node: since[node])
                cluster.kill(oldest)
                sight.kills.append(now)
                sight.struck += found[oldest] > 0
                due += kill_seconds

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield sight
    finally:
        done.set()
        thread.join()


def wait_until_empty(cluster: AutoscaledCluster, seconds: float) -> None:
    """Return when the autoscaler has ended every node but the head."""
    deadline = time.monotonic() + seconds
    while cluster.nodes():
        if time.monotonic() > deadline:
            raise AssertionError(cluster.monitor_log()[-4000:])
        time.sleep(0.5)


def durable_images(proxy: FaultyProxy, name: str, unit_images: int) -> int:
    """Images of the run whose part lies in the store."""
    parts = Counter(
        path
        for method, path, status in list(proxy.log)
        if method == "PUT" and status == 200 and f"/{name}/embedded/" in path
    )
    return len(parts) * unit_images
