"""Simulate the backfill of a fold's pairs, as gallery and queries at once.

    another fold -> offset, calibration, policy inputs
    the fold's z, s -> served vectors, orders -> curves

Offset, calibration and policy inputs are fitted on other pairs than the measured ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from pipeline.arrays import NO_LABEL, Float32, Float64, Int64
from pipeline.evaluation.metrics import METRICS
from pipeline.evaluation.simulated_curve import (
    CurveInputs,
    CurveOptions,
    order_by_priority,
    random_order,
    recall_curve,
    simulate_curve,
)
from pipeline.models import offset as offsets
from pipeline.models.calibration import Calibration, fit_calibration
from pipeline.planning.policies import load_policy
from pipeline.planning.policy_inputs import PolicyInputs
from training.simulation.build_policy_inputs import policy_inputs_of_fold
from training.simulation.folds import Fold
from training.simulation.staleness_cost import fit_learned, staleness_cost
from training.simulation.trials import Serving

_RANDOM_SEEDS = 3


@dataclass(frozen=True, slots=True)
class SimulationDetail:
    """How finely a backfill is simulated: the number of points of the curve, and at most this many queries."""

    points: int
    queries: int


SCREENING, FINAL = SimulationDetail(8, 2500), SimulationDetail(22, 5000)


@dataclass(frozen=True, slots=True)
class FoldPair:
    """The fold that is measured, and the one that offset, calibration and policy inputs are fitted on."""

    measured: Fold
    fitted_on: Fold


@dataclass(frozen=True, slots=True)
class SimulatedGallery:
    """N images that are gallery and queries at once.

    Attributes:
        served: (N, d) float32, the transformed vectors as they are served.
        new: (N, d) float32, the new embeddings.
        labels: (N,) int64, -1 for none: neither a query nor a match; None to measure without labels.
        metric: l2, ip or cosine.
        calibration: of the distances to transformed vectors.
    """

    served: Float32
    new: Float32
    labels: Int64 | None
    metric: str
    calibration: Calibration | None = None


def measure_fold(
    pair: FoldPair, serving: Serving, policies: list[str], detail: SimulationDetail, metric: str, seed: int
) -> dict[str, Float64]:
    """The curve of each policy on one fold, (P, M) float64 in per cent."""
    fold, other = pair.measured, pair.fitted_on
    served, others = _serve(pair, serving, metric)
    reference = _reference(pair, others, "learned" in policies, metric, seed)
    ids, scored = np.arange(len(served)), fold.scored()
    orders = {}
    for name in policies:
        if name == "random":
            orders[name] = [random_order(ids, seed + draw) for draw in range(_RANDOM_SEEDS)]
        else:
            orders[name] = [order_by(load_policy(name, seed, reference)(scored), seed)]
    calibration = fit_calibration(others, other.pairs.new, metric, seed) if serving.calibrate else None
    gallery = SimulatedGallery(served, fold.pairs.new, fold.labels(), metric, calibration)
    return curves_of(gallery, orders, detail)[1]


def _serve(pair: FoldPair, serving: Serving, metric: str) -> tuple[Float32, Float32]:
    """Both folds as they are served, (N, d_new) and (M, d_new)."""
    fold, other = pair.measured, pair.fitted_on
    if serving.offset == "none":
        return fold.z, other.z
    known = offsets.HeldOutPairs(other.z, other.s, other.pairs.new)
    fitted = offsets.fit_offset(serving.offset, serving.strength, known, other.classifier, metric)
    return replace(fitted, classifier=fold.classifier).apply(fold.z, fold.s), fitted.apply(other.z, other.s)


def queries_of(gallery: SimulatedGallery, order: Int64, detail: SimulationDetail) -> dict[str, Float64]:
    """The curve of each query that has a match, (Q, P) per metric of METRICS, in per cent."""
    served, new, labels = gallery.served, gallery.new, gallery.labels
    assert labels is not None, "queries are measured by labels"
    rows, ids = _some(np.flatnonzero(labels != NO_LABEL), detail.queries), np.arange(len(served))
    inputs = CurveInputs(served, new, new[rows], labels[rows], labels, query_ids=rows, gallery_ids=ids)
    options = CurveOptions(points=detail.points, metric=gallery.metric, calibration=gallery.calibration, per_query=True)
    found = simulate_curve(inputs, {"": [order]}, options).queries
    assert found is not None, "asked per query"
    ranks, precision = (values[0] for values in found[""])  # (P, Q) of the one order
    matched = ranks[0] > 0
    return {
        name: 100 * np.asarray(values, np.float64)[:, matched].T
        for name, values in (("top1", ranks == 1), ("top5", ranks <= 5), ("map", precision))
    }


def _some(rows: Int64, most: int) -> Int64:
    """At most `most` of the rows, evenly spread."""
    return rows[:: -(-len(rows) // most)]


def order_by(priority: Float32, seed: int) -> Int64:
    """Rows by descending priority, (N,) int64."""
    return order_by_priority(priority, np.arange(len(priority)), seed)


def curves_of(
    gallery: SimulatedGallery, orders: dict[str, list[Int64]], detail: SimulationDetail
) -> tuple[tuple[str, ...], dict[str, Float64]]:
    """The metrics, and the curve of each order, (P, M) float64 in per cent."""
    served, new, labels, metric = gallery.served, gallery.new, gallery.labels, gallery.metric
    ids, calibration = np.arange(len(served)), gallery.calibration
    if labels is None:
        flat = {name: some[0] for name, some in orders.items()}
        rows = _some(ids, detail.queries)
        options = CurveOptions(points=detail.points, metric=metric, calibration=calibration)
        curves = recall_curve(served, new, rows, flat, options)
        return ("recall10",), {name: curve[:, None] for name, curve in curves.items()}
    queries = _some(np.flatnonzero(labels != NO_LABEL), detail.queries)
    simulation = simulate_curve(
        CurveInputs(served, new, new[queries], labels[queries], labels, query_ids=queries, gallery_ids=ids),
        orders,
        CurveOptions(points=detail.points, metric=metric, calibration=calibration),
    )
    return METRICS, {name: curve.values for name, curve in simulation.orders.items()}


def _reference(pair: FoldPair, served: Float32, learned: bool, metric: str, seed: int) -> PolicyInputs:
    """The policy inputs from `pair.fitted_on`, whose vectors are `served`, with the classifier of the measured fold."""
    fold, other = pair.measured, pair.fitted_on
    reference = policy_inputs_of_fold(other, metric, seed)
    if learned:
        costs = staleness_cost(served, other.pairs.new, other.labels(), metric, seed)
        reference = fit_learned(other.scored(), reference, costs, seed)
    if fold.classifier is None:
        return reference
    return replace(reference, classifier_weight=fold.classifier.weight, classifier_bias=fold.classifier.bias)
