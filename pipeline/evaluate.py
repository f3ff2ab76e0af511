"""Retrieval quality of a gallery, and the backfilling curve from known embeddings (METHOD.md).

Pure functions on arrays. Queries are embeddings of the new encoder, except for old/old. Distances are
exact, ties are pessimistic (ranking.py), and the same arrays give the same bits: a curve's ends equal
what `evaluate` gives for the gallery that is all transformed or all embedded.

It knows nothing about files, runs or indexes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline import ranking
from pipeline.arrays import Bools, Float32, Float64, Int32, Int64, Labels
from pipeline.calibration import Calibration
from pipeline.hashing import splitmix64
from pipeline.points import curve_steps, score_points, slot_share, transformed_slots
from pipeline.ranking import Progress

METRICS = ("top1", "top5", "map")


@dataclass(frozen=True, slots=True)
class Metrics:
    """Means in per cent over the queries that have a match; the others are only counted.

    `first_rank` is (Q,) int32, from 1, and 0 where a query has no match; `average_precision` is
    (Q,) float64 in [0, 1], NaN where a query has no match.
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
class OrderCurve:
    """One order: `values` is (P, 3) float64, METRICS in per cent, the mean over its permutations.

    `area` is the plain mean of the points (as published), `area_trapezoid` the trapezoid rule, and
    `area_std` the sample deviation of `area` over the permutations (0 for one); each (3,) float64.
    """

    values: Float64
    area: Float64
    area_trapezoid: Float64
    area_std: Float64
    num_permutations: int


@dataclass(frozen=True, slots=True)
class Detail:
    """One order per point and query: `first_rank` (P, Q) int32, `average_precision` (P, Q) float64.

    `slot_share` is (P,) float64: the share of transformed vectors in the nearest SLOTS over their share
    in the gallery; NaN where none is left. At a tie for the last slot the transformed one counts.
    """

    first_rank: Int32
    average_precision: Float64
    slot_share: Float64


@dataclass(frozen=True, slots=True)
class Simulation:
    """The curve of each order over `fractions` (P,) float64; `start` and `end` are the states at 0 and 1.

    `queries` has, where it was asked for, of each order the first ranks (M, P, Q) int32 and the average precisions
    (M, P, Q) float64 of its M permutations, as in `Detail`.
    """

    fractions: Float64
    orders: dict[str, OrderCurve]
    start: Metrics
    end: Metrics
    detail: Detail | None
    queries: dict[str, tuple[Int32, Float64]] | None = None


def evaluate(
    queries: Float32,
    gallery: Float32,
    query_labels: Labels,
    gallery_labels: Labels,
    *,
    metric: str = "l2",
    self_match: bool = False,
    query_ids: Int64 | None = None,
    gallery_ids: Int64 | None = None,
    transformed: Bools | None = None,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
) -> Metrics:
    """CMC top-1 and top-5, and mAP over the full ranking.

    Args:
        queries: (Q, d) float32.
        gallery: (N, d) float32.
        query_labels: (Q,) integers or strings.
        gallery_labels: (N,) of the same kind.
        metric: l2, ip or cosine.
        self_match: query i is gallery row i, which does not count for it.
        query_ids: (Q,) and `gallery_ids` (N,): the gallery row of a query's own id does not count for it.
        gallery_ids: see `query_ids`.
        transformed: (N,) bool, which gallery rows are transformed vectors.
        calibration: maps the keys of these rows; None to rank both kinds as they are.
        progress: called with (queries done, queries).

    Raises:
        DataError: shapes do not fit, a value is not finite, or no query has a match.
    """
    own = ranking.own_rows(len(queries), len(gallery), self_match, query_ids, gallery_ids)
    task = ranking.prepare(queries, query_labels, gallery_labels, own, metric, calibration)
    first_rank, average_precision = _no_scores(len(queries))

    def score(rows: Int64, columns: Int64, distances: list[Float32]) -> None:
        thresholds, _ = ranking.take_relevant(distances, columns)
        counts = ranking.histogram(ranking.count_below(distances[0], thresholds), thresholds.shape[1])
        irrelevant = counts[:, 0].cumsum(axis=1)
        first_rank[rows], average_precision[rows] = ranking.score(irrelevant, task.num_matches[rows])

    task.run([gallery], score, progress, [transformed])
    return _metrics(first_rank, average_precision, len(gallery))


