"""Answer queries from a snapshot: open a commit whole, or follow a tag from commit to commit.

After publishing; all it knows of a run are its tags, commits and segments. Guarantee: every call answers
from exactly one published commit, whose files were checked against it; a commit that cannot be opened
whole is never switched to. A lease keeps the commit that is served from gc; who may not write reads without
one, and where gc is faster than it opens a commit, it opens the one that the tag has moved to meanwhile. It may be
opened before a fork (gunicorn's preload): each child takes a lease of its own when it first uses it, and its main
thread searches without the help of others.
Does not embed images.
"""

from __future__ import annotations

import functools
import logging
import operator
import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.arrays import Float32, Int64
from pipeline.errors import DataError, FastfillError, Removed
from pipeline.index import commits, retention, segment, tags
from pipeline.index.codebook import Codebook
from pipeline.index.commits import Commit
from pipeline.index.retention import Lease
from pipeline.index.segment import Segment
from pipeline.index.segment_files import KINDS, SegmentKind, SegmentRef, check_digest
from pipeline.index.tags import PROD
from pipeline.run import Run
from pipeline.serving.user_keys import Keys
from pipeline.storage import parquet

logger = logging.getLogger(__name__)

_SEARCHERS: weakref.WeakSet[Searcher] = weakref.WeakSet()
_OPEN_THREADS = 8  # hashing releases the GIL, and remote segments are fetched meanwhile
_TRIES = 16
_ALWAYS_PADDED = 1024


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The answer to a batch of queries: K = k columns, but never more than 1,024 or the vectors of the commit.

    Attributes:
        commit: the commit that gave it.
        distances: (Q, K) float32, best first: squared Euclidean for l2, similarity for ip and cosine;
            inf or -inf where fewer than K were found. If the commit has a calibration, that of a transformed hit is
            what the distance of its embedded vector is expected to be.
        ids: (Q, K) int64; -1 where fewer than K were found. If the gallery's ids are integers, they are these;
            if they are strings, these are row numbers of the gallery, and `keys` has the strings.
    """

    commit: int
    distances: Float32
    ids: Int64
    _transformed: NDArray[np.bool_] = field(repr=False)
    _keys: Keys = field(repr=False, compare=False)

    @property
    def kinds(self) -> NDArray[np.str_]:
        """(Q, K) strings: `embedded` or `transformed`; empty where fewer than K were found."""
        return np.where(self.ids < 0, "", np.where(self._transformed, "transformed", "embedded"))

    @property
    def keys(self) -> NDArray[np.object_]:
        """(Q, K) objects, the gallery's own ids: str, or int if they are integers; None where fewer were found.

        Looked up in the run's gallery at each access, so keep the array.

        Raises:
            DataError: the gallery is missing or damaged.
        """
        return self._keys.of(self.ids)


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """A commit with everything it names, opened."""

    commit: Commit
    codebook: Codebook
    segments: dict[str, Segment]  # by sha256: segments without a vector may be the same file
    searched: dict[SegmentKind, list[Segment]]  # these, or all of a kind gathered into one
    rejected: Int64  # ids of transformed vectors in embedded segments, which earlier versions sealed
    lease: Lease | None


class Searcher:
    """Searches a commit; one object may be used from many threads."""

    def __init__(
        self,
        run_uri: str,
        tag: str = PROD,
        commit: int | None = None,
        verify: bool = True,
        in_memory: bool = True,
    ) -> None:
        """Open a snapshot.

        Args:
            run_uri: the run.
            tag: the tag that `refresh` follows, where no commit is given.
            commit: stay at this commit.
            verify: check every byte against the commit before serving it; without it a damaged file is
                noticed only where FAISS cannot read it.
            in_memory: gather the segments of a commit into one index per kind, so that a query costs little more than
                in one index of all. In memory that is the index once, and twice while `refresh` opens the next commit.
                Without it they stay mapped files: opened in no time and shared between processes, and a single query
                of many segments takes several times as long.

        Raises:
            DataError: there is no such tag or commit, or one of its files is missing or damaged.
            Removed: gc has removed the commit.
        """
        self._run = Run(run_uri)
        self._tag = tag if commit is None else None
        self._verify = verify
        self._in_memory = in_memory
        self._keys = Keys(self._run)
        self._refreshing, self._inherited = threading.RLock(), False
        _renew_after_fork()
        _SEARCHERS.add(self)
        number = None if commit is None else _whole("commit", commit, 0)
        self._opened: _Snapshot | None = self._follow(None) if number is None else self._open_leased(number, None)

    @property
    def commit(self) -> Commit:
        """The commit that the next call answers from."""
        return self._pinned().commit

    @property
    def num_vectors(self) -> int:
        """The number of vectors it holds: the whole gallery, but for images that are deleted and dropped."""
        return self.commit.counts.vectors

    def search(self, queries: ArrayLike, k: int) -> SearchResult:
        """The k nearest images of each query, all from one commit.

        Args:
            queries: (Q, d) numbers, the new encoder's embeddings.
            k: neighbours per query, a whole number of at least 1. More than there are costs nothing: the
                answer has no more columns than the commit has vectors, or 1,024 where it has fewer.

        Raises:
            DataError: the queries have another shape, are not finite numbers, or k is no whole number above 0.
        """
        opened = self._pinned()
        columns = min(_whole("k", k, 1), max(opened.commit.counts.vectors, _ALWAYS_PADDED))
        try:
            vectors = np.asarray(queries, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise DataError("queries are not an array of numbers", found=error) from error
        commit = opened.commit
        hits = segment.search_by_kind(
            opened.codebook, opened.searched, vectors, columns, commit.nprobe, commit.calibration
        )
        transformed = hits.transformed
        if len(opened.rejected):
            transformed = transformed | np.isin(hits.ids, opened.rejected)
        return SearchResult(commit.number, hits.distances, hits.ids, transformed, self._keys)

    def refresh(self) -> bool:
        """Go to the commit that the tag points to now; whatever goes wrong, the present one stays.

        Returns:
            whether it is another commit than before.

        Raises:
            DataError: the new commit, or one of its files, is missing or damaged.
        """
        with self._refreshing:
            before = self._pinned()
            if self._tag is None or (opened := self._follow(before)) is before:
                return False
            self._opened = opened
            _release(before)
            return True

    def close(self) -> None:
        """Let the segments go, once the calls that use them have returned."""
        with self._refreshing:
            opened, self._opened = self._opened, None
        if opened is not None:
            _release(opened)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _forked(self) -> None:
        """In a child: another thread of the parent may have held a lock, and the lease is the parent's."""
        self._refreshing, self._inherited = threading.RLock(), True
        self._keys = Keys(self._run)
        segment.use_one_thread()  # of OpenMP, in the thread that has forked: it would wait for those of the parent

    def _take_own_lease(self) -> None:
        with self._refreshing:
            opened = self._opened
            if self._inherited and opened is not None:
                self._opened = replace(opened, lease=_own_lease(self._run, opened.commit.number))
            self._inherited = False

    def _pinned(self) -> _Snapshot:
        if self._inherited:
            self._take_own_lease()
        opened = self._opened
        if opened is None:
            raise ValueError("this Searcher is closed")
        return opened

    def _wanted(self) -> int:
        assert self._tag is not None
        return tags.tagged(self._run, self._tag)

    def _follow(self, before: _Snapshot | None) -> _Snapshot:
        """The commit that the tag points to, opened; again where the tag moves away from one that cannot be."""
        number = self._wanted()
        for _ in range(_TRIES):
            if before is not None and before.commit.number == number:
                return before
            try:
                return self._open_leased(number, before)
            except (DataError, Removed):
                failed, number = number, self._wanted()
                if number == failed:
                    raise
        return self._open_leased(number, before)

    def _open_leased(self, number: int, before: _Snapshot | None) -> _Snapshot:
        commit = commits.read_commit(self._run, number)
        lease = retention.take(self._run, number)
        try:
            return self._open(commit, before, lease)
        except BaseException:
            if lease is not None:
                lease.release()
            raise

    def _open(self, commit: Commit, before: _Snapshot | None, lease: Lease | None) -> _Snapshot:
        if before is not None and before.commit.codebook_sha256 == commit.codebook_sha256:
            codebook, known = before.codebook, before.segments
        else:
            codebook = Codebook.open(self._run, commit.codebook_path, commit.codebook_sha256, self._verify)
            known = {}
        if (codebook.dim, codebook.metric) != (commit.dim, commit.metric):
            raise DataError(
                "the codebook is not the commit's",
                expected=f"{commit.dim} dimensions, {commit.metric}",
                found=f"{codebook.dim} dimensions, {codebook.metric}",
                where=self._run.path(commit.codebook_path),
            )

        def open_segment(ref: SegmentRef) -> Segment:
            return known.get(ref.sha256) or Segment.open(self._run, codebook, ref, self._verify)

        refs = {ref.sha256: ref for ref in commit.segments}
        with ThreadPoolExecutor(_OPEN_THREADS) as pool:
            segments = dict(zip(refs, pool.map(open_segment, refs.values()), strict=True))
        searched = {kind: _of_kind(commit, segments, kind) for kind in KINDS}
        if self._in_memory:
            searched = {kind: [segment.gather_segments(codebook, some)] for kind, some in searched.items() if some}
        return _Snapshot(commit, codebook, segments, searched, self._rejected(commit), lease)

    def _rejected(self, commit: Commit) -> Int64:
        """The ids of transformed vectors in embedded segments; only earlier versions sealed such segments."""
        found = [np.empty(0, np.int64)]
        for ref in commit.segments:
            if ref.kind == "embedded" and ref.rejected:
                where = self._run.path(ref.sidecar_path)
                if self._verify:
                    check_digest(where, ref.sidecar_sha256)
                sidecar = parquet.read_parquet(where, ["id", "kind"])
                found.append(sidecar["id"].to_numpy()[sidecar["kind"].to_numpy() == "transformed"])
        return np.concatenate(found)


