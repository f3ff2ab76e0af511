"""How benchmarks measure: candidates take turns in each repeat, ratios are taken within one, memory is watched.

Other work on the two cores makes single figures scatter; candidates of one repeat had the same neighbours. Figures are
the median with the lowest and the highest.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_LOOK_EVERY_SECONDS = 0.25
_PACKAGES = ("numpy", "pyarrow", "ray", "torch", "faiss-gpu", "faiss-cpu")


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some figures, the lowest and the highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one figure."""
        found = list(values)
        return cls(statistics.median(found), min(found), max(found))

    def text(self, form: str = ".2f") -> str:
        """`median (low - high)`, each in the given format."""
        return f"{self.median:{form}} ({self.low:{form}} - {self.high:{form}})"


def interleave(
    candidates: Mapping[str, Callable[[], object]], repeats: int, warm_up: int = 0
) -> dict[str, list[float]]:
    """The seconds of each call, `repeats` per candidate: all are called once, then all again.

    Every second round goes backwards, so that none always has the same one before it.

    Args:
        candidates: by name; what they return is dropped.
        repeats: rounds that count.
        warm_up: rounds before them that do not.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(-warm_up, repeats):
        order = list(candidates.items())
        for name, candidate in order[:: -1 if number % 2 else 1]:
            start = time.perf_counter()
            candidate()
            seconds = time.perf_counter() - start
            if number >= 0:
                times[name].append(seconds)
    return times


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """The spread of the quotients within each repeat."""
    return Spread.of(above / below for above, below in zip(numerators, denominators, strict=True))


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; the first column is left, the others are right."""
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def header(packages: Sequence[str] = ()) -> str:
    """The head of a result, with what it takes to repeat it: date, command, commit, machine, versions, load average.

    Args:
        packages: distributions to name beside those that nearly all use.
    """
    script = Path(sys.argv[0])
    command = " ".join(["python -m", f"benchmarks.{script.parent.name}.{script.stem}", *sys.argv[1:]])
    return "\n".join(
        [
            f"`{command}`, {time.strftime('%Y-%m-%d')}, commit {_commit()}.",
            f"{os.cpu_count()} CPUs ({_cpu()}), {_memory_gib():.0f} GiB, {platform.machine()}, "
            f"Python {platform.python_version()}, {versions((*_PACKAGES, *packages))}.",
            f"Load average at the start {os.getloadavg()[0]:.1f}.",
        ]
    )


def versions(packages: Iterable[str]) -> str:
    """`name version` of those that are installed."""
    installed = {item.metadata["Name"].lower(): item.version for item in importlib.metadata.distributions()}
    return ", ".join(f"{name} {installed[name]}" for name in dict.fromkeys(packages) if name in installed)


class Memory:
    """The most memory that this process and its children have at once, while it is entered.

    Proportional set size: pages that processes share count once, Ray's object store included; a server of S3 that a
    benchmark started does not count. Looked at four times a second, so a shorter peak may be missed.

    Attributes:
        peak: bytes.
    """

    def __init__(self) -> None:
        self.peak, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, sum(map(_pss, descendants(os.getpid()))))
            if self._stop.wait(_LOOK_EVERY_SECONDS):
                return


def memory() -> Memory:
    """Watch the memory of a `with` block: `with memory() as used: ...`, then `used.peak`."""
    return Memory()


def descendants(process: int) -> list[int]:
    """A process and all below it, without the S3 server."""
    found, waiting = [], [process]
    while waiting:
        item = waiting.pop()
        try:
            if "weed" in Path(f"/proc/{item}/comm").read_text():
                continue
            found.append(item)
            for task in Path(f"/proc/{item}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def _pss(process: int) -> int:
    """Proportional set size in bytes; 0 if the process is gone."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def _commit() -> str:
    """The short hash of the tree's commit, and a note if the tree differs from it."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short", "HEAD") + (" with uncommitted changes" if changed else "")


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown")


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
