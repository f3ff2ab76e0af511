"""What a store of objects can do, and how it says no; the ground that `storage` and its stores stand on."""

from __future__ import annotations

import errno
import io
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


def is_full(error: OSError) -> bool:
    """Whether an error says that the disk, or the user's share of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


class AlreadyExists(Exception):
    """`put_if_absent` lost: the name is taken."""


class Changed(Exception):
    """`compare_and_swap` lost: the object is no longer the one that was read."""


class Unreadable(OSError):
    """The store does not give this one object, and will not the next time either; `code` is its word for why."""

    def __init__(self, code: str, text: str, uri: str) -> None:
        super().__init__(errno.EIO, text, uri)
        self.code = code


class Outside(OSError):
    """A link leads out of the folder that images may be read from."""

    def __init__(self, found: str, uri: str) -> None:
        super().__init__(errno.EPERM, found, uri)
        self.found = found


class TooLarge(Exception):
    """A whole object is larger than its reader wants to have."""

    def __init__(self, size_bytes: int, etag: str) -> None:
        super().__init__(f"{size_bytes} bytes")
        self.size_bytes, self.etag = size_bytes, etag


@dataclass(frozen=True, slots=True)
class Stat:
    """Size in bytes, modification time in seconds since the epoch, and an etag that changes with the content."""

    size_bytes: int
    modified_seconds: float
    etag: str


class Store(Protocol):
    """Whole objects under names. Missing and forbidden ones are FileNotFoundError and PermissionError."""

    def exists(self, name: str) -> bool:
        """Whether an object of that name is there."""

    def stat(self, name: str) -> Stat:
        """Its size, time and etag."""

    def listing(self, prefix: str, deep: bool = True) -> Iterator[tuple[str, Stat]]:
        """All objects below a folder, or only those right in it; in an order that stays the same."""

    def leftovers(self, prefix: str) -> Iterator[tuple[str, Stat]]:
        """What is below a folder beside whole objects: the traces of writers, some of which may have died."""

    def folders(self, prefix: str) -> list[str]:
        """The folders right in a folder, sorted; none where it holds so many objects that this is a long search."""

    def read(self, name: str, offset: int | None, length: int | None) -> tuple[bytes, str]:
        """A whole object or `length` bytes from `offset`, and the object's etag; fewer bytes at its end."""

    def open(self, name: str) -> io.BufferedReader:
        """A seekable binary file."""

    def local_file(self, name: str) -> AbstractContextManager[Path]:
        """A file on this machine with the object's bytes, for the length of a `with`."""

    def read_versioned(self, name: str) -> tuple[bytes, str] | None:
        """Bytes, and the version for `compare_and_swap`; None where there is no such object."""

    def put(self, name: str, data: bytes) -> None:
        """Write or replace, whole or not at all."""

    def put_if_absent(self, name: str, data: bytes) -> None:
        """Create, whole or not at all; raises AlreadyExists."""

    def compare_and_swap(self, name: str, data: bytes, version: str | None) -> str:
        """Replace what is still at `version` (None: missing); returns the new version, raises Changed."""

    def delete(self, names: list[str]) -> None:
        """Remove objects; those that are not there are no error."""

    def delete_folder(self, prefix: str) -> None:
        """Remove an object of that name, and all objects below it."""

    def check(self, prefix: str) -> None:
        """Prove that a run can live here; raises ConfigError or DataError."""


Span = tuple[int, int]
"""Bytes of an object, from the first to before the second."""


class Reader(Protocol):
    """Reads images, from many threads; says no as a `Store` does. Each read counts as `requests:image`."""

    def whole(self, name: str, most_bytes: int) -> tuple[bytes, str]:
        """An object and its etag; raises TooLarge before its bytes are read."""

    def spans(self, name: str, spans: list[Span]) -> Iterator[tuple[bytes, str]]:
        """The bytes of each span, fewer where the object ends before, and the etag (empty if none came)."""
