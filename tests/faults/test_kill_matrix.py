"""SIGKILL for every part of the system at every step of a wave: nothing is lost, doubled or half-published.

Each step is known by its S3 request, at which the proxy strikes. One run per victim meets all seven steps, one
after the other, in the order in which they come.
"""

from __future__ import annotations

import queue
import subprocess
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pytest

from pipeline.index import commits
from pipeline.storage import objects, parquet
from tests.faults.scene import (
    IMAGES,
    NODE_CPUS,
    UNIT_IMAGES,
    WAVES,
    Scene,
    add_worker,
    created_commits,
    image_reads,
    kill,
    processes,
)
from tests.support.faulty_proxy import FaultyProxy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# step -> the request at which it strikes, and whether after it was applied
STEPS = {
    "fetch": ("GET", r"/images/\d+\.png", False),
    "embed": ("GET", r"/images/\d+\.png", True),
    "log write": ("PUT", r"/embedded/wave-", False),
    "seal": ("PUT", r"/index/segments/\w+\.faiss", False),
    "before commit": ("PUT", r"/index/commits/", False),
    "after commit": ("PUT", r"/index/commits/", True),
    "before the tag moves": ("PUT", r"/index/tags/candidate", False),
}
VICTIMS = ("driver", "embedding actor", "sealing task", "worker node", "S3 server")
MUST = {"sealing task": ["seal"], "embedding actor": list(STEPS)[:4]}  # where one of them has to be found


@dataclass
class Strike:
    """One kill: the test's main thread does it while the request waits, and says whether the request goes on."""

    step: str
    struck: threading.Event = field(default_factory=threading.Event)
    passes: bool = True


@dataclass
class Matrix:
    """A run in which one kind of victim is killed at each step."""

    scene: Scene
    cluster: Any
    victim: str
    name: str
    strikes: queue.Queue[Strike] = field(default_factory=queue.Queue)
    driver: subprocess.Popen[str] | None = None
    moments: list[tuple[int, set[str]]] = field(
        default_factory=list
    )  # of each kill: length of the log, what is durable
    nodes: list[Any] = field(default_factory=list)
    killed: dict[str, str] = field(default_factory=dict)  # by step, what came of the strike in a word

    def arm(self, step: str) -> None:
        """Wait for the next step's request."""
        method, path, after = STEPS[step]

        def act(target: str) -> bool:
            strike = Strike(step)
            self.strikes.put(strike)
            strike.struck.wait(60)
            return strike.passes

        self.scene.proxy.watch(act, method, f"{path}" if "images" in path else rf"/{self.name}{path}", after=after)

    def play(self) -> None:
        """Start the run, strike at each step, start again what is the user's to start again, and wait for the end."""
        self.driver = self.scene.start(self.name)
        for step in STEPS:
            self.arm(step)
            strike = self._next()
            self.moments.append((len(self.scene.proxy.log), self._durable()))
            killed = self._strike(strike)
            strike.struck.set()
            self.killed[step] = killed
            if self.victim == "driver":
                self.driver.communicate(timeout=60)
                self.driver = self.scene.start(self.name)
        output, _ = self.driver.communicate(timeout=240)
        assert self.driver.returncode == 0, output

    def _next(self) -> Strike:
        try:
            return self.strikes.get(timeout=120)
        except queue.Empty:
            assert self.driver is not None
            self.driver.kill()
            raise AssertionError(f"the step never came:\n{self.driver.communicate()[0]}") from None

    def _strike(self, strike: Strike) -> str:
        """Kill; what came of it in a word."""
        if self.victim == "driver":
            assert self.driver is not None
            self.driver.kill()
            strike.passes = False
            return "killed"
        if self.victim == "S3 server":
            self.scene.server.kill()
            self.scene.server.start()
            strike.passes = False  # its answer died with it; before it, the request did
            return "killed"
        if self.victim == "worker node":
            node = self.nodes.pop(0)
            self.cluster.remove_node(node, allow_graceful=False)
            self.nodes.append(add_worker(self.cluster))
            return "killed"
        title = {"embedding actor": "EmbedStage", "sealing task": "_seal"}[self.victim]
        # An actor may be on its way back; a sealing task runs only while its wave is sealed.
        seconds = {"embedding actor": 30, "sealing task": 5}[self.victim] if strike.step in MUST[self.victim] else 0
        deadline = time.monotonic() + seconds
        while not (found := processes(title)) and time.monotonic() < deadline:
            time.sleep(0.2)
        return "killed" if kill(found) else "-"  # none of them runs at this step

    def _durable(self) -> set[str]:
        run = self.scene.run(self.name)
        parts = objects.list_files(run.path("embedded"), ".parquet")
        ids = [parquet.read_parquet(uri, ["id"])["id"] for uri in parts]
        return {
            f"{number:04d}.png"
            for number in pa.chunked_array([c for i in ids for c in i.chunks], pa.int64()).to_pylist()
        }


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_kill_at_every_step_changes_nothing_that_is_published(
    scene: Scene, cluster: Any, calm: FaultyProxy, victim: str
) -> None:
    name = f"kill-{victim.replace(' ', '-').lower()}"
    run = scene.prepare(name, like="undisturbed")
    calm.delays[r"/images/"] = 1.5  # so that the run is still going on when its seventh step is struck
    matrix = Matrix(scene, cluster, victim, name, nodes=list(cluster.worker_nodes))
    matrix.play()
    assert scene.published(name) == scene.published("undisturbed")
    assert set(scene.published(name)) == set(range(WAVES + 1))
    for number in scene.published("undisturbed"):
        ours, theirs = (commits.read_commit(scene.run(item), number) for item in (name, "undisturbed"))
        digests = [[(ref.sha256, ref.sidecar_sha256) for ref in commit.segments] for commit in (ours, theirs)]
        assert digests[0] == digests[1]
        for ref in ours.segments:
            assert objects.sha256(run.path(ref.path)) == ref.sha256
    created = created_commits(calm.log, name)
    assert all(count == 1 for count in created.values()), "a wave was published twice"
    # Sealing tasks run at no other step, and when a wave is committed the last image may be embedded already.
    must = MUST.get(victim, list(STEPS))
    assert all(matrix.killed[step] == "killed" for step in must), "a cell of the matrix is empty"
    assert len(image_reads(calm.log)) == IMAGES
    again: set[str] = set().union(*(durable & set(image_reads(calm.log[start:])) for start, durable in matrix.moments))
    # Of a lost node also units whose acknowledgement was on its way.
    most = NODE_CPUS * UNIT_IMAGES if victim == "worker node" else 0
    assert len(again) <= most, "images were read again that were durable when the kill came"
    report = scene.audit(name)
    assert report["ok"], report["problems"]
    print(victim, matrix.killed, "images read again:", sum(image_reads(calm.log).values()) - IMAGES)
