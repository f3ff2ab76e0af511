"""Every moment of a run on a disk, seen through the audit events that Python raises before each file operation.

Nothing of ours is replaced: whatever the storage does, and in whichever thread, its operations come by here.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
_CHANGES = {"os.link": 1, "os.rename": 1, "os.remove": 0, "os.mkdir": 0, "os.rmdir": 0, "os.truncate": 0}
_TEMPORARY = ".tmp-"


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation on a file, before it is done.

    Attributes:
        name: its audit event; `create` and `open` for the two kinds of `open`.
        path: what it changes or reads.
    """

    name: str
    path: str

    @property
    def changes(self) -> bool:
        """Whether it changes what is on the disk."""
        return self.name != "open"


def watch(folder: Path, told: Callable[[Operation], None]) -> None:
    """Be told of each operation below a folder, one at a time; what is raised takes the operation's place.

    For the rest of the process: a hook cannot be taken away.
    """
    lock, inside, prefix = threading.RLock(), threading.local(), f"{folder}/"

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event not in _CHANGES and event != "open":
            return
        operation = _operation(event, arguments)
        if not operation.path.startswith(prefix) or getattr(inside, "hook", False):
            return
        with lock:
            inside.hook = True
            try:
                told(operation)
            finally:
                inside.hook = False

    sys.addaudithook(hook)


def _operation(event: str, arguments: tuple[object, ...]) -> Operation:
    path = arguments[_CHANGES.get(event, 0)]
    text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
    flags = arguments[2] if event == "open" else 0
    if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return Operation("create", text)
    return Operation(event, text)


class States:
    """Copies of a run's folder, one for each different state that a crash can leave."""

    def __init__(self, folder: Path, copies: Path) -> None:
        self._folder, self._copies = folder, copies
        self._last: tuple[frozenset[tuple[str, int]], bool] | None = None
        self._created: set[str] = set()
        self.count = 0

    def take(self, operation: Operation) -> None:
        """Copy the folder, if it is not as it was at the last call; half a temporary file is all that a crash leaves.

        Of states that differ only in temporary files the one that has such files is kept. A file that is written in
        its place gives a state more, in which half of it is there.
        """
        if not operation.changes:
            return
        torn = [path for path in self._created if _TEMPORARY not in path and os.path.exists(path)]
        self._created = {operation.path} if operation.name == "create" else set()
        if any(os.path.getsize(path) for path in torn):
            self._copy(torn)
        files = self._settled(self._list)
        whole = frozenset(item for item in files if _TEMPORARY not in item[0])
        has_leftovers = files != whole
        if self._last is not None and self._last[0] == whole:
            if self._last[1] or not has_leftovers:
                return
            self.count -= 1
        self._copy([])
        self._last = whole, has_leftovers

    def _copy(self, torn: list[str]) -> None:
        copy = self._copies / str(self.count)
        self._settled(lambda: self._copy_to(copy))
        halved = [copy / Path(path).relative_to(self._folder) for path in torn]
        for path in [*halved, *copy.rglob(f"{_TEMPORARY}*")]:
            os.truncate(path, path.stat().st_size // 2)
        self.count += 1

    def _list(self) -> frozenset[tuple[str, int]]:
        return frozenset((str(path), path.lstat().st_ino) for path in self._folder.rglob("*"))

    def _copy_to(self, copy: Path) -> None:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self._folder, copy)

    def _settled(self, look: Callable[[], T]) -> T:
        """What it gives; again if another thread ended meanwhile the one operation that it had begun before."""
        for _ in range(10):
            try:
                return look()
            except (FileNotFoundError, shutil.Error):
                continue
        return look()
