"""Score all points of a curve at once: galleries in which some rows are embedded and the others transformed.

The counts of `evaluation.ranks` add up over rows. So a point's counts are those of the transformed gallery plus the
difference that each replaced row makes; two histograms per query and order give all points.

A row with step i is embedded between point i and point i + 1.
"""

from __future__ import annotations

import numpy as np

from pipeline.arrays import Float32, Float64, Int64
from pipeline.errors import DataError
from pipeline.evaluation import ranks
from pipeline.evaluation.ranks import TOP_K


def curve_steps(order: Int64, cuts: Int64, name: str) -> Int64:
    """(N,) int64: the step in which each row is embedded."""
    num = cuts[-1]
    if len(order) != num or (np.bincount(order, minlength=num) != 1).any():
        raise DataError("an order is not a permutation of the gallery", expected=f"each of {num} rows once", where=name)
    steps = np.empty(num, np.int64)
    steps[order] = np.searchsorted(cuts, np.arange(num), side="right") - 1
    return steps


def score_points(
    distances: list[Float32], columns: Int64, num_matches: Int64, steps: list[Int64], points: int
) -> tuple[Int64, Float64]:
    """First ranks and average precisions, each (M, P, B), of B queries of one label in M orders.

    Args:
        distances: to the transformed and to the embedded gallery, each (B, N) float32; overwritten.
        columns: (R,) int64, the gallery rows of the queries' label.
        num_matches: (B,) int64, those of them that count.
        steps: per order, (N,) int64.
        points: P.
    """
    thresholds, source = ranks.take_relevant(distances, columns)
    num = thresholds.shape[1]
    below = [ranks.count_below(side, thresholds) for side in distances]
    within = [ranks.histogram(side, num)[:, 0].cumsum(axis=1) for side in below]
    embedded = source >= len(columns)
    first_rank = np.empty((len(steps), points, len(source)), np.int64)
    precision = np.empty(first_rank.shape)
    for point, side in ((0, 0), (-1, 1)):
        irrelevant = within[side][embedded == side].reshape(len(source), -1)
        first_rank[:, point], precision[:, point] = ranks.score(irrelevant, num_matches)
    inner = np.arange(1, points - 1)[:, None]
    for index, step in enumerate(steps):
        change = ranks.histogram(below[1], num, step, points - 1) - ranks.histogram(below[0], num, step, points - 1)
        irrelevant = within[0][:, None] + change[:, :-1].cumsum(axis=2).cumsum(axis=1)
        current = (step[columns][source % len(columns)][:, None] < inner) == embedded[:, None]
        scores = ranks.score(irrelevant[current].reshape(*irrelevant.shape[:2], -1), num_matches)
        first_rank[index, 1:-1], precision[index, 1:-1] = scores[0].T, scores[1].T
    return first_rank, precision


def transformed_slots(distances: list[Float32], steps: Int64, points: int) -> Int64:
    """(P, B) int64: how many of each query's TOP_K nearest are transformed vectors.

    The last of them is never farther than the TOP_K-th smallest max(transformed, embedded). So rows with both
    distances above it never count.
    """
    transformed, embedded = distances
    slots = min(TOP_K, transformed.shape[1] - 1)
    bound = np.partition(np.maximum(transformed, embedded), slots - 1, axis=1)[:, slots - 1 : slots]
    near = np.minimum(transformed, embedded) <= bound
    counts = np.empty((points, len(transformed)), np.int64)
    for row in range(len(transformed)):
        columns = np.flatnonzero(near[row])
        done = steps[columns] < np.arange(points)[:, None]
        current = np.where(done, embedded[row, columns], transformed[row, columns])
        last = np.partition(current, slots - 1, axis=1)[:, slots - 1 : slots]
        counts[:, row] = np.minimum(((current <= last) & ~done).sum(axis=1), slots)
    return counts


def slot_share(counts: Int64, steps: Int64) -> Float64:
    """(P,) float64 from the transformed counts (P, Q) and the step of each row, which is P or more for never."""
    slots = min(TOP_K, len(steps) - 1)
    left = (steps >= np.arange(len(counts))[:, None]).mean(axis=1)
    share = np.full(len(counts), np.nan)
    np.divide(counts.mean(axis=1) / slots, left, out=share, where=left > 0)
    return share
