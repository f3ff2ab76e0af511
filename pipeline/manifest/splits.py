"""The splits of a manifest's sources, and the rows that a scan finds in each.

A split is some folders, a tar, or a Parquet or CSV file. Its rows are stored as chunks (Parquet), and its result is
written last: a split with a result is done. The names depend on the split, its options and its file's etag, so that a
rerun finds what it can keep.

    <folder>/pieces/<name>-00000.rows   chunks; not `.parquet`, so that readers of the folder skip them
    <folder>/pieces/<name>.json         the result
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Literal

import pyarrow as pa

from pipeline.errors import DataError
from pipeline.storage import documents, objects, parquet

CHUNK_ROWS = 131_072
CHUNK_BYTES = 128 * 2**20
SPLIT_NAME = 24  # characters
_FORMAT = 1

SourceKind = Literal["objects", "tar", "parquet", "csv"]
ManifestRow = tuple[str, str, int | None, int | None, str | None, int | None, str | None, str | None]

ROWS = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("uri", pa.string()),
        pa.field("offset", pa.int64()),
        pa.field("length", pa.int64()),
        pa.field("etag", pa.string()),
        pa.field("size_bytes", pa.int64()),  # of the image: of its object or its range
        pa.field("label", pa.string()),
    ]
)
HASH = pa.field("sha256", pa.string())


@dataclass(frozen=True, slots=True)
class Options:
    """How sources are read."""

    suffixes: tuple[str, ...]  # of image files, lower case with the dot
    uri_column: str = "uri"  # column of Parquet and CSV files
    key_column: str | None = None  # column of Parquet and CSV files; by default `key`, or else the uri
    stat: bool = False  # look up size and etag of the images that Parquet and CSV files name
    hash: bool = False  # read every image of folders and tars, and store its sha256


@dataclass(frozen=True, slots=True)
class SourceSplit:
    """A unit of scanning."""

    kind: SourceKind
    uris: tuple[str, ...]  # the file, or the folders; a folder that ends with "/" is listed without its subfolders
    root: str  # the folder below which keys start
    etag: str = ""  # etag of the file when it was found

    def name(self, options: Options) -> str:
        """A digest of all inputs of its rows that are known before the scan."""
        text = json.dumps([_FORMAT, asdict(self), asdict(options)])
        return hashlib.sha256(text.encode()).hexdigest()[:SPLIT_NAME]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some rows: a file of ours, or the `row_groups` of a Parquet source."""

    uri: str
    row_groups: tuple[int, ...] | None
    first_row: int
    rows: int
    num_bytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class SplitResult:
    """The result of scanning a split."""

    name: str
    kind: SourceKind
    chunks: tuple[Chunk, ...]  # the rows, in order
    schema: str  # the serialised Arrow schema of the chunks
    tars: tuple[tuple[str, str], ...]  # tars that were found in folders, as (uri, etag)
    notes: dict[str, int]  # counts for the user, such as objects that are not images

    @property
    def num_rows(self) -> int:
        """Rows over all chunks."""
        return sum(chunk.rows for chunk in self.chunks)

    @property
    def arrow_schema(self) -> pa.Schema:
        """The Arrow schema of the chunks."""
        return pa.ipc.read_schema(pa.BufferReader(base64.b64decode(self.schema)))


def result_uri(folder: str, name: str) -> str:
    """The URI of a split's result."""
    return objects.join(folder, "pieces", f"{name}.json")


def read_split_result(folder: str, name: str) -> SplitResult | None:
    """The result of a split; None if it is not done."""
    where = result_uri(folder, name)
    found = objects.read_versioned(where)
    return None if found is None else documents.parse(SplitResult, found[0], where, documents.DELETE)


class SplitWriter:
    """Writes the rows of one split, and keeps at most one chunk in memory."""

    def __init__(self, folder: str, split: SourceSplit, options: Options) -> None:
        self.tars: list[tuple[str, str]] = []
        self.notes: Counter[str] = Counter()
        self._folder, self._kind, self._name = folder, split.kind, split.name(options)
        self._schema = ROWS.append(HASH) if options.hash else ROWS
        self._rows: list[ManifestRow] = []
        self._chunks: list[Chunk] = []

    def add(self, row: ManifestRow) -> None:
        """Add an image, with the fields of ROWS and HASH."""
        self._rows.append(row)
        if len(self._rows) >= CHUNK_ROWS:
            self._flush()

    def write(self, table: pa.Table) -> None:
        """Write a table as one chunk."""
        self._schema = table.schema.remove_metadata()
        data = parquet.parquet_bytes(self._schema, [table])
        uri = objects.join(self._folder, "pieces", f"{self._name}-{len(self._chunks):05d}.rows")
        objects.put(uri, data)
        digest = hashlib.sha256(data).hexdigest()
        first = sum(chunk.rows for chunk in self._chunks)
        self._chunks.append(Chunk(uri, None, first, table.num_rows, table.nbytes, digest))

    def refer(self, uri: str, row_groups: list[int], rows: int, num_bytes: int, schema: pa.Schema) -> None:
        """Add rows of a Parquet source by reference; `schema` is their schema after reading."""
        self._schema = schema.remove_metadata()
        digest = hashlib.sha256(json.dumps([self._name, row_groups]).encode()).hexdigest()
        first = sum(chunk.rows for chunk in self._chunks)
        self._chunks.append(Chunk(uri, tuple(row_groups), first, rows, num_bytes, digest))

    def finish(self) -> SplitResult:
        """Write the remaining rows, then the result."""
        self._flush()
        schema = base64.b64encode(self._schema.serialize()).decode()
        result = SplitResult(self._name, self._kind, tuple(self._chunks), schema, tuple(self.tars), dict(self.notes))
        objects.put(result_uri(self._folder, self._name), documents.encode(result))
        return result

    def _flush(self) -> None:
        if self._rows:
            columns = list(zip(*self._rows, strict=True))[: len(self._schema)]
            self._rows = []
            try:
                arrays = [pa.array(column, field.type) for column, field in zip(columns, self._schema, strict=True)]
            except UnicodeEncodeError as error:
                raise DataError("a file's name is not UTF-8", found=ascii(error.object), remedy="rename it") from error
            self.write(pa.Table.from_arrays(arrays, schema=self._schema))
