"""A store of objects over HTTP, from single requests that may fail, get lost or be answered twice.

Between `storage` and a client (`s3_client`). Guarantee: a request is repeated while it may still succeed,
with jitter and growing pauses, for a bounded time, and each repetition is counted; a conditional write
whose answer was lost is settled by reading back: what is there and equal is ours. So whoever writes under
a condition, and must be told apart from others who write the same, puts an attempt id into the bytes.
"""

from __future__ import annotations

import contextlib
import functools
import io
import random
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from pipeline.errors import ConfigError, DataError, TransientError
from pipeline.store import AlreadyExists, Changed, Stat

T = TypeVar("T")

_FIRST_PAUSE_SECONDS = 0.1
_READ_AHEAD = 2**16
_PROBES = "probe"


class Again(Exception):
    """The same request may succeed later; `cause` is a short name for counting."""

    def __init__(self, cause: str, text: str = "") -> None:
        super().__init__(f"{cause}: {text}" if text else cause)
        self.cause = cause


class Precondition(Exception):
    """The condition of a request did not hold (412)."""


@dataclass(frozen=True, slots=True)
class Blob:
    """Bytes of an object and its etag."""

    data: bytes
    etag: str


@dataclass(frozen=True, slots=True)
class Page:
    """Some of a listing, the token for the next page if there is one, and the folders where it is not deep."""

    objects: list[tuple[str, Stat]]
    token: str | None
    folders: list[str] = field(default_factory=list)


