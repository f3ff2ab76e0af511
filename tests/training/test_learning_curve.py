"""How many pairs a linear map is to be expected to need."""

from __future__ import annotations

import pytest

from training.learning_curve import LearningCurve, learning_curve


def on_curve(best: float, gain: float, exponent: float, old: float = 0.0) -> LearningCurve:
    pairs = (200, 400, 600, 1000)
    return LearningCurve(pairs, tuple(best - gain * count**-exponent for count in pairs), old)


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
    assert LearningCurve((100, 200, 300), (30.0, 29.0, 28.0), 0.0).pairs_for(40.0) is None


def test_learning_curve_of_five_folds_measures_one_two_three_and_all() -> None:
    asked: list[int] = []

    def quality_of(folds: int) -> float:
        asked.append(folds)
        return float(folds)

    curve = learning_curve([10, 20, 30, 40, 50], quality_of, 7.0)
    assert asked == [1, 2, 3, 5]
    assert curve == LearningCurve((10, 30, 60, 150), (1.0, 2.0, 3.0, 5.0), 7.0)


def test_learning_curve_of_one_fold_measures_it_once() -> None:
    assert learning_curve([10], float, 0.0).pairs == (10,)
