"""Fetch the encoded images of a unit in few requests.

An image that cannot be read becomes a reject; only faults of the store or the machine are raised. Memory holds at most
a unit's encoded images and the requests in flight.
"""

from __future__ import annotations

import errno
import functools
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.arrays import Int64
from pipeline.errors import DataError, TransientError
from pipeline.schema import DELETED
from pipeline.storage import interface, objects, parquet
from pipeline.storage.interface import Reader, Span
from pipeline.storage.retry import COUNTS
from pipeline.storage.settings import FetchSettings

WAITED = "microseconds:image"
"""In `objects.counts`: how long decoding waited for images' bytes."""

_MOST = 0.5
"""Read the whole container if at least this share of it is wanted: unused bytes are cheaper than more requests."""

_DECODED_BYTES = 2**26
"""Bytes of a Parquet file's image column that are decoded at once."""

_DECODED_ROWS = 256

_NO_PLACE = (errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP)


@dataclass(frozen=True, slots=True)
class Place:
    """Where one image lies: an object, a byte range of one, or a row of a Parquet file's image column.

    `etag` is the object's when the manifest was made, if known; a space and the object's sha256 may follow.
    """

    uri: str
    offset: int | None
    length: int | None
    row: int | None
    etag: str | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the image is a whole object, not part of a container."""
        return self.row is None and self.length is None and not self.offset

    def is_changed(self, etag: str | None) -> bool:
        """Whether the object has changed since the manifest was made; False if that is not known."""
        if self.etag is None or etag is None:
            return False
        planned = self.etag.partition(" ")[0]
        return planned.strip('"') != etag.strip('"')  # a user's manifest may have etags without quotes


class Reject(Exception):
    """One image that cannot be embedded; `reason` is a few words, optionally followed by `: detail`."""

    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(f"{stage}: {reason}")
        self.stage = stage
        self.reason = reason


Fetched = tuple[bytes | Reject, str | None]
"""An encoded image or its reject, and the etag of its object when it was read."""


@dataclass(frozen=True, slots=True)
class ByteRange:
    """One request of a container: the bytes of `span`, for the images at these rows of the unit."""

    span: Span
    rows: list[int]


def fetch(places: list[Place], max_bytes: int, settings: FetchSettings, root: str | None = None) -> Iterator[Fetched]:
    """The encoded bytes of each place, in order; requests, bytes and retries are counted in `objects.counts`.

    Links may lead anywhere, or with `root`, a local folder, nowhere out of it. An image above `max_bytes` is a reject.

    Raises:
        TransientError: a store kept failing.
        DataError: a store refuses the credentials, or a bucket is missing.
    """
    unit = _Unit(places, max_bytes, settings, root)
    for row, (data, etag) in enumerate(unit.fetched()):
        COUNTS.add("bytes:needed", 0 if isinstance(data, Reject) else len(data))
        yield _since_manifest(data, etag, places[row]), etag


def coalesce(ranges: Iterable[tuple[int, Span]], settings: FetchSettings) -> list[ByteRange]:
    """Requests that cover the ranges of one container, each given as (row, span).

    Ranges at most `max_gap_bytes` apart share a request of up to `max_request_bytes`. If most bytes between the first
    and the last range are wanted, the gap does not matter. No range is cut; a longer one is a request of its own.
    """
    pieces: list[ByteRange] = []
    ordered = sorted(ranges, key=lambda item: item[1])
    wanted = sum(stop - start for _, (start, stop) in ordered)
    whole = max(stop for _, (_, stop) in ordered) - ordered[0][1][0] if ordered else 0
    most_gap = settings.max_request_bytes if wanted >= _MOST * whole else settings.max_gap_bytes
    for row, (start, stop) in ordered:
        if pieces:
            (first, last), rows = pieces[-1].span, pieces[-1].rows
            longest = max(last, stop) - first
            if start - last <= most_gap and longest <= max(settings.max_request_bytes, last - first):
                pieces[-1] = ByteRange((first, max(last, stop)), [*rows, row])
                continue
        pieces.append(ByteRange((start, stop), [row]))
    return pieces


_MISSING = Reject("fetch", "missing")


@dataclass(frozen=True, slots=True)
class _Read:
    """The work of one thread in one go: a whole object, or byte ranges of one."""

    uri: str
    rows: list[int]
    pieces: list[ByteRange] | None


class _Unit:
    def __init__(self, places: list[Place], max_bytes: int, settings: FetchSettings, root: str | None) -> None:
        self._places, self._max_bytes, self._settings, self._root = places, max_bytes, settings, root
        self._found: list[Fetched | None] = [None] * len(places)
        self._readers: dict[str, Reader] = {}

    def fetched(self) -> Iterator[Fetched]:
        """Each image in order; an image is dropped from memory once it is yielded."""
        reads = self._plan()
        with ThreadPoolExecutor(self._settings.concurrency) as pool:
            try:
                waiting: dict[int, Future[None]] = {}
                for read in reads:
                    waiting |= dict.fromkeys(read.rows, pool.submit(self._run, read))
                with _waiting():
                    self._read_columns()
                for row in range(len(self._places)):
                    if row in waiting:
                        _wait(waiting.pop(row))
                    found, self._found[row] = self._found[row], None
                    assert found is not None, f"row {row} was not fetched"
                    yield found
            finally:
                pool.shutdown(cancel_futures=True)  # after an error the rest is not needed

    def _plan(self) -> list[_Read]:
        """What to read, in the order in which images are needed; places that cannot be read become rejects."""
        whole: dict[str, list[int]] = {}
        ranges: dict[str, list[tuple[int, Span]]] = {}
        for row, place in enumerate(self._places):
            if place.row is not None:
                continue
            if (bad := self._refused(place)) is not None:
                self._found[row] = bad, None
            elif place.is_whole:
                whole.setdefault(place.uri, []).append(row)
            else:
                ranges.setdefault(place.uri, []).append((row, self._span(place)))
        reads = [_Read(uri, rows, None) for uri, rows in whole.items()]
        for uri, wanted in ranges.items():
            pieces = coalesce(wanted, self._settings)
            together = [pieces] if objects.is_local(uri) else [[piece] for piece in pieces]  # a file is opened once
            reads += [_Read(uri, [row for piece in some for row in piece.rows], some) for some in together]
        return sorted(reads, key=lambda read: min(read.rows))

    def _refused(self, place: Place) -> bytes | Reject | None:
        """The image or reject of a place that needs no request; else None."""
        if (scheme := objects.split(place.uri)[0]) not in objects.SCHEMES:  # from a manifest that was not checked
            return Reject("fetch", f"missing: {scheme}:// cannot be read, only local paths and s3://")
        if min(place.offset or 0, place.length or 0) < 0:
            return Reject("fetch", "missing: offset and length must not be negative")
        if (place.length or 0) > self._max_bytes:
            return self._too_large(place.length or 0)
        return b"" if place.length == 0 else None

    def _too_large(self, size: int) -> Reject:
        return Reject("fetch", f"too large: {size} bytes, at most {self._max_bytes}")

    def _run(self, read: _Read) -> None:
        try:
            reader, name = self._reader(read.uri)
            if read.pieces is None:
                self._leave(read.rows, reader.whole(name, self._max_bytes))
                return
            parts = reader.spans(name, [piece.span for piece in read.pieces])
            for piece, (data, etag) in zip(read.pieces, parts, strict=True):
                for row in piece.rows:
                    self._found[row] = self._cut(self._places[row], piece.span[0], data), etag or None
        except interface.TooLarge as error:
            self._leave(read.rows, (self._too_large(error.size_bytes), error.etag))
        except (OSError, ValueError) as error:
            if _is_unreadable(error, read.uri) and read.pieces is not None and len(read.rows) > 1:
                for row in read.rows:  # other images of the container may be readable
                    self._run(_Read(read.uri, [row], [ByteRange(self._span(self._places[row]), [row])]))
                return
            self._leave(read.rows, (_reject(error, read.uri), None))

    def _reader(self, uri: str) -> tuple[Reader, str]:
        """The reader of a URI's scheme, made once per unit: one per image would double the cost of our own work."""
        scheme, name = objects.split(uri)
        if scheme not in self._readers:
            self._readers[scheme] = objects.image_reader(scheme, self._settings, self._root)
        return self._readers[scheme], name

    def _span(self, place: Place) -> Span:
        start = place.offset or 0
        return start, start + (self._max_bytes + 1 if place.length is None else place.length)

    def _leave(self, rows: list[int], fetched: Fetched) -> None:
        for row in rows:
            self._found[row] = fetched

    def _cut(self, place: Place, first: int, data: bytes) -> bytes | Reject:
        """A copy of an image's bytes, so that the request's other bytes can be freed."""
        start = (place.offset or 0) - first
        if place.length is None:
            found = data[start:]
            return found if len(found) <= self._max_bytes else self._too_large(len(found))
        found = data[start : start + place.length]
        if len(found) < place.length:
            return Reject("fetch", f"truncated: {len(found)} of {place.length} bytes are there")
        return found

    def _read_columns(self) -> None:
        """The rows of Parquet files, read while the requests are in flight."""
        columns: dict[str, list[int]] = {}
        for row, place in enumerate(self._places):
            if place.row is not None:
                columns.setdefault(place.uri, []).append(row)
        for uri, rows in columns.items():
            found, etag = _column(uri, {self._places[row].row or 0 for row in rows})
            if isinstance(found, Reject) and not objects.is_local(uri):
                found = self._ask(uri.rpartition("#")[0], found)
            planned = next((self._places[row].etag for row in rows if self._places[row].etag), None)
            etag = _same_content(uri.rpartition("#")[0], etag, planned)
            for row in rows:
                data = found if isinstance(found, Reject) else found.get(self._places[row].row or 0, _MISSING)
                if isinstance(data, bytes) and len(data) > self._max_bytes:
                    data = self._too_large(len(data))
                self._found[row] = data, etag

    def _ask(self, path: str, reject: Reject) -> Reject:
        """Ask the store why a file could not be read: the answer to a HEAD does not name the cause.

        Raises:
            DataError: the bucket is missing, or the credentials are refused.
        """
        if reject is not _MISSING and not reject.reason.startswith("unreadable"):
            return reject
        try:
            reader, name = self._reader(path)
            list(reader.spans(name, [(0, 1)]))
        except OSError as error:
            return _reject(error, path)
        return reject


