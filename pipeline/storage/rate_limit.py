"""How fast one process may ask one prefix of an object store, and when it must leave it alone for a moment.

Below `object_fetch`. Guarantee: over any time the requests let through are at most `per_second` times its
length, and a burst of a tenth of a second's worth; after `slow_down` nobody goes before the pause is over.
It knows only its own process: with n load tasks at once, a prefix sees up to n times as many requests.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

BURST_SECONDS = 0.1
_FIRST_PAUSE_SECONDS = 0.5
_CALM_SECONDS = 10.0


class RateLimit:
    """A token bucket with a pause, for many threads."""

    def __init__(
        self,
        per_second: float,
        most_pause_seconds: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`clock` and `sleep` are others in tests."""
        self._gap_seconds = 1.0 / per_second
        self._most_pause_seconds = most_pause_seconds
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._next = clock()  # when the next request may go
        self._resume = clock() - _CALM_SECONDS
        self._pause_seconds = 0.0

    def wait(self) -> None:
        """Return when it is this request's turn."""
        while True:
            with self._lock:
                turn = max(self._next, self._clock() - BURST_SECONDS)
                self._next = turn + self._gap_seconds
            while (left := turn - self._clock()) > 0:
                self._sleep(left)
            if self._clock() >= self._resume:  # else: told to slow down while this one was waiting
                return

    def slow_down(self) -> None:
        """The store has had enough (503): nobody goes for a while, longer each time this happens in a row."""
        with self._lock:
            now = self._clock()
            if now < self._resume:
                return  # one of many answers to the same burst
            calm = now - self._resume >= _CALM_SECONDS
            self._pause_seconds = _FIRST_PAUSE_SECONDS if calm else 2 * self._pause_seconds
            self._pause_seconds = min(self._pause_seconds, self._most_pause_seconds)
            self._resume = now + random.uniform(0.5, 1.0) * self._pause_seconds
            self._next = max(self._next, self._resume)
