"""The number of pairs that a linear map is expected to need."""

from __future__ import annotations

import pytest

from training.fitting.learning_curve import LearningCurve


def on_curve(best: float, gain: float, exponent: float) -> LearningCurve:
    pairs = (200, 400, 600, 1000)
    return LearningCurve(pairs, tuple(best - gain * count**-exponent for count in pairs))


@pytest.mark.parametrize("exponent", [0.25, 0.5, 1.0])
def test_pairs_for_a_target_on_a_power_law_is_where_the_law_reaches_it(exponent: float) -> None:
    gain = 20 * 1000**exponent  # 30 % with the 1,000 pairs there are
    curve = on_curve(50.0, gain, exponent)
    assert curve.pairs_for(35.0) == pytest.approx((gain / 15) ** (1 / exponent), rel=0.01)


def test_pairs_for_a_target_that_is_reached_is_what_there_is() -> None:
    assert on_curve(50.0, 100.0, 0.5).pairs_for(20.0) == 1000


def test_pairs_for_a_target_above_the_limit_of_the_law_is_none() -> None:
    assert on_curve(50.0, 100.0, 0.5).pairs_for(51.0) is None


def test_pairs_for_a_target_that_takes_more_than_a_hundred_times_the_pairs_is_none() -> None:
    assert on_curve(50.0, 100.0, 0.25).pairs_for(49.9) is None


def test_pairs_for_a_curve_that_falls_is_none() -> None:
    assert LearningCurve((100, 200, 300), (30.0, 29.0, 28.0)).pairs_for(40.0) is None
