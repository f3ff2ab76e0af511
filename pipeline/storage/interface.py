"""The interface of stores of objects, and their errors."""

from __future__ import annotations

import errno
import io
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


def is_full(error: OSError) -> bool:
    """Whether the error means that the disk or the user's quota is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


class AlreadyExists(Exception):
    """`put_if_absent` failed: the object exists."""


class Changed(Exception):
    """`compare_and_swap` failed: the object has changed since it was read."""


class Unreadable(OSError):
    """The store will never return this object; `code` is its reason."""

    def __init__(self, code: str, text: str, uri: str) -> None:
        super().__init__(errno.EIO, text, uri)
        self.code = code


class Outside(OSError):
    """A link leads out of the folder from which images may be read."""

    def __init__(self, found: str, uri: str) -> None:
        super().__init__(errno.EPERM, found, uri)
        self.found = found


class TooLarge(Exception):
    """An object is larger than the reader's limit."""

    def __init__(self, size_bytes: int, etag: str) -> None:
        super().__init__(f"{size_bytes} bytes")
        self.size_bytes, self.etag = size_bytes, etag


@dataclass(frozen=True, slots=True)
class Stat:
    """Size in bytes, modification time (Unix seconds), and an etag that changes with the content."""

    size_bytes: int
    modified_seconds: float
    etag: str


class Store(Protocol):
    """Named objects. Raises FileNotFoundError and PermissionError for missing and forbidden objects."""

    def exists(self, name: str) -> bool:
        """Whether the object exists."""

    def stat(self, name: str) -> Stat:
        """Its size, time and etag."""

    def listing(self, prefix: str, deep: bool = True) -> Iterator[tuple[str, Stat]]:
        """All objects below a folder, or only those directly in it, in a stable order."""

    def leftovers(self, prefix: str) -> Iterator[tuple[str, Stat]]:
        """Unfinished objects below a folder, of writers that are at work or have died."""

    def folders(self, prefix: str) -> list[str]:
        """The folders directly in a folder, sorted; none if it has so many objects that the search would be long."""

    def read(self, name: str, offset: int | None, length: int | None) -> tuple[bytes, str]:
        """A whole object, or `length` bytes from `offset` (fewer at its end), and the object's etag."""

    def open(self, name: str) -> io.BufferedReader:
        """A seekable binary file."""

    def local_file(self, name: str) -> AbstractContextManager[Path]:
        """A local file with the object's bytes, which lasts as long as the `with`."""

    def read_versioned(self, name: str) -> tuple[bytes, str] | None:
        """Bytes, and the version for `compare_and_swap`; None if there is no object."""

    def put(self, name: str, data: bytes) -> None:
        """Write or replace an object atomically."""

    def put_if_absent(self, name: str, data: bytes) -> None:
        """Create an object atomically; raises AlreadyExists."""

    def compare_and_swap(self, name: str, data: bytes, version: str | None) -> str:
        """Replace an object that is still at `version` (None: missing); returns the new version, raises Changed."""

    def delete(self, names: list[str]) -> None:
        """Remove objects; missing ones are no error."""

    def delete_folder(self, prefix: str) -> None:
        """Remove the object and all objects below it."""

    def check(self, prefix: str) -> None:
        """Check that the store can hold a run; raises ConfigError or DataError."""


Span = tuple[int, int]
"""A byte range: start, and stop (exclusive)."""


class Reader(Protocol):
    """Reads images, from many threads; raises as a `Store` does. Each read counts as `requests:image`."""

    def whole(self, name: str, most_bytes: int) -> tuple[bytes, str]:
        """An object and its etag; raises TooLarge before reading its bytes."""

    def spans(self, name: str, spans: list[Span]) -> Iterator[tuple[bytes, str]]:
        """The bytes of each span (fewer at the object's end) and the etag (empty if there were no bytes)."""
