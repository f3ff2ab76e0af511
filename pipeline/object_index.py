"""The images below a prefix, one object each, from listings alone.

Guarantee: one row per object whose suffix is an image's; tars are handed on, everything else is counted. An
image is read only where its content is to be hashed.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from pipeline import storage
from pipeline.pieces import Options, Piece, PieceWriter
from pipeline.store import Stat

_HASHED_AT_ONCE = 256
_THREADS = 8
_SPLIT_INTO = 64  # pieces of a prefix, about
_MAX_LEVELS = 3


def split(prefix: str) -> list[Piece]:
    """Share a prefix among some pieces by its folders, without listing it; one piece where it has none."""
    root = prefix.rstrip("/")
    shallow: list[str] = []
    leaves = [root]
    for _ in range(_MAX_LEVELS):
        below = {leaf: storage.folders(leaf) for leaf in leaves} if len(leaves) < _SPLIT_INTO else {}
        if not any(below.values()):
            break
        shallow += [f"{leaf}/" for leaf in leaves if below[leaf]]
        leaves = [folder for leaf in leaves for folder in below[leaf] or [leaf]]
    folders = sorted([*shallow, *leaves])
    each = -(-len(folders) // _SPLIT_INTO)
    starts = range(0, len(folders), each)
    return [Piece("objects", tuple(folders[start : start + each]), root) for start in starts]


def index_objects(piece: Piece, options: Options, out: PieceWriter) -> None:
    """Write a row for each image in the folders of a piece; the key is the path below the root."""
    images = _images(piece, options, out)
    if not options.hash:
        for uri, found in images:
            out.add((uri[len(piece.root) + 1 :], uri, None, None, found.etag, found.size_bytes, None, None))
        return
    with ThreadPoolExecutor(_THREADS) as pool:
        while some := list(itertools.islice(images, _HASHED_AT_ONCE)):
            digests = pool.map(_sha256, [uri for uri, _ in some])
            for (uri, found), digest in zip(some, digests, strict=True):
                out.add((uri[len(piece.root) + 1 :], uri, None, None, found.etag, found.size_bytes, None, digest))


def _images(piece: Piece, options: Options, out: PieceWriter) -> Iterator[tuple[str, Stat]]:
    for folder in piece.uris:
        for uri, found in storage.iter_stats(folder, deep=not folder.endswith("/")):
            suffix = os.path.splitext(uri)[1].lower()
            if suffix in options.suffixes:
                yield uri, found
            elif suffix == ".tar":
                out.tars.append((uri, found.etag))
            elif not uri.endswith("/"):  # such empty objects stand for folders
                out.notes["other_objects"] += 1


def _sha256(uri: str) -> str:
    return hashlib.sha256(storage.read_bytes(uri)).hexdigest()
