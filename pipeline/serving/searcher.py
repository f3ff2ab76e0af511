"""Answer queries from a snapshot: open one commit, or follow a tag from commit to commit.

Every call answers from exactly one published commit whose files were checked; a commit that cannot be opened whole is
never switched to. A lease keeps the served commit from gc. Without the right to write there is no lease: if gc removes
a commit before it is open, the searcher opens the tag's next one. A searcher may be opened before a fork (gunicorn's
preload): each child takes its own lease when it first uses it, and its main thread searches with one thread.
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
from pipeline.index import commits, leases, segment, tags
from pipeline.index.codebook import Codebook
from pipeline.index.commits import Commit
from pipeline.index.leases import Lease
from pipeline.index.segment import Segment
from pipeline.index.segment_files import KINDS, SegmentKind, SegmentRef, check_digest
from pipeline.index.tags import PROD
from pipeline.run import Run
from pipeline.serving.user_keys import UserKeys
from pipeline.storage import parquet

logger = logging.getLogger(__name__)

_SEARCHERS: weakref.WeakSet[Searcher] = weakref.WeakSet()
_OPEN_THREADS = 8  # hashing releases the GIL, and remote segments are fetched meanwhile
_TRIES = 16
_ALWAYS_PADDED = 1024


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The answer to Q queries: K = k columns, but at most 1,024 or the number of vectors, whichever is larger.

    Attributes:
        commit: that gave the answer.
        distances: (Q, K) float32, best first: squared Euclidean for l2, similarity for ip and cosine; inf or -inf if
            fewer than K were found. With a calibration, the expected distance of the embedded vector for transformed
            hits.
        ids: (Q, K) int64, -1 if fewer than K were found: the gallery's ids; its row numbers if the ids are strings,
            which `keys` gives.
    """

    commit: int
    distances: Float32
    ids: Int64
    _transformed: NDArray[np.bool_] = field(repr=False)
    _keys: UserKeys = field(repr=False, compare=False)

    @property
    def kinds(self) -> NDArray[np.str_]:
        """(Q, K) strings: `embedded` or `transformed`; empty if fewer than K were found."""
        return np.where(self.ids < 0, "", np.where(self._transformed, "transformed", "embedded"))

    @property
    def keys(self) -> NDArray[np.object_]:
        """(Q, K) objects, the gallery's own ids: str, or int if they are integers; None if fewer were found.

        Each access looks them up in the run's gallery, so keep the array.

        Raises:
            DataError: the gallery is missing or damaged.
        """
        return self._keys.of(self.ids)


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
            tag: that `refresh` follows, if no commit is given.
            commit: stay at this commit.
            verify: check every byte against the commit; without it, only damage that FAISS notices is found.
            in_memory: gather the segments into one index per kind, so that a query costs about as much as in one
                index. Takes the index once in memory, and twice while `refresh` opens the next commit. Without it the
                segments stay mapped files: opened at once and shared between processes, but a single query of many
                segments takes several times as long.

        Raises:
            DataError: there is no such tag or commit, or one of its files is missing or damaged.
            Removed: gc has removed the commit.
        """
        self._run = Run(run_uri)
        self._tag = tag if commit is None else None
        self._verify = verify
        self._in_memory = in_memory
        self._keys = UserKeys(self._run)
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
        """The number of vectors in the commit: the gallery without dropped images."""
        return self.commit.counts.vectors

    def search(self, queries: ArrayLike, k: int) -> SearchResult:
        """The k nearest images of each query, all from one commit.

        Args:
            queries: (Q, d) numbers, the new encoder's embeddings.
            k: neighbours per query, at least 1; it may exceed the number of vectors at no cost.

        Raises:
            DataError: the queries have another shape or are not finite numbers, or k is not a whole number above 0.
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
        """Go to the commit that the tag points to now; True if it is another one. On any error the present one stays.

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
        """Release the segments, once the calls that use them have returned."""
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
        """In a child: another thread of the parent may hold a lock, and the lease is the parent's."""
        self._refreshing, self._inherited = threading.RLock(), True
        self._keys = UserKeys(self._run)
        segment.use_one_thread()  # of OpenMP: the forking thread would wait for the parent's threads

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
        """Open the tag's commit; try again if the tag has moved from a commit that cannot be opened."""
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
        lease = leases.take(self._run, number)
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
        """The ids of transformed vectors in embedded segments, which only earlier versions sealed."""
        found = [np.empty(0, np.int64)]
        for ref in commit.segments:
            if ref.kind == "embedded" and ref.rejected:
                where = self._run.path(ref.sidecar_path)
                if self._verify:
                    check_digest(where, ref.sidecar_sha256)
                sidecar = parquet.read_parquet(where, ["id", "kind"])
                found.append(sidecar["id"].to_numpy()[sidecar["kind"].to_numpy() == "transformed"])
        return np.concatenate(found)


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """An opened commit with all its files."""

    commit: Commit
    codebook: Codebook
    segments: dict[str, Segment]  # by sha256: empty segments may be the same file
    searched: dict[SegmentKind, list[Segment]]  # the same by kind, or gathered into one per kind
    rejected: Int64  # ids of transformed vectors in embedded segments, which earlier versions sealed
    lease: Lease | None


def _of_kind(commit: Commit, segments: dict[str, Segment], kind: SegmentKind) -> list[Segment]:
    return [segments[sha256] for sha256 in dict.fromkeys(ref.sha256 for ref in commit.segments if ref.kind == kind)]


def _whole(name: str, value: int, least: int) -> int:
    """A caller's number as a Python int; NumPy's integers are accepted."""
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
    """From now on tell every Searcher of a forked child about the fork."""

    def tell() -> None:
        for searcher in list(_SEARCHERS):
            searcher._forked()

    os.register_at_fork(after_in_child=tell)


def _own_lease(run: Run, number: int) -> Lease | None:
    """A lease on a commit that is open already; None if it cannot be taken: open files stay readable."""
    try:
        return leases.take(run, number)
    except (FastfillError, OSError) as error:
        logger.warning("commit %d is served without a lease after a fork: %s", number, error)
        return None


def _release(opened: _Snapshot) -> None:
    if opened.lease is not None:
        opened.lease.release()
