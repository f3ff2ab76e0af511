"""Exact ranks of the relevant images of each query, by counting.

Average precision needs, for each relevant image, the number of irrelevant ones that are as near. So only the relevant
distances of a query are sorted, and all others are counted between them. Ties are pessimistic, hence deterministic: at
equal distance an irrelevant image comes first. Memory is a few blocks of distances for any gallery.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import numpy as np

from pipeline.arrays import Bools, Float32, Float64, Int32, Int64, Labels
from pipeline.errors import DataError
from pipeline.models.calibration import Calibration

OnProgress = Callable[[int, int], None]
Score = Callable[[Int64, Int64, list[Float32]], None]

TOP_K = 10  # the nearest that recall, slot share and ranks of the probe set look at
_BLOCK = 2**23  # distances of one thread to one gallery: 32 MB
_BATCH = 2**17  # distances counted at a time: they fit in the cache
_THREADS = min(8, os.cpu_count() or 1)
_GEMM = Lock()  # BLAS has its own threads: two products at once took 3 times as long (measured)


@dataclass(frozen=True, slots=True)
class Task:
    """Queries and their relevant rows; galleries are given to `run`."""

    metric: str  # l2, ip or cosine
    queries: Float32  # (Q, d) float32
    labels: Int64  # (Q,) int64, an index into `columns`
    columns: list[Int64]  # the gallery rows of each label
    own: Int64  # (Q,) int64, the gallery row that does not count for a query, or -1
    num_matches: Int64  # (Q,) int64, the relevant rows that count
    calibration: Calibration | None = None  # maps the keys of transformed rows

    def run(
        self,
        galleries: list[Float32],
        score: Score,
        progress: OnProgress | None,
        transformed: Sequence[Bools | None] = (),
    ) -> None:
        """Call `score(rows, columns, distances)` for every query that has a match, from several threads.

        `rows` (B,) are queries of one label, `columns` (R,) the gallery rows of that label, and `distances` has a
        (B, N) float32 per gallery, which `score` may overwrite. The same input gives the same bits.

        Args:
            galleries: each (N, d) float32.
            score: the function to call.
            transformed: per gallery the rows that are transformed vectors, (N,) bool; None for no row.

        Raises:
            DataError: a gallery does not fit labels and queries, or is not finite.
        """
        expected = sum(map(len, self.columns)), self.queries.shape[1]
        for gallery in galleries:
            if gallery.shape != expected:
                raise DataError("the gallery does not fit labels and queries", expected=expected, found=gallery.shape)
        kinds = itertools.chain(transformed, itertools.repeat(None)) if self.calibration else itertools.repeat(None)
        sides = [_side(gallery, self.metric, kind) for gallery, kind in zip(galleries, kinds, strict=False)]
        rows = np.argsort(self.labels, kind="stable")
        rows = rows[self.num_matches[rows] > 0]
        size = max(1, _BLOCK // len(galleries[0]))
        blocks = [rows[start : start + size] for start in range(0, len(rows), size)]

        def work(block: Int64) -> int:
            for batch, distances in self._batches(block, sides):
                score(batch, self.columns[self.labels[batch[0]]], distances)
            return len(block)

        done = 0
        with ThreadPoolExecutor(_THREADS) as pool:
            for count in pool.map(work, blocks):
                done += count
                if progress is not None:
                    progress(done, len(rows))

    def _batches(self, block: Int64, sides: list[_Side]) -> Iterator[tuple[Int64, list[Float32]]]:
        """Runs of one label from a block of queries, and their distances to each side."""
        distances = [self._distances(block, side) for side in sides]
        size = max(1, _BATCH // distances[0].shape[1])
        bounds = np.flatnonzero(np.diff(self.labels[block], prepend=-1, append=-1))
        for first, last in itertools.pairwise(bounds):
            for start in range(first, last, size):
                part = slice(start, min(start + size, last))
                rows = block[part]
                yield (
                    rows,
                    [self._calibrated(some[part], rows, side) for some, side in zip(distances, sides, strict=True)],
                )

    def _calibrated(self, distances: Float32, rows: Int64, side: _Side) -> Float32:
        if self.calibration is None or side.transformed is None:
            return distances
        return calibrate(distances, self.queries[rows], side.transformed, self.metric, self.calibration)

    def _distances(self, rows: Int64, side: _Side) -> Float32:
        """(B, N) float32, a monotone function of the distance; infinite at each query's own row."""
        with _GEMM:
            distances = self.queries[rows] @ side.vectors.T
        if side.offset is not None:
            distances += side.offset
        own = self.own[rows]
        known = np.flatnonzero(own >= 0)
        distances[known, own[known]] = np.inf
        return distances


