"""All reads and writes of a run's files, local or s3://, and the two ways to publish.

The URI's scheme chooses the store. Objects appear atomically, and are durable before a call returns. `put_if_absent`
and `compare_and_swap` have exactly one winner.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pipeline.errors import ConfigError
from pipeline.storage.interface import AlreadyExists, Reader, Stat, Store
from pipeline.storage.local import LocalReader, LocalStore
from pipeline.storage.retry import COUNTS, Retry
from pipeline.storage.retrying_store import ObjectStore
from pipeline.storage.settings import FetchSettings, StorageSettings
from pipeline.storage.uris import holds_user

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

T = TypeVar("T")
U = TypeVar("U")
_SETTINGS = "FASTFILL_STORAGE"  # the settings, as JSON: worker processes inherit them
SCHEMES = ("file", "s3")
"""Schemes of readable URIs; a path without a scheme is a local file."""

_WILD = "*?["
_PIECE_BYTES = 2**23
PARALLEL_READS = 16  # threads: footers and row groups are small and far away


def configure(settings: StorageSettings) -> None:
    """Use these settings from now on, in this process and in those that inherit its environment."""
    os.environ[_SETTINGS] = settings.model_dump_json()


def environment() -> dict[str, str]:
    """Environment variables with the settings, for processes that do not inherit them; no credentials."""
    return {_SETTINGS: os.environ[_SETTINGS]} if _SETTINGS in os.environ else {}


def counts() -> Counter[str]:
    """Counts of this process's requests so far; see `retry.COUNTS`."""
    return COUNTS.snapshot()


def retries(since: Counter[str]) -> int:
    """How many requests this process has repeated since these `counts`."""
    return sum(count for name, count in (counts() - since).items() if name.startswith("retries:"))


def check(uri: str) -> None:
    """Check that a run can live under a URI: it can be written, with conditions.

    Raises:
        ConfigError: the store ignores conditional writes, or the scheme is unknown.
        DataError: the bucket or folder is missing, or may not be written.
    """
    store, name = _locate(uri)
    store.check(name)


def join(uri: str, *parts: str) -> str:
    """`uri/part/part`."""
    return "/".join([uri.rstrip("/"), *parts])


def is_local(uri: str) -> bool:
    """Whether the object lies on a file system of this machine."""
    return split(uri)[0] == "file"


def exists(uri: str) -> bool:
    """Whether the object exists."""
    store, name = _locate(uri)
    return store.exists(name)


def stat(uri: str) -> Stat:
    """Size, time and etag; raises FileNotFoundError."""
    store, name = _locate(uri)
    return store.stat(name)


def list_stats(prefix: str, suffix: str = "") -> list[tuple[str, Stat]]:
    """The URIs and stats of all objects below a folder, sorted; empty if the folder is missing."""
    store, name = _locate(prefix)
    lead = prefix.removesuffix(name)
    return sorted((f"{lead}{found}", info) for found, info in store.listing(name) if found.endswith(suffix))


def iter_stats(prefix: str, deep: bool = True) -> Iterator[tuple[str, Stat]]:
    """As `list_stats`, but one by one, for folders that are too large for memory.

    Args:
        prefix: the folder.
        deep: False for only the objects directly in the folder.
    """
    store, name = _locate(prefix)
    lead = prefix.removesuffix(name)
    return ((f"{lead}{found}", info) for found, info in store.listing(name, deep))


def list_leftovers(prefix: str) -> list[tuple[str, Stat]]:
    """The URIs and stats of unfinished objects below a folder, of writers that are at work or have died."""
    store, name = _locate(prefix)
    lead = prefix.removesuffix(name)
    return sorted((f"{lead}{found}", info) for found, info in store.leftovers(name))


def folders(prefix: str) -> list[str]:
    """The URIs of the folders directly in a folder, sorted, to share a listing among workers.

    Also none if an object store's folder has so many objects that the search would be long.
    """
    store, name = _locate(prefix)
    lead = prefix.removesuffix(name)
    return [f"{lead}{found}" for found in store.folders(name)]


def list_files(prefix: str, suffix: str = "") -> list[str]:
    """The URIs of all objects below a folder, sorted; empty if the folder is missing."""
    return [uri for uri, _ in list_stats(prefix, suffix)]


def expand(pattern: str, suffix: str) -> list[str]:
    """The files of a file name, a folder or a glob, sorted."""
    if exists(pattern):
        return [pattern.removeprefix("file://")]
    if not any(mark in pattern for mark in _WILD):
        return list_files(pattern, suffix)
    name = _locate(pattern)[1]
    if is_local(pattern):
        files = (file for file in Path("/").glob(name.lstrip("/")) if file.is_file())
        return sorted(str(file) for file in files if not file.name.startswith("."))
    folder = name[: min(name.index(mark) for mark in _WILD if mark in name)].rpartition("/")[0]
    return [uri for uri in list_files(f"s3://{folder}") if _matches(uri.split("/"), pattern.split("/"))]


def read_bytes(uri: str, offset: int | None = None, length: int | None = None) -> bytes:
    """A whole object, or `length` bytes from `offset` (fewer at its end).

    Raises:
        FileNotFoundError, PermissionError: the object is missing or forbidden.
        TransientError: the store kept failing.
    """
    return read_with_etag(uri, offset, length)[0]


def read_with_etag(uri: str, offset: int | None = None, length: int | None = None) -> tuple[bytes, str]:
    """As `read_bytes`, with the object's etag."""
    store, name = _locate(uri)
    return store.read(name, offset, length)


def open_input(uri: str) -> BufferedReader:
    """An object as a seekable binary file."""
    store, name = _locate(uri)
    return store.open(name)


