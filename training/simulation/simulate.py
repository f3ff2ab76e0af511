"""Simulate the backfill of pairs that a fit has not seen: how they are served, the order, the curve.

    a fold's z, s -> offset, calibration and what policies know, of another fold -> served vectors, orders -> curves

Guarantee: offset, calibration and policies are fitted on other pairs than are measured; the same arrays and seed give
the same curve. It does not know how the transformation was fitted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from pipeline.arrays import Float32, Float64, Int64
from pipeline.config.tree import Config
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
from pipeline.planning.policy_inputs import PolicyInputs, build_policy_inputs
from training.fitting.losses import NO_LABEL
from training.simulation.folds import Fold
from training.simulation.staleness_cost import fit_learned, staleness_cost
from training.simulation.trials import Serving

_RANDOM_SEEDS = 3


@dataclass(frozen=True, slots=True)
class SimulationDetail:
    """How finely a backfill is simulated: points of the curve, and queries at most."""

    points: int
    queries: int


SCREENING, FINAL = SimulationDetail(8, 2500), SimulationDetail(22, 5000)


def measure_fold(
    config: Config, fold: Fold, other: Fold, serving: Serving, policies: list[str], detail: SimulationDetail
) -> dict[str, Float64]:
    """The curve of each order on one fold, (P, M) float64 in per cent.

    Args:
        config: `gallery.metric` and `seed` count.
        fold: gallery and queries at once.
        other: pairs that offset, calibration and policies are fitted on.
        serving: how vectors are served and ranked.
        policies: their names.
        detail: P points, and how many queries at most.
    """
    served, others = _serve(config, fold, other, serving)
    reference = _reference(config, fold, other, others, "learned" in policies)
    ids, scored = np.arange(len(served)), fold.scored()
    orders = {}
    for name in policies:
        if name == "random":
            orders[name] = [random_order(ids, config.seed + seed) for seed in range(_RANDOM_SEEDS)]
        else:
            orders[name] = [order_by(load_policy(name, config.seed, reference)(scored), config.seed)]
    calibration = None
    if serving.calibrate:
        calibration = fit_calibration(others, other.pairs.new, config.gallery.metric, config.seed)
    return curves_of(config, served, fold, orders, detail, calibration)[1]


def _serve(config: Config, fold: Fold, other: Fold, serving: Serving) -> tuple[Float32, Float32]:
    """A fold and the pairs `other` as they are served, (N, d_new) and (M, d_new), by an offset fitted on `other`."""
    if serving.offset == "none":
        return fold.z, other.z
    fitted = offsets.fit_offset(
        serving.offset, serving.strength, other.z, other.s, other.pairs.new, other.classifier, config.gallery.metric
    )
    return replace(fitted, classifier=fold.classifier).apply(fold.z, fold.s), fitted.apply(other.z, other.s)


def queries_of(
    served: Float32,
    new: Float32,
    labels: Int64,
    order: Int64,
    metric: str,
    detail: SimulationDetail,
    calibration: Calibration | None = None,
) -> dict[str, Float64]:
    """The backfill of images that are gallery and queries at once, query by query: per metric of METRICS (Q, P), in per
    cent, of the queries that have a match.

    Args:
        served: (N, d) float32.
        new: (N, d) float32.
        labels: (N,) int64, -1 for none: no query, and never a match.
        order: (N,) int64, the rows as they are embedded.
        metric: l2, ip or cosine.
        detail: P points, and how many queries at most.
        calibration: maps the keys of transformed vectors.
    """
    rows, ids = _some(np.flatnonzero(labels != NO_LABEL), detail.queries), np.arange(len(served))
    inputs = CurveInputs(served, new, new[rows], labels[rows], labels, query_ids=rows, gallery_ids=ids)
    options = CurveOptions(points=detail.points, metric=metric, calibration=calibration, per_query=True)
    found = simulate_curve(inputs, {"": [order]}, options).queries
    assert found is not None, "asked per query"
    ranks, precision = (values[0] for values in found[""])  # (P, Q) of the one order
    matched = ranks[0] > 0
    return {
        name: 100 * np.asarray(values, np.float64)[:, matched].T
        for name, values in (("top1", ranks == 1), ("top5", ranks <= 5), ("map", precision))
    }


def _some(rows: Int64, most: int) -> Int64:
    """Of these, spread over them, as many or fewer."""
    return rows[:: -(-len(rows) // most)]


def order_by(priority: Float32, seed: int) -> Int64:
    """Rows by descending priority, (N,) int64."""
    return order_by_priority(priority, np.arange(len(priority)), seed)


def curves_of(
    config: Config,
    served: Float32,
    fold: Fold,
    orders: dict[str, list[Int64]],
    detail: SimulationDetail,
    calibration: Calibration | None = None,
) -> tuple[tuple[str, ...], dict[str, Float64]]:
    """The metrics, and the curve of each order, (P, M) float64 in per cent; the fold is gallery and queries at once.

    The calibration maps the keys of transformed vectors.
    """
    labels, metric, ids = fold.labels(), config.gallery.metric, np.arange(len(served))
    if labels is None:
        flat = {name: some[0] for name, some in orders.items()}
        rows = _some(ids, detail.queries)
        curves = recall_curve(
            served,
            fold.pairs.new,
            rows,
            flat,
            CurveOptions(points=detail.points, metric=metric, calibration=calibration),
        )
        return ("recall10",), {name: curve[:, None] for name, curve in curves.items()}
    queries = _some(np.flatnonzero(labels != NO_LABEL), detail.queries)
    simulation = simulate_curve(
        CurveInputs(
            served, fold.pairs.new, fold.pairs.new[queries], labels[queries], labels, query_ids=queries, gallery_ids=ids
        ),
        orders,
        CurveOptions(points=detail.points, metric=metric, calibration=calibration),
    )
    return METRICS, {name: curve.values for name, curve in simulation.orders.items()}


def _reference(config: Config, fold: Fold, other: Fold, served: Float32, learned: bool) -> PolicyInputs:
    """What policies know of the pairs `other`, with the fold's own classifier.

    Args:
        config: `gallery.metric` and `seed` count.
        fold: what is ranked.
        other: pairs.
        served: (M, d_new) float32, as these are served.
        learned: whether the policy `learned` is to know its model.
    """
    pairs, metric = other.pairs, config.gallery.metric
    known = None if other.classifier is None else (other.classifier.weight, other.classifier.bias)
    reference = build_policy_inputs(pairs.old, other.z, other.s, pairs.new, pairs.labels, known, metric, config.seed)
    if learned:
        costs = staleness_cost(served, pairs.new, other.labels(), metric, config.seed)
        reference = fit_learned(other.scored(), reference, costs, config.seed)
    if fold.classifier is None:
        return reference
    return replace(reference, classifier_weight=fold.classifier.weight, classifier_bias=fold.classifier.bias)