@contextmanager
def _waiting() -> Iterator[None]:
    """Count the time until the end as waiting for images' bytes, in whole microseconds."""
    start = time.perf_counter()
    try:
        yield
    finally:
        COUNTS.add(WAITED, round((time.perf_counter() - start) * 1e6))


def _wait(future: Future[None]) -> None:
    if future.done():
        future.result()
    else:
        with _waiting():
            future.result()


def _is_unreadable(error: OSError | ValueError, uri: str) -> bool:
    """Whether these bytes cannot be read from the local disk (EIO): a bad sector."""
    return isinstance(error, OSError) and error.errno == errno.EIO and objects.is_local(uri)


def _reject(error: OSError | ValueError, uri: str) -> Reject:
    """The reject of an image; faults of the machine are raised."""
    if isinstance(error, interface.Outside):
        return Reject("fetch", f"outside data_root: {error.found} (allow_outside: true reads it)")
    if isinstance(error, interface.Unreadable):
        return Reject("fetch", f"unreadable: {error.code}")
    if _is_unreadable(error, uri):
        return Reject("fetch", "unreadable: EIO")
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return _MISSING
    if isinstance(error, PermissionError):
        return Reject("fetch", "forbidden")
    if isinstance(error, IsADirectoryError):
        return Reject("fetch", "missing: a folder has this name")
    if isinstance(error, OSError) and error.errno not in _NO_PLACE:
        raise error
    return Reject("fetch", f"missing: {error}")


