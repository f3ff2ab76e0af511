"""The expected curve: between the ends of the gallery, with the bend of held-out pairs, and a band."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.arrays import Float64
from pipeline.planning.expected_curve import CurveEnds, Expected, expect, fraction_for, interval

FRACTIONS = np.linspace(0, 1, 22)
CURVE = 40 + 12 * FRACTIONS**0.5


def test_a_gallery_that_is_like_the_pairs_gets_their_curve() -> None:
    found = expect(np.stack([CURVE, CURVE]), FRACTIONS, CurveEnds(CURVE[0], CURVE[-1], 0, 0))
    assert found.values == pytest.approx(CURVE)
    assert found.low == pytest.approx(CURVE)
    assert found.high == pytest.approx(CURVE)


@given(st.floats(0, 100), st.floats(0, 100), st.floats(0, 5), st.floats(0, 5))
def test_the_ends_are_those_of_the_gallery_with_their_errors(
    start: float, end: float, start_error: float, end_error: float
) -> None:
    found = expect(np.stack([CURVE, CURVE + 1]), FRACTIONS, CurveEnds(start, end, start_error, end_error))
    assert found.values[[0, -1]] == pytest.approx([start, end], abs=1e-9)
    high, low = (
        [value + side * error for value, error in ((start, start_error), (end, end_error))] for side in (2, -2)
    )
    assert found.high[[0, -1]] == pytest.approx(np.minimum(high, 100), abs=1e-9)
    assert found.low[[0, -1]] == pytest.approx(np.maximum(low, 0), abs=1e-9)


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 50), st.sampled_from([0, 1, 20, 200, 10**6])), min_size=1))
def test_an_interval_lies_inside_0_to_100_and_around_its_figure(points: list[tuple[float, float, int]]) -> None:
    values, errors, queries = (np.array(column, np.float64) for column in zip(*points, strict=True))
    low, high = interval(values, errors, np.divide(1, queries, out=np.zeros_like(queries), where=queries > 0))
    assert (low >= 0).all()
    assert (low <= values).all()
    assert (values <= high).all()
    assert (high <= 100).all()


@pytest.mark.parametrize(("right", "queries"), [(0, 10), (1, 10), (98, 100), (100, 100), (173, 200)])
def test_the_interval_of_a_proportion_is_wilson_s(right: int, queries: int) -> None:
    share = right / queries
    error = 100 * np.sqrt(share * (1 - share) / queries)
    low, high = interval(*(np.array([item]) for item in (100 * share, error, 1 / queries)))
    for bound in (low[0] / 100, high[0] / 100):  # its definition: where the score test is just not significant
        assert (share - bound) ** 2 == pytest.approx(4 * bound * (1 - bound) / queries, abs=1e-12)
    assert low[0] < high[0]


def test_the_interval_of_a_mean_that_varies_less_than_a_proportion_is_narrower() -> None:
    low, high = interval(np.full(2, 98.0), np.array([1.4, 0.5]), np.full(2, 1 / 100))
    assert high[1] - low[1] < high[0] - low[0]


@settings(max_examples=20, deadline=None)
@given(st.floats(90, 100), st.floats(90, 100))
def test_expected_curve_stays_within_0_to_100(start: float, end: float) -> None:
    bent = 90 + 60 * FRACTIONS * (1 - FRACTIONS)
    found = expect(np.stack([bent, bent + 3]), FRACTIONS, CurveEnds(start, end, 2.0, 2.65, 0.5, 200, 200))
    assert ((found.low >= 0) & (found.low <= found.values)).all()
    assert ((found.high <= 100) & (found.high >= found.values)).all()


def test_a_curve_that_an_earlier_version_kept_is_read_inside_0_to_100() -> None:
    found = expect(np.stack([CURVE, CURVE]), FRACTIONS, CurveEnds(41, 50, 1, 2))
    tree = found.to_json() | {"high": (found.high + 60).tolist(), "low": (found.low - 60).tolist()}
    again = Expected.from_json(tree)
    assert again.high.max() == 100
    assert again.low.min() == 0


def test_folds_that_disagree_make_the_band_wider_between_the_ends() -> None:
    folds = np.stack([CURVE, 40 + 12 * FRACTIONS])
    found = expect(folds, FRACTIONS, CurveEnds(40, 52, 0, 0))
    assert (found.high - found.low)[10] > 1
    assert (found.high - found.low)[[0, -1]] == pytest.approx(0)


def test_the_fraction_is_where_the_curve_stays_above() -> None:
    fractions = np.array([0.0, 0.5, 1.0])
    assert fraction_for(np.array([50.0, 90.0, 100.0]), fractions, 95) == pytest.approx(0.75)
    assert fraction_for(np.array([96.0, 90.0, 100.0]), fractions, 95) == pytest.approx(0.75)
    assert fraction_for(np.array([96.0, 97.0, 100.0]), fractions, 95) == 0
    assert fraction_for(np.array([50.0, 60.0, 70.0]), fractions, 95, full=100) == 1


def test_an_error_that_both_ends_share_does_not_widen_what_99_per_cent_take() -> None:
    """A curve that is off by a factor keeps its fractions: what is off is the end, too."""
    curve = np.minimum(40 + 24 * FRACTIONS, 52)  # its end from half way on
    tight = expect(np.stack([curve, curve]), FRACTIONS, CurveEnds(40, 52, 0, 0)).reached[99]
    found = expect(np.stack([curve, curve]), FRACTIONS, CurveEnds(40, 52, 1.5, 1.5 * 52 / 40, 1.0)).reached[99]
    assert tight.low == tight.fraction == tight.high
    assert found.low > tight.fraction - 0.1
    assert found.high < tight.fraction + 0.2, "not to 1, which the end kept where it is would give"


@pytest.mark.parametrize("correlation", [-0.5, 0.0, 0.9])
def test_the_band_of_what_95_per_cent_take_holds_so_many_of_other_samples(correlation: float) -> None:
    """Against its definition: ends and bend are drawn anew, straight from their distribution."""
    folds = np.stack([CURVE, 40 + 12 * FRACTIONS**0.6, 40 + 12 * FRACTIONS**0.45, 40 + 12 * FRACTIONS**0.55])
    ends = CurveEnds(40, 52, 0.5, 0.6, correlation)
    found = expect(folds, FRACTIONS, ends).reached[95]
    bend = folds - folds[:, :1] * (1 - FRACTIONS) - folds[:, -1:] * FRACTIONS
    rng = np.random.default_rng(7)
    shared = correlation * ends.start_error * ends.end_error
    drawn = rng.multivariate_normal([40, 52], [[ends.start_error**2, shared], [shared, ends.end_error**2]], 4000)
    bends = rng.multivariate_normal(bend.mean(axis=0), np.cov(bend, rowvar=False) / len(bend), 4000)
    curves = drawn[:, :1] * (1 - FRACTIONS) + drawn[:, 1:] * FRACTIONS + bends
    within = [found.low <= fraction_for(curve, FRACTIONS, 95) <= found.high for curve in curves]
    assert np.mean(within) == pytest.approx(0.954, abs=0.02)


@pytest.mark.parametrize(("images", "share"), [(500, 0.2), (2000, 0.5), (18_000, 0.9)])
def test_the_probe_set_s_own_bend_counts_by_the_number_of_its_images(images: int, share: float) -> None:
    straight = np.tile(30 + 20 * FRACTIONS, (images, 1))
    found = expect(np.stack([CURVE, CURVE]), FRACTIONS, CurveEnds(CURVE[0], CURVE[-1], 0, 0), own=straight)
    line = CURVE[0] + (CURVE[-1] - CURVE[0]) * FRACTIONS
    assert found.values == pytest.approx(share * line + (1 - share) * CURVE)
    assert found.low == pytest.approx(found.values)


def test_the_band_knows_how_far_the_probe_set_s_own_bend_may_be_off() -> None:
    """Against its definition: probe sets are drawn anew."""
    rng, straight = np.random.default_rng(3), np.stack([CURVE, CURVE])

    def draw(images: int) -> Float64:
        return CURVE + 12 * FRACTIONS * (1 - FRACTIONS) * rng.normal(size=(images, 1)) + rng.normal(size=(images, 22))

    found = expect(straight, FRACTIONS, CurveEnds(40, 52, 0, 0), own=draw(800))
    others = np.stack([expect(straight, FRACTIONS, CurveEnds(40, 52, 0, 0), own=draw(800)).values for _ in range(400)])
    assert (found.high - found.values)[1:-1] == pytest.approx(2 * others.std(axis=0)[1:-1], rel=0.2)


def test_expect_is_deterministic() -> None:
    folds = np.stack([CURVE, 40 + 12 * FRACTIONS])
    assert (
        expect(folds, FRACTIONS, CurveEnds(40, 52, 1, 1)).reached
        == expect(folds, FRACTIONS, CurveEnds(40, 52, 1, 1)).reached
    )


def test_expected_curve_survives_json() -> None:
    found = expect(np.stack([CURVE, CURVE]), FRACTIONS, CurveEnds(41, 50, 1, 2), sample=1000)
    again = Expected.from_json(json.loads(json.dumps(found.to_json())))
    assert again.values.tolist() == found.values.tolist()
    assert again.reached == found.reached
    assert again.sample == 1000
    assert found.reached[95].low < found.reached[95].fraction < found.reached[95].high
