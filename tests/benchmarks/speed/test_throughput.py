"""The steady rate of a stream whose units end in rounds."""

from __future__ import annotations

import pytest

from benchmarks.speed.throughput import Rate, ratios, steady


def rounds(units: int) -> list[tuple[float, int]]:
    """Two actors that each take 2 s for a unit of 100 images, one a moment after the other: 100 images a second."""
    return [(2.0 + 2.0 * (unit // 2) + 0.01 * (unit % 2), 100 * (unit + 1)) for unit in range(units)]


@pytest.mark.parametrize("units", range(8, 24))
def test_over_whole_rounds_the_rate_does_not_depend_on_where_the_middle_begins(units: int) -> None:
    assert steady(rounds(units), per_round=2) == pytest.approx(100.0)


def test_batches_that_come_one_by_one_need_no_round() -> None:
    assert steady([(0.5 * batch, 64 * batch) for batch in range(1, 41)]) == pytest.approx(128.0)


def test_less_than_a_round_in_the_middle_has_no_steady_rate() -> None:
    assert steady(rounds(2), per_round=2) is None


def test_a_repeat_without_a_steady_rate_is_left_out_of_that_ratio_alone() -> None:
    ours, others = [Rate(10.0, None), Rate(20.0, 30.0)], [Rate(10.0, 10.0), Rate(10.0, 10.0)]
    whole, part = ratios(ours, others)
    assert whole.startswith("1.50 (1.00 - 2.00)")
    assert part.startswith("3.00")
    assert ratios(ours, [Rate(10.0, None), Rate(10.0, None)])[1] == ""
