"""The linear transformation and its error estimate: by metric, with side information, of other widths, of few pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.arrays import Float32, Int64
from pipeline.errors import DataError
from pipeline.models.networks import LinearTransformation, ResidualTransformation
from pipeline.models.transformation import apply
from training.fitting import linear_fit
from training.fitting.held_out_metrics import spearman
from training.fitting.linear import Folds, added
from training.fitting.linear_fit import BlockSums, LinearFit, OnePass, fit_linear, over_arrays

D_OLD, D_NEW, D_SIDE = 8, 12, 3
CPU = torch.device("cpu")


def pairs(num: int, seed: int = 0) -> tuple[Float32, Float32, Float32]:
    """Old, new and side; the noise of new grows with the first number of old."""
    rng, truth = np.random.default_rng(seed), np.random.default_rng(7)
    old, side = rng.normal(size=(num, D_OLD)), rng.normal(size=(num, D_SIDE))
    new = 2 + old @ truth.normal(size=(D_OLD, D_NEW)) + side @ truth.normal(size=(D_SIDE, D_NEW))
    new += np.exp(0.5 * old[:, :1]) * rng.normal(size=(num, D_NEW))
    return old.astype(np.float32), new.astype(np.float32), side.astype(np.float32)


def unit(vectors: Float32) -> Float32:
    found: Float32 = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return found


def fitted(num: int, normalize: bool = False, with_side: bool = True) -> LinearFit:
    old, new, side = pairs(num)
    given, width = (side, D_SIDE) if with_side else (None, None)
    one_pass = over_arrays(np.arange(num), old, unit(new) if normalize else new, given, normalize)
    return fit_linear(one_pass, LinearTransformation(D_OLD, D_NEW, width, normalize))


def errors(found: LinearFit, normalize: bool, with_side: bool) -> tuple[Float32, Float32]:
    """Of pairs that the fit has not seen: the squared error, and s."""
    old, new, side = pairs(2000, seed=1)
    z, s = apply(found.network.eval(), old, side if with_side else None, CPU, 512)
    error: Float32 = np.square((unit(new) if normalize else new) - z).mean(axis=1)
    return error, s


@pytest.mark.parametrize("with_side", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_s_ranks_by_the_error_and_is_its_expected_value(normalize: bool, with_side: bool) -> None:
    error, s = errors(fitted(2000, normalize, with_side), normalize, with_side)
    assert spearman(s, error) > (0.5 if with_side else 0.3)
    assert np.exp(s).mean() == pytest.approx(error.mean(), rel=0.2)


def test_side_information_is_used() -> None:
    with_side, without = (errors(fitted(2000, False, given), False, given)[0].mean() for given in (True, False))
    assert with_side < 0.8 * without


@pytest.mark.parametrize("normalize", [True, False])
def test_the_cross_validated_error_is_that_of_pairs_not_seen(normalize: bool) -> None:
    found = fitted(2000, normalize)
    error, _ = errors(found, normalize, True)
    assert found.error == pytest.approx(error.mean(), rel=0.2)


def test_with_cosine_z_has_unit_length_and_the_length_of_inputs_does_not_matter() -> None:
    network = fitted(500, normalize=True).network.eval()
    old, _, side = pairs(100, seed=1)
    z, s = apply(network, old, side, CPU, 64)
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, rtol=1e-5)
    longer = apply(network, 5 * old, 2 * side, CPU, 64)
    np.testing.assert_allclose(longer[0], z, atol=1e-5)
    np.testing.assert_allclose(longer[1], s, atol=1e-4)


@pytest.mark.parametrize("normalize", [True, False])
def test_forty_pairs_are_enough_for_a_finite_fit(normalize: bool) -> None:
    error, s = errors(fitted(40, normalize), normalize, True)
    assert np.isfinite(s).all()
    assert error.mean() < np.square(pairs(2000)[1]).mean()


def test_exact_pairs_have_a_finite_s() -> None:
    old, new = pairs(200)[0], np.ascontiguousarray(pairs(200)[0][:, ::-1])
    found = fit_linear(over_arrays(np.arange(200), old, new, None, False), LinearTransformation(D_OLD, D_OLD))
    z, s = apply(found.network.eval(), 100 * old, None, CPU, 64)
    np.testing.assert_allclose(z, 100 * new, rtol=0.01, atol=0.1)
    assert np.isfinite(s).all()


def test_other_partitions_give_the_same_weights() -> None:
    old, new, _ = pairs(700)
    whole = over_arrays(np.arange(700), old, new, None, False)

    def in_parts(function: BlockSums, share: float) -> Folds:
        assert share >= 1
        rows: list[Int64] = [np.arange(700)[part::3] for part in range(3)]
        first, second, third = (function(mine, old[mine], new[mine]) for mine in rows)
        found = added(added(first, second), third)
        assert found is not None
        return found

    passes: list[OnePass] = [whole, in_parts]
    one, other = (fit_linear(item, LinearTransformation(D_OLD, D_NEW)).network.state_dict() for item in passes)
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


def test_s_is_fitted_on_a_sample_where_pairs_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, _ = pairs(2000)
    monkeypatch.setattr(linear_fit, "ERROR_PAIRS", 500)
    counts = []

    def counted(function: BlockSums, share: float) -> Folds:
        found = over_arrays(np.arange(2000), old, new, None, False)(function, share)
        counts.append(sum(fold.count for fold in found))
        return found

    fit_linear(counted, LinearTransformation(D_OLD, D_NEW))
    assert counts[0] == 2000
    assert 400 < counts[1] < 600


def test_embeddings_that_are_not_finite_are_refused() -> None:
    old, new, _ = pairs(100)
    old[3, 2] = np.nan
    with pytest.raises(DataError, match="not finite"):
        fit_linear(over_arrays(np.arange(100), old, new, None, False), LinearTransformation(D_OLD, D_NEW))


@pytest.mark.parametrize("normalize", [True, False])
def test_a_residual_transformation_starts_as_the_linear_one(normalize: bool) -> None:
    found = fitted(300, normalize)
    residual = ResidualTransformation(D_OLD, D_NEW, 16, D_SIDE, normalize)
    found.start(residual)
    old, _, side = pairs(100, seed=1)
    for mine, other in zip(
        apply(residual.eval(), old, side, CPU, 64), apply(found.network.eval(), old, side, CPU, 64), strict=True
    ):
        np.testing.assert_array_equal(mine, other)
