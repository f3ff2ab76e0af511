"""Index the pieces of all sources: folders first, then the tars that were found in them.

Guarantee: a piece that is done is not done again; an error names the source that it is about. One row per
piece is all that this process sees.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from pipeline.errors import DataError
from pipeline.fan_out import spread
from pipeline.object_index import index_objects
from pipeline.pieces import Ledger, Options, Piece, PieceWriter, read_ledger
from pipeline.sources import find_pieces
from pipeline.table_index import index_csv, index_parquet
from pipeline.tar_index import index_tar

_INDEX = {"objects": index_objects, "tar": index_tar, "parquet": index_parquet, "csv": index_csv}

OnProgress = Callable[[str, int, int, str], None]
"""Told (step, done, in all, how many images) as pieces and parts get done."""


@dataclass(frozen=True, slots=True)
class _Work:
    """A piece to index; `again` where it is not kept even if it is there."""

    folder: str
    piece: Piece
    options: Options
    again: bool


def index_sources(
    folder: str,
    sources: Sequence[str],
    options: Options,
    list_again: bool,
    on_progress: OnProgress,
    start_ray: Callable[[], None] | None,
) -> tuple[list[Ledger], Counter[str]]:
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
    tars = {item: [Piece("tar", (uri,), item.root, etag) for uri, etag in done[item].tars] for item in done}
    second = [_Work(folder, tar, options, False) for found in tars.values() for tar in found]
    more, more_counts = _run("index tars", second, on_progress, start_ray)
    ledgers = []
    for source, pieces in zip(sources, of_source, strict=True):
        found = [ledger for piece in pieces for ledger in (done[piece], *(more[tar] for tar in tars[piece]))]
        _check_not_empty(source, found)
        ledgers += found
    return ledgers, counts + more_counts


def count_notes(ledgers: Sequence[Ledger]) -> Counter[str]:
    """What the ledgers noted, added up."""
    return functools.reduce(Counter.__add__, (Counter(ledger.notes) for ledger in ledgers), Counter[str]())


def _run(
    step: str, work: list[_Work], on_progress: OnProgress, start_ray: Callable[[], None] | None
) -> tuple[dict[Piece, Ledger], Counter[str]]:
    done, counts, images = dict[Piece, Ledger](), Counter[str](), 0
    if work:
        on_progress(step, 0, len(work), "")
    for item, (ledger, made) in spread(_index_piece, work, start_ray):
        done[item.piece] = ledger
        counts["made" if made else "kept"] += 1
        images += ledger.num_rows
        on_progress(step, sum(counts.values()), len(work), f"{images:,} images")
    return done, counts


def _index_piece(work: _Work) -> tuple[Ledger, bool]:
    """The ledger of a piece, and whether it had to be made."""
    name = work.piece.name(work.options)
    done = None if work.again else read_ledger(work.folder, name)
    if done is not None:
        return done, False
    out = PieceWriter(work.folder, work.piece, work.options)
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


def _check_not_empty(source: str, ledgers: Sequence[Ledger]) -> None:
    if sum(ledger.num_rows for ledger in ledgers) == 0:
        notes = count_notes(ledgers)
        raise DataError(
            "a source has no images",
            expected="images by their suffix, tars with images, or rows with a uri",
            found=", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in notes.items()) or "nothing",
            where=source,
            remedy="name the suffixes with --suffix; Parquet and CSV files are given by name or glob",
        )