def _of_kind(commit: Commit, segments: dict[str, Segment], kind: SegmentKind) -> list[Segment]:
    return [segments[sha256] for sha256 in dict.fromkeys(ref.sha256 for ref in commit.segments if ref.kind == kind)]


def _whole(name: str, value: int, least: int) -> int:
    """A number that a caller gave as a Python int; numpy's integers are whole numbers too."""
    try:
        number = operator.index(value)
    except TypeError:
        expected = f"an integer of at least {least}"
        raise DataError(f"{name} is not a whole number", expected=expected, found=repr(value)) from None
    if number < least:
        raise DataError(f"{name} is out of range", expected=f"at least {least}", found=number)
    return number


@functools.cache
def _renew_after_fork() -> None:
    """Tell every Searcher of a forked child that it is in a child, from now on."""

    def tell() -> None:
        for searcher in list(_SEARCHERS):
            searcher._forked()

    os.register_at_fork(after_in_child=tell)


def _own_lease(run: Run, number: int) -> Lease | None:
    """A lease on a commit that is open already; None if there can be none: what is open can be read all the same."""
    try:
        return retention.take(run, number)
    except (FastfillError, OSError) as error:
        logger.warning("commit %d is served without a lease after a fork: %s", number, error)
        return None


def _release(opened: _Snapshot) -> None:
    if opened.lease is not None:
        opened.lease.release()
