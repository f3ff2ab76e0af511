"""The estimate of `plan` beside the run that follows: CIFAR-100 by the shipped config, but for a fit of one epoch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.embedding import vector_log
from pipeline.planning.plan import read_plan
from pipeline.run import Run
from pipeline.storage import objects

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

CONFIG = str(Path(__file__).resolve().parents[2] / "jobs" / "configs" / "cifar100.yaml")
WITHIN = 0.25


def fastfill(command: str, settings: list[str], *words: str) -> str:
    """A command as a user types it; what it prints on stdout."""
    chosen = [word for setting in settings for word in ("--set", setting)]
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", command, "--config", CONFIG, *chosen, *words],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return done.stdout


def test_the_estimate_of_the_time_is_within_a_quarter_of_the_real_run(cifar100: Path, tmp_path: Path) -> None:
    """Real: from commit 0, after which the first image is asked for, to the last durable part."""
    settings = [f"run={tmp_path / 'run'}", f"data_root={cifar100}", "pairs.manifest=test.parquet"]
    settings += ["fit.transformation=linear", "evaluate.max_images=1"]
    estimated = json.loads(fastfill("plan", settings, "--json"))["estimate"]["seconds"]
    fastfill("backfill", settings)
    run = Run(str(tmp_path / "run"))
    plan = read_plan(run)
    assert plan is not None
    real = max(vector_log.part_times(plan.log(run)).values()) - objects.stat(run.commit(0)).modified_seconds
    print(f"estimated {estimated:.1f} s, real {real:.1f} s")
    assert estimated == pytest.approx(real, rel=WITHIN)
