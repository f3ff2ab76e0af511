"""What the processes of the crash tests do: record a run's states, go on from one, meet an error at one operation."""

from __future__ import annotations

import errno
import re
import shutil
from pathlib import Path

import fsspec
from PIL import Image

from jobs import checks
from pipeline import embed, expected, planner, probe, score
from pipeline.errors import FastfillError
from pipeline.run import Run
from tests.crashes import small_run, stages
from tests.crashes.moments import Operation, States, watch
from tests.crashes.outcome import durable_images, outcome, written_once
from training import boost, fit

IMPORTED = (boost, checks, embed, expected, fit, fsspec, planner, probe, score)
"""What a driver imports as it goes, and what takes seconds: once in the server that forks, not in every case."""
Image.init()

Outcome = dict[str, object]


def make(home: Path) -> Outcome:
    """A home, a copy of its run before the first driver, and what an undisturbed run comes to."""
    stages.install()
    config = small_run.write_home(home)
    shutil.copytree(config.run, home / "start")
    small_run.drive(config)
    found = outcome(Run(config.run))
    shutil.rmtree(config.run)
    return found


def record(home: Path, states: Path) -> int:
    """Run undisturbed, and keep each state of the disk on the way; gives their number."""
    stages.install()
    config = small_run.load(home)
    shutil.copytree(home / "start", config.run)
    states.mkdir()
    taken = States(Path(config.run), states)
    watch(Path(config.run), taken.take)
    small_run.drive(config)
    return taken.count


def go_on(home: Path, run: Path, expected: Outcome) -> list[str]:
    """Start a driver on what a crash has left; what is wrong afterwards."""
    stages.install()
    config = small_run.load(home, str(run))
    durable, once = durable_images(run), written_once(run)
    read: list[Path] = []
    watch(home / "data" / "images", lambda operation: read.append(Path(operation.path)))
    small_run.drive(config, on_start=read.clear)
    wrong = differences(outcome(Run(config.run)), expected)
    if again := durable & {int(path.stem) for path in read}:
        wrong.append(f"images {sorted(again)} were durable and are read again")
    after = written_once(run)
    return wrong + [f"{path} was durable and is written again" for path in once if after.get(path) != once[path]]


def differences(found: Outcome, expected: Outcome) -> list[str]:
    """In words, where two outcomes differ."""
    wrong = []
    for name, value in expected.items():
        if isinstance(value, dict) and isinstance(other := found[name], dict):
            keys = sorted({*value, *other}, key=str)
            wrong += [f"{name}: {key} differs" for key in keys if value.get(key) != other.get(key)]
        elif value != found[name]:
            wrong.append(f"{name}: {found[name]}")
    return wrong