def _since_manifest(data: bytes | Reject, etag: str | None, place: Place) -> bytes | Reject:
    """The image, unless its object was deleted or its container replaced since the manifest was made."""
    if not place.is_whole and place.is_changed(etag):  # another image may lie at the old place
        return Reject("fetch", "container changed: make the manifest again, and start a new run with --new-run")
    if data is _MISSING and place.etag is not None:
        return Reject("fetch", f"{DELETED}: was there when the manifest was made")
    return data


def _same_content(path: str, etag: str | None, planned: str | None) -> str | None:
    """A file's etag; the planned one if the file was only touched or copied and its bytes are the same."""
    known, _, sha256 = (planned or "").partition(" ")
    if etag in (None, known) or not sha256 or not objects.is_local(path):
        return etag
    return known if _sha256(path, etag) == sha256 else etag


@functools.lru_cache(maxsize=1024)
def _sha256(path: str, etag: str) -> str:
    return objects.sha256(path)


def _column(uri: str, wanted: set[int], tries: int = 3) -> tuple[dict[int, bytes] | Reject, str | None]:
    """The wanted rows of a Parquet image column (`file.parquet#column`), and the file's etag."""
    path, _, column = uri.rpartition("#")
    etag = None
    try:
        etag = objects.stat(path).etag
        found = dict(_column_rows(path, column, np.array(sorted(wanted), dtype=np.int64)))
        if objects.stat(path).etag == etag:
            return found, etag
        replaced: Exception | None = None
    except (OSError, ValueError) as error:
        return _reject(error, path), None
    except DataError as error:
        cause = error.__cause__
        if not isinstance(cause, OSError) or cause.errno is None:  # Arrow's own OSErrors have no errno
            return Reject("fetch", f"damaged: {error}".splitlines()[0]), etag
        if cause.errno != errno.ESTALE:
            return _reject(cause, path), etag
        replaced = error
    if tries > 1:  # replaced while it was read: read the new file
        return _column(uri, wanted, tries - 1)
    raise TransientError("a Parquet file keeps changing while it is read", where=path) from replaced


