"""The curve without labels: two ways to the same number, and the ends that are known."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.arrays import Bools, Float32, Int64
from pipeline.evaluation.metrics import nearest_rows
from pipeline.evaluation.ranks import TOP_K
from pipeline.evaluation.simulated_curve import CurveOptions, recall_curve
from pipeline.models.calibration import Calibration

NUM, DIM, POINTS = 60, 5, 4


def vectors(seed: int) -> Float32:
    """(N, d), not writable, as vectors from Parquet are."""
    found = np.random.default_rng(seed).normal(size=(NUM, DIM)).astype(np.float32)
    found.flags.writeable = False
    return found


def by_sorting(
    queries: Float32,
    gallery: Float32,
    own: Int64,
    metric: str,
    left: Bools | None = None,
    calibration: Calibration | None = None,
) -> list[set[int]]:
    if metric == "cosine":
        queries, gallery = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (queries, gallery))
    keys = np.square(queries[:, None] - gallery).sum(axis=2) if metric == "l2" else -queries @ gallery.T
    if calibration is not None and left is not None:
        keys[:, left] = calibration.apply(keys[:, left])
    keys[np.arange(len(own)), own] = np.inf
    return [set(row) for row in np.argsort(keys, axis=1)[:, :TOP_K].tolist()]


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_the_nearest_are_those_of_a_full_sort_without_the_query_itself(metric: str) -> None:
    own = np.arange(5, 45)
    found = nearest_rows(vectors(0)[own], vectors(1), own, metric)
    assert [set(row) for row in found.tolist()] == by_sorting(vectors(0)[own], vectors(1), own, metric)


@pytest.mark.parametrize("calibration", [None, Calibration((-1.0, 0.0, 5.0), (-2.0, 0.0, 3.0))])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_each_point_is_the_share_of_the_new_models_neighbours_in_that_mixture(
    metric: str, calibration: Calibration | None
) -> None:
    transformed, embedded, order, own = (
        vectors(0),
        vectors(1),
        np.random.default_rng(2).permutation(NUM),
        np.arange(NUM),
    )
    found = recall_curve(
        transformed, embedded, own, {"some": order}, CurveOptions(points=POINTS, metric=metric, calibration=calibration)
    )["some"]
    exact = by_sorting(embedded, embedded, own, metric)
    for point in range(POINTS):
        state, left, done = transformed.copy(), np.ones(NUM, np.bool_), order[: point * NUM // (POINTS - 1)]
        state[done], left[done] = embedded[done], False
        mixed = by_sorting(embedded, state, own, metric, left, calibration)
        shares = [len(a & b) / TOP_K for a, b in zip(mixed, exact, strict=True)]
        assert found[point] == pytest.approx(100 * np.mean(shares))
    assert found[-1] == 100


def test_a_gallery_of_the_query_alone_has_no_neighbours() -> None:
    assert nearest_rows(vectors(0)[:1], vectors(0)[:1], np.arange(1), "l2").shape == (1, 0)
