"""The gap of the scarce group, and when it is halved."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.quality.encoders import SCARCE_GROUP
from benchmarks.quality.subgroups import fifth_of, gaps, halved


def test_gap_is_the_other_groups_score_minus_the_scarce_groups() -> None:
    groups = np.array([SCARCE_GROUP, SCARCE_GROUP, "good", "good", "bad", "bad"], object)
    ranks = np.array([[1, 2, 1, 1, 3, 1], [1, 1, 1, 1, 3, 1]], np.int32)
    found = gaps(ranks, 1 / ranks, groups)
    assert found[:, 0].tolist() == [25.0, -25.0]
    assert found[:, 1] == pytest.approx([100 * (10 / 12 - 0.75), 100 * (10 / 12 - 1)])
    assert found[:, 2].tolist() == [50.0, 50.0]


def test_halved_is_where_the_gap_stays_below_half() -> None:
    assert halved(np.array([8.0, 3.0, 5.0, 4.0, 1.0])) == 0.75
    assert halved(np.array([8.0, 8.0, 8.0])) == 1.0
    assert fifth_of(22) == 4
    assert fifth_of(6) == 1
