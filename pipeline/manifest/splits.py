"""The pieces that a gallery manifest is indexed in, and the rows that come of each.

A piece is some folders of a prefix, a tar, or a Parquet or CSV file. Its rows become chunks (Parquet) and its
ledger is written last: a piece whose ledger is there is done. Both are named by what the piece is, with the
etag of its file, so that a rerun finds what it may keep. This module does not know how images are found.

    <folder>/pieces/<name>-00000.rows   chunks; not `.parquet`, which is what a reader of the folder looks for
    <folder>/pieces/<name>.json         the ledger
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
PIECE_NAME = 24  # characters
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
        pa.field("size_bytes", pa.int64()),  # of the image: the object's, or the range's
        pa.field("label", pa.string()),
    ]
)
HASH = pa.field("sha256", pa.string())


@dataclass(frozen=True, slots=True)
class Options:
    """How sources are read.

    Attributes:
        suffixes: of image files, lower case with the dot.
        uri_column: of Parquet and CSV files.
        key_column: of Parquet and CSV files; by default `key`, or else the uri.
        stat: look up size and etag of what Parquet and CSV files name.
        hash: read every image of prefixes and tars, and keep the sha256 of its bytes.
    """

    suffixes: tuple[str, ...]
    uri_column: str = "uri"
    key_column: str | None = None
    stat: bool = False
    hash: bool = False


@dataclass(frozen=True, slots=True)
class SourceSplit:
    """Something to index.

    Attributes:
        kind: what it is.
        uris: the file; or the folders, whose names end with "/" where they are listed without those below.
        root: the folder that keys start below.
        etag: of the file, when it was found.
    """

    kind: SourceKind
    uris: tuple[str, ...]
    root: str
    etag: str = ""

    def name(self, options: Options) -> str:
        """Changes with everything that its rows depend on, as far as that is known beforehand."""
        text = json.dumps([_FORMAT, asdict(self), asdict(options)])
        return hashlib.sha256(text.encode()).hexdigest()[:PIECE_NAME]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some rows: a file of ours, or (where `row_groups` are named) rows of a Parquet source itself."""

    uri: str
    row_groups: tuple[int, ...] | None
    first_row: int
    rows: int
    num_bytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class SplitResult:
    """What came of a piece.

    Attributes:
        name: of the piece.
        kind: of the piece.
        chunks: the rows, in order.
        schema: of the chunks, serialised.
        tars: tars that were found in folders: (uri, etag).
        notes: counts of what the user may want to know, such as objects that are no images.
    """

    name: str
    kind: SourceKind
    chunks: tuple[Chunk, ...]
    schema: str
    tars: tuple[tuple[str, str], ...]
    notes: dict[str, int]

    @property
    def num_rows(self) -> int:
        """Rows over all chunks."""
        return sum(chunk.rows for chunk in self.chunks)

    @property
    def arrow_schema(self) -> pa.Schema:
        """Names and types of the chunks' columns."""
        return pa.ipc.read_schema(pa.BufferReader(base64.b64decode(self.schema)))


def ledger_uri(folder: str, name: str) -> str:
    """Where a piece's ledger is."""
    return objects.join(folder, "pieces", f"{name}.json")


def read_split_result(folder: str, name: str) -> SplitResult | None:
    """The ledger of a piece; None where it is not done."""
    where = ledger_uri(folder, name)
    found = objects.read_versioned(where)
    return None if found is None else documents.parse(SplitResult, found[0], where, documents.DELETE)


class SplitWriter:
    """Takes the rows of one piece one by one or as tables, and keeps a chunk of them in memory at most."""

    def __init__(self, folder: str, piece: SourceSplit, options: Options) -> None:
        self.tars: list[tuple[str, str]] = []
        self.notes: Counter[str] = Counter()
        self._folder, self._kind, self._name = folder, piece.kind, piece.name(options)
        self._schema = ROWS.append(HASH) if options.hash else ROWS
        self._rows: list[ManifestRow] = []
        self._chunks: list[Chunk] = []

    def add(self, row: ManifestRow) -> None:
        """One image, in the order of ROWS and HASH."""
        self._rows.append(row)
        if len(self._rows) >= CHUNK_ROWS:
            self._flush()

    def write(self, table: pa.Table) -> None:
        """A table as one chunk."""
        self._schema = table.schema.remove_metadata()
        data = parquet.parquet_bytes(self._schema, [table])
        uri = objects.join(self._folder, "pieces", f"{self._name}-{len(self._chunks):05d}.rows")
        objects.put(uri, data)
        digest = hashlib.sha256(data).hexdigest()
        first = sum(chunk.rows for chunk in self._chunks)
        self._chunks.append(Chunk(uri, None, first, table.num_rows, table.nbytes, digest))

    def refer(self, uri: str, row_groups: list[int], rows: int, num_bytes: int, schema: pa.Schema) -> None:
        """Rows that stay where they are, in a Parquet source; `schema` is what they become when they are read."""
        self._schema = schema.remove_metadata()
        digest = hashlib.sha256(json.dumps([self._name, row_groups]).encode()).hexdigest()
        first = sum(chunk.rows for chunk in self._chunks)
        self._chunks.append(Chunk(uri, tuple(row_groups), first, rows, num_bytes, digest))

    def finish(self) -> SplitResult:
        """Write what is left, and the ledger."""
        self._flush()
        schema = base64.b64encode(self._schema.serialize()).decode()
        ledger = SplitResult(self._name, self._kind, tuple(self._chunks), schema, tuple(self.tars), dict(self.notes))
        objects.put(ledger_uri(self._folder, self._name), documents.encode(ledger))
        return ledger

    def _flush(self) -> None:
        if self._rows:
            columns = list(zip(*self._rows, strict=True))[: len(self._schema)]
            self._rows = []
            try:
                arrays = [pa.array(column, field.type) for column, field in zip(columns, self._schema, strict=True)]
            except UnicodeEncodeError as error:
                raise DataError("a file's name is not UTF-8", found=ascii(error.object), remedy="rename it") from error
            self.write(pa.Table.from_arrays(arrays, schema=self._schema))