@dataclass(frozen=True, slots=True)
class _Side:
    vectors: Float32
    offset: Float32 | None
    transformed: Bools | None


def calibrate(
    distances: Float32, queries: Float32, transformed: Bools, metric: str, calibration: Calibration
) -> Float32:
    """Map the distances of transformed rows, in place.

    Args:
        distances: (B, N) float32: keys for ip and cosine; for l2 (key - |query|^2) / 2.
        queries: (B, d) float32, or their negatives.
        transformed: (N,) bool.
        calibration: the map.
    """
    keys = distances[:, transformed].astype(np.float64)
    if metric == "l2":
        lengths = np.square(queries, dtype=np.float64).sum(axis=1, keepdims=True)
        distances[:, transformed] = (calibration.apply_exactly(2 * keys + lengths) - lengths) / 2
    else:
        distances[:, transformed] = calibration.apply_exactly(keys)
    return distances


def prepare(
    queries: Float32,
    query_labels: Labels,
    gallery_labels: Labels,
    own: Int64,
    metric: str,
    calibration: Calibration | None = None,
) -> Task:
    """Check the queries and find the relevant rows of each; arguments as in `metrics.evaluate`.

    Raises:
        DataError: shapes do not fit, a value is not finite, the metric is unknown, or no query has a match.
    """
    if len(queries) != len(query_labels):
        raise DataError("queries and their labels differ in number", expected=len(queries), found=len(query_labels))
    names, codes = np.unique(np.concatenate([gallery_labels, query_labels]), return_inverse=True)
    codes = codes.astype(np.int64)
    gallery, labels = codes[: len(gallery_labels)], codes[len(gallery_labels) :]
    counts = np.bincount(gallery, minlength=len(names))
    columns = np.split(np.argsort(gallery, kind="stable"), np.cumsum(counts)[:-1])
    is_own = (own >= 0) & (gallery[own] == labels)
    num_matches = counts[labels] - is_own
    if not num_matches.any():
        raise DataError("no query has a match in the gallery", expected="labels that occur more than once")
    return Task(metric, -_checked(queries, metric), labels, columns, own, num_matches, calibration)


def own_rows(
    num_queries: int, num_gallery: int, self_match: bool, query_ids: Int64 | None, gallery_ids: Int64 | None
) -> Int64:
    """(Q,) int64: the gallery row that is the query itself, or -1.

    Raises:
        DataError: `self_match`, and not as many queries as gallery rows; or ids of one side only.
    """
    if self_match:
        if num_queries != num_gallery:
            raise DataError("self_match needs the queries to be the gallery", expected=num_gallery, found=num_queries)
        return np.arange(num_queries)
    if query_ids is None and gallery_ids is None:
        return np.full(num_queries, -1)
    if query_ids is None or gallery_ids is None or (len(query_ids), len(gallery_ids)) != (num_queries, num_gallery):
        raise DataError("give an id for each query and for each gallery row, or none at all")
    order = np.argsort(gallery_ids)
    place = np.minimum(np.searchsorted(gallery_ids[order], query_ids), num_gallery - 1)
    return np.where(gallery_ids[order[place]] == query_ids, order[place], -1)


def take_relevant(distances: list[Float32], columns: Int64) -> tuple[Float32, Int64]:
    """The relevant distances of all sides, ascending, (B, K) float32, and the source of each, (B, K) int64.

    Source `side * R + r` is row columns[r] of that side. In `distances` they become infinite.
    """
    values = np.concatenate([side[:, columns] for side in distances], axis=1)
    source = np.argsort(values, axis=1, kind="stable")
    for side in distances:
        side[:, columns] = np.inf
    return np.take_along_axis(values, source, axis=1), source


