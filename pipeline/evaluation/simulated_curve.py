"""Simulate a backfill from known embeddings: orders of the gallery, and the quality at each fraction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.arrays import Bools, Float32, Float64, Int32, Int64, Labels
from pipeline.evaluation import ranks
from pipeline.evaluation.curve_points import curve_steps, score_points, slot_share, transformed_slots
from pipeline.evaluation.knn_by_kind import CalibratedRows, nearest_by_kind
from pipeline.evaluation.metrics import METRICS, Metrics, mean_metrics, nearest_rows, no_scores, recall, to_metrics
from pipeline.evaluation.ranks import OnProgress
from pipeline.hashing import splitmix64
from pipeline.models.calibration import Calibration


@dataclass(frozen=True, slots=True)
class OrderCurve:
    """The curve of one order, as METRICS in per cent."""

    values: Float64  # (P, 3) float64, the mean over its permutations
    area: Float64  # (3,) float64, the plain mean of the points (as published)
    area_trapezoid: Float64  # (3,) float64, by the trapezoid rule
    area_std: Float64  # (3,) float64, the sample deviation of `area` over the permutations; 0 for one
    num_permutations: int  # how many there are


@dataclass(frozen=True, slots=True)
class ResultDetail:
    """One order per point and query: `first_rank` (P, Q) int32, `average_precision` (P, Q) float64.

    `slot_share` is (P,) float64: the share of transformed vectors in the TOP_K nearest over their share of the
    gallery; NaN if none is left. At a tie for the last place the transformed one counts.
    """

    first_rank: Int32
    average_precision: Float64
    slot_share: Float64


@dataclass(frozen=True, slots=True)
class Simulation:
    """The curve of each order over `fractions` (P,) float64; `start` and `end` are the states at 0 and 1.

    With `CurveOptions.per_query`, `queries` has the first ranks (M, P, Q) int32 and the average precisions (M, P, Q)
    float64 of the M permutations of each order.
    """

    fractions: Float64
    orders: dict[str, OrderCurve]
    start: Metrics
    end: Metrics
    detail: ResultDetail | None
    queries: dict[str, tuple[Int32, Float64]] | None = None


@dataclass(frozen=True, slots=True)
class CurveInputs:
    """A gallery of N images with both vectors of each, and the queries."""

    transformed: Float32  # (N, d) float32, the transformed old embeddings
    embedded: Float32  # (N, d) float32, the new embeddings of the same images
    queries: Float32  # (Q, d) float32, new embeddings
    query_labels: Labels  # (Q,) integers or strings
    gallery_labels: Labels  # (N,) of the same kind
    query_ids: Int64 | None = None  # (Q,); the gallery row with a query's own id does not count for it
    gallery_ids: Int64 | None = None  # (N,)
    embeddable: Bools | None = None  # (N,) bool; a row where it is False (a reject) stays transformed


@dataclass(frozen=True, slots=True)
class CurveOptions:
    """How a curve is simulated."""

    points: int = 22  # P, at least 2
    metric: str = "l2"  # l2, ip or cosine
    self_match: bool = False  # query i is gallery row i, which does not count for it
    calibration: Calibration | None = None  # maps the keys of transformed vectors; None to rank both kinds as they are
    detail: str | None = None  # the order whose first permutation is returned per query, with its slot share
    per_query: bool = False  # whether the scores of all orders are returned per query


def simulate_curve(
    inputs: CurveInputs,
    orders: Mapping[str, Sequence[Int64]],
    options: CurveOptions | None = None,
    progress: OnProgress | None = None,
) -> Simulation:
    """The curve of each order: at point i the first floor(i * N / (points - 1)) images of it are embedded.

    Args:
        inputs: the gallery and the queries.
        orders: name -> one or more permutations (N,) int64 of the gallery rows, the first to embed first.

    Raises:
        DataError: as in `evaluate`, or an order is not a permutation of the gallery.
    """
    how, num = options or CurveOptions(), len(inputs.transformed)
    points, detail, queries = how.points, how.detail, inputs.queries
    own = ranks.own_rows(len(queries), num, how.self_match, inputs.query_ids, inputs.gallery_ids)
    task = ranks.prepare(queries, inputs.query_labels, inputs.gallery_labels, own, how.metric, how.calibration)
    possible = np.full(num, True) if inputs.embeddable is None else inputs.embeddable
    cuts = np.arange(points) * num // (points - 1)
    names = [name for name in orders for _ in orders[name]]
    steps = [curve_steps(order, cuts, name) for name in orders for order in orders[name]]
    shown = None if detail is None else np.where(possible, steps[names.index(detail)], points)
    first_rank, average_precision = no_scores(len(steps), points, len(queries))
    slots = np.zeros((points, len(queries)), np.int64)

    def score(rows: Int64, columns: Int64, distances: list[Float32]) -> None:
        if shown is not None:
            slots[:, rows] = transformed_slots(distances, shown, points)
        found = score_points(distances, columns, task.num_matches[rows], steps, points)
        first_rank[..., rows], average_precision[..., rows] = found

    mixed = np.where(possible[:, None], inputs.embedded, inputs.transformed)
    task.run([inputs.transformed, mixed], score, progress, [possible | True, ~possible])
    start, end = (to_metrics(first_rank[0, point], average_precision[0, point], num) for point in (0, -1))
    means = np.stack([mean_metrics(*scores) for scores in zip(first_rank, average_precision, strict=True)])
    members = {name: [own == name for own in names] for name in orders}
    curves = {name: _order_curve(means[mine], cuts / num) for name, mine in members.items()}
    kept = (
        {name: (first_rank[mine], average_precision[mine]) for name, mine in members.items()} if how.per_query else None
    )
    if shown is None:
        return Simulation(cuts / num, curves, start, end, None, kept)
    at, share = names.index(detail or ""), slot_share(slots[:, task.num_matches > 0], shown)
    return Simulation(cuts / num, curves, start, end, ResultDetail(first_rank[at], average_precision[at], share), kept)


def share_of_gap(area: float, old_old: float, new_new: float) -> float:
    """The part of the new model's gain that an area covers: 0 to 1; NaN if there is no gain."""
    return (area - old_old) / (new_new - old_old) if new_new != old_old else float("nan")


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
    """From (M, P, 3) METRICS; the ends are the same for all M, to the last bit."""
    values = permutations.mean(axis=0)
    values[[0, -1]] = permutations[0, [0, -1]]
    areas = permutations.mean(axis=1)
    std = areas.std(axis=0, ddof=1) if len(areas) > 1 else np.zeros(len(METRICS))
    return OrderCurve(values, values.mean(axis=0), np.trapezoid(values, fractions, axis=0), std, len(areas))


