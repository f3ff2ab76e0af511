"""The one definition of throughput: images made durable per second of embedding. Pure.

The first moment starts the clock: the start of its images is unknown. Pauses far longer than usual are interruptions
and do not count. Less than `SHORTEST_SECONDS` of work has no rate.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

SHORTEST_SECONDS = 5.0
_IDLE_SECONDS = 30.0  # a longer pause is an interruption,
_IDLE_FACTOR = 20  # if it is also this many times the median pause


@dataclass(frozen=True, slots=True)
class Throughput:
    """Images made durable in a stretch of a run."""

    images: int  # without those of the first moment
    seconds: float  # from the first moment to the last
    idle_seconds: float = 0.0  # the part of `seconds` in which the run was interrupted

    @property
    def per_second(self) -> float:
        """Images per second of embedding."""
        return self.images / max(self.seconds - self.idle_seconds, 1e-6)


def throughput(moments: Iterable[tuple[float, int]], recent_seconds: float | None = None) -> Throughput | None:
    """The throughput of a run or its last stretch; None for fewer than two moments or too few seconds of work.

    Args:
        moments: (seconds, images that became durable then), in any order and by any clock.
        recent_seconds: the length of the stretch, back from the last moment; None for the whole run.
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
