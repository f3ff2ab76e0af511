"""One definition of a rate."""

from __future__ import annotations

import pytest

from pipeline.reporting.throughput import Throughput, throughput

STEADY = [(1000.0 + 2 * number, 10) for number in range(9)]


def test_throughput_is_the_images_after_the_first_moment_over_the_time_since() -> None:
    found = throughput(reversed(STEADY))
    assert found == Throughput(80, 16.0)
    assert found is not None
    assert found.per_second == 5.0


@pytest.mark.parametrize("moments", [[], [(1.0, 5)], [(1.0, 5), (1.0, 7)]])
def test_throughput_of_a_single_moment_is_unknown(moments: list[tuple[float, int]]) -> None:
    assert throughput(moments) is None
    assert throughput(moments, 60.0) is None


def test_throughput_of_less_than_five_seconds_of_work_is_unknown() -> None:
    assert throughput([(0.0, 30), (0.02, 30)]) is None
    assert throughput([(0.0, 30), (4.9, 30)]) is None
    assert throughput([(0.0, 30), (5.0, 30)]) == Throughput(30, 5.0)
    interrupted = [(number + 3600.0 * (number > 2), 10) for number in range(5)]
    assert throughput(interrupted) is None, "an interruption is no work"


def test_throughput_leaves_out_an_interruption_and_keeps_a_slow_run() -> None:
    interrupted = STEADY + [(seconds + 3616, images) for seconds, images in STEADY]
    found = throughput(interrupted)
    assert found is not None
    assert found.idle_seconds == 3600 - 2
    assert found.per_second == pytest.approx(5.0)
    slow = throughput([(100.0 * number, 10) for number in range(9)])
    assert slow == Throughput(80, 800.0)


def test_throughput_of_the_last_stretch_counts_no_earlier_moment() -> None:
    found = throughput([(0.0, 1000), *STEADY], 8.0)
    assert found == Throughput(40, 8.0)
