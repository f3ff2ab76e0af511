"""An object store in memory that keeps each write in order: the writes so far are all that a crash leaves."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.storage.retry import Again
from pipeline.storage.retrying_store import Page
from tests.support.unreliable_store import UnreliableStore

Write = tuple[str, bytes | None]
"""A name and its new content; None if it is deleted."""


class MemoryStore(UnreliableStore):
    """With folders, and honest conditions.

    Attributes:
        writes: that were done, in order.
        loses_answers: the client gets no answer to its first write of each name, though the write is done.
    """

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[Write] = []
        self.loses_answers = False
        self._lost: set[str] = set()

    def do(self, writes: Iterable[Write]) -> None:
        """Do what another run has done."""
        for name, data in writes:
            if data is None:
                self.objects.pop(name, None)
            else:
                self.objects[name] = data

    def put(self, name: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        etag = super().put(name, data, if_absent=if_absent, if_match=if_match)
        self.writes.append((name, data))
        if self.loses_answers and name not in self._lost:
            self._lost.add(name)
            raise Again("lost")
        return etag

    def delete(self, names: list[str]) -> None:
        super().delete(names)
        self.writes += [(name, None) for name in names]

    def listing(self, prefix: str, token: str | None, deep: bool = True) -> Page:
        found = sorted(super().listing(prefix, token).objects)
        if deep:
            return Page(found, None)
        right = [(name, stat) for name, stat in found if "/" not in name.removeprefix(prefix)]
        below = {name.removeprefix(prefix).partition("/")[0] for name, _ in found if "/" in name.removeprefix(prefix)}
        return Page(right, None, sorted(f"{prefix}{name}" for name in below))
