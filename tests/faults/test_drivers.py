"""Two drivers on one run, and one that was stopped and wakes up: exactly one publishes, and storage stays whole."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from tests.faults.scene import Scene, created_commits, wait_for
from tests.support.faulty_proxy import FaultyProxy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CONFLICT = 3  # exit code


def test_two_drivers_on_one_run_one_publishes_and_one_is_refused(scene: Scene, calm: FaultyProxy) -> None:
    name = "two-drivers"
    scene.prepare(name, like="undisturbed")
    first = scene.start(name)
    waiting, taken = threading.Event(), threading.Event()

    def hold(_: str) -> bool:
        """The first driver is about to create commit 3, and the second takes the run over just then."""
        waiting.set()
        return taken.wait(120)

    calm.watch(hold, "PUT", rf"/{name}/index/commits/0+3\.json")
    assert waiting.wait(120)
    calm.watch(lambda _: taken.set() or True, "PUT", rf"/{name}/index/tags/candidate", after=True)
    second = scene.start(name)
    outputs = [process.communicate(timeout=240)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (CONFLICT, 0), outputs
    assert "another driver took this run over" in outputs[0]
    assert scene.published(name) == scene.published("undisturbed")
    assert all(count == 1 for count in created_commits(calm.log, name).values())
    report = scene.audit(name)
    assert report["ok"], report["problems"]


@pytest.mark.parametrize("step", ["before", "after"])
def test_a_driver_that_wakes_up_after_it_was_replaced_cannot_publish(
    scene: Scene, calm: FaultyProxy, tmp_path: Path, step: str
) -> None:
    """Stopped just before or just after it creates a commit, and woken when another driver has finished the run."""
    name = f"sleeper-{step}"
    scene.prepare(name, like="undisturbed")
    calm.delays[r"/images/"] = 1.0
    sleeper = scene.start(name)
    asleep = threading.Event()

    def stop(_: str) -> bool:
        os.kill(sleeper.pid, signal.SIGSTOP)
        asleep.set()
        return step == "after"  # before: the request is lost, and sent again when it wakes up

    calm.watch(stop, "PUT", rf"/{name}/index/commits/0+3\.json", after=step == "after")
    assert asleep.wait(120)
    scene.finish_elsewhere(name, tmp_path / "home")  # who sleeps keeps its part of the cluster
    assert scene.published(name) == scene.published("undisturbed")
    before = scene.published(name)
    os.kill(sleeper.pid, signal.SIGCONT)
    output, _ = sleeper.communicate(timeout=120)
    assert sleeper.returncode == CONFLICT, output
    assert "another driver took this run over" in output
    assert scene.published(name) == before
    assert all(count == 1 for count in created_commits(calm.log, name).values())
    report = scene.audit(name)
    assert report["ok"], report["problems"]


def test_another_machine_finishes_the_run_from_storage_alone(scene: Scene, calm: FaultyProxy, tmp_path: Path) -> None:
    """Another home and folder, a Ray of its own, and of the first machine only the config and the credentials."""
    name = "another-machine"
    scene.prepare(name, like="undisturbed")
    first = scene.start(name)
    wait_for(calm, "PUT", rf"/{name}/index/commits/0+3\.json", first)
    first.kill()
    first.communicate(timeout=60)
    home = tmp_path / "home"
    scene.finish_elsewhere(name, home)
    assert scene.published(name) == scene.published("undisturbed")
    assert all(count == 1 for count in created_commits(calm.log, name).values())
    left = [path.name for path in home.iterdir() if not path.name.startswith(".")]  # the libraries have their caches
    assert left == ["run.yaml"], "the run left something on the machine"
    report = scene.audit(name)
    assert report["ok"], report["problems"]
