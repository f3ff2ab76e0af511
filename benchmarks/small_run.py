"""A run of CIFAR-100, or of a part of it, started by the user's command, for benchmarks of time.

Stages are timed by the files that they leave when they are done, so nothing is added to the measured program.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data" / "cifar100"
CONFIG = ROOT / "jobs" / "configs" / "cifar100.yaml"

FIRST_IMAGE = "pairs/**/unit-*.parquet"
VISIBLE = "snapshot 0 visible"
STAGES = {
    "first unit embedded": FIRST_IMAGE,
    "pairs embedded": "pairs/pairs.json",
    "fitted": "transformation/transformation.json",
    "planned": "plan/plan.json",
    "snapshot 0 measured": f"reports/probe-set/{0:020d}.json",
    VISIBLE: "index/tags/prod.json",
    "last wave published": f"index/commits/{20:020d}.json",
}


@dataclass(frozen=True, slots=True)
class Job:
    """One run to be: its folder, and what is set otherwise than in the example config.

    Attributes:
        data: the folder of CIFAR-100's data and encoders.
    """

    folder: Path
    data: Path
    settings: tuple[str, ...] = ()

    @property
    def options(self) -> list[str]:
        """Of any command on this run."""
        pairs = [f"run={self.folder}", f"data_root={self.data}", *self.settings]
        return ["--config", str(CONFIG), *(word for pair in pairs for word in ("--set", pair))]

    def backfill(self, until: str | None = None) -> dict[str, float]:
        """Seconds from the command's start to the files of each stage, and to its end.

        A stage that was not reached is missing; so is snapshot 0 where the gate kept it from being served.

        Args:
            until: stop it, as by Ctrl-C, as soon as there is a file of this pattern.

        Raises:
            RuntimeError: the command failed.
        """
        started, seconds = time.time(), dict[str, float]()
        with subprocess.Popen(
            command("backfill", *self.options), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT
        ) as process:
            while process.poll() is None:
                ends = until is not None and next(self.folder.glob(until), None) is not None
                self._look(seconds, started)  # after `until`, whose own stage may be among them
                if ends:
                    process.send_signal(signal.SIGINT)
                    process.wait(timeout=60)
                    return seconds
                time.sleep(0.02)
            if process.returncode:
                assert process.stderr is not None
                raise RuntimeError(process.stderr.read().decode()[-2000:])
        self._look(seconds, started)
        return seconds | {"report written, command ended": time.time() - started}

    def _look(self, seconds: dict[str, float], started: float) -> None:
        """Note the stages whose files are new."""
        for name, pattern in STAGES.items():
            if name in seconds or (found := next(self.folder.glob(pattern), None)) is None:
                continue
            written = found.stat().st_mtime
            tag = json.loads(found.read_text()) if name == VISIBLE else {"commit": 0}
            if 0 in (tag["commit"], tag.get("previous")):
                seconds[name] = written - started


def command(*words: str) -> list[str]:
    """`fastfill` of this tree, by the interpreter that runs the benchmark."""
    return [sys.executable, "-m", "jobs.cli", *words]


def timed(words: list[str]) -> Callable[[], object]:
    """A call that runs a program to its end; its start is part of what is timed."""
    return lambda: subprocess.run(words, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def part_of_cifar(folder: Path, data: Path, num_gallery: int, num_pairs: int) -> tuple[str, ...]:
    """Settings for a run on the first rows of gallery and pairs, which are copied to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("test", num_gallery), ("train", num_pairs)):
        pq.write_table(pq.read_table(data / f"{name}.parquet").slice(0, count), folder / f"{name}.parquet")
    return (
        f"gallery.manifest={folder / 'test.parquet'}",
        f"pairs.manifest={folder / 'train.parquet'}",
        "fit.transformation=linear",
    )


def data_folder(given: str | None) -> Path:
    """CIFAR-100's folder.

    Raises:
        SystemExit: it is not there.
    """
    folder = Path(given) if given else Path(os.environ.get("FASTFILL_DATA", DATA))
    if not (folder / "test.parquet").exists():
        raise SystemExit(f"Nothing measured: no CIFAR-100 data in {folder}; give --data.")
    return folder
