"""Ray's job commands, as a user types them, against the dashboard of a test's cluster."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.scene import ROOT, Scene, add_worker

STOP_SECONDS = 30.0  # in which a job has to end that is told to


@dataclass(frozen=True)
class Jobs:
    """`ray job ...` for one cluster; each job runs a command of ours from the working folder that is sent along."""

    dashboard: str  # http://host:port
    environment: dict[str, str]

    def ray(self, *words: str, ok: bool = True) -> str:
        """One `ray` command; what it prints."""
        command = [str(Path(sys.executable).parent / "ray"), *words]
        environment = {**self.environment, "RAY_AUTH_MODE": "disabled", "RAY_API_SERVER_ADDRESS": self.dashboard}
        environment.pop("PYTHONPATH", None)  # the job has what it needs in its working folder
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        assert done.returncode == 0 or not ok, done.stdout
        return done.stdout

    def job(self, action: str, *words: str, ok: bool = True) -> str:
        return self.ray("job", action, "--address", self.dashboard, *words, ok=ok)

    def submit(self, name: str, config: Path, *settings: str, script: str = "backfill") -> None:
        """Submit a job, as the README says; settings are `key=value`."""
        command = ["python", f"jobs/{script}.py", "--config", str(config)]
        command += [word for setting in settings for word in ("--set", setting)]
        self.job("submit", "--submission-id", name, "--no-wait", "--working-dir", ".", "--", *command)

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

    def nodes_of_actors(self, kind: str) -> dict[str, str]:
        """The node of each actor that there is or was of this kind, by the actor's id."""
        found = json.loads(self.ray("list", "actors", "--format", "json", "--limit", "1000", "--detail"))
        actors = [actor for actor in found if kind in (actor["class_name"] + actor["repr_name"])]
        return {actor["actor_id"]: actor["node_id"] for actor in actors}


def submit(jobs: Jobs, scene: Scene, job: str, run: str, *settings: str, script: str = "backfill") -> None:
    jobs.submit(job, scene.config, f"run={scene.run(run).uri}", *settings, script=script)


def take_away(node: Any, cluster: Any, jobs: Jobs, notice_seconds: int) -> None:
    """A spot machine's notice, where there is one, and its end; another one comes."""
    if notice_seconds:
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        drain = ["drain-node", "--address", cluster.address, "--node-id", node.node_id, *reason]
        jobs.ray(*drain, "--deadline-remaining-seconds", str(notice_seconds))
        time.sleep(notice_seconds)
    cluster.remove_node(node, allow_graceful=False)
    add_worker(cluster)
