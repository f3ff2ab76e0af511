"""`ray start`, and the processes of it: it leaves them behind, and a killed raylet its agents."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from tests.faults.scene import kill

MARK = "FASTFILL_TEST_CLUSTER"


class Marked:
    """Processes that were started with a mark in their environment, and all that these have started."""

    def __init__(self) -> None:
        self.environment = {MARK: uuid.uuid4().hex}

    def ray_start(self, *words: str, environment: dict[str, str], prefix: Sequence[str] = ()) -> None:
        """`ray start` with these words, after what runs it on another host; raises RuntimeError with what it said."""
        ray = [str(Path(sys.executable).parent / "ray"), "start", "--object-store-memory=100000000"]
        done = subprocess.run(
            [*prefix, *ray, *words],
            env=os.environ | environment | self.environment | {"RAY_AUTH_MODE": "disabled"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(done.stdout)

    def processes(self, words: str = "") -> list[int]:
        """Those whose command holds these words; Ray's workers write over their environment and are not found."""
        pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
        return [pid for pid in pids if words in title(pid) and variable(pid, MARK) == self.environment[MARK]]

    def end(self, words: str = "") -> None:
        """SIGKILL for them and all below them, until there are none."""
        deadline = time.monotonic() + 10
        while (pids := self.processes(words)) and time.monotonic() < deadline:
            kill([pid for root in pids for pid in descendants(root)])
            time.sleep(0.2)


def variable(pid: int, name: str) -> str | None:
    """A variable that the process was started with."""
    for entry in _read(pid, "environ").split("\0"):
        key, _, value = entry.partition("=")
        if key == name:
            return value
    return None


def title(pid: int) -> str:
    """Its command, or what it calls itself; nothing once it has ended."""
    return _read(pid, "cmdline").replace("\0", " ")


def children() -> dict[int, list[int]]:
    """The processes of this machine by their parent."""
    found: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and (stat := _read(int(entry.name), "stat")):
            found.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    return found


def descendants(root: int) -> list[int]:
    """A process and all below it."""
    family, found = children(), [root]
    for pid in found:
        found += family.get(pid, [])
    return found


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""  # it has just ended