def count_below(distances: Float32, thresholds: Float32) -> Int32:
    """(B, N) int32: how many of its row's ascending `thresholds` (B, K) are below each distance; exact.

    Each distance falls into a cell of a fine grid over the thresholds, which gives the count. Distances in cells with
    a threshold are searched. Rounding is monotone and the same for both, so no distance crosses a threshold. Measured:
    4 times as fast as a search for all.
    """
    rows, num = distances.shape
    cells = int(np.clip(num, 2**8, 2**16))
    low = thresholds[:, :1]
    high = np.where(np.isinf(thresholds), low, thresholds).max(axis=1, keepdims=True)
    scale = np.float32(cells) / np.maximum(high - low, np.float32(1e-30))
    first_cell = np.arange(rows, dtype=np.int32)[:, None] * (cells + 4)

    def cell(values: Float32, last: int) -> Int32:
        with np.errstate(over="ignore"):  # far beyond the last threshold: infinite is right
            position = (values - low) * scale
        position += 1
        cells_of: Int32 = np.clip(position, 0, last).astype(np.int32) + first_cell
        return cells_of

    occupied = cell(thresholds, cells + 3)  # infinite ones get a cell without distances
    held = np.bincount(occupied.ravel(), minlength=rows * (cells + 4)).reshape(rows, -1)
    below = (held.cumsum(axis=1) - held).astype(np.int32).ravel()
    below[occupied] = -1
    result: Int32 = below.take(cell(distances, cells + 2))
    for row in range(rows):
        unsure = np.flatnonzero(result[row] < 0)
        result[row, unsure] = np.searchsorted(thresholds[row], distances[row, unsure])
    return result


def histogram(below: Int32, num_thresholds: int, steps: Int64 | None = None, num_steps: int = 1) -> Int64:
    """(B, num_steps, K) int64: the number of rows per step whose distance lies in each gap of the thresholds.

    The cumulative sum over K is the number of rows as near as each threshold. `steps` is (N,) int64.
    """
    width = num_thresholds + 1
    flat = below + np.arange(len(below))[:, None] * (num_steps * width)
    if steps is not None:
        flat += steps * width
    counts = np.bincount(flat.ravel(), minlength=len(below) * num_steps * width)
    return counts.reshape(len(below), num_steps, width)[:, :, :-1]


def score(irrelevant: Int64, num_matches: Int64) -> tuple[Int64, Float64]:
    """The first relevant rank, and the average precision, each (B, ...).

    `irrelevant` is (B, ..., R): the number of irrelevant rows as near as the r-th nearest relevant one.
    """
    found = np.arange(1, irrelevant.shape[-1] + 1)
    matches = num_matches.reshape(-1, *[1] * (irrelevant.ndim - 2))
    ranks = irrelevant + found
    precision = found / ranks
    precision *= found <= matches[..., None]
    return ranks[..., 0], precision.sum(axis=-1) / matches


def _side(gallery: Float32, metric: str, transformed: Bools | None) -> _Side:
    vectors = _checked(gallery, metric)
    offset = np.einsum("nd,nd->n", vectors, vectors) / 2 if metric == "l2" else None
    return _Side(vectors, offset, transformed if transformed is not None and transformed.any() else None)


def _checked(vectors: Float32, metric: str) -> Float32:
    if metric not in ("l2", "ip", "cosine"):
        raise DataError("unknown metric", expected="l2, ip or cosine", found=metric)
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    norms = np.einsum("nd,nd->n", vectors, vectors)
    if not np.isfinite(norms).all():
        raise DataError("embeddings are not finite", found=f"{(~np.isfinite(norms)).sum()} of {len(norms)} rows")
    if metric != "cosine":
        return vectors
    unit: Float32 = vectors / np.maximum(np.sqrt(norms), np.float32(1e-30))[:, None]
    return unit