@contextlib.contextmanager
def local_file(uri: str) -> Iterator[Path]:
    """A local path of the object, for libraries that need a file name.

    It may be gone after the `with`, but stays readable if it was opened or mapped before.
    """
    store, name = _locate(uri)
    with store.local_file(name) as path:
        yield path


def split(uri: str) -> tuple[str, str]:
    """The scheme of a URI (`file` for a path), and the object's name in its store."""
    scheme, separator, name = uri.partition("://")
    return (scheme, name) if separator else ("file", uri)


def image_reader(scheme: str, fetch: FetchSettings, root: str | None = None) -> Reader:
    """A reader of images for the stores of a scheme.

    Args:
        scheme: one of SCHEMES.
        fetch: how images are read.
        root: a local folder whose links must not lead out of it; None: links are followed anywhere.
    """
    return _reader(scheme, os.environ.get(_SETTINGS, ""), os.getpid(), fetch, root, _account())


def arrow_filesystem(uri: str) -> tuple[FileSystem, str]:
    """A URI as a pyarrow file system and a path in it, for Ray Train."""
    from pyarrow import fs

    if is_local(uri):
        return fs.LocalFileSystem(), _locate(uri)[1]
    settings = _settings()
    options = {"endpoint_override": settings.endpoint, "region": settings.region or os.environ.get("AWS_REGION")}
    return fs.S3FileSystem(**{key: value for key, value in options.items() if value}), _locate(uri)[1]


def sha256(uri: str) -> str:
    """The hex digest of an object's bytes."""
    digest = hashlib.sha256()
    with open_input(uri) as file:
        while piece := file.read(_PIECE_BYTES):  # each read may be a request
            digest.update(piece)
    return digest.hexdigest()


def read_versioned(uri: str) -> tuple[bytes, str] | None:
    """An object's bytes and its version for `compare_and_swap`; None if it is missing."""
    store, name = _locate(uri)
    return store.read_versioned(name)


def put_if_absent(uri: str, data: bytes) -> None:
    """Create an object atomically.

    Raises:
        AlreadyExists: the object exists, and is left as it is. An object store does not raise if the bytes are equal.
    """
    store, name = _locate(uri)
    store.put_if_absent(name, data)


def put_once(uri: str, data: bytes) -> None:
    """Create an object, or leave it as it is if it exists."""
    with contextlib.suppress(AlreadyExists):
        put_if_absent(uri, data)


def compare_and_swap(uri: str, data: bytes, version: str | None) -> str:
    """Replace an object that is still at `version` (None: still missing), and return the new version.

    If others might write equal bytes, put an attempt id into `data`: see `retrying_store`.

    Raises:
        Changed: the object has another version, and is left as it is.
    """
    store, name = _locate(uri)
    return store.compare_and_swap(name, data, version)


def put(uri: str, data: bytes) -> None:
    """Write or replace an object; for derived files such as reports, never to publish."""
    store, name = _locate(uri)
    store.put(name, data)


def delete(uri: str) -> None:
    """Remove an object, or a folder with its content; a missing one is no error."""
    store, name = _locate(uri)
    store.delete_folder(name)


def delete_files(uris: list[str]) -> None:
    """Remove objects of one store, in few requests."""
    if uris:
        _locate(uris[0])[0].delete([_locate(uri)[1] for uri in uris])


def at_once(function: Callable[[T], U], items: Iterable[T]) -> list[U]:
    """Apply a function that waits for the store to each item, in 16 threads; the results are in order."""
    with ThreadPoolExecutor(PARALLEL_READS, thread_name_prefix="storage") as pool:
        return list(pool.map(function, items))


def _locate(uri: str) -> tuple[Store, str]:
    """The store that a URI belongs to, and the object's name there."""
    scheme, name = split(uri)
    return _store(scheme, os.environ.get(_SETTINGS, ""), os.getpid(), _account()), name


def _account() -> tuple[str, ...]:
    """The environment variables that clients read only once: address, region and account."""
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_PROFILE", "AWS_ACCESS_KEY_ID")
    return tuple(os.environ.get(name, "") for name in names)


@functools.lru_cache(maxsize=8)  # the keys include settings and process, because both may change
def _store(scheme: str, settings: str, process: int, account: tuple[str, ...]) -> Store:
    if scheme == "file":
        return LocalStore()
    if scheme == "s3":
        from pipeline.storage.s3_client import S3Client  # here: importing it takes half a second

        found = _settings()
        if holds_user(found.endpoint or ""):  # from the environment: the config is checked elsewhere
            raise ConfigError(
                "the store's URL must not hold a user or password",
                where="AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL",
                remedy="give credentials through AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
            )
        return ObjectStore(S3Client(found), Retry(found.retry_seconds, found.max_pause_seconds))
    raise ConfigError("unknown scheme of a URI", expected="a local path or s3://", found=f"{scheme}://")


@functools.lru_cache(maxsize=8)
def _reader(
    scheme: str, settings: str, process: int, fetch: FetchSettings, root: str | None, account: tuple[str, ...]
) -> Reader:
    if scheme == "file":
        return LocalReader(root)
    from pipeline.storage.s3_reader import ObjectReader  # here: as above

    return ObjectReader(_settings(), fetch, _store(scheme, settings, process, account))


def _settings() -> StorageSettings:
    text = os.environ.get(_SETTINGS)
    return StorageSettings.model_validate_json(text) if text else StorageSettings()


def _matches(parts: list[str], pattern: list[str]) -> bool:
    return len(parts) == len(pattern) and all(map(fnmatch.fnmatchcase, parts, pattern))
