"""The CIFAR-100 backfill with few pairs and epochs: for tests of where a run is made, and not of how well it fits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq

from pipeline.run import Run

CONFIG = str(Path(__file__).resolve().parents[2] / "jobs" / "configs" / "cifar100.yaml")
PAIRS, WAVES = 4000, 8


def fastfill(*words: str) -> str:
    """A command as the user would type it, which has to end well; its stdout."""
    done = subprocess.run([sys.executable, "-m", "jobs.cli", *words], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def settings(run: str, data: Path, train: Path | str, **others: str) -> list[str]:
    """What differs from the shipped config, as `key=value`; on the CPU, so that all machines give the same bytes."""
    items = {
        "run": run,
        "data_root": str(data),
        "device": "cpu",
        "pairs.manifest": str(train),
        "gallery.columns.group": "null",
        "fit.transformation": "linear",
        "plan.waves": str(WAVES),
        "evaluate.max_images": "1",
        **others,
    }
    return [f"{key}={value}" for key, value in items.items()]


def options(settings: list[str]) -> list[str]:
    """Settings as words of a command."""
    return [word for setting in settings for word in ("--set", setting)]


def make_local_run(data: Path, folder: Path) -> Run:
    """A finished run of this machine alone, over the images in the Parquet file."""
    run, train = Run(str(folder / "run")), folder / "train.parquet"
    pq.write_table(pq.read_table(data / "train.parquet").slice(0, PAIRS), train)
    fastfill("backfill", "--config", CONFIG, *options(settings(run.uri, data, train)))
    return run


def pairs_of(run: Run) -> Path:
    """Where its pairs are."""
    return Path(run.uri).parent / "train.parquet"
