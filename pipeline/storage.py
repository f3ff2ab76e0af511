"""Every byte in and out, and the two ways to publish: `put_if_absent` and `compare_and_swap`.

The only module that opens files for the run. Guarantee: what exists under a name is whole; a reader
never sees half of it, and what is written is on disk before the call returns. It does not know what
the bytes mean.

Local paths only so far: a URI is an absolute path, or `file://` and one.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ConfigError, DataError

_TEMPORARY = ".tmp-"


class AlreadyExists(Exception):
    """`put_if_absent` lost: the name is taken."""


class Changed(Exception):
    """`compare_and_swap` lost: the object is no longer the one that was read."""


@dataclass(frozen=True, slots=True)
class Stat:
    """Size in bytes, modification time in seconds since the epoch, and an etag that changes with the content."""

    size_bytes: int
    modified_seconds: float
    etag: str


def join(uri: str, *parts: str) -> str:
    """`uri/part/part`."""
    return "/".join([uri.rstrip("/"), *parts])


def exists(uri: str) -> bool:
    """Whether an object or a folder of that name is there."""
    return _path(uri).exists()


def stat(uri: str) -> Stat:
    """Raises FileNotFoundError where there is no such object."""
    result = _path(uri).stat()
    return Stat(result.st_size, result.st_mtime, f"{result.st_mtime_ns:x}-{result.st_size:x}")


def list_files(prefix: str, suffix: str = "") -> list[str]:
    """The URIs of all whole objects below a folder, sorted; empty where the folder is missing."""
    root = _path(prefix)
    found = (
        os.path.join(folder, name)
        for folder, _, names in os.walk(root)
        for name in names
        if not name.startswith(".") and name.endswith(suffix)
    )
    return sorted(found)


def expand(pattern: str, suffix: str) -> list[str]:
    """The files that a file name, a folder or a glob stands for, sorted."""
    path = _path(pattern)
    if path.is_dir():
        return list_files(pattern, suffix)
    if path.exists():
        return [str(path)]
    found = Path("/").glob(str(path).lstrip("/")) if any(mark in pattern for mark in "*?[") else ()
    return sorted(str(file) for file in found if not file.name.startswith(".") and file.is_file())


def read_bytes(uri: str, offset: int | None = None, length: int | None = None) -> bytes:
    """A whole object, or `length` bytes from `offset`.

    Raises:
        FileNotFoundError, PermissionError: as the file system says.
    """
    with open_input(uri) as file:
        if offset is None:
            return file.read()
        file.seek(offset)
        return file.read(-1 if length is None else length)


def open_input(uri: str) -> BufferedReader:
    """An object as a seekable binary file."""
    return open(_path(uri), "rb")


def local_copy(uri: str) -> Path:
    """A path on this machine that holds the object, for libraries that want a file name."""
    return _path(uri)


def sha256(uri: str) -> str:
    """The hex digest of an object's bytes."""
    with open_input(uri) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_versioned(uri: str) -> tuple[bytes, str] | None:
    """An object's bytes and the version to give to `compare_and_swap`; None where it is missing."""
    try:
        data = read_bytes(uri)
    except FileNotFoundError:
        return None
    return data, hashlib.sha256(data).hexdigest()


def put_if_absent(uri: str, data: bytes) -> None:
    """Create an object, whole or not at all.

    Raises:
        AlreadyExists: the name is taken; what is there is untouched.
    """
    path = _path(uri)
    with _temporary(path, data) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise AlreadyExists(uri) from None
    _sync_folder(path.parent)


def compare_and_swap(uri: str, data: bytes, version: str | None) -> str:
    """Replace an object that is still at `version` (None: still missing), and return the new version.

    Raises:
        Changed: it is not; what is there is untouched.
    """
    path = _path(uri)
    with _temporary(path, data) as temporary, _locked(path):
        current = read_versioned(uri)
        if (current[1] if current else None) != version:
            raise Changed(uri)
        os.rename(temporary, path)
    _sync_folder(path.parent)
    return hashlib.sha256(data).hexdigest()


def put(uri: str, data: bytes) -> None:
    """Write or replace an object; for what is derived and may be made again (reports), never to publish."""
    path = _path(uri)
    with _temporary(path, data) as temporary:
        os.rename(temporary, path)
    _sync_folder(path.parent)


def delete(uri: str) -> None:
    """Remove an object, or a folder with all that is below it; nothing happens where there is none."""
    path = _path(uri)
    if path.is_dir():
        for name in sorted(path.rglob("*"), reverse=True):
            name.rmdir() if name.is_dir() else name.unlink(missing_ok=True)
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def parquet_bytes(schema: pa.Schema, row_groups: Iterable[pa.Table]) -> bytes:
    """One Parquet file with one row group per table, empty ones included; the same rows give the same bytes."""
    sink = io.BytesIO()
    strings = [field.name for field in schema if pa.types.is_string(field.type)]
    with pq.ParquetWriter(sink, schema, use_dictionary=strings, compression="zstd", compression_level=1) as writer:
        for table in row_groups:
            writer.write_table(table.select(schema.names).cast(schema), row_group_size=max(1, table.num_rows))
    return sink.getvalue()


@contextmanager
def open_parquet(uri: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file for reading.

    Raises:
        DataError: it is missing or not Parquet.
    """
    try:
        with pq.ParquetFile(open_input(uri)) as file:
            yield file
    except FileNotFoundError as error:
        raise DataError("a Parquet file is missing", where=uri) from error
    except (pa.ArrowInvalid, OSError) as error:  # damaged footers and pages come as either
        raise DataError("not a readable Parquet file", found=error, where=uri) from error


def read_parquet(uri: str, columns: list[str] | None = None, row_groups: list[int] | None = None) -> pa.Table:
    """A Parquet file, or some of its columns and row groups."""
    with open_parquet(uri) as file:
        if row_groups is None:
            return file.read(columns=columns)
        return file.read_row_groups(row_groups, columns=columns)


def _path(uri: str) -> Path:
    if uri.startswith("file://"):
        return Path(uri.removeprefix("file://"))
    if "://" in uri:
        raise ConfigError(
            "this store is not supported yet", expected="a local path", found=uri.split("://")[0] + "://", where=uri
        )
    return Path(uri)


@contextmanager
def _temporary(path: Path, data: bytes) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{_TEMPORARY}{uuid.uuid4().hex}"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path.parent / f".lock-{path.name}", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
