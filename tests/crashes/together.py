"""Three drivers, gc and a reader on one run, one call of `storage` after the other in an order that a seed gives."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pytest

from pipeline.backfill import publisher
from pipeline.embedding import fetch
from pipeline.errors import DataError, IncompatibleRun, SnapshotConflict
from pipeline.evaluation import ranks
from pipeline.index import tags
from pipeline.index.commits import read_commit
from pipeline.index.gc import Rules, collect_garbage
from pipeline.reporting.audit import audit
from pipeline.reporting.progress import Progress
from pipeline.run import Run
from pipeline.serving import searcher as search
from pipeline.serving.searcher import Searcher
from pipeline.storage import objects
from tests.crashes import small_run, stages
from tests.crashes.outcome import Outcome, digests
from tests.support.galleries import NEW_DIM
from tests.support.interleave import Turns

DRIVERS, CALLS = 3, 20_000
REFUSED = (SnapshotConflict, IncompatibleRun)  # what a driver may end with, if another one is faster


class Inline:
    """In place of a pool of threads: what is submitted is done at once, so that the order is the seed's alone."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def submit(self, function: Callable[..., Any], *arguments: object) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:  # noqa: BLE001 (raised where the result is asked for)
            future.set_exception(error)
        return future

    def map(self, function: Callable[..., Any], *items: Iterable[Any]) -> Iterator[Any]:
        return iter([function(*some) for some in zip(*items, strict=False)])

    def shutdown(self, **_: object) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        pass


def all_at_once(home: Path, uri: Path, seed: int, expected: Outcome) -> tuple[list[str], list[int], int]:
    """Let them run, then look.

    Returns:
        what is wrong, the commits that the reader saw, and how many gc has removed.
    """
    stages.install()
    config, run, choose = small_run.load(home, str(uri)), Run(str(uri)), random.Random(seed)
    for path in (home / "start").rglob("*.*"):
        objects.put(objects.join(run.uri, str(path.relative_to(home / "start"))), path.read_bytes())
    seen: list[int] = []
    ended: list[bool] = []

    def drive() -> Progress:
        try:
            return small_run.drive(config)
        finally:
            ended.append(True)

    def others_go_on() -> bool:
        return len(ended) < DRIVERS

    with pytest.MonkeyPatch.context() as patch:
        for module in (fetch, publisher, ranks, search, objects):
            patch.setattr(module, "ThreadPoolExecutor", Inline)
        turns = Turns(patch, (choose.randrange(60) for _ in range(CALLS)))
        ends = turns.run(
            *[drive] * DRIVERS, lambda: _collect(run, others_go_on), lambda: _read(run, others_go_on, seen)
        )
    wrong = [repr(end) for end in ends[DRIVERS:] if end is not None]
    wrong += [repr(end) for end in ends[:DRIVERS] if not isinstance(end, (Progress, *REFUSED))]
    if not any(isinstance(end, Progress) and end.wave == small_run.WAVES for end in ends):
        wrong.append(f"no driver has finished: {ends}")
    if seen != sorted(seen):
        wrong.append(f"the reader went back: {seen}")
    wrong += _left(run, expected)
    return wrong, seen, small_run.WAVES + 1 - len(tags.list_commits(run))


def _collect(run: Run, may_go_on: Callable[[], bool]) -> None:
    """gc, again and again."""
    while may_go_on():
        collect_garbage(run.uri, Rules(keep=1, grace_seconds=0))


def _read(run: Run, may_go_on: Callable[[], bool], seen: list[int]) -> None:
    """Open and search, again and again; each answer is whole."""
    queries = np.random.default_rng(0).normal(size=(2, NEW_DIM)).astype(np.float32)
    while may_go_on():
        try:
            with Searcher(run.uri) as searcher:
                found = searcher.search(queries, small_run.IMAGES)
        except DataError as error:
            if "there is no tag" not in str(error):
                raise
            continue
        assert all(sorted(ids) == list(range(small_run.IMAGES)) for ids in found.ids.tolist())
        seen.append(found.commit)


def _left(run: Run, expected: Outcome) -> list[str]:
    """What is wrong with the run afterwards; gc may have removed commits and what only they name."""
    wrong, commits, files = [str(problem) for problem in audit(run.uri).problems], expected["commits"], digests(run)
    assert isinstance(commits, dict)
    assert isinstance(expected["files"], dict)
    found = {number: read_commit(run, number).content() for number in tags.list_commits(run)}
    wrong += [f"commit {number} differs" for number in found if found[number] != commits[number]]
    if small_run.WAVES not in found or tags.read_tag(run, "prod") is None:
        wrong.append(f"the last commit is not there: {sorted(found)}")
    wrong += [f"{name} differs" for name in files if files[name] != expected["files"].get(name)]
    kept = [name for name in expected["files"] if not name.startswith("/index/segments/")]
    return wrong + [f"{name} is missing" for name in kept if name not in files]
