"""Call one function for many pieces of work: in this process, in threads, or as Ray tasks.

`each` stays in this process for a small gallery and keeps the order of the pieces. `on_ray` always uses Ray. `spread`
begins with threads and adds Ray if the work takes long.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_THREADS = 4
_PATIENCE_SECONDS = 15.0  # starting Ray takes four
_ENOUGH = 8  # items left for which Ray pays off
_TASK_CPUS = 0.5
_MAX_TASKS = 256  # in flight

SMALL_IMAGES = 250_000
"""Up to here a pass over the gallery takes seconds in one process."""


def each(
    function: Callable[..., Result], shared: tuple[object, ...], pieces: Sequence[object], images: int
) -> Iterator[Result]:
    """The results for each piece, in order; in this process if the pieces hold few images.

    Args:
        function: importable by a task; called with the shared arguments, then the piece.
        shared: arguments that are the same for all pieces; sent to the cluster once.
        pieces: the last argument of each call.
        images: how many the pieces hold together.
    """
    if images <= SMALL_IMAGES:
        yield from (function(*shared, piece) for piece in pieces)
    else:
        yield from on_ray(function, shared, pieces)


def on_ray(function: Callable[..., Result], shared: tuple[object, ...], pieces: Iterable[object]) -> Iterator[Result]:
    """As `each`, always as Ray tasks."""
    import ray  # here: small galleries do without it

    task = ray.remote(num_cpus=_TASK_CPUS)(function)
    stored = [ray.put(item) for item in shared]
    for reference in [task.remote(*stored, piece) for piece in pieces]:
        yield ray.get(reference)


def spread(
    function: Callable[[Item], Result], items: Sequence[Item], start_ray: Callable[[], None] | None
) -> Iterator[tuple[Item, Result]]:
    """Each item with its result, in the order of completion.

    Args:
        function: of one item; function, items and results are picklable.
        items: the work.
        start_ray: called before Ray is used; None to stay in this process.
    """
    begin = time.monotonic()
    with ThreadPoolExecutor(_THREADS) as pool:
        futures = {pool.submit(function, item): item for item in items}
        waiting: set[Future[Result]] = set(futures)
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in done:
                    yield futures[future], future.result()
                idle = [future for future in waiting if not future.running()]
                if start_ray is not None and time.monotonic() - begin > _PATIENCE_SECONDS and len(idle) >= _ENOUGH:
                    left = [future for future in idle if future.cancel()]
                    waiting -= set(left)
                    start_ray()
                    yield from _over_ray(function, [futures[future] for future in left])
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _over_ray(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[tuple[Item, Result]]:
    import ray

    task = ray.remote(num_cpus=_TASK_CPUS, scheduling_strategy="SPREAD")(function)
    rest = iter(items)
    waiting: dict[object, Item] = {}
    while True:
        for item in rest:
            waiting[task.remote(item)] = item
            if len(waiting) >= _MAX_TASKS:
                break
        if not waiting:
            return
        ready, _ = ray.wait(list(waiting))
        yield waiting.pop(ready[0]), ray.get(ready[0])
