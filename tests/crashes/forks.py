"""A fork for each case: a process of its own, as a driver has, without the seconds that importing takes.

Two servers, which import once and start nothing, fork for every case. What a case leaves in memory (caches, threads,
hooks) ends with it, as it does when a driver dies.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

SERVERS = 2
_IMPORTED = ["tests.crashes.cases", "tests.crashes.together"]

Case = Callable[..., Any]
Run = Callable[[Case, Sequence[tuple[Any, ...]]], list[Any]]


@contextmanager
def servers() -> Iterator[Run]:
    """Give a function that runs a case for each of some arguments, and returns what each one returned."""
    kept = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS",)}
    os.environ["OMP_NUM_THREADS"] = "1"  # threads of OpenMP do not outlive a fork
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    try:
        with ProcessPoolExecutor(SERVERS, mp_context=context) as pool:
            yield lambda case, arguments: list(pool.map(_forked, [case] * len(arguments), arguments))
    finally:
        for name, value in kept.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _forked(case: Case, arguments: tuple[Any, ...]) -> Any:
    """What a case returns in a process of its own; an exception that it ends with is raised here."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        _answer(writing, case, arguments)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if not answer:
        return f"died with status {os.waitstatus_to_exitcode(status)}"
    good, value = pickle.loads(answer)  # noqa: S301 (of our own child)
    if not good:
        raise AssertionError(f"{case.__name__}{arguments}:\n{value}")
    return value


def _answer(writing: int, case: Case, arguments: tuple[Any, ...]) -> None:
    try:
        answer = True, case(*arguments)
    except BaseException:  # noqa: BLE001 (the process that waits for the case reports it)
        answer = False, traceback.format_exc()
    data = pickle.dumps(answer)
    with os.fdopen(writing, "wb") as pipe:
        pipe.write(data)
    os._exit(0)
