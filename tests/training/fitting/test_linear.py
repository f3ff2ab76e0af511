"""Least squares from sums: exact over any partition, cross-validation equal to brute force, known answers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.arrays import Float32
from training.fitting import linear
from training.fitting.linear import LAMBDAS, NUM_FOLDS, Folds, added, fit, folds_of, procrustes, ridge, sums_of, total


def pairs(num: int, d_in: int = 6, d_out: int = 9, noise: float = 0.3, seed: int = 0) -> tuple[Float32, Float32]:
    """Inputs far from the origin, and outputs that are an affine function of them with noise."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num, d_in)) * rng.uniform(0.2, 2, d_in) + 5
    y = x @ rng.normal(size=(d_in, d_out)) + rng.normal(size=d_out) + noise * rng.normal(size=(num, d_out))
    return x.astype(np.float32), y.astype(np.float32)


def rotation(d_in: int, d_out: int) -> NDArray[np.float64]:
    """(d_in, d_out), with orthonormal rows or columns."""
    q, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(max(d_in, d_out),) * 2))
    found: NDArray[np.float64] = q[:d_in, :d_out]
    return found


def folds(x: Float32, y: Float32) -> Folds:
    return sums_of(x, y, folds_of(np.arange(len(x))))


def brute_force(x: Float32, y: Float32, lam: float) -> float:
    """The squared error of ridge over all folds, each fitted on the others' rows, in float64."""
    places, found = folds_of(np.arange(len(x))), 0.0
    for fold in range(NUM_FOLDS):
        train, held = places != fold, places == fold
        a, b = x[train].astype(np.float64), y[train].astype(np.float64)
        mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
        covered = (a - mean_a).T @ (a - mean_a)
        penalty = lam * np.trace(covered) / x.shape[1] * np.eye(x.shape[1])
        weight = np.linalg.solve(covered + penalty, (a - mean_a).T @ (b - mean_b))
        found += np.square(y[held] - mean_b - (x[held] - mean_a) @ weight).sum()
    return found


def test_sums_of_parts_added_up_are_the_sums_of_all_rows() -> None:
    x, y = pairs(300)
    whole, cuts = folds(x, y), [0, 1, 90, 91, 300]
    places = folds_of(np.arange(300))
    parts = [sums_of(x[a:b], y[a:b], places[a:b]) for a, b in itertools.pairwise(cuts)]
    together = added(added(parts[0], parts[1]), added(parts[2], parts[3]))
    assert together is not None
    for one, other in zip(whole, together, strict=True):
        assert one.count == other.count
        np.testing.assert_allclose(one.xx_ii, other.xx_ii, rtol=1e-12)
        np.testing.assert_allclose(one.xy_io, other.xy_io, rtol=1e-12)
        assert one.yy == pytest.approx(other.yy, rel=1e-12)
    np.testing.assert_allclose(fit(whole).map.weight_io, fit(together).map.weight_io, rtol=1e-8)


def test_sums_about_means_are_those_of_centred_rows() -> None:
    x, y = pairs(200)
    a, b = (item.astype(np.float64) - item.astype(np.float64).mean(axis=0) for item in (x, y))
    sums = total(folds(x, y))
    xx, xy, yy = sums.about(x.astype(np.float64).mean(axis=0), y.astype(np.float64).mean(axis=0))
    np.testing.assert_allclose(xx, a.T @ a, rtol=1e-9, atol=1e-8)
    np.testing.assert_allclose(xy, a.T @ b, rtol=1e-9, atol=1e-8)
    assert yy == pytest.approx(np.square(b).sum())


@pytest.mark.parametrize("num", [40, 400])
def test_cross_validation_from_sums_is_that_by_brute_force(num: int) -> None:
    x, y = pairs(num, noise=2.0)
    by_fold = folds(x, y)
    for number, lam in enumerate(LAMBDAS):
        found = sum(linear._ridge_errors(total(by_fold).without(fold), fold)[number] for fold in by_fold)
        assert found == pytest.approx(brute_force(x, y, lam), rel=1e-6)


def test_the_lambda_with_the_least_cross_validated_error_is_taken() -> None:
    x, y = pairs(60, d_in=40, noise=8.0)
    found = fit(folds(x, y))
    errors = [brute_force(x, y, lam) for lam in LAMBDAS]
    assert found.lam == LAMBDAS[int(np.argmin(errors))]
    assert LAMBDAS[0] < found.lam < LAMBDAS[-1], "else it shows nothing"
    assert found.error == pytest.approx(min(errors) / y.size, rel=1e-6)


def test_exact_linear_data_is_recovered() -> None:
    x, y = pairs(500, noise=0.0)
    found = fit(folds(x, y))
    assert found.lam == LAMBDAS[0]
    np.testing.assert_allclose(found.map(x), y, atol=0.01)
    np.testing.assert_allclose(ridge(total(folds(x, y)), 1e-12)(x), y, atol=1e-4)


@pytest.mark.parametrize("d_out", [20, 24])
def test_procrustes_recovers_a_rotation_from_few_pairs(d_out: int) -> None:
    rng, turn = np.random.default_rng(0), rotation(20, d_out)
    x = rng.normal(size=(40, 20))
    y = 3 * x @ turn + 1 + 0.3 * rng.normal(size=(40, d_out))
    found = fit(folds(x.astype(np.float32), y.astype(np.float32)))
    assert found.lam is None
    assert len(found.without) == NUM_FOLDS
    np.testing.assert_allclose(found.map.weight_io, 3 * turn, atol=0.6)


def test_procrustes_has_orthonormal_directions_and_one_scale() -> None:
    x, y = pairs(100, d_in=8, d_out=5)
    weight = procrustes(total(folds(x, y))).weight_io
    gram = weight.T @ weight
    np.testing.assert_allclose(gram, gram[0, 0] * np.eye(5), atol=1e-10)


def test_a_map_without_a_fold_has_not_seen_its_pairs() -> None:
    x, y = pairs(100)
    places = folds_of(np.arange(100))
    changed = np.where((places == 2)[:, None], y + 100, y)
    before, after = fit(folds(x, y)), fit(folds(x, changed))
    if before.lam == after.lam:
        np.testing.assert_allclose(after.without[2].weight_io, before.without[2].weight_io, rtol=1e-6)
    np.testing.assert_allclose(after.without[2].mean_o, before.without[2].mean_o, rtol=1e-9)
    assert not np.allclose(after.map.mean_o, before.map.mean_o)


def test_linear_fit_of_constant_inputs_gives_the_mean() -> None:
    x, y = np.ones((50, 4), np.float32), pairs(50)[1]
    np.testing.assert_allclose(fit(folds(x, y)).map(x), np.broadcast_to(y.mean(axis=0), y.shape), atol=1e-4)
