"""The images of a tar: offsets and lengths from its headers, labels from WebDataset siblings.

Each image is a row whose byte range is the image. A tar for which that is impossible (cut off, damaged, compressed,
links, sparse members) is refused. Concatenated tars are read to their end. Over object storage only the headers are
read, unless they are less than `_SKIP_BYTES` apart on average: then reading everything in long ranges is cheaper.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator
from typing import IO, cast

from pipeline.errors import DataError
from pipeline.manifest.splits import ManifestRow, Options, SourceSplit, SplitWriter
from pipeline.storage import objects

_BLOCK = 512
_SKIP_BYTES = 2**20  # transferred in the latency of a request: 16 KiB take 2.1 ms, 8 MiB 12.3 ms (SeaweedFS)
_LONG_READ = 8 * 2**20
_FIRST_READ = 256 * 2**10
_HEADER_READ = 16 * 2**10  # with a pax header, a label beside the image, and its header
_MAX_LABEL_BYTES = 2**20
_LABELS = (".cls", ".txt", ".json")  # the first one that exists is used
# Raised for damaged headers: text for a number, an impossible size, an endless chain of headers.
_BAD_NUMBERS = (ValueError, OverflowError, MemoryError, RecursionError)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def index_tar(split: SourceSplit, options: Options, out: SplitWriter) -> None:
    """Write a row for each image of a tar; its key is the tar's path below the root without `.tar`, and the member.

    Raises:
        DataError: the tar is cut off, damaged or compressed, or an image is a link or a sparse file.
    """
    uri = split.uris[0]
    stem = os.path.splitext(uri[len(split.root) + 1 :])[0]
    found = objects.stat(uri)
    with _open(uri, found.etag, found.size_bytes, whole=options.hash) as file:
        sample = _Sample("", out)
        for member in members(file, uri, found.size_bytes):
            name = os.path.normpath(member.name.lstrip("/")).encode("utf-8", "backslashreplace").decode()
            base, suffix = _split(name)
            if base != sample.base:
                sample.close()
                sample = _Sample(base, out)
            if member.isdir() or name.rpartition("/")[2].startswith("."):
                continue
            if os.path.splitext(f"image{suffix}")[1] in options.suffixes:
                _check_has_bytes(member, uri)
                digest = _sha256(file, member) if options.hash else None
                key = f"{stem}/{name}"
                sample.rows.append((key, uri, member.offset_data, member.size, found.etag, member.size, None, digest))
            elif suffix in _LABELS and member.isreg():
                sample.labels[suffix] = _label(file, member, uri)
            else:
                out.notes["other_members"] += 1
        sample.close()


def members(file: IO[bytes], uri: str, size_bytes: int) -> Iterator[tarfile.TarInfo]:
    """The members of a tar in order, from their headers; the caller may seek in between.

    Raises:
        DataError: a header is damaged, or the tar is cut off.
    """
    archive = _archive(file, uri)
    offset, ended = 0, False
    while offset < size_bytes:
        file.seek(offset)
        block = file.read(_BLOCK)
        if block.count(0) == _BLOCK:  # an end mark; another tar may follow
            offset, ended = offset + _BLOCK, True
            continue
        file.seek(offset)
        try:
            member = tarfile.TarInfo.fromtarfile(archive)  # not next(), which takes a damaged header for the end
        except (tarfile.HeaderError, *_BAD_NUMBERS) as error:
            raise _damaged(uri, offset, error) from error
        if member.size < 0:
            raise _damaged(uri, offset, ValueError(f"a size of {member.size}"))
        end = min(member.offset_data + member.size, archive.offset)  # the latter if there is less data
        if end > size_bytes:
            raise DataError(
                "the tar is cut off inside a member",
                expected=f"{end:,} bytes, to the end of {member.name}",
                found=f"{size_bytes:,} bytes",
                where=f"{uri}: offset {offset}",
                remedy="copy it again from where it is whole",
            )
        yield member
        offset, ended = archive.offset, False
    if not ended:
        raise DataError(
            "the tar is cut off: it has no end mark",
            expected="blocks of zeros after the last member",
            found=f"the end of the file, at {size_bytes:,} bytes",
            where=f"{uri}: offset {offset}",
            remedy="copy it again from where it is whole",
        )


class _Sample:
    """Neighbouring members with one base name: images, and perhaps their label."""

    def __init__(self, base: str, out: SplitWriter) -> None:
        self.base, self._out = base, out
        self.rows: list[ManifestRow] = []
        self.labels: dict[str, str | None] = {}

    def close(self) -> None:
        """Write the images with the label."""
        label = next((self.labels[suffix] for suffix in _LABELS if self.labels.get(suffix) is not None), None)
        if label is not None and not self.rows:
            self._out.notes["labels_without_image"] += 1
        for row in self.rows:
            self._out.add((*row[:6], label, row[7]))


def _archive(file: IO[bytes], uri: str) -> tarfile.TarFile:
    """A TarFile for reading single headers."""
    try:
        return tarfile.TarFile(fileobj=file, mode="r")
    except (tarfile.ReadError, *_BAD_NUMBERS) as error:
        file.seek(0)
        start = file.read(8)
        kind = next((kind for magic, kind in _COMPRESSED.items() if start.startswith(magic)), None)
        if kind is None:
            raise _damaged(uri, 0, error) from error
        raise DataError(
            "a compressed tar does not allow reading single images",
            expected="an uncompressed tar",
            found=kind,
            where=f"{uri}: offset 0",
            remedy="decompress the tar; images are compressed already",
        ) from error


def _damaged(uri: str, offset: int, error: Exception) -> DataError:
    return DataError(
        "not a tar, or a damaged one",
        expected="the header of a member",
        found=error,
        where=f"{uri}: offset {offset}",
        remedy="copy it again from where it is whole",
    )


def _split(name: str) -> tuple[str, str]:
    """A member's base name, and its suffix from the first dot, as in WebDataset."""
    folder, slash, file = name.rpartition("/")
    base, dot, suffix = file.partition(".")
    return f"{folder}{slash}{base}", f"{dot}{suffix.lower()}"


