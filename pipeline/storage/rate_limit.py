"""A limit on one process's requests to one prefix of an object store, with a pause when the store asks for one.

Requests are at most `per_second` times the elapsed time, plus a burst of 0.1 s. Each process has its own limit, so n
load tasks send up to n times as many.
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
        """Tests replace `clock` and `sleep`."""
        self._gap_seconds = 1.0 / per_second
        self._most_pause_seconds = most_pause_seconds
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._next = clock()  # when the next request may go
        self._resume = clock() - _CALM_SECONDS
        self._pause_seconds = 0.0

    def wait(self) -> None:
        """Wait for this request's turn."""
        while True:
            with self._lock:
                turn = max(self._next, self._clock() - BURST_SECONDS)
                self._next = turn + self._gap_seconds
            while (left := turn - self._clock()) > 0:
                self._sleep(left)
            if self._clock() >= self._resume:  # else `slow_down` was called meanwhile
                return

    def slow_down(self) -> None:
        """Pause all requests, because the store is overloaded (503); repeated pauses get longer."""
        with self._lock:
            now = self._clock()
            if now < self._resume:
                return  # another answer to the same burst
            calm = now - self._resume >= _CALM_SECONDS
            self._pause_seconds = _FIRST_PAUSE_SECONDS if calm else 2 * self._pause_seconds
            self._pause_seconds = min(self._pause_seconds, self._most_pause_seconds)
            self._resume = now + random.uniform(0.5, 1.0) * self._pause_seconds
            self._next = max(self._next, self._resume)
