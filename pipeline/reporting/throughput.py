"""What a rate is, once for all that show one: images made durable per second of embedding.

The first moment only starts the clock, because nobody knows when its images were begun. A pause far longer than is
usual in the run is an interruption, and no embedding. Less than `SHORTEST_SECONDS` of work has no rate: of so few
units the figure says nothing. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

SHORTEST_SECONDS = 5.0
_IDLE_SECONDS = 30.0  # a pause between two moments that is longer, and far longer than is usual in the run,
_IDLE_FACTOR = 20  # is a run that was interrupted, not one that is slow


@dataclass(frozen=True, slots=True)
class Throughput:
    """What was made durable in a stretch of a run.

    Attributes:
        images: made durable after its first moment; those of the first moment itself do not count.
        seconds: from its first moment to its last.
        idle_seconds: of these, in which the run was interrupted.
    """

    images: int
    seconds: float
    idle_seconds: float = 0.0

    @property
    def per_second(self) -> float:
        """Images per second of embedding."""
        return self.images / max(self.seconds - self.idle_seconds, 1e-6)


def throughput(moments: Iterable[tuple[float, int]], recent_seconds: float | None = None) -> Throughput | None:
    """Of a run or its last stretch; None while there are no two moments, or too few seconds of work between them.

    Args:
        moments: seconds at which so many images became durable, in any order and by any clock.
        recent_seconds: how long the stretch is, back from the last moment; None for all of it.
    """
    known = sorted(moments)
    if recent_seconds is not None and known:
        known = [item for item in known if known[-1][0] - item[0] <= recent_seconds]
    if not known or known[-1][0] <= known[0][0]:
        return None
    start = known[0][0]
    images = sum(count for seconds, count in known if seconds > start)
    pauses = np.diff([seconds for seconds, _ in known])
    usual = float(np.median(pauses))
    idle = pauses[pauses > max(_IDLE_SECONDS, _IDLE_FACTOR * usual)]
    found = Throughput(images, known[-1][0] - start, float((idle - usual).sum()))
    return found if found.seconds - found.idle_seconds >= SHORTEST_SECONDS else None