def recall_curve(
    transformed: Float32, embedded: Float32, queries: Int64, orders: Mapping[str, Int64], options: CurveOptions
) -> dict[str, Float64]:
    """The share of the full new model's 10 nearest that each point of each order finds, (P,) float64 in per cent.

    Args:
        transformed: (N, d) float32, as served.
        embedded: (N, d) float32, the new encoder on the same images.
        queries: (Q,) rows whose new embeddings are the queries; a row is no neighbour of its own.
        orders: name -> permutation (N,) of the rows, the first to embed first.
        options: `points`, `metric` and `calibration` count.
    """
    exact = nearest_rows(embedded[queries], embedded, queries, options.metric)
    cuts = np.arange(options.points) * len(embedded) // (options.points - 1)
    curves = {}
    for name, order in orders.items():
        state, left, values = transformed.copy(), np.ones(len(embedded), np.bool_), []
        for start, end in zip(np.concatenate([[0], cuts]), cuts, strict=False):
            rows = order[start:end]
            state[rows], left[rows] = embedded[rows], False
            mapped_rows = CalibratedRows(left, options.calibration)
            found = nearest_by_kind(embedded[queries], state, exact.shape[1], queries, options.metric, mapped_rows)[1]
            values.append(recall(found, exact))
        curves[name] = np.array(values)
    return curves