def _column_rows(path: str, column: str, wanted: Int64) -> Iterator[tuple[int, bytes]]:
    """Reads only row groups that hold a wanted row."""
    with parquet.open_parquet(path) as file:
        if column not in file.schema_arrow.names:
            raise DataError("a Parquet file lacks a column", expected=column, where=path)
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        for group in range(file.num_row_groups):
            rows = wanted[(wanted >= starts[group]) & (wanted < starts[group + 1])]
            if len(rows):
                if objects.is_local(path):  # reads of a store are counted there
                    COUNTS.add("requests:image")
                    COUNTS.add("bytes:image", _column_bytes(file, group, column))
                yield from _images(file, group, column, rows, int(starts[group]))


def _images(file: pq.ParquetFile, group: int, column: str, rows: Int64, first: int) -> Iterator[tuple[int, bytes]]:
    """Some rows of a row group, a few megabytes at a time: a whole column may exceed Arrow's limit of 2 GiB.

    `rows` are rows of the file, ascending; all are in the row group, which begins at row `first`.
    """
    size, num_rows = _column_bytes(file, group, column, compressed=False), file.metadata.row_group(group).num_rows
    at_once = min(max(1, _DECODED_BYTES * num_rows // max(1, size)), _DECODED_ROWS)  # equal images count once in `size`
    for batch in file.iter_batches(at_once, row_groups=[group], columns=[column]):
        end = first + batch.num_rows
        mine = rows[(rows >= first) & (rows < end)]
        images = batch.column(0).take(pa.array(mine - first))
        yield from zip(mine.tolist(), (data or b"" for data in images.to_pylist()), strict=True)
        if end > rows[-1]:
            return
        first = end


def _column_bytes(file: pq.ParquetFile, group: int, column: str, compressed: bool = True) -> int:
    size = "total_compressed_size" if compressed else "total_uncompressed_size"
    metadata = file.metadata.row_group(group)
    chunks = (metadata.column(number) for number in range(metadata.num_columns))
    return sum(getattr(chunk, size) for chunk in chunks if chunk.path_in_schema == column)
