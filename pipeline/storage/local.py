"""The local file system as a store of whole, durable objects.

A file is written under a temporary name, synced, then linked or renamed. So an object appears atomically, and is on
disk before a call returns.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISFIFO, S_ISREG, S_ISSOCK
from typing import cast

from pipeline.errors import DataError
from pipeline.storage.interface import AlreadyExists, Changed, Outside, Span, Stat, TooLarge, Unreadable, is_full
from pipeline.storage.retry import COUNTS

_TEMPORARY = ".tmp-"
_NO_FILE = (errno.ENXIO, errno.ENODEV, errno.EAGAIN)  # opening a socket, or a device that is not there or not ready


class LocalStore:
    """Names are absolute paths; a version is the sha256 of the content."""

    def exists(self, name: str) -> bool:
        """Whether the object exists."""
        return Path(name).is_file()

    def stat(self, name: str) -> Stat:
        """Size, time and etag."""
        return _stat(os.stat(name))

    def listing(self, prefix: str, deep: bool = True) -> Iterator[tuple[str, Stat]]:
        """All objects below a folder, or only those directly in it."""
        for folder, folders, names in os.walk(prefix):
            folders[:] = sorted(folders) if deep else []  # os.walk visits these next
            for name in sorted(names):
                path = os.path.join(folder, name)
                if not name.startswith(".") and os.path.isfile(path):
                    with contextlib.suppress(FileNotFoundError):  # removed since
                        yield path, _stat(os.stat(path))

    def leftovers(self, prefix: str) -> Iterator[tuple[str, Stat]]:
        """Temporary files, of writers that are at work or have died."""
        for folder, _, names in os.walk(prefix):
            for path in (os.path.join(folder, name) for name in names if name.startswith(_TEMPORARY)):
                with contextlib.suppress(FileNotFoundError):  # its writer is done
                    yield path, _stat(os.stat(path))

    def folders(self, prefix: str) -> list[str]:
        """The folders directly in a folder; as in a listing, links are not followed."""
        with os.scandir(prefix) as entries:
            return sorted(entry.path for entry in entries if entry.is_dir(follow_symlinks=False))

    def read(self, name: str, offset: int | None, length: int | None) -> tuple[bytes, str]:
        """Bytes and etag."""
        with open(name, "rb") as file:
            if offset is not None:
                file.seek(offset)
            return file.read(-1 if length is None else length), _stat(os.fstat(file.fileno())).etag

    def open(self, name: str) -> io.BufferedReader:
        """A seekable file."""
        return _open_regular(name)

    @contextmanager
    def local_file(self, name: str) -> Iterator[Path]:
        """The object's own file."""
        yield Path(name)

    def read_versioned(self, name: str) -> tuple[bytes, str] | None:
        """Bytes and version; None if there is no object."""
        try:
            data, _ = self.read(name, None, None)
        except FileNotFoundError:
            return None
        return data, hashlib.sha256(data).hexdigest()

    def put(self, name: str, data: bytes) -> None:
        """Write or replace."""
        path = Path(name)
        with _temporary(path, data) as temporary:
            os.rename(temporary, path)
        _sync_folder(path.parent)

    def put_if_absent(self, name: str, data: bytes) -> None:
        """Create, by a hard link."""
        path = Path(name)
        with _temporary(path, data) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                raise AlreadyExists(name) from None
        _sync_folder(path.parent)

    def compare_and_swap(self, name: str, data: bytes, version: str | None) -> str:
        """Replace, under a lock."""
        path = Path(name)
        with _temporary(path, data) as temporary, _locked(path):
            current = self.read_versioned(name)
            if (current[1] if current else None) != version:
                raise Changed(name)
            os.rename(temporary, path)
        _sync_folder(path.parent)
        return hashlib.sha256(data).hexdigest()

    def delete(self, names: list[str]) -> None:
        """Remove objects; missing ones are no error."""
        for name in names:
            Path(name).unlink(missing_ok=True)

    def delete_folder(self, prefix: str) -> None:
        """Remove an object or a folder with its content; of a link, only the link."""
        path = Path(prefix)
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
            return
        for name in sorted(path.rglob("*"), reverse=True):
            name.rmdir() if name.is_dir() and not name.is_symlink() else name.unlink(missing_ok=True)
        path.rmdir()

    def check(self, prefix: str) -> None:
        """Check that objects can be created below a folder, without creating it; raises DataError."""
        folder = Path(prefix).absolute()
        try:
            while not folder.exists():
                folder = folder.parent
            probe = folder / f"{_TEMPORARY}{uuid.uuid4().hex}"
            self.put_if_absent(str(probe), b"probe")
            probe.unlink()
        except OSError as error:
            if is_full(error):
                raise OSError(error.errno, error.strerror, prefix) from error
            raise DataError(
                "the folder cannot be written", found=error.strerror, where=prefix, remedy="give another folder"
            ) from error


