"""The map from the keys of transformed vectors to those of their embeddings."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.arrays import Float32, Float64
from pipeline.errors import DataError
from pipeline.models import calibration as calibrations
from pipeline.models.calibration import Calibration, fit_calibration, read_calibration
from pipeline.models.networks import TransformationNetwork
from pipeline.models.transformation import TransformationInfo, save_transformation
from pipeline.run import Run
from pipeline.storage import documents

IDENTITY = Calibration((0.0, 1.0), (0.0, 1.0))


def pairs(num: int, scale: float, noise: float = 0.0, seed: int = 0) -> tuple[Float32, Float32]:
    """New embeddings that have `scale` times the size of the transformed vectors, and noise of their own."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(num, 16)).astype(np.float32)
    return z, (scale * z + noise * rng.normal(size=z.shape)).astype(np.float32)


def test_map_goes_through_its_knots_and_has_slope_1_beyond_them() -> None:
    map_ = Calibration((1.0, 2.0, 4.0), (10.0, 20.0, 24.0))
    keys = np.array([[-1, 0.5, 1], [1.5, 2, 3], [4, 5, 1000]], np.float32)
    assert map_.apply(keys).tolist() == [[8, 9.5, 10], [15, 20, 22], [24, 25, 1020]]


def test_map_keeps_infinity() -> None:
    assert Calibration((1.0, 2.0), (5.0, 6.0)).apply(np.array([np.inf, -np.inf], np.float32)).tolist() == [
        np.inf,
        -np.inf,
    ]


def test_identity_changes_no_key() -> None:
    keys = np.random.default_rng(0).normal(size=10_000).astype(np.float32) * 100
    assert np.array_equal(IDENTITY.apply(keys), keys)


knots = st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=12, unique=True).map(sorted)


@settings(max_examples=300, deadline=None)
@given(knots, knots, st.integers(0, 2**32 - 1))
def test_map_never_decreases_in_float32(observed: list[float], expected: list[float], seed: int) -> None:
    num = min(len(observed), len(expected))
    map_ = Calibration(tuple(observed[:num]), tuple(expected[:num]))
    near = np.array(observed, np.float32)  # the neighbours of each knot, and some keys between
    steps = [np.nextafter(near, np.float32(side)) for side in (-np.inf, np.inf)]
    between = np.random.default_rng(seed).uniform(observed[0], observed[-1], 500).astype(np.float32)
    keys = np.sort(np.concatenate([near, *steps, between]))
    assert (np.diff(map_.apply(keys)) >= 0).all()
    assert (np.diff(map_.apply_exactly(keys.astype(np.float64))) >= 0).all()


def mean_keys(queries: Float32, vectors: Float32) -> Float64:
    """The mean squared distance of each rank, without each query's own row."""
    keys = np.square(queries[:, None].astype(np.float64) - vectors).sum(axis=2)
    np.fill_diagonal(keys, np.inf)
    found: Float64 = np.sort(keys, axis=1)[:, :-1].mean(axis=0)
    return found


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_fit_recovers_a_known_scale(metric: str) -> None:
    z, new = pairs(500, scale=2.0)
    found = fit_calibration(z, new, metric, seed=0)
    assert found is not None
    if metric == "l2":  # |q - 2z| with q = 2y, against |q - z|
        keys, true = (mean_keys(new, side)[[0, 4, 50, 250, 450]] for side in (z, new))
        np.testing.assert_allclose(found.apply(keys.astype(np.float32)), true, rtol=0.01)
    else:
        np.testing.assert_allclose(found.apply(np.array([-20, -5, 5], np.float32)), [-40, -10, 10], rtol=0.05)


def test_fit_gives_the_identity_if_the_transformation_is_exact() -> None:
    z, new = pairs(300, scale=1.0)
    found = fit_calibration(z, new, "l2", seed=0)
    assert found is not None
    assert found.observed == found.expected


@pytest.mark.parametrize(("metric", "anchor"), [("l2", 0.0), ("cosine", -1.0)])
def test_fit_maps_the_least_key_to_itself(metric: str, anchor: float) -> None:
    found = fit_calibration(*pairs(200, scale=1.0, noise=1.0), metric, seed=0)
    assert found is not None
    assert found.observed[0] == found.expected[0] == anchor


def test_fit_leaves_out_each_querys_own_pair() -> None:
    z, new = pairs(100, scale=1.0, noise=0.1)
    found = fit_calibration(z, new, "l2", seed=0)
    assert found is not None
    np.testing.assert_allclose(found.observed[1], mean_keys(new, z)[0], rtol=1e-4)


def test_fit_on_pairs_beyond_the_limit_uses_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrations, "_MOST_PAIRS", 60)
    monkeypatch.setattr(calibrations, "_MOST_QUERIES", 30)
    z, new = pairs(500, scale=1.0, noise=1.0)
    found = [fit_calibration(z, new, "l2", seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


def test_fit_on_more_pairs_has_more_knots() -> None:
    found = [fit_calibration(*pairs(num, scale=1.0, noise=1.0), "l2", seed=0) for num in (20, 1000)]
    assert found[0] is not None
    assert found[1] is not None
    assert len(found[0].observed) < len(found[1].observed)


def test_fit_on_too_few_pairs_gives_none() -> None:
    assert fit_calibration(*pairs(19, scale=2.0), "l2", seed=0) is None


def test_fit_on_vectors_that_do_not_vary_gives_none() -> None:
    same = np.ones((50, 4), np.float32)
    assert all(fit_calibration(same, same, metric, seed=0) is None for metric in ("l2", "ip", "cosine"))


@pytest.mark.parametrize(
    ("observed", "expected"),
    [((), ()), ((0.0, 1.0), (0.0,)), ((0.0, 0.0), (0.0, 1.0)), ((0.0, 1.0), (1.0, 0.0)), ((0.0, np.nan), (0.0, 1.0))],
)
def test_knots_that_do_not_increase_are_refused(observed: tuple[float, ...], expected: tuple[float, ...]) -> None:
    with pytest.raises(DataError):
        Calibration(observed, expected)


def test_file_gives_back_the_same_map() -> None:
    found = fit_calibration(*pairs(300, scale=2.0, noise=0.5), "l2", seed=0)
    assert found is not None
    assert Calibration.from_bytes(found.to_bytes()) == found


def test_file_that_was_changed_is_refused() -> None:
    data = IDENTITY.to_bytes().replace(b"1.0", b"2.0")
    with pytest.raises(DataError, match="changed"):
        Calibration.from_bytes(data)


def test_file_with_knots_that_do_not_increase_is_refused() -> None:
    data = documents.encode(asdict(IDENTITY) | {"expected": [1.0, 0.0]})
    with pytest.raises(DataError):
        Calibration.from_bytes(data)


@pytest.mark.parametrize("part", [None, IDENTITY])
def test_calibration_is_read_with_the_transformation(tmp_path: Path, part: Calibration | None) -> None:
    run = Run(str(tmp_path))
    info = TransformationInfo(2, 3, None, 4, False, "fastfill", 0, 1, 10, 2, True)
    parts = {} if part is None else {calibrations.PART: part.to_bytes()}
    save_transformation(run, TransformationNetwork(2, 3, 4), info, parts)
    assert read_calibration(run) == part
