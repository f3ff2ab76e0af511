"""Index the pieces of all sources: folders first, then the tars that were found in them.

Guarantee: a piece that is done is not done again; an error names the source that it is about. One row per
piece is all that this process sees.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from pipeline.errors import DataError
from pipeline.manifest.scan_tables import index_csv, index_parquet
from pipeline.manifest.scan_tars import index_tar
from pipeline.manifest.splits import Options, SourceKind, SourceSplit, SplitResult, SplitWriter, read_split_result
from pipeline.parallel import spread
from pipeline.storage import objects
from pipeline.storage.interface import Stat

_FILES: dict[str, SourceKind] = {".tar": "tar", ".parquet": "parquet", ".csv": "csv"}
_WILD = "*?["
_LISTED_AT_ONCE = 16

_HASHED_AT_ONCE = 256
_THREADS = 8
_SPLIT_INTO = 64  # pieces of a prefix, about
_MAX_LEVELS = 3

OnProgress = Callable[[str, int, int, str], None]
"""Told (step, done, in all, how many images) as pieces and parts get done."""


@dataclass(frozen=True, slots=True)
class _Work:
    """A piece to index; `again` where it is not kept even if it is there."""

    folder: str
    piece: SourceSplit
    options: Options
    again: bool


def index_sources(
    folder: str,
    sources: Sequence[str],
    options: Options,
    list_again: bool,
    on_progress: OnProgress,
    start_ray: Callable[[], None] | None,
) -> tuple[list[SplitResult], Counter[str]]:
    """Index all pieces of all sources that are not done yet.

    Args:
        folder: of the manifest.
        sources: as `find_pieces` takes them.
        options: how they are read.
        list_again: do not keep listings; there is no other way to see whether a folder changed.
        on_progress: told of progress.
        start_ray: see `spread`.

    Returns:
        the ledgers, those of tars after the folders that they were found in; and how many pieces were
        `made` and `kept`.

    Raises:
        DataError: a source is missing, empty, may not be read, or is damaged.
    """
    on_progress("find the sources", 0, len(sources), "")
    of_source = []
    for number, source in enumerate(sources, start=1):
        with _explained(source):
            of_source.append(find_pieces(source))
        on_progress("find the sources", number, len(sources), "")
    first = [_Work(folder, piece, options, list_again and piece.kind == "objects") for p in of_source for piece in p]
    done, counts = _run("index", first, on_progress, start_ray)
    tars = {item: [SourceSplit("tar", (uri,), item.root, etag) for uri, etag in done[item].tars] for item in done}
    second = [_Work(folder, tar, options, False) for found in tars.values() for tar in found]
    more, more_counts = _run("index tars", second, on_progress, start_ray)
    ledgers = []
    for source, pieces in zip(sources, of_source, strict=True):
        found = [ledger for piece in pieces for ledger in (done[piece], *(more[tar] for tar in tars[piece]))]
        _check_not_empty(source, found)
        ledgers += found
    return ledgers, counts + more_counts


def count_notes(ledgers: Sequence[SplitResult]) -> Counter[str]:
    """What the ledgers noted, added up."""
    return functools.reduce(Counter.__add__, (Counter(ledger.notes) for ledger in ledgers), Counter[str]())


def _run(
    step: str, work: list[_Work], on_progress: OnProgress, start_ray: Callable[[], None] | None
) -> tuple[dict[SourceSplit, SplitResult], Counter[str]]:
    done, counts, images = dict[SourceSplit, SplitResult](), Counter[str](), 0
    if work:
        on_progress(step, 0, len(work), "")
    for item, (ledger, made) in spread(_index_piece, work, start_ray):
        done[item.piece] = ledger
        counts["made" if made else "kept"] += 1
        images += ledger.num_rows
        on_progress(step, sum(counts.values()), len(work), f"{images:,} images")
    return done, counts


def _index_piece(work: _Work) -> tuple[SplitResult, bool]:
    """The ledger of a piece, and whether it had to be made."""
    name = work.piece.name(work.options)
    done = None if work.again else read_split_result(work.folder, name)
    if done is not None:
        return done, False
    out = SplitWriter(work.folder, work.piece, work.options)
    with _explained(work.piece.uris[0]):
        _INDEX[work.piece.kind](work.piece, work.options, out)
    return out.finish(), True


@contextmanager
def _explained(where: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError("a source is not there", found=error.strerror, where=error.filename or where) from error
    except PermissionError as error:
        raise DataError(
            "a source may not be read",
            found=error.strerror,
            where=error.filename or where,
            remedy="check the permissions and, for s3://, the credentials",
        ) from error


def _check_not_empty(source: str, ledgers: Sequence[SplitResult]) -> None:
    if sum(ledger.num_rows for ledger in ledgers) == 0:
        notes = count_notes(ledgers)
        raise DataError(
            "a source has no images",
            expected="images by their suffix, tars with images, or rows with a uri",
            found=", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in notes.items()) or "nothing",
            where=source,
            remedy="name the suffixes with --suffix; Parquet and CSV files are given by name or glob",
        )


def split(prefix: str) -> list[SourceSplit]:
    """Share a prefix among some pieces by its folders, without listing it; one piece where it has none."""
    root = prefix.rstrip("/")
    shallow: list[str] = []
    leaves = [root]
    for _ in range(_MAX_LEVELS):
        below = {leaf: objects.folders(leaf) for leaf in leaves} if len(leaves) < _SPLIT_INTO else {}
        if not any(below.values()):
            break
        shallow += [f"{leaf}/" for leaf in leaves if below[leaf]]
        leaves = [folder for leaf in leaves for folder in below[leaf] or [leaf]]
    folders = sorted([*shallow, *leaves])
    each = -(-len(folders) // _SPLIT_INTO)
    starts = range(0, len(folders), each)
    return [SourceSplit("objects", tuple(folders[start : start + each]), root) for start in starts]


def index_objects(piece: SourceSplit, options: Options, out: SplitWriter) -> None:
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


def _images(piece: SourceSplit, options: Options, out: SplitWriter) -> Iterator[tuple[str, Stat]]:
    for folder in piece.uris:
        for uri, found in objects.iter_stats(folder, deep=not folder.endswith("/")):
            suffix = os.path.splitext(uri)[1].lower()
            if suffix in options.suffixes:
                yield uri, found
            elif suffix == ".tar":
                out.tars.append((uri, found.etag))
            elif not uri.endswith("/"):  # such empty objects stand for folders
                out.notes["other_objects"] += 1


def _sha256(uri: str) -> str:
    return hashlib.sha256(objects.read_bytes(uri)).hexdigest()


def find_pieces(source: str) -> list[SourceSplit]:
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
    files = objects.expand(source, f".{kind}")
    if not files:
        raise DataError("a source is not there", expected=f"a {kind} file", where=source)
    with ThreadPoolExecutor(_LISTED_AT_ONCE) as pool:
        etags = [found.etag for found in pool.map(objects.stat, files)]
    return [SourceSplit(kind, (uri,), _root(source), etag) for uri, etag in zip(files, etags, strict=True)]


def _root(source: str) -> str:
    """The folder that keys start below: the one before the first wildcard."""
    first = min((source.index(mark) for mark in _WILD if mark in source), default=len(source))
    return source[:first].rpartition("/")[0]


_INDEX = {"objects": index_objects, "tar": index_tar, "parquet": index_parquet, "csv": index_csv}