class Client(Protocol):
    """One request per call; raises Again, Precondition, FileNotFoundError, PermissionError, EOFError (416)."""

    def head(self, name: str) -> Stat:
        """Size, time and etag."""

    def get(self, name: str, start: int | None, stop: int | None, if_match: str | None) -> Blob:
        """A whole object, or its bytes from `start` to before `stop`."""

    def put(self, name: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """Write under a condition; returns the etag."""

    def listing(self, prefix: str, token: str | None, deep: bool = True) -> Page:
        """One page of the objects whose names begin with `prefix`; else only those without a further "/"."""

    def delete(self, names: list[str]) -> None:
        """Remove; a missing object is no error."""


class Counts:
    """What a process asked of stores: requests, bytes, and retries by cause. Safe over threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, name: str, count: int = 1) -> None:
        """Add to one of them."""
        with self._lock:
            self._counts[name] += count

    def snapshot(self) -> Counter[str]:
        """All of them, as they are now; subtract two to see what happened between."""
        with self._lock:
            return self._counts.copy()


COUNTS = Counts()
"""`requests:<kind>`, `bytes:get`, `bytes:put` and `retries:<cause>` of this process."""


@dataclass(frozen=True, slots=True)
class Retry:
    """For how long a failing request is repeated, and how long the pauses become at most."""

    seconds: float = 300.0
    most_pause_seconds: float = 10.0

    def call(self, kind: str, request: Callable[[], T], where: str) -> T:
        """Repeat a request while it raises Again.

        Raises:
            TransientError: it still did when the time was over.
        """
        deadline = time.monotonic() + self.seconds
        pause = _FIRST_PAUSE_SECONDS
        while True:
            COUNTS.add(f"requests:{kind}")
            try:
                return request()
            except Again as error:
                COUNTS.add(f"retries:{error.cause}")
                if time.monotonic() >= deadline:
                    raise TransientError(
                        "object storage keeps failing",
                        expected=f"an answer within {self.seconds:g} seconds",
                        found=error,
                        where=where,
                        remedy="what is durable is kept; run the same command again when the store is back",
                    ) from error
            time.sleep(random.uniform(0, pause))  # full jitter: many workers must not come back at once
            pause = min(2 * pause, self.most_pause_seconds)


class ObjectStore:
    """A `Store` over a `Client`; names are those of the client, after `scheme`."""

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
        return self._call("head", name, lambda: self._client.head(name))

    def listing(self, prefix: str, deep: bool = True) -> Iterator[tuple[str, Stat]]:
        """All objects below a folder, or only those right in it, page by page, sorted by name."""
        for page in self._pages(prefix, deep):
            yield from page.objects

    def leftovers(self, prefix: str) -> Iterator[tuple[str, Stat]]:
        """Probes: of checks at work, and of those that died."""
        return self.listing(f"{prefix.rstrip('/')}/{_PROBES}")

    def folders(self, prefix: str) -> list[str]:
        """The folders right in a folder; none where a page of 1,000 names shows none, for it may be one of many."""
        found: list[str] = []
        for page in self._pages(prefix, deep=False):
            if page.token is not None and not page.folders:
                return []
            found += page.folders
        return found

    def read(self, name: str, offset: int | None, length: int | None) -> tuple[bytes, str]:
        """GET."""
        blob = self._get(name, offset, None if offset is None or length is None else offset + length)
        return blob.data, blob.etag

    def open(self, name: str) -> io.BufferedReader:
        """A seekable file that reads ranges of the version it found first."""
        return io.BufferedReader(_ObjectFile(self, name), _READ_AHEAD)

    @contextmanager
    def local_file(self, name: str) -> Iterator[Path]:
        """A copy, removed at the end: what was opened or mapped until then stays readable."""
        with tempfile.TemporaryDirectory(prefix="fastfill-") as folder:
            path = Path(folder, name.rpartition("/")[2])
            path.write_bytes(self._get(name, None, None).data)
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
        """PUT with If-None-Match; equal bytes that are there are taken for an earlier try of ours."""
        try:
            self._put(name, data, if_absent=True)
        except Precondition:
            found = self.read_versioned(name)
            if found is None or found[0] != data:
                raise AlreadyExists(f"{self._scheme}{name}") from None

    def compare_and_swap(self, name: str, data: bytes, version: str | None) -> str:
        """PUT with If-Match; equal bytes that are there are taken for an earlier try of ours."""
        try:
            return self._put(name, data, if_absent=version is None, if_match=version)
        except (Precondition, FileNotFoundError):
            found = self.read_versioned(name)
            if found is None or found[0] != data:
                raise Changed(f"{self._scheme}{name}") from None
            return found[1]

    def delete(self, names: list[str]) -> None:
        """DELETE."""
        if names:
            self._call("delete", names[0], lambda: self._client.delete(names))

    def delete_folder(self, prefix: str) -> None:
        """DELETE what a listing finds."""
        self.delete([prefix, *(name for name, _ in self.listing(prefix))])

    def check(self, prefix: str) -> None:
        """Write, conditionally write, swap and delete a probe object."""
        name = f"{prefix.rstrip('/')}/{_PROBES}/{uuid.uuid4().hex}"
        try:
            self._check_conditions(name)
        except FileNotFoundError as error:
            raise DataError(
                "the bucket is not there", found=error.strerror, where=self._scheme + prefix, remedy="create it first"
            ) from error
        except PermissionError as error:
            raise DataError(
                "the store refuses these credentials",
                expected="read, write, list and delete below the run",
                found=error.strerror,
                where=self._scheme + prefix,
                remedy="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or the machine's role",
            ) from error
        finally:
            self._forget(name)

    def _check_conditions(self, name: str) -> None:
        """Exactly the writes whose condition holds must be done."""
        self.put_if_absent(name, b"first")
        next(self.listing(name.rpartition("/")[0]), None)
        try:
            self.put_if_absent(name, b"second")
        except AlreadyExists:
            pass
        else:
            raise self._ignores("If-None-Match", name)
        found = self.read_versioned(name)
        version = self.compare_and_swap(name, b"third", found[1] if found else None)
        try:
            self.compare_and_swap(name, b"fourth", found[1] if found else None)
        except Changed:
            pass
        else:
            raise self._ignores("If-Match", name)
        if (now := self.read_versioned(name)) != (b"third", version):
            raise self._ignores(f"read-after-write: {now}", name)

    def _ignores(self, condition: str, name: str) -> ConfigError:
        return ConfigError(
            "this store cannot hold a run: it ignores conditional writes",
            expected="412 where the condition of a PUT does not hold",
            found=f"{condition} was ignored",
            where=self._scheme + name,
            remedy="use a store with conditional writes (AWS S3 has them), or a local path",
        )

    def _forget(self, name: str) -> None:
        with contextlib.suppress(OSError, Again):  # the probe did not get in, or stays as a few bytes of litter
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
        except EOFError:  # 416: the range begins at or behind the end
            return Blob(b"", self.stat(name).etag)
        COUNTS.add("bytes:get", len(blob.data))
        return blob

    def _put(self, name: str, data: bytes, if_absent: bool = False, if_match: str | None = None) -> str:
        COUNTS.add("bytes:put", len(data))
        return self._call("put", name, lambda: self._client.put(name, data, if_absent=if_absent, if_match=if_match))

    def _call(self, kind: str, name: str, request: Callable[[], T]) -> T:
        return self._retry.call(kind, request, self._scheme + name)


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
        try:
            data = self._store._get(self._name, self._position, stop, self._stat.etag).data
        except Precondition:
            raise OSError(f"the object was replaced while it was read: {self._name}") from None
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
