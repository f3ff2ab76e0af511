"""Scans the sources of a manifest: cuts them into splits, then finds the images of each split.

Folders are scanned first, then the tars that were found in them. A split that is done is not scanned again. This
process sees one result per split, and no rows.
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
_SPLIT_INTO = 64  # splits of a folder, about
_MAX_LEVELS = 3

OnProgress = Callable[[str, int, int, str], None]
"""Called with (step, done, total, number of images) as splits and parts are finished."""


@dataclass(frozen=True, slots=True)
class _Work:
    """A split to scan; with `again` an existing result is not kept."""

    folder: str
    split: SourceSplit
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
    """Scan all splits of all sources that are not done yet.

    Args:
        folder: folder of the manifest.
        sources: folders, files and globs, as for `find_splits`.
        options: how they are read.
        list_again: list folders again; their changes cannot be seen otherwise.
        on_progress: called with the progress.
        start_ray: see `parallel.spread`.

    Returns:
        the results, with those of tars after the folder in which they were found; and how many splits were
        `made` and `kept`.

    Raises:
        DataError: a source is missing, empty, unreadable or damaged.
    """
    on_progress("find the sources", 0, len(sources), "")
    of_source = []
    for number, source in enumerate(sources, start=1):
        with _explained(source):
            of_source.append(find_splits(source))
        on_progress("find the sources", number, len(sources), "")
    first = [_Work(folder, split, options, list_again and split.kind == "objects") for p in of_source for split in p]
    done, counts = _run("index", first, on_progress, start_ray)
    tars = {item: [SourceSplit("tar", (uri,), item.root, etag) for uri, etag in done[item].tars] for item in done}
    second = [_Work(folder, tar, options, False) for found in tars.values() for tar in found]
    more, more_counts = _run("index tars", second, on_progress, start_ray)
    results = []
    for source, splits in zip(sources, of_source, strict=True):
        found = [result for split in splits for result in (done[split], *(more[tar] for tar in tars[split]))]
        _check_not_empty(source, found)
        results += found
    return results, counts + more_counts


def find_splits(source: str) -> list[SourceSplit]:
    """The splits of a source, in a stable order.

    Raises:
        DataError: there is no such file, or its kind is unknown.
        FileNotFoundError, PermissionError: the source is missing or forbidden.
    """
    kind = next((kind for suffix, kind in _FILES.items() if source.lower().endswith(suffix)), None)
    if kind is None and any(mark in source for mark in _WILD):
        raise DataError("a glob must end with a known suffix", expected=sorted(_FILES), found=source)
    if kind is None:
        return split_folder(source)
    files = objects.expand(source, f".{kind}")
    if not files:
        raise DataError("a source does not exist", expected=f"a {kind} file", where=source)
    with ThreadPoolExecutor(_LISTED_AT_ONCE) as pool:
        etags = [found.etag for found in pool.map(objects.stat, files)]
    return [SourceSplit(kind, (uri,), _root(source), etag) for uri, etag in zip(files, etags, strict=True)]


def split_folder(prefix: str) -> list[SourceSplit]:
    """Divide a folder into splits by its subfolders, without listing it; one split if it has none."""
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


def index_objects(split: SourceSplit, options: Options, out: SplitWriter) -> None:
    """Write a row for each image in the folders of a split; its key is the path below the root."""
    images = _images(split, options, out)
    if not options.hash:
        for uri, found in images:
            out.add((uri[len(split.root) + 1 :], uri, None, None, found.etag, found.size_bytes, None, None))
        return
    with ThreadPoolExecutor(_THREADS) as pool:
        while some := list(itertools.islice(images, _HASHED_AT_ONCE)):
            digests = pool.map(_sha256, [uri for uri, _ in some])
            for (uri, found), digest in zip(some, digests, strict=True):
                out.add((uri[len(split.root) + 1 :], uri, None, None, found.etag, found.size_bytes, None, digest))


def count_notes(results: Sequence[SplitResult]) -> Counter[str]:
    """The sum of the notes of all splits."""
    return functools.reduce(Counter.__add__, (Counter(result.notes) for result in results), Counter[str]())


def _run(
    step: str, work: list[_Work], on_progress: OnProgress, start_ray: Callable[[], None] | None
) -> tuple[dict[SourceSplit, SplitResult], Counter[str]]:
    done, counts, images = dict[SourceSplit, SplitResult](), Counter[str](), 0
    if work:
        on_progress(step, 0, len(work), "")
    for item, (result, made) in spread(_scan_split, work, start_ray):
        done[item.split] = result
        counts["made" if made else "kept"] += 1
        images += result.num_rows
        on_progress(step, sum(counts.values()), len(work), f"{images:,} images")
    return done, counts


def _scan_split(work: _Work) -> tuple[SplitResult, bool]:
    """The result of a split, and whether it is new."""
    name = work.split.name(work.options)
    done = None if work.again else read_split_result(work.folder, name)
    if done is not None:
        return done, False
    out = SplitWriter(work.folder, work.split, work.options)
    with _explained(work.split.uris[0]):
        _INDEX[work.split.kind](work.split, work.options, out)
    return out.finish(), True


@contextmanager
def _explained(where: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError("a source does not exist", found=error.strerror, where=error.filename or where) from error
    except PermissionError as error:
        raise DataError(
            "a source may not be read",
            found=error.strerror,
            where=error.filename or where,
            remedy="check the permissions and, for s3://, the credentials",
        ) from error


def _check_not_empty(source: str, results: Sequence[SplitResult]) -> None:
    if sum(result.num_rows for result in results) == 0:
        notes = count_notes(results)
        raise DataError(
            "a source has no images",
            expected="files with an image suffix, tars with images, or rows with a uri",
            found=", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in notes.items()) or "nothing",
            where=source,
            remedy="give the suffixes with --suffix; name Parquet and CSV files themselves, or by a glob",
        )


def _root(source: str) -> str:
    """The folder below which keys start: the last one before the first wildcard."""
    first = min((source.index(mark) for mark in _WILD if mark in source), default=len(source))
    return source[:first].rpartition("/")[0]


def _images(split: SourceSplit, options: Options, out: SplitWriter) -> Iterator[tuple[str, Stat]]:
    for folder in split.uris:
        for uri, found in objects.iter_stats(folder, deep=not folder.endswith("/")):
            suffix = os.path.splitext(uri)[1].lower()
            if suffix in options.suffixes:
                yield uri, found
            elif suffix == ".tar":
                out.tars.append((uri, found.etag))
            elif not uri.endswith("/"):  # empty objects with such names stand for folders
                out.notes["other_objects"] += 1


def _sha256(uri: str) -> str:
    return hashlib.sha256(objects.read_bytes(uri)).hexdigest()


_INDEX = {"objects": index_objects, "tar": index_tar, "parquet": index_parquet, "csv": index_csv}
