"""Digests of the content of a Parquet file: computed as it is written, compared as it is read.

Parquet's own page checksums do not cover page headers and the footer. So the footer holds a digest of the decoded
values of each column and row group, and one digest of these together with the names and the number of rows. Files
without digests (from users or older versions) are read unchecked.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

KEY = b"fastfill.digests"
"""The key of the digests in a file's metadata."""

_ARROW = b"ARROW:schema"
_BYTES = 16  # of each column and row group


class Mismatch(Exception):
    """The content differs from the digests."""


class Digests:
    """The digests of a file that is being written."""

    def __init__(self, schema: pa.Schema) -> None:
        self._metadata = dict(schema.metadata or {})
        self._columns = {field.name: bytearray() for field in schema if _label(field.type)}
        self._fields = [(field.name, _label(field.type)) for field in schema]
        self._num_rows = 0

    def add(self, row_group: pa.Table) -> None:
        """Add a row group."""
        self._num_rows += row_group.num_rows
        for name, found in self._columns.items():
            found += _digest(row_group[name])

    def metadata(self) -> dict[str, str]:
        """The footer's metadata, after the last row group."""
        texts = {name: base64.b64encode(found).decode() for name, found in self._columns.items()}
        sha256 = _whole(self._fields, self._num_rows, self._metadata, texts)
        return {KEY.decode(): json.dumps({"columns": texts, "sha256": sha256})}


class Content(pq.ParquetFile):  # type: ignore[misc]  # pyarrow has no types
    """A Parquet file that compares values with its digests as it reads them. Any method may raise Mismatch."""

    digest: str
    """Digest of the whole content; empty if the file has no digests."""

    def __init__(self, source: object) -> None:
        super().__init__(source, page_checksum_verification=True)
        self._texts: dict[str, str] = {}
        self.digest = ""
        metadata = self.metadata.metadata or {}
        if KEY in metadata and not self._is_copy(metadata):
            self._texts, self.digest = self._found(metadata)

    def read(self, columns: Sequence[str] | None = None, **options: object) -> pa.Table:
        """All row groups."""
        return self._checked(super().read(columns=columns, **options), range(self.num_row_groups), columns)

    def read_row_group(self, i: int, columns: Sequence[str] | None = None, **options: object) -> pa.Table:
        """One row group."""
        return self._checked(super().read_row_group(i, columns=columns, **options), [i], columns)

    def read_row_groups(
        self, row_groups: Sequence[int], columns: Sequence[str] | None = None, **options: object
    ) -> pa.Table:
        """Some row groups."""
        table = super().read_row_groups(row_groups, columns=columns, **options)
        return self._checked(table, row_groups, columns)

    def _is_copy(self, metadata: dict[bytes, bytes]) -> bool:
        """Whether another program has copied the metadata of one of our files to other rows."""
        return _ARROW in metadata and KEY in (self.schema_arrow.metadata or {})

    def _found(self, metadata: dict[bytes, bytes]) -> tuple[dict[str, str], str]:
        try:
            tree = json.loads(metadata[KEY])
            texts, sha256 = tree["columns"], tree["sha256"]
        except (ValueError, KeyError, TypeError) as error:
            raise Mismatch(f"its digests cannot be read: {error}") from error
        kinds = [(field.name, field.type) for field in self.schema_arrow]
        fields = [(name, _label(kind)) for name, kind in kinds]
        as_written = all(kind.value_field.name == "element" for _, kind in kinds if _is_list(kind))
        if not as_written or sha256 != _whole(fields, self.metadata.num_rows, metadata, texts):
            raise Mismatch("its footer is not as it was written")
        return texts, sha256

    def _checked(self, table: pa.Table, row_groups: Sequence[int], columns: Sequence[str] | None) -> pa.Table:
        wanted = [name for name in self._texts if columns is None or name in columns]
        starts = np.cumsum([0, *(self.metadata.row_group(group).num_rows for group in row_groups)])
        for name in wanted:
            if name not in table.column_names or table.num_rows != starts[-1]:
                raise Mismatch(f"column {name} is not as it was written")
            known, column = base64.b64decode(self._texts[name]), table[name]
            for group, start, end in zip(row_groups, starts[:-1], starts[1:], strict=True):
                if _digest(column.slice(start, end - start)) != known[group * _BYTES : (group + 1) * _BYTES]:
                    raise Mismatch(f"column {name} of row group {group} is not as it was written")
        kept = {key: value for key, value in (table.schema.metadata or {}).items() if key != KEY}
        return table.replace_schema_metadata(kept or None)


def digest_of(data: bytes) -> str:
    """`Content.digest` of the file with these bytes."""
    file = Content(pa.BufferReader(data))
    return file.digest


def together(digests: Sequence[str]) -> str:
    """One digest of several, in this order."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _whole(fields: list[tuple[str, str]], num_rows: int, metadata: dict[bytes, bytes], texts: dict[str, str]) -> str:
    others = sorted((key.hex(), value.hex()) for key, value in metadata.items() if key not in (KEY, _ARROW))
    return hashlib.sha256(json.dumps([fields, num_rows, others, texts]).encode()).hexdigest()


def _digest(column: pa.ChunkedArray) -> bytes:
    digest = hashlib.sha256()
    _feed(digest.update, column.chunk(0) if column.num_chunks == 1 else column.combine_chunks())
    return digest.digest()[:_BYTES]


def _label(kind: pa.DataType) -> str:
    """A name of a type that Parquet stores unchanged; empty for other types, which get no digests."""
    types = pa.types
    if _is_list(kind):
        child = _label(kind.value_type)
        return child and f"{kind.list_size if types.is_fixed_size_list(kind) else ''}[{child}]"
    checks = (types.is_integer, types.is_floating, types.is_boolean, types.is_null, *_TEXT)
    return str(kind) if any(check(kind) for check in checks) else ""


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)


def _feed(update: Callable[[Any], None], array: pa.Array) -> None:
    """Update a digest with an array's type, nulls and values, whatever its buffers are."""
    kind, count = array.type, len(array)
    update(f"{_label(kind)} {count} {array.null_count};".encode())
    if array.null_count == count:
        return
    if array.null_count:
        update(np.packbits(array.is_valid().to_numpy(zero_copy_only=False)).tobytes())
        array = array.drop_null()
    if pa.types.is_fixed_size_list(kind):
        _feed(update, array.flatten())
    elif _is_list(kind):
        _feed(update, pc.list_value_length(array))
        _feed(update, array.flatten())
    elif any(check(kind) for check in _TEXT):
        width = np.int64 if str(kind).startswith("large") else np.int32
        ends = np.frombuffer(array.buffers()[1], width)[array.offset : array.offset + len(array) + 1]
        update(np.diff(ends).astype(np.int64).tobytes())
        if data := array.buffers()[2]:
            update(memoryview(data)[ends[0] : ends[-1]])
    elif pa.types.is_boolean(kind):
        update(array.to_numpy(zero_copy_only=False).tobytes())
    else:
        size = kind.bit_width // 8
        update(memoryview(array.buffers()[1])[array.offset * size : (array.offset + len(array)) * size])
