"""SIGKILL at any moment, then the same command again: the same bytes as an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.config.load import load_config
from pipeline.index import commits, tags
from pipeline.reporting.audit import audit
from pipeline.run import Run
from pipeline.storage import objects
from tests.support.galleries import write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

KILLS = 6


def start(path: str) -> subprocess.Popen[bytes]:
    """`fastfill backfill` as a process group of its own, with the Ray that it starts."""
    command = [sys.executable, "-m", "jobs.backfill", "--config", path]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def kill_at(path: str, seconds: float) -> bool:
    """SIGKILL the driver and its Ray after some seconds; whether it was still running."""
    process = start(path)
    try:
        process.communicate(timeout=seconds)
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return True


def finish(path: str) -> float:
    begin = time.monotonic()
    process = start(path)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output.decode()
    return time.monotonic() - begin


def test_backfill_killed_at_random_moments_publishes_the_same_bytes(tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    first, second = write_config(undisturbed), write_config(killed)
    for name in ("old.pt2", "new.pt2", "gallery.parquet", "training.parquet"):
        (killed / "data" / name).write_bytes((undisturbed / "data" / name).read_bytes())
    seconds = finish(first)
    seed = int(os.environ.get("FASTFILL_KILL_SEED", time.time_ns() % 10**6))
    print(f"FASTFILL_KILL_SEED={seed}")
    moments = random.Random(seed)
    kills = sum(kill_at(second, moments.uniform(0.2, 1.0) * seconds) for _ in range(KILLS))
    finish(second)
    assert kills >= 1
    runs = Run(load_config(first).run), Run(load_config(second).run)
    assert tags.list_commits(runs[0]) == tags.list_commits(runs[1])
    for number in tags.list_commits(runs[0]):
        expected, found = (commits.read_commit(run, number).content() for run in runs)
        assert json.dumps(found) == json.dumps(expected)
    segments = [
        {uri.removeprefix(run.uri): objects.sha256(uri) for uri in objects.list_files(run.path("index", "segments"))}
        for run in runs
    ]
    assert segments[1].items() >= segments[0].items()
    report = audit(runs[1].uri)
    assert report.ok, report.problems
