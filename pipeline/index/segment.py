"""Segments: the FAISS index in pieces, one per (shard, wave, kind); build, search, decode and merge them.

A segment is inverted lists with explicit ids, and borrows the codebook's quantizer. Searching segments gives the
answer of one index of all their vectors. With a calibration, a search takes the k nearest of each kind and merges them
by calibrated keys (`search_by_kind`). On equal processors the same rows give the same bytes (across processors:
`equality`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import faiss
import numpy as np
from numpy.typing import NDArray

from pipeline.arrays import Float32, Int64
from pipeline.errors import DataError
from pipeline.index.codebook import READ_FLAGS, Codebook, parts
from pipeline.index.segment_files import (
    KINDS,
    Rows,
    SegmentKind,
    SegmentRef,
    check_digest,
    local_segment,
    store_segment,
)
from pipeline.models.calibration import Calibration
from pipeline.run import Run

Bools = NDArray[np.bool_]

_QUERIES_AT_ONCE = 1024
_RESULTS_AT_ONCE = 2**22  # over the queries of one group: bounds the memory beside the answer
_COLUMNS_AT_ONCE = 8192
_COLUMNS_TO_SORT = 64  # up to here sorting them all is fastest


class Segment:
    """One segment, or several gathered into one; never changed."""

    def __init__(self, codebook: Codebook, ivf: faiss.IndexIVF) -> None:
        self.ivf = ivf
        self.num_vectors: int = ivf.ntotal
        self._codebook = codebook  # owns the quantizer that the index points to

    @classmethod
    def read(cls, codebook: Codebook, path: str) -> Segment:
        """Open a local file with mmap.

        Raises:
            DataError: FAISS cannot read it, or it was built for another kind of codebook.
        """
        try:
            ivf = parts(faiss.read_index(path, READ_FLAGS | faiss.IO_FLAG_MMAP))[0]
        except (RuntimeError, TypeError) as error:
            raise DataError("not a readable segment", found=error, where=path) from error
        kinds = [(type(item).__name__, item.d, item.nlist, item.code_size) for item in (codebook.ivf, ivf)]
        if kinds[0] != kinds[1]:
            raise DataError("the segment has another codec", expected=kinds[0], found=kinds[1], where=path)
        return cls(codebook, codebook.borrow(ivf))

    @classmethod
    def open(cls, run: Run, codebook: Codebook, ref: SegmentRef, verify: bool = True) -> Segment:
        """Open a segment of a commit after checking its bytes against the commit.

        Raises:
            DataError: it is missing, its bytes have changed, or its number of vectors is wrong.
        """
        where = run.path(ref.path)
        with local_segment(where) as path:
            if verify:
                check_digest(str(path), ref.sha256, where)
            segment = cls.read(codebook, str(path))
        if segment.num_vectors != ref.vectors:
            raise DataError("a segment has another size", expected=ref.vectors, found=segment.num_vectors, where=where)
        return segment


@dataclass(frozen=True, slots=True)
class Hits:
    """The k nearest vectors of Q queries, best first; all fields are (Q, k)."""

    # As a user sees them: squared Euclidean ascending for l2, similarity descending for ip and cosine; inf or -inf if
    # fewer than k were found. Those of transformed vectors are calibrated.
    distances: Float32
    ids: Int64  # -1 if fewer than k were found
    transformed: Bools  # whether the vector is in a transformed segment
    raw: Float32  # the distances before calibration


def build_segment(codebook: Codebook, ids: Int64, vectors: Float32) -> bytes:
    """A segment's bytes: the same for the same rows in any order.

    `ids` is (n,) int64, unique and not negative; `vectors` is (n, d) float32. n may be 0.

    Raises:
        DataError: an id is repeated or negative, the shape is wrong, or a number is not finite.
    """
    order = np.argsort(ids, kind="stable")
    ids = np.ascontiguousarray(ids[order], dtype=np.int64)
    _check_ids(ids, len(vectors))
    return codebook.serialize(_filled(codebook, ids, vectors[order])).tobytes()


def gather_segments(codebook: Codebook, segments: Sequence[Segment]) -> Segment:
    """Copy segments into one in memory, with the same answers at the cost of one.

    A query then visits each list once instead of once per segment, where a list often has only a vector or two.
    """
    pointers = faiss.InvertedListsPtrVector()  # type: ignore[attr-defined]  # not in the stubs
    for segment in segments:
        pointers.push_back(segment.ivf.invlists)
    lists = faiss.HStackInvertedLists(pointers.size(), pointers.data())  # borrows those of the segments
    whole = codebook.new_segment()
    everything = faiss.InvertedLists.SUBSET_TYPE_INVLIST  # type: ignore[attr-defined]  # not in the stubs
    lists.copy_subset_to(  # type: ignore[attr-defined]  # not in the stubs
        whole.invlists, everything, 0, codebook.num_lists
    )
    whole.ntotal = sum(segment.num_vectors for segment in segments)
    return Segment(codebook, whole)


def use_one_thread() -> None:
    """Search with the calling thread alone from now on."""
    faiss.omp_set_num_threads(1)


def search(
    codebook: Codebook, segments: Sequence[Segment], queries: Float32, k: int, nprobe: int
) -> tuple[Float32, Int64]:
    """The k nearest vectors of all segments, as one index of them would answer; equal distances by smaller id.

    Returns:
        distances (Q, k) float32 and ids (Q, k) int64, best first: squared Euclidean ascending for l2, similarity
        descending
        for ip and cosine. If fewer than k were found: id -1, distance inf or -inf.

    Raises:
        DataError: the queries (Q, d) have another width, or are not finite.
    """
    found = search_by_kind(codebook, {"embedded": segments}, queries, k, nprobe, None)
    return found.distances, found.ids


def search_by_kind(
    codebook: Codebook,
    segments: Mapping[SegmentKind, Sequence[Segment]],
    queries: Float32,
    k: int,
    nprobe: int,
    calibration: Calibration | None,
) -> Hits:
    """The k nearest vectors of all segments by calibrated key, exactly.

    A key is the squared distance for l2, and minus the similarity for ip and cosine. The calibration maps the keys of
    transformed vectors. It is monotone, so the k nearest of each kind contain the k nearest of both. Equal calibrated
    keys are ordered: embedded before transformed, then by the key before calibration, then by id. Without a
    calibration equal keys are ordered by id alone.

    Raises:
        DataError: the queries (Q, d) have another width, or are not finite.
    """
    prepared = codebook.prepare(queries)
    found = []
    together = max(1, min(_QUERIES_AT_ONCE, _RESULTS_AT_ONCE // k))
    for start in range(0, max(1, len(prepared)), together):
        rows = slice(start, start + together)
        probe = _ListScan.make(codebook, prepared[rows], nprobe)
        found.append(_nearest_by_kind(segments, probe, k, calibration))
    keys, ids, is_transformed, raw = found[0] if len(found) == 1 else map(np.concatenate, zip(*found, strict=True))
    if _sign(codebook.ivf) < 0:
        keys, raw = -keys, -raw
    return Hits(keys, ids, is_transformed, raw)


def decode_segment(codebook: Codebook, segment: Segment, wanted: Int64 | None = None) -> tuple[Int64, Float32]:
    """The content of a segment: ids (n,) int64, sorted, and decoded vectors (n, d) float32.

    The vectors are the added ones if `codebook.exact`, else as the codec rounds them. `wanted` decodes these ids
    alone, as far as they are there.
    """
    lists = segment.ivf.invlists
    assert lists is not None
    sizes = {number: size for number in range(codebook.num_lists) if (size := lists.list_size(number))}
    width = segment.ivf.code_size
    codes = [faiss.rev_swig_ptr(lists.get_codes(number), size * width) for number, size in sizes.items()]
    ids = [faiss.rev_swig_ptr(lists.get_ids(number), size) for number, size in sizes.items()]
    all_ids = np.concatenate([np.empty(0, np.int64), *ids])
    rows = np.argsort(all_ids)
    rows = rows if wanted is None else rows[np.isin(all_ids[rows], wanted)]
    if not len(rows):
        return np.empty(0, dtype=np.int64), np.empty((0, codebook.dim), dtype=np.float32)
    numbers = np.repeat(np.array(list(sizes), dtype=np.int64), list(sizes.values()))[rows]
    some_codes = np.concatenate(codes).reshape(-1, width)[rows]
    vectors = np.empty((len(rows), segment.ivf.d), dtype=np.float32)
    segment.ivf.decode_vectors(
        len(vectors), faiss.swig_ptr(some_codes), faiss.swig_ptr(numbers), faiss.swig_ptr(vectors)
    )
    return all_ids[rows], codebook.restore(vectors)


def as_stored(codebook: Codebook, vectors: Float32) -> Float32:
    """The vectors (n, d) as `decode_segment` would return them after storing, in their order: (n, d) float32.

    Equal within rounding (`equality`): after PCA or OPQ the last bits depend on how many vectors are decoded together.
    """
    if codebook.exact:
        return vectors
    return decode_segment(codebook, Segment(codebook, _filled(codebook, np.arange(len(vectors)), vectors)))[1]


def merge(codebook: Codebook, segments: Iterable[Segment], nprobe: int) -> bytes:
    """Segments as one stand-alone FAISS index, for `faiss.read_index`; no id may be in two of them."""
    whole = codebook.new_index()
    ivf, _ = parts(whole)
    ivf.nprobe = nprobe
    for segment in segments:  # copied: `merge_from` would empty the mapped segments
        everything = faiss.InvertedLists.SUBSET_TYPE_INVLIST  # type: ignore[attr-defined]  # not in the stubs
        segment.ivf.copy_subset_to(ivf, everything, 0, codebook.num_lists)
    whole.ntotal = ivf.ntotal
    return faiss.serialize_index(whole).tobytes()


def write_segment(run: Run, codebook: Codebook, rows: Rows, shard: int, wave: int, kind: SegmentKind) -> SegmentRef:
    """Build and store the segment of a (shard, wave); a repeated call writes nothing new.

    In an embedded segment of an earlier version rejected rows are still transformed.

    Raises:
        DataError: as `build_segment`; or an embedded row in a transformed segment.
    """
    return store_segment(run, build_segment(codebook, rows.ids, rows.vectors), rows, shard, wave, kind)


@dataclass(frozen=True, slots=True)
class _ListScan:
    """Prepared queries (q, d'), and the lists to visit with their distances, (q, nprobe)."""

    queries: Float32
    lists: Int64
    coarse: Float32
    parameters: faiss.SearchParametersIVF

    @classmethod
    def make(cls, codebook: Codebook, queries: Float32, nprobe: int) -> _ListScan:
        lists, coarse = codebook.assign(queries, nprobe)
        parameters = faiss.SearchParametersIVF()
        parameters.nprobe = lists.shape[1]
        return cls(queries, lists, coarse, parameters)

    def of(self, rows: NDArray[np.intp]) -> _ListScan:
        return _ListScan(self.queries[rows], self.lists[rows], self.coarse[rows], self.parameters)


def _candidates(segments: Sequence[Segment], probe: _ListScan, k: int, width: int) -> tuple[Float32, Int64]:
    """At least the k smallest (key, id) of each query, in any order, from the `width` > k best of each segment.

    FAISS breaks ties in its own order, so a segment may leave out equals of its last result. If such a one ties with
    the k-th of all, the query is searched again for more.
    """
    rows = len(probe.queries)
    best: list[tuple[Float32, Int64]] = []
    edge: Float32 | None = None
    for segment in segments:
        asked = min(width, segment.num_vectors)
        if not asked:
            continue
        best.append(_scan(segment.ivf, probe, asked))
        if asked < segment.num_vectors:
            last = best[-1][0][:, -1]
            edge = last if edge is None else np.minimum(edge, last)
        if sum(keys.shape[1] for keys, _ in best) > _COLUMNS_AT_ONCE:
            best = [_merge(best, k)]
    missing = max(0, k - sum(keys.shape[1] for keys, _ in best))
    if missing:
        best.append((np.full((rows, missing), np.inf, np.float32), np.full((rows, missing), -1, np.int64)))
    keys, ids = best[0] if len(best) == 1 else _merge(best, k)  # a scan gives ascending keys
    if edge is None or not (ties := (edge <= keys[:, k - 1]) & np.isfinite(edge)).any():
        return keys, ids
    keys, ids = _merge([(keys, ids)], k)
    tied = np.flatnonzero(ties)
    keys[tied], ids[tied] = _merge([_candidates(segments, probe.of(tied), k, 4 * width)], k)
    return keys, ids


def _scan(ivf: faiss.IndexIVF, probe: _ListScan, k: int) -> tuple[Float32, Int64]:
    """The k nearest of one segment: keys (smaller is better, inf if there is none) and ids."""
    rows = len(probe.queries)
    distances = np.empty((rows, k), dtype=np.float32)
    ids = np.empty((rows, k), dtype=np.int64)
    # The C form, because the wrapped one takes nprobe from the index, which other threads search too.
    ivf.search_preassigned_c(  # type: ignore[attr-defined]  # not in the stubs
        rows,
        faiss.swig_ptr(probe.queries),
        k,
        faiss.swig_ptr(probe.lists),
        faiss.swig_ptr(probe.coarse),
        faiss.swig_ptr(distances),
        faiss.swig_ptr(ids),
        False,
        probe.parameters,
    )
    if _sign(ivf) < 0:
        np.negative(distances, out=distances)
    missing = ids < 0
    if missing.any():
        distances[missing] = np.inf
    return distances, ids


def _merge(parts: list[tuple[Float32, Int64]], k: int) -> tuple[Float32, Int64]:
    """The k smallest (key, id) of each row of all parts, sorted; all equals of the k-th take part."""
    keys, ids = parts[0]
    if len(parts) > 1:
        keys = np.concatenate([part[0] for part in parts], axis=1)
        ids = np.concatenate([part[1] for part in parts], axis=1)
    rows = np.arange(len(keys))[:, None]
    if keys.shape[1] > _COLUMNS_TO_SORT and k < keys.shape[1]:
        kth = np.partition(keys, k - 1, axis=1)[:, k - 1 : k]
        kept = int((keys <= kth).sum(axis=1).max(initial=k))
        if kept < keys.shape[1]:
            nearest = np.argpartition(keys, kept - 1, axis=1)[:, :kept]
            keys, ids = keys[rows, nearest], ids[rows, nearest]
    order = np.lexsort((ids, keys), axis=1)[:, :k]
    return keys[rows, order], ids[rows, order]


def _nearest_by_kind(
    segments: Mapping[SegmentKind, Sequence[Segment]], probe: _ListScan, k: int, calibration: Calibration | None
) -> tuple[Float32, Int64, Bools, Float32]:
    """The k nearest of both kinds: calibrated keys, ids, whether transformed, and raw keys; all (q, k)."""
    parts = [_candidates(segments[kind], probe, k, width=k + 1) for kind in KINDS if segments.get(kind)]
    parts = parts or [_candidates((), probe, k, width=k + 1)]
    raw = np.concatenate([keys for keys, _ in parts], axis=1)
    ids = np.concatenate([ids for _, ids in parts], axis=1)
    only_transformed = len(parts) == 1 and segments.get("transformed")
    first = 0 if only_transformed else parts[0][0].shape[1]  # this column and all after it are transformed
    keys = raw
    by: list[NDArray[np.generic]] = [ids, raw]
    if calibration is not None and first < raw.shape[1]:
        keys = raw.copy()
        keys[:, first:] = calibration.apply(raw[:, first:])
        transformed = np.zeros(raw.shape, np.bool_)
        transformed[:, first:] = True
        by += [transformed, keys]
    order = np.lexsort(by, axis=1)[:, :k]
    rows = np.arange(len(raw))[:, None]
    ids = ids[rows, order]
    return keys[rows, order], ids, (order >= first) & (ids >= 0), raw[rows, order]


def _filled(codebook: Codebook, ids: Int64, vectors: Float32) -> faiss.IndexIVF:
    prepared = codebook.prepare(vectors)
    segment = codebook.new_segment()
    if len(ids):
        lists = np.ascontiguousarray(codebook.assign(prepared, 1)[0].reshape(-1))
        segment.add_core(len(ids), faiss.swig_ptr(prepared), faiss.swig_ptr(ids), faiss.swig_ptr(lists))
    return segment


def _sign(ivf: faiss.IndexIVF) -> np.float32:
    return np.float32(1 if ivf.metric_type == faiss.METRIC_L2 else -1)


def _check_ids(ids: Int64, num_vectors: int) -> None:
    """`ids` are sorted."""
    if ids.shape != (num_vectors,):
        raise DataError("a segment needs one id per vector", expected=(num_vectors,), found=ids.shape)
    repeated = ids[1:][ids[1:] == ids[:-1]]
    if len(repeated) or (len(ids) and ids[0] < 0):
        found = f"{len(repeated)} repeated, such as {repeated[:3].tolist()}; the smallest is {ids[0]}"
        raise DataError("ids of a segment are repeated or negative", expected="each id once, from 0", found=found)
