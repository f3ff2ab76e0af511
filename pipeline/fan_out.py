"""One function over many pieces of a gallery: in this process where it is small, else as Ray tasks.

For what is measured beside the backfill: a gallery of a few thousand images is not worth a task per piece, and
its tests need no Ray. Guarantee: the results come in the order of the pieces, whoever made them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

SMALL_IMAGES = 250_000
"""Up to here a pass over the gallery takes seconds in one process."""

_TASK_CPUS = 0.5


def each(function: Callable[..., T], shared: tuple[object, ...], pieces: Sequence[object], images: int) -> Iterator[T]:
    """What the function gives for each piece, in order.

    Args:
        function: of a module, so that a task can import it; called with what is shared, then the piece.
        shared: arguments that are the same for all pieces; sent to the cluster once.
        pieces: the last argument.
        images: how many the pieces hold together.
    """
    if images <= SMALL_IMAGES:
        yield from (function(*shared, piece) for piece in pieces)
        return
    import ray  # here: readers of what is measured do without it

    task = ray.remote(num_cpus=_TASK_CPUS)(function)
    stored = [ray.put(item) for item in shared]
    for reference in [task.remote(*stored, piece) for piece in pieces]:
        yield ray.get(reference)
