"""What a source is, by its name: a folder, or files of tar, Parquet or CSV; and the pieces to index it in."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from pipeline import storage
from pipeline.errors import DataError
from pipeline.object_index import split
from pipeline.pieces import Kind, Piece

_FILES: dict[str, Kind] = {".tar": "tar", ".parquet": "parquet", ".csv": "csv"}
_WILD = "*?["
_THREADS = 16


def find_pieces(source: str) -> list[Piece]:
    """The pieces of a source, in an order that stays the same.

    Raises:
        DataError: no such file is there, or it is of a kind that cannot be read.
        FileNotFoundError, PermissionError: as the store says.
    """
    kind = next((kind for suffix, kind in _FILES.items() if source.lower().endswith(suffix)), None)
    if kind is None and any(mark in source for mark in _WILD):
        raise DataError("a glob of this kind cannot be indexed", expected=sorted(_FILES), found=source)
    if kind is None:
        return split(source)
    files = storage.expand(source, f".{kind}")
    if not files:
        raise DataError("a source is not there", expected=f"a {kind} file", where=source)
    with ThreadPoolExecutor(_THREADS) as pool:
        etags = [found.etag for found in pool.map(storage.stat, files)]
    return [Piece(kind, (uri,), _root(source), etag) for uri, etag in zip(files, etags, strict=True)]


def _root(source: str) -> str:
    """The folder that keys start below: the one before the first wildcard."""
    first = min((source.index(mark) for mark in _WILD if mark in source), default=len(source))
    return source[:first].rpartition("/")[0]
