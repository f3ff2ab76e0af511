"""The local file system as a store of whole, durable objects.

Below `storage`, beside `object_store`. Guarantee: an object appears whole or not at all, and is on disk
before a call returns: written beside its name, synced, then linked or renamed. It does not know URIs.
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
        """Whether an object of that name is there."""
        return Path(name).is_file()

    def stat(self, name: str) -> Stat:
        """Size, time and etag; raises FileNotFoundError."""
        return _stat(os.stat(name))

    def listing(self, prefix: str, deep: bool = True) -> Iterator[tuple[str, Stat]]:
        """All whole objects below a folder, or only those right in it."""
        for folder, folders, names in os.walk(prefix):
            folders[:] = sorted(folders) if deep else []  # os.walk goes by what is left here
            for name in sorted(names):
                path = os.path.join(folder, name)
                if not name.startswith(".") and os.path.isfile(path):
                    with contextlib.suppress(FileNotFoundError):  # removed since
                        yield path, _stat(os.stat(path))

    def leftovers(self, prefix: str) -> Iterator[tuple[str, Stat]]:
        """Temporary files: of writers at work, and of those that died."""
        for folder, _, names in os.walk(prefix):
            for path in (os.path.join(folder, name) for name in names if name.startswith(_TEMPORARY)):
                with contextlib.suppress(FileNotFoundError):  # its writer is done
                    yield path, _stat(os.stat(path))

    def folders(self, prefix: str) -> list[str]:
        """The folders right in a folder; links to folders are not followed, as in a listing."""
        with os.scandir(prefix) as entries:
            return sorted(entry.path for entry in entries if entry.is_dir(follow_symlinks=False))

    def read(self, name: str, offset: int | None, length: int | None) -> tuple[bytes, str]:
        """Bytes, and the etag of the object."""
        with open(name, "rb") as file:
            if offset is not None:
                file.seek(offset)
            return file.read(-1 if length is None else length), _stat(os.fstat(file.fileno())).etag

    def open(self, name: str) -> io.BufferedReader:
        """A seekable file."""
        return _open_regular(name)

    @contextmanager
    def local_file(self, name: str) -> Iterator[Path]:
        """The object as a file on this machine, which it is already."""
        yield Path(name)

    def read_versioned(self, name: str) -> tuple[bytes, str] | None:
        """Bytes and version; None where there is no such object."""
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
        """Link or fail."""
        path = Path(name)
        with _temporary(path, data) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                raise AlreadyExists(name) from None
        _sync_folder(path.parent)

    def compare_and_swap(self, name: str, data: bytes, version: str | None) -> str:
        """Rename under a lock."""
        path = Path(name)
        with _temporary(path, data) as temporary, _locked(path):
            current = self.read_versioned(name)
            if (current[1] if current else None) != version:
                raise Changed(name)
            os.rename(temporary, path)
        _sync_folder(path.parent)
        return hashlib.sha256(data).hexdigest()

    def delete(self, names: list[str]) -> None:
        """Remove objects; those that are not there are no error."""
        for name in names:
            Path(name).unlink(missing_ok=True)

    def delete_folder(self, prefix: str) -> None:
        """Remove a folder and what is below it, or an object; of a link the link alone, never what it points to."""
        path = Path(prefix)
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
            return
        for name in sorted(path.rglob("*"), reverse=True):
            name.rmdir() if name.is_dir() and not name.is_symlink() else name.unlink(missing_ok=True)
        path.rmdir()

    def check(self, prefix: str) -> None:
        """Whether objects can be created below a folder, which stays missing where it is; raises DataError."""
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
                "the folder cannot be written", found=error.strerror, where=prefix, remedy="give another one"
            ) from error


class LocalReader:
    """Images from regular files: one open for all that is wanted of a file at once.

    A file below `root` must lie there in fact: a link that leads out of it is not followed. Files that are named
    elsewhere are read where they are. Without a root every link is followed.
    """

    def __init__(self, root: str | None = None) -> None:
        """Nothing is opened yet."""
        self._below = None if root is None else f"{root.rstrip('/')}/"
        self._really_below = None if root is None else f"{os.path.realpath(root).rstrip('/')}/"

    def whole(self, name: str, most_bytes: int) -> tuple[bytes, str]:
        """A file."""
        COUNTS.add("requests:image")
        with self._open(name) as file:
            stat = _stat(os.fstat(file.fileno()))
            if stat.size_bytes > most_bytes:
                raise TooLarge(stat.size_bytes, stat.etag)
            data = file.read(stat.size_bytes)  # and no more: files of /proc say 0 and may have no end
        COUNTS.add("bytes:image", len(data))
        return data, stat.etag

    def spans(self, name: str, spans: list[Span]) -> Iterator[tuple[bytes, str]]:
        """Spans of a file."""
        with self._open(name) as file:
            etag = _stat(os.fstat(file.fileno())).etag
            for start, stop in spans:
                file.seek(start)
                data = file.read(stop - start)
                COUNTS.add("requests:image")
                COUNTS.add("bytes:image", len(data))
                yield data, etag

    def _open(self, name: str) -> io.BufferedReader:
        """A regular file that lies where its name says."""
        file = _open_regular(name)
        if self._below is not None and name.startswith(self._below):
            found = _real_path(name, file.fileno())
            if not found.startswith(cast(str, self._really_below)):
                file.close()
                raise Outside(found, name)
        return file


def _open_regular(name: str) -> io.BufferedReader:
    """A file for reading; opening it never waits, as it would for the writer of a FIFO.

    Raises:
        Unreadable: it is a FIFO, a socket or a device, whose reading may never end.
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
    """Where an opened file lies; without /proc where its name leads now."""
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
        if error.filename is None or str(error.filename) == str(temporary):  # the name means nothing to the user
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
    """Make a folder and those above it; each that was missing is on disk before anything is put into it."""
    if path.is_dir():
        return
    _make_folder(path.parent)
    path.mkdir(exist_ok=True)  # another process may have made it just now, and not have synced it yet
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
