"""The counting below the metrics: exact for every distribution of distances."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluation.ranks import count_below, histogram, score


@settings(max_examples=100, deadline=None)
@given(
    num=st.integers(1, 400),
    num_thresholds=st.integers(1, 40),
    scale=st.sampled_from([1e-30, 1e-6, 1.0, 1e6, 1e30]),
    offset=st.sampled_from([0.0, 1.0, -1e4]),
    rounded=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_counts_equal_a_search_whatever_the_scale_the_offset_and_the_ties(
    num: int, num_thresholds: int, scale: float, offset: float, rounded: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    drawn = rng.standard_cauchy((3, num + num_thresholds)) * (2 if rounded else 1)
    values = ((np.round(drawn) if rounded else drawn) * scale + offset).astype(np.float32)
    distances, thresholds = values[:, :num], np.sort(values[:, num:], axis=1)
    distances[:, 0] = np.inf
    thresholds[1:, -1:] = np.inf if num_thresholds > 1 else thresholds[1:, -1:]
    expected = np.stack([np.searchsorted(thresholds[row], distances[row]) for row in range(3)])
    expected[:, 0] = np.isfinite(thresholds).sum(axis=1)
    assert np.array_equal(count_below(distances, thresholds), expected)


def test_a_threshold_that_many_distances_equal_counts_them_all() -> None:
    distances = np.full((1, 1000), 3, np.float32)
    below = count_below(distances, np.array([[2, 3, 3, 4]], np.float32))
    assert histogram(below, 4)[0, 0].cumsum().tolist() == [0, 1000, 1000, 1000]


def test_histogram_splits_the_rows_by_their_step() -> None:
    below = np.array([[0, 1, 2, 1], [2, 2, 0, 0]], np.int32)
    counts = histogram(below, 2, np.array([0, 1, 1, 1]), 2)
    assert counts.tolist() == [[[1, 0], [0, 2]], [[0, 0], [2, 0]]]


def test_score_of_relevant_images_at_ranks_two_and_four() -> None:
    first_rank, precision = score(np.array([[1, 2]]), np.array([2]))
    assert first_rank.tolist() == [2]
    assert precision[0] == pytest.approx((1 / 2 + 2 / 4) / 2)