class LocalReader:
    """Reads images from regular files; a file is opened once for all its spans.

    For a name below `root`, links that lead out of `root` are refused. Otherwise links are followed.
    """

    def __init__(self, root: str | None = None) -> None:
        self._below = None if root is None else f"{root.rstrip('/')}/"
        self._really_below = None if root is None else f"{os.path.realpath(root).rstrip('/')}/"

    def whole(self, name: str, most_bytes: int) -> tuple[bytes, str]:
        """A file and its etag."""
        COUNTS.add("requests:image")
        with self._open(name) as file:
            stat = _stat(os.fstat(file.fileno()))
            if stat.size_bytes > most_bytes:
                raise TooLarge(stat.size_bytes, stat.etag)
            data = file.read(stat.size_bytes)  # no more: files of /proc have size 0 and may be endless
        COUNTS.add("bytes:image", len(data))
        return data, stat.etag

    def spans(self, name: str, spans: list[Span]) -> Iterator[tuple[bytes, str]]:
        """The bytes of spans of a file."""
        with self._open(name) as file:
            etag = _stat(os.fstat(file.fileno())).etag
            for start, stop in spans:
                file.seek(start)
                data = file.read(stop - start)
                COUNTS.add("requests:image")
                COUNTS.add("bytes:image", len(data))
                yield data, etag

    def _open(self, name: str) -> io.BufferedReader:
        """A regular file that is really below `root` if its name is."""
        file = _open_regular(name)
        if self._below is not None and name.startswith(self._below):
            found = _real_path(name, file.fileno())
            if not found.startswith(cast(str, self._really_below)):
                file.close()
                raise Outside(found, name)
        return file


def _open_regular(name: str) -> io.BufferedReader:
    """Open a regular file for reading, without waiting for the writer of a FIFO.

    Raises:
        Unreadable: it is a FIFO, a socket or a device, which may be endless.
    """
    try:
        file = open(name, "rb", opener=_opener)  # noqa: SIM115 - closed here if it is no file, else by the caller
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
        raise Unreadable("a socket or a device, not a file", str(error), name) from None
    mode = os.fstat(file.fileno()).st_mode
    if S_ISREG(mode):
        return file
    file.close()
    raise Unreadable(f"a {_kind(mode)}, not a file", "not a regular file", name)


def _opener(name: str, flags: int) -> int:
    return os.open(name, flags | os.O_NONBLOCK | os.O_NOCTTY)


def _kind(mode: int) -> str:
    return "FIFO" if S_ISFIFO(mode) else "socket" if S_ISSOCK(mode) else "device"


def _real_path(name: str, descriptor: int) -> str:
    """The real path of an open file; without /proc, of its name."""
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return os.path.realpath(name)


def _stat(result: os.stat_result) -> Stat:
    return Stat(result.st_size, result.st_mtime, f"{result.st_mtime_ns:x}-{result.st_size:x}")


@contextmanager
def _temporary(path: Path, data: bytes) -> Iterator[Path]:
    _make_folder(path.parent)
    temporary = path.parent / f"{_TEMPORARY}{uuid.uuid4().hex}"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    except OSError as error:
        if error.filename is None or str(error.filename) == str(temporary):  # the user does not know this name
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path.parent / f".lock-{path.name}", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make_folder(path: Path) -> None:
    """Make a folder and its parents; each new one is on disk before anything is put into it."""
    if path.is_dir():
        return
    _make_folder(path.parent)
    path.mkdir(exist_ok=True)  # another process may have just made it, and not synced it yet
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
