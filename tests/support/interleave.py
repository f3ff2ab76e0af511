"""Run functions in threads that take turns, one call of `storage` at a time, in an order that a test chooses.

Threads that just run hardly ever meet in the gap that matters; here every gap is a choice of the test.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

import pytest

from pipeline.storage import objects

CALLS = ("exists", "stat", "list_stats", "read_bytes", "read_versioned")
CHANGES = ("put", "put_if_absent", "compare_and_swap", "delete", "delete_files")


class Turns:
    """Whose turn it is; a thread that is not one of ours is never stopped."""

    def __init__(self, patch: pytest.MonkeyPatch, order: Iterable[int]) -> None:
        self._order = iter(order)
        self._state = threading.Condition()
        self._waiting: dict[int, int] = {}  # thread -> which function
        self._running: dict[int, int] = {}
        self._go: int | None = None
        for name in CALLS + CHANGES:
            patch.setattr(objects, name, self._taking_turns(getattr(objects, name)))
        patch.setattr(time, "sleep", lambda _: self._wait())  # a pause is a chance for the others

    def run(self, *functions: Callable[[], object]) -> list[object]:
        """What each one returns, or the exception that it ends with."""
        results: list[object] = [None] * len(functions)

        def work(number: int) -> None:
            try:
                self._wait()
                results[number] = functions[number]()
            except Exception as error:  # noqa: BLE001 (the test looks at it)
                results[number] = error
            finally:
                with self._state:
                    del self._running[threading.get_ident()]
                    self._state.notify_all()

        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(functions))]
        with self._state:
            for number, thread in enumerate(threads):
                thread.start()
                assert thread.ident is not None
                self._running[thread.ident] = number
        while self._let_one_go():
            pass
        for thread in threads:
            thread.join()
        return results

    def _let_one_go(self) -> bool:
        with self._state:
            assert self._state.wait_for(lambda: self._go is None and self._waiting.keys() == self._running.keys(), 30)
            if not self._running:
                return False
            choice = next(self._order, None)
            numbers = sorted(self._waiting.values())
            number = numbers[0] if choice is None else numbers[choice % len(numbers)]
            self._go = next(thread for thread, found in self._waiting.items() if found == number)
            self._state.notify_all()
            return True

    def _wait(self) -> None:
        me = threading.get_ident()
        with self._state:
            if me not in self._running:
                return
            self._waiting[me] = self._running[me]
            self._state.notify_all()
            self._state.wait_for(lambda: self._go == me)
            self._go = None
            del self._waiting[me]

    def _taking_turns(self, real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            self._wait()
            return real(*arguments, **named)

        return call
