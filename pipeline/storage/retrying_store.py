"""A `Store` over HTTP, made of single requests of a `Client` that may fail, be lost or arrive twice.

A failing request is repeated for a bounded time, with growing random pauses. If the answer to a conditional write was
lost, the object is read back: equal bytes count as our write. A writer that must be told apart from others who write
the same bytes therefore puts an attempt id into them.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import itertools
import logging
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from pipeline.errors import ConfigError, DataError
from pipeline.storage.interface import AlreadyExists, Changed, Stat
from pipeline.storage.retry import COUNTS, Again, NoBucket, Precondition, Retry

T = TypeVar("T")

logger = logging.getLogger(__name__)

_READ_AHEAD = 2**16
_PROBES = "probe"
_COPY_BYTES = 2**24
_DELETE_AT_ONCE = 1000
_CONDITION_IGNORED = "this endpoint ignored `{}`: a PUT whose condition does not hold was accepted"
_MOST_PUT_BYTES = 5 * 2**30  # of one PUT; more would take a multipart upload


@dataclass(frozen=True, slots=True)
class Blob:
    """Bytes of an object and its etag."""

    data: bytes
    etag: str


@dataclass(frozen=True, slots=True)
class Page:
    """A page of a listing, the token for the next page, and the folders of a listing that is not deep."""

    objects: list[tuple[str, Stat]]
    token: str | None
    folders: list[str] = field(default_factory=list)


class Client(Protocol):
    """One request per call. Raises Again, Precondition, FileNotFoundError, PermissionError, EOFError (416)."""

    def head(self, name: str) -> Stat:
        """Size, time and etag."""

    def get(self, name: str, start: int | None, stop: int | None, if_match: str | None) -> Blob:
        """A whole object, or its bytes from `start` to before `stop`."""

    def put(self, name: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """Write under a condition; returns the etag."""

    def listing(self, prefix: str, token: str | None, deep: bool = True) -> Page:
        """One page of the objects whose names begin with `prefix`; if not deep, those without a further "/"."""

    def delete(self, names: list[str]) -> None:
        """Remove up to 1,000 objects of one bucket; a missing object is no error."""


class ObjectStore:
    """A `Store` over a `Client`, with the client's names; URIs begin with `scheme`."""

    def __init__(self, client: Client, retry: Retry, scheme: str = "s3://") -> None:
        self._client, self._retry, self._scheme = client, retry, scheme

    def exists(self, name: str) -> bool:
        """HEAD."""
        try:
            self.stat(name)
        except FileNotFoundError:
            return False
        return True

    def stat(self, name: str) -> Stat:
        """HEAD."""
        if name.endswith("/"):  # some stores answer this for a folder
            raise FileNotFoundError(errno.ENOENT, "not an object's name", self._scheme + name)
        return self._call("head", name, lambda: self._client.head(name))

    def listing(self, prefix: str, deep: bool = True) -> Iterator[tuple[str, Stat]]:
        """All objects below a folder, or only those directly in it, sorted by name."""
        for page in self._pages(prefix, deep):
            yield from (item for item in page.objects if not item[0].endswith("/"))  # these stand for folders

    def leftovers(self, prefix: str) -> Iterator[tuple[str, Stat]]:
        """Probe objects, of checks that are at work or have died."""
        return self.listing(f"{prefix.rstrip('/')}/{_PROBES}")

    def folders(self, prefix: str) -> list[str]:
        """The folders directly in a folder; none if a page of 1,000 names has none, as there may be many pages."""
        found: list[str] = []
        for page in self._pages(prefix, deep=False):
            if page.token is not None and not page.folders:
                return []
            found += page.folders
        return found

    def read(self, name: str, offset: int | None, length: int | None) -> tuple[bytes, str]:
        """GET."""
        if length == 0:  # no such range exists: a store would send the whole object
            return b"", self.stat(name).etag
        start = 0 if offset is None and length is not None else offset
        blob = self._get(name, start, None if start is None or length is None else start + length)
        return blob.data, blob.etag

    def open(self, name: str) -> io.BufferedReader:
        """A seekable file that reads ranges of one version of the object."""
        return io.BufferedReader(_ObjectFile(self, name), _READ_AHEAD)

    @contextmanager
    def local_file(self, name: str) -> Iterator[Path]:
        """A temporary copy; after the `with`, it stays readable if it was opened or mapped before."""
        with tempfile.TemporaryDirectory(prefix="fastfill-") as folder:
            path = Path(folder, name.rpartition("/")[2])
            self._copy(name, path)
            yield path

    def read_versioned(self, name: str) -> tuple[bytes, str] | None:
        """GET."""
        try:
            blob = self._get(name, None, None)
        except FileNotFoundError:
            return None
        return blob.data, blob.etag

    def put(self, name: str, data: bytes) -> None:
        """PUT."""
        self._put(name, data)

    def put_if_absent(self, name: str, data: bytes) -> None:
        """PUT with If-None-Match; an existing object with equal bytes counts as our own earlier attempt."""
        try:
            self._put(name, data, if_absent=True)
        except Precondition:
            found = self.read_versioned(name)
            if found is None or found[0] != data:
                raise AlreadyExists(f"{self._scheme}{name}") from None

    def compare_and_swap(self, name: str, data: bytes, version: str | None) -> str:
        """PUT with If-Match; an existing object with equal bytes counts as our own earlier attempt."""
        try:
            return self._put(name, data, if_absent=version is None, if_match=version)
        except (Precondition, FileNotFoundError) as error:
            if version is None and isinstance(error, FileNotFoundError):
                raise  # there is no such bucket
            found = self.read_versioned(name)
            if found is None or found[0] != data:
                raise Changed(f"{self._scheme}{name}") from None
            return found[1]

    def delete(self, names: list[str]) -> None:
        """DELETE, one request for up to 1,000 names of one bucket."""
        for _, group in itertools.groupby(names, lambda name: name.partition("/")[0]):
            while some := list(itertools.islice(group, _DELETE_AT_ONCE)):
                self._call("delete", some[0], functools.partial(self._client.delete, some))

    def delete_folder(self, prefix: str) -> None:
        """List, then DELETE."""
        below = (name for page in self._pages(prefix, deep=True) for name, _ in page.objects)
        self.delete([prefix, *below])

    def check(self, prefix: str) -> None:
        """Write, write conditionally, swap, list and delete a probe object."""
        name = f"{prefix.rstrip('/')}/{_PROBES}/{uuid.uuid4().hex}"
        where = self._scheme + prefix
        try:
            self._check_conditions(name)
            self.delete([name])
        except FileNotFoundError as error:
            raise _no_bucket(error, where) from error
        except PermissionError as error:
            raise DataError(
                "the store does not let these credentials write here",
                expected="read, write, list and delete below the run",
                found=error.strerror,
                where=where,
                remedy="grant these rights, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role",
            ) from error
        except OSError as error:
            raise DataError(
                "the store lacks an operation that a run needs",
                expected="plain and conditional PUT, GET, HEAD, LIST and DELETE",
                found=error.strerror,
                where=where,
            ) from error
        finally:
            self._forget(name)

    def _check_conditions(self, name: str) -> None:
        """A write must succeed exactly if its condition holds, and be visible at once."""
        folder = name.rpartition("/")[0]
        next(self._pages(folder, deep=True))  # first, because on some stores a PUT creates a missing bucket
        self._expect(True, "If-None-Match", name, lambda: self.put_if_absent(name, b"first"))
        self._expect(False, "If-None-Match", name, lambda: self.put_if_absent(name, b"second"))
        _, version = self.read_versioned(name) or (b"", None)
        self._expect(True, "If-Match", name, lambda: self.compare_and_swap(name, b"third", version))
        self._expect(False, "If-Match", name, lambda: self.compare_and_swap(name, b"fourth", version))
        listed = [found for found, _ in self.listing(folder)]
        data, _ = self.read_versioned(name) or (b"", None)
        if data != b"third" or name not in listed:
            raise ConfigError(
                "this store cannot hold a run: writes are not visible at once",
                found=f"an older object or listing: {data!r}, {len(listed)} objects",
                where=self._scheme + name,
                remedy="use a strongly consistent store, such as AWS S3, or a local path",
            )

    def _expect(self, done: bool, condition: str, name: str, write: Callable[[], object]) -> None:
        found = True
        try:
            write()
        except (AlreadyExists, Changed):
            found = False
        if found != done:
            raise ConfigError(
                "this store cannot hold a run: it ignores conditional writes",
                expected="the store answers 412 to a conditional PUT when the object exists or has changed",
                found=_CONDITION_IGNORED.format(condition)
                if found
                else f"a PUT with a valid `{condition}` was refused",
                where=self._scheme + name,
                remedy="use a store with conditional writes, such as AWS S3, or a local path",
            )

    def _copy(self, name: str, path: Path) -> None:
        """Copy one version by ranges that are short enough to be repeated."""
        with path.open("wb") as file:
            blob = self._get(name, 0, _COPY_BYTES)
            file.write(blob.data)
            while len(blob.data) == _COPY_BYTES:
                blob = self._get(name, file.tell(), file.tell() + _COPY_BYTES, blob.etag)
                file.write(blob.data)

    def _forget(self, name: str) -> None:
        with contextlib.suppress(OSError, Again):  # the probe was not written, or stays as a few bytes
            self._client.delete([name])

    def _pages(self, prefix: str, deep: bool) -> Iterator[Page]:
        folder, token = f"{prefix.rstrip('/')}/", None
        while True:
            page = self._call("list", folder, functools.partial(self._client.listing, folder, token, deep))
            yield page
            token = page.token
            if token is None:
                return

    def _get(self, name: str, start: int | None, stop: int | None, if_match: str | None = None) -> Blob:
        try:
            blob = self._call("get", name, lambda: self._client.get(name, start, stop, if_match))
        except Precondition:
            raise OSError(errno.ESTALE, "the object was replaced while it was read", self._scheme + name) from None
        except EOFError:  # 416: the range begins at or after the end
            return Blob(b"", self.stat(name).etag)
        COUNTS.add("bytes:get", len(blob.data))
        return blob

    def _put(self, name: str, data: bytes, if_absent: bool = False, if_match: str | None = None) -> str:
        if len(data) > _MOST_PUT_BYTES:
            raise DataError(
                "an object is too large for one PUT",
                expected=f"at most {_MOST_PUT_BYTES:,} bytes",
                found=f"{len(data):,} bytes",
                where=self._scheme + name,
                remedy="use more shards or waves for smaller segments, or smaller units for smaller parts",
            )
        COUNTS.add("bytes:put", len(data))
        return self._call("put", name, lambda: self._client.put(name, data, if_absent=if_absent, if_match=if_match))

    def _call(self, kind: str, name: str, request: Callable[[], T]) -> T:
        try:
            return self._retry.call(kind, request, self._scheme + name)
        except NoBucket as error:  # also if the caller expects missing objects
            raise _no_bucket(error, self._scheme + name) from error


def _no_bucket(error: FileNotFoundError, where: str) -> DataError:
    return DataError("the bucket does not exist", found=error.strerror, where=where, remedy="create it first")


class _ObjectFile(io.RawIOBase):
    """Random access to one version of an object by range requests."""

    def __init__(self, store: ObjectStore, name: str) -> None:
        self._store, self._name, self._position = store, name, 0
        self._stat = store.stat(name)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._stat.size_bytes}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]  # typeshed: any buffer
        stop = min(self._position + len(buffer), self._stat.size_bytes)
        if stop <= self._position:
            return 0
        data = self._store._get(self._name, self._position, stop, self._stat.etag).data
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
