"""Early stopping: the best weights are kept, also the first ones, and a fit without gain ends."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from training.fitting.stopping import PATIENCE, Stopping, num_stopping, stopping_rows


def observed(errors: list[float]) -> Stopping:
    found, weight = Stopping(), torch.zeros(1)
    for number, error in enumerate(errors):
        weight.fill_(number)  # in place, as an optimiser does
        found.observe(error, {"w": weight})
    return found


@pytest.mark.parametrize(("errors", "best"), [([3.0, 2.0, 1.0, 2.0], 2), ([1.0, 2.0, 3.0], 0), ([1.0, 1.0], 0)])
def test_the_first_weights_with_the_least_error_count(errors: list[float], best: int) -> None:
    found = observed(errors)
    assert found.weights["w"].item() == best
    assert found.error == min(errors)


def test_stopping_ends_after_epochs_without_a_better_error() -> None:
    assert not observed([1.0] * PATIENCE).over
    assert observed([1.0] * (PATIENCE + 1)).over
    assert not observed([1.0] * PATIENCE + [0.5] + [1.0] * (PATIENCE - 1)).over


def test_an_error_that_is_not_a_number_is_never_the_best() -> None:
    assert observed([1.0, float("nan")]).weights["w"].item() == 0


def test_stopping_restored_from_its_state_goes_on_the_same() -> None:
    first, second = observed([2.0, 1.0, 3.0]), Stopping()
    second.restore(first.state())
    for found in (first, second):
        found.observe(0.5, {"w": torch.full((1,), 9.0)})
    assert first.state() == second.state()


@pytest.mark.parametrize("count", [2, 9, 10, 1000])
def test_a_tenth_of_the_rows_is_watched_and_never_fitted_on(count: int) -> None:
    fitted, watched = stopping_rows(count)
    assert len(watched) == num_stopping(count) == max(1, count // 10)
    assert np.sort(np.concatenate([fitted, watched])).tolist() == list(range(count))