def simulate_curve(
    transformed: Float32,
    embedded: Float32,
    queries: Float32,
    query_labels: Labels,
    gallery_labels: Labels,
    orders: Mapping[str, Sequence[Int64]],
    *,
    points: int = 22,
    metric: str = "l2",
    self_match: bool = False,
    query_ids: Int64 | None = None,
    gallery_ids: Int64 | None = None,
    embeddable: Bools | None = None,
    calibration: Calibration | None = None,
    detail: str | None = None,
    per_query: bool = False,
    progress: Progress | None = None,
) -> Simulation:
    """The curve of each order: at point i the first floor(i * N / (points - 1)) images of it are embedded.

    Args as in `evaluate`, and:
        transformed: (N, d) float32, h of the old embedding.
        embedded: (N, d) float32, the new encoder on the same images, in the same order.
        orders: name -> one or more permutations (N,) int64 of the gallery rows, the first to embed first.
        points: P, at least 2.
        embeddable: (N,) bool; where it is False (a reject) the vector stays transformed throughout.
        detail: the order whose first permutation is returned per query, with its slot share.
        per_query: return the scores of all orders per query.

    Raises:
        DataError: as in `evaluate`, or an order is not a permutation of the gallery.
    """
    num = len(transformed)
    own = ranking.own_rows(len(queries), num, self_match, query_ids, gallery_ids)
    task = ranking.prepare(queries, query_labels, gallery_labels, own, metric, calibration)
    possible, cuts = np.full(num, True) if embeddable is None else embeddable, np.arange(points) * num // (points - 1)
    names = [name for name in orders for _ in orders[name]]
    steps = [curve_steps(order, cuts, name) for name in orders for order in orders[name]]
    shown = None if detail is None else np.where(possible, steps[names.index(detail)], points)
    first_rank, average_precision = _no_scores(len(steps), points, len(queries))
    slots = np.zeros((points, len(queries)), np.int64)

    def score(rows: Int64, columns: Int64, distances: list[Float32]) -> None:
        if shown is not None:
            slots[:, rows] = transformed_slots(distances, shown, points)
        found = score_points(distances, columns, task.num_matches[rows], steps, points)
        first_rank[..., rows], average_precision[..., rows] = found

    mixed = np.where(possible[:, None], embedded, transformed)
    task.run([transformed, mixed], score, progress, [possible | True, ~possible])
    start, end = (_metrics(first_rank[0, point], average_precision[0, point], num) for point in (0, -1))
    means = np.stack([_means(*scores) for scores in zip(first_rank, average_precision, strict=True)])
    members = {name: [own == name for own in names] for name in orders}
    curves = {name: _order_curve(means[mine], cuts / num) for name, mine in members.items()}
    kept = {name: (first_rank[mine], average_precision[mine]) for name, mine in members.items()} if per_query else None
    if shown is None:
        return Simulation(cuts / num, curves, start, end, None, kept)
    at, share = names.index(detail or ""), slot_share(slots[:, task.num_matches > 0], shown)
    return Simulation(cuts / num, curves, start, end, Detail(first_rank[at], average_precision[at], share), kept)


def by_group(first_rank: Int32, average_precision: Float64, groups: Int64, num_groups: int) -> Float64:
    """METRICS in per cent of each group's queries, (num_groups, P, 3) float64; NaN for a group without any.

    Args:
        first_rank: (P, Q) int32, as in `Detail`.
        average_precision: (P, Q) float64.
        groups: (Q,) int64 in [0, num_groups), or -1 for none.
        num_groups: the number of groups.
    """
    members = [np.flatnonzero(groups == group) for group in range(num_groups)]
    return np.stack([_means(first_rank[:, rows], average_precision[:, rows]) for rows in members])


def negative_flips(before: Int32, after: Int32) -> Float64:
    """The per cent of queries that were answered at rank 1 `before` (Q,) and are not `after` (P, Q); (P,) float64."""
    measured = before > 0
    flips: Float64 = 100 * ((before == 1) & (after != 1))[:, measured].mean(axis=1)
    return flips


def share_of_gap(area: float, old_old: float, new_new: float) -> float:
    """How much of the way from the old to the new system an area is: 0 to 1, NaN where there is no way."""
    return (area - old_old) / (new_new - old_old) if new_new != old_old else float("nan")


def recall(found: Int64, exact: Int64) -> float:
    """The per cent of the exact neighbours (Q, k) int64 that are among those found (Q, k)."""
    return float(100 * (found[:, :, None] == exact[:, None, :]).any(axis=1).mean())


def order_by_priority(priority: Float32, ids: Int64, seed: int) -> Int64:
    """Rows by descending priority, (N,) int64; ties by the ascending hash of the id with the plan's seed."""
    return np.lexsort((splitmix64(ids, seed), -priority))


def random_order(ids: Int64, seed: int) -> Int64:
    """Rows in a random order, (N,) int64, that depends on the ids and the seed only."""
    return np.argsort(splitmix64(ids, seed), kind="stable")


def oracle_order(transformed: Float32, embedded: Float32) -> Int64:
    """Rows by descending true Euclidean distance between the two vectors, (N,) int64; ties by row."""
    gap = embedded - transformed
    return np.argsort(-(gap * gap).sum(axis=1), kind="stable")


def _order_curve(permutations: Float64, fractions: Float64) -> OrderCurve:
    """From (M, P, 3) METRICS; the ends are the same for all M, and stay so to the last bit."""
    values = permutations.mean(axis=0)
    values[[0, -1]] = permutations[0, [0, -1]]
    areas = permutations.mean(axis=1)
    std = areas.std(axis=0, ddof=1) if len(areas) > 1 else np.zeros(len(METRICS))
    return OrderCurve(values, values.mean(axis=0), np.trapezoid(values, fractions, axis=0), std, len(areas))


def _no_scores(*shape: int) -> tuple[Int32, Float64]:
    return np.zeros(shape, np.int32), np.full(shape, np.nan)


def _means(first_rank: Int32, average_precision: Float64) -> Float64:
    """METRICS in per cent, (..., 3) float64, over the queries (..., Q) that have a match; NaN where none has."""
    measured = np.flatnonzero(first_rank[(0,) * (first_rank.ndim - 1)] > 0)
    if not len(measured):
        return np.full((*first_rank.shape[:-1], len(METRICS)), np.nan)
    ranks = first_rank.take(measured, axis=-1)
    precision = average_precision.take(measured, axis=-1)  # contiguous: a sum's bits depend on the layout
    means = [(ranks <= 1).mean(axis=-1), (ranks <= 5).mean(axis=-1), precision.mean(axis=-1)]
    percent: Float64 = 100 * np.stack(means, axis=-1)
    return percent


def _metrics(first_rank: Int32, average_precision: Float64, num_gallery: int) -> Metrics:
    top1, top5, precision = (float(value) for value in _means(first_rank, average_precision))
    measured = int((first_rank > 0).sum())
    unmatched = len(first_rank) - measured
    return Metrics(top1, top5, precision, measured, unmatched, num_gallery, first_rank, average_precision)