def _check_has_bytes(member: tarfile.TarInfo, uri: str) -> None:
    """Check that a member is a regular file, stored in one range of the tar."""
    where = f"{uri}: offset {member.offset}, member {member.name}"
    if member.islnk() or member.issym():
        raise DataError(
            "an image in a tar is a link, without bytes of its own",
            expected="regular files",
            found=f"a link to {member.linkname}",
            where=where,
            remedy="pack it with `tar --dereference --hard-dereference`",
        )
    if not member.isreg() or member.issparse():
        found = "a sparse file" if member.issparse() else f"a member of type {member.type!r}"
        raise DataError(
            "an image in a tar is not stored in one piece",
            expected="regular files",
            found=found,
            where=where,
            remedy="pack it without `--sparse`",
        )


def _label(file: IO[bytes], member: tarfile.TarInfo, uri: str) -> str | None:
    where = f"{uri}: offset {member.offset}, member {member.name}"
    if member.size > _MAX_LABEL_BYTES:
        raise DataError("a label is too large", expected=f"at most {_MAX_LABEL_BYTES} bytes", where=where)
    file.seek(member.offset_data)
    try:
        text = file.read(member.size).decode()
        if not member.name.lower().endswith(".json"):
            return text.strip()
        tree = json.loads(text)
    except ValueError as error:
        raise DataError("a label cannot be read", expected="UTF-8 text, or JSON", found=error, where=where) from error
    label = tree.get("label") if isinstance(tree, dict) else None
    return None if label is None else label if isinstance(label, str) else json.dumps(label)


def _sha256(file: IO[bytes], member: tarfile.TarInfo) -> str:
    file.seek(member.offset_data)
    return hashlib.sha256(file.read(member.size)).hexdigest()


def _open(uri: str, etag: str, size_bytes: int, whole: bool) -> IO[bytes]:
    if objects.is_local(uri):
        return objects.open_input(uri)
    return cast(IO[bytes], _Ranges(uri, etag, size_bytes, whole))


class _Ranges(io.RawIOBase):
    """One version of an object, read in short or long ranges, whichever is cheaper."""

    def __init__(self, uri: str, etag: str, size_bytes: int, whole: bool) -> None:
        self._uri, self._etag, self._size_bytes, self._whole = uri, etag, size_bytes, whole
        self._position = self._start = 0
        self._short_reads = self._short_stop = 0  # requests for reading the headers only
        self._data = b""

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET
        self._position = offset
        return offset

    def read(self, size: int = -1) -> bytes:
        start = self._position
        stop = self._size_bytes if size < 0 else min(start + size, self._size_bytes)
        if stop <= start:
            return b""
        if stop > self._short_stop:
            self._short_reads, self._short_stop = self._short_reads + 1, start + _HEADER_READ
        if start < self._start or stop > self._start + len(self._data):
            self._fetch(start, max(stop - start, self._ahead(start)))
        self._position = stop
        return self._data[start - self._start : stop - self._start]

    def _ahead(self, start: int) -> int:
        """Bytes of the next request."""
        if self._whole:
            return _LONG_READ
        if start == 0:
            return _FIRST_READ
        return _LONG_READ if start / self._short_reads < _SKIP_BYTES else _HEADER_READ

    def _fetch(self, start: int, length: int) -> None:
        self._data, etag = objects.read_with_etag(self._uri, start, length)
        self._start = start
        if etag != self._etag:
            raise DataError(
                "the tar was replaced while it was read", where=self._uri, remedy="run the same command again"
            )
