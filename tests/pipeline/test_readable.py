"""Lengths of time and moments as people read them."""

from __future__ import annotations

import pytest

from pipeline.readable import duration, moment


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (1.42, "1.4 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 0 min"),
        (7500, "2 h 5 min"),
        (86_400, "24 h 0 min"),
        (273_600, "3 d 4 h"),
    ],
)
def test_duration_is_told_in_its_two_largest_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_moment_is_told_in_utc() -> None:
    assert moment(0) == "1970-01-01 00:00:00 UTC"
