"""What the processes of the crash tests do: record a run's states, go on from one, meet an error at one operation."""

from __future__ import annotations

import os
import pickle
import re
import shutil
from collections import Counter
from pathlib import Path

import fsspec
from PIL import Image

from jobs.steps import preflight
from pipeline.config.tree import Config
from pipeline.embedding import embedder
from pipeline.errors import FastfillError
from pipeline.planning import build, expected_curve, score
from pipeline.run import Run
from pipeline.storage import objects, retry
from pipeline.storage.local import LocalStore
from pipeline.storage.retry import Retry
from pipeline.storage.retrying_store import ObjectStore
from tests.crashes import small_run, stages
from tests.crashes.memory_store import MemoryStore
from tests.crashes.moments import Operation, States, watch
from tests.crashes.outcome import Outcome, differences, durable_images, outcome, written_once
from tests.support.unreliable_store import FakeTime
from training import fit

IMPORTED = (preflight, embedder, expected_curve, fit, fsspec, build, score)
"""What a driver imports as it goes, and what takes seconds: once in the server that forks, not in every case."""
Image.init()

REMOTE = "s3://bucket/run"
_VARIES = re.compile(r"[0-9a-f]{16,}|\d+")


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
    """Start a driver on what a crash has left on the disk; what is wrong afterwards."""
    stages.install()
    return _go_on(home, small_run.load(home, str(run)), expected)


def record_writes(home: Path, writes: Path) -> int:
    """As `record`, in an object store: its writes one after the other are its states; gives their number."""
    store, config = _in_memory(home)
    store.writes.clear()
    small_run.drive(config)
    writes.write_bytes(pickle.dumps(store.writes))
    return len(store.writes)


def go_on_in_memory(home: Path, writes: Path, number: int, expected: Outcome) -> list[str]:
    """As `go_on`, with the first writes of a run in an object store."""
    store, config = _in_memory(home)
    store.do(pickle.loads(writes.read_bytes())[:number])  # noqa: S301 (of our own)
    store.writes.clear()
    once = {uri.removeprefix("s3://") for uri in written_once(Run(config.run))}
    wrong = _go_on(home, config, expected)
    return wrong + [f"{name} was durable and is written again" for name, _ in store.writes if name in once]


def lose_answers(home: Path, expected: Outcome) -> list[str]:
    """A run whose store loses its first answer to each write, after the write is done."""
    store, config = _in_memory(home)
    store.loses_answers = True
    return _go_on(home, config, expected)


def operations(home: Path, run: Path) -> dict[str, int]:
    """How many operations of each kind an undisturbed run does."""
    stages.install()
    shutil.copytree(home / "start", run)
    seen: list[str] = []
    watch(run, lambda operation: seen.append(kind(operation, run)))
    small_run.drive(small_run.load(home, str(run)))
    return Counter(seen)


def fail(home: Path, run: Path, wanted: str, number: int, code: int) -> str:
    """A run in which the nth operation of a kind ends with an error; how the run ends."""
    stages.install()
    shutil.copytree(home / "start", run)
    seen: Counter[str] = Counter()

    def told(operation: Operation) -> None:
        seen[kind(operation, run)] += 1
        if kind(operation, run) == wanted and seen[wanted] == number:
            raise OSError(code, os.strerror(code), operation.path)

    watch(run, told)
    try:
        small_run.drive(small_run.load(home, str(run)))
    except (FastfillError, OSError) as error:
        return f"refused: {error}"
    return "completed"


def die(home: Path, run: Path, number: int) -> None:
    """A run whose process dies at the nth operation that changes something: no exception, no clean-up, no flush."""
    stages.install()
    shutil.copytree(home / "start", run)
    left = [number]

    def told(operation: Operation) -> None:
        left[0] -= operation.changes
        if left[0] < 0:
            os._exit(9)

    watch(run, told)
    small_run.drive(small_run.load(home, str(run)))


def kind(operation: Operation, run: Path) -> str:
    """An operation without numbers and digests: `create /embedded/wave-#/.tmp-#`."""
    return f"{operation.name} {_VARIES.sub('#', operation.path.removeprefix(str(run)))}"


def _go_on(home: Path, config: Config, expected: Outcome) -> list[str]:
    run, read = Run(config.run), list[Path]()
    durable, once = durable_images(run), written_once(run)
    watch(home / "data" / "images", lambda operation: read.append(Path(operation.path)))
    small_run.drive(config, on_start=read.clear)
    wrong = differences(outcome(run), expected)
    if again := durable & {int(path.stem) for path in read}:
        wrong.append(f"images {sorted(again)} were durable and are read again")
    after = written_once(run)
    return wrong + [f"{uri} was durable and is written again" for uri in once if after.get(uri) != once[uri]]


def _in_memory(home: Path) -> tuple[MemoryStore, Config]:
    """A run in an object store, before its first driver."""
    stages.install()
    store = MemoryStore()
    remote, local = ObjectStore(store, Retry(seconds=2.0)), LocalStore()
    objects._store = lambda scheme, *_: local if scheme == "file" else remote  # type: ignore[assignment]
    retry.time = FakeTime()  # type: ignore[assignment] # no pause takes any time
    for path in (home / "start").rglob("*.*"):
        objects.put(objects.join(REMOTE, str(path.relative_to(home / "start"))), path.read_bytes())
    return store, small_run.load(home, REMOTE)
