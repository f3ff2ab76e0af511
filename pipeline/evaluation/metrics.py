"""Retrieval quality of a gallery (docs/method.md): pure functions on arrays.

Queries are embeddings of the new encoder, except for old/old. Distances are exact, ties are pessimistic
(`evaluation.ranks`), and the same arrays give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.arrays import Bools, Float32, Float64, Int32, Int64, Labels
from pipeline.evaluation import ranks as ranking
from pipeline.evaluation.ranks import TOP_K, OnProgress
from pipeline.knn import nearest
from pipeline.models.calibration import Calibration

METRICS = ("top1", "top5", "map")


@dataclass(frozen=True, slots=True)
class Metrics:
    """Means in per cent over the queries that have a match; the others are only counted.

    `first_rank` is (Q,) int32, from 1, and 0 for a query without a match. `average_precision` is (Q,) float64 in
    [0, 1], and NaN for a query without a match.
    """

    top1: float
    top5: float
    map: float
    num_queries: int
    num_unmatched: int
    num_gallery: int
    first_rank: Int32
    average_precision: Float64

    def as_dict(self) -> dict[str, float]:
        """`{"top1":, "top5":, "map":}` in per cent."""
        return {"top1": self.top1, "top5": self.top5, "map": self.map}


@dataclass(frozen=True, slots=True)
class EvaluateOptions:
    """How a gallery is ranked."""

    metric: str = "l2"  # l2, ip or cosine
    self_match: bool = False  # query i is gallery row i, which does not count for it
    query_ids: Int64 | None = None  # (Q,); the gallery row with a query's own id does not count for it
    gallery_ids: Int64 | None = None  # (N,)
    transformed: Bools | None = None  # (N,) bool, the gallery rows that are transformed vectors
    calibration: Calibration | None = None  # maps the keys of these rows; None to rank both kinds as they are


def evaluate(
    queries: Float32,
    gallery: Float32,
    query_labels: Labels,
    gallery_labels: Labels,
    options: EvaluateOptions | None = None,
    progress: OnProgress | None = None,
) -> Metrics:
    """Rank the gallery for each query by exact distance.

    Args:
        queries: (Q, d) float32.
        gallery: (N, d) float32.
        query_labels: (Q,) integers or strings.
        gallery_labels: (N,) of the same kind.
        options: how it is ranked; by default by l2, and no gallery row is a query's own.

    Raises:
        DataError: shapes do not fit, a value is not finite, or no query has a match.
    """
    how = options or EvaluateOptions()
    own = ranking.own_rows(len(queries), len(gallery), how.self_match, how.query_ids, how.gallery_ids)
    task = ranking.prepare(queries, query_labels, gallery_labels, own, how.metric, how.calibration)
    first_rank, average_precision = no_scores(len(queries))

    def score(rows: Int64, columns: Int64, distances: list[Float32]) -> None:
        thresholds, _ = ranking.take_relevant(distances, columns)
        counts = ranking.histogram(ranking.count_below(distances[0], thresholds), thresholds.shape[1])
        irrelevant = counts[:, 0].cumsum(axis=1)
        first_rank[rows], average_precision[rows] = ranking.score(irrelevant, task.num_matches[rows])

    task.run([gallery], score, progress, [how.transformed])
    return to_metrics(first_rank, average_precision, len(gallery))


def by_group(first_rank: Int32, average_precision: Float64, groups: Int64, num_groups: int) -> Float64:
    """METRICS in per cent of each group's queries, (num_groups, P, 3) float64; NaN for a group without any.

    Args:
        first_rank: (P, Q) int32, as in `simulated_curve.ResultDetail`.
        average_precision: (P, Q) float64.
        groups: (Q,) int64 in [0, num_groups), or -1 for none.
        num_groups: the number of groups.
    """
    members = [np.flatnonzero(groups == group) for group in range(num_groups)]
    return np.stack([mean_metrics(first_rank[:, rows], average_precision[:, rows]) for rows in members])


def negative_flips(before: Int32, after: Int32) -> Float64:
    """The per cent of queries that are answered at rank 1 `before` (Q,) and not `after` (P, Q); (P,) float64."""
    measured = before > 0
    flips: Float64 = 100 * ((before == 1) & (after != 1))[:, measured].mean(axis=1)
    return flips


def recall(found: Int64, exact: Int64) -> float:
    """The per cent of the exact neighbours (Q, k) int64 that are among those found (Q, k)."""
    return float(100 * (found[:, :, None] == exact[:, None, :]).any(axis=1).mean())


def mean_metrics(first_rank: Int32, average_precision: Float64) -> Float64:
    """METRICS in per cent, (..., 3) float64, over the queries (..., Q) that have a match; NaN if none has."""
    measured = np.flatnonzero(first_rank[(0,) * (first_rank.ndim - 1)] > 0)
    if not len(measured):
        return np.full((*first_rank.shape[:-1], len(METRICS)), np.nan)
    ranks = first_rank.take(measured, axis=-1)
    precision = average_precision.take(measured, axis=-1)  # contiguous: a sum's bits depend on the layout
    means = [(ranks <= 1).mean(axis=-1), (ranks <= 5).mean(axis=-1), precision.mean(axis=-1)]
    percent: Float64 = 100 * np.stack(means, axis=-1)
    return percent


def to_metrics(first_rank: Int32, average_precision: Float64, num_gallery: int) -> Metrics:
    """The metrics of queries from their first relevant rank (0 for none) and average precision."""
    top1, top5, precision = (float(value) for value in mean_metrics(first_rank, average_precision))
    measured = int((first_rank > 0).sum())
    unmatched = len(first_rank) - measured
    return Metrics(top1, top5, precision, measured, unmatched, num_gallery, first_rank, average_precision)


def nearest_rows(queries: Float32, gallery: Float32, own: Int64, metric: str) -> Int64:
    """Each query's TOP_K nearest rows except its own, (Q, K) int64; all if there are fewer."""
    return nearest(queries, gallery, min(TOP_K, len(gallery) - 1), own, metric)[1]


def no_scores(*shape: int) -> tuple[Int32, Float64]:
    """Ranks 0 and precisions NaN, for queries that are not scored yet."""
    return np.zeros(shape, np.int32), np.full(shape, np.nan)
