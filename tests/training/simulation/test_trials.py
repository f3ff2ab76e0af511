"""The rule of selection: the simplest trial within one standard error of the best."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.method import FitSettings
from training.simulation.trials import Recipe, Serving, Trial, TrialRow, choose, finalists, selection_of, settings_of

RECIPE = Recipe("fastfill", 0.1, 512, 40)
NONE, CONFIDENCE = Serving("none", 0.0), Serving("confidence", 0.5)


def row(areas: list[float], policy: str = "random", serving: Serving = NONE, recipe: Recipe = RECIPE) -> TrialRow:
    """Flat curves of these values, one per fold, of one metric."""
    return TrialRow(Trial(recipe, serving, policy), np.repeat(np.array(areas)[:, None, None], 5, axis=1))


def test_choose_takes_a_clear_winner() -> None:
    rows = [row([50, 51, 52]), row([48, 49, 50], "uncertainty")]
    assert choose(rows, [0]) is rows[0]
    rows = [row([48, 49, 50]), row([50, 51, 52], "entropy", CONFIDENCE)]
    assert choose(rows, [0]) is rows[1]


def test_choose_takes_the_simplest_within_one_standard_error() -> None:
    best, simpler = row([50.0, 51.0, 52.0], "entropy"), row([50.2, 50.6, 52.0], "uncertainty")
    assert choose([best, simpler], [0]) is simpler


def test_choose_compares_within_folds_so_that_differences_between_folds_cancel() -> None:
    """The folds differ by 10 points, and the candidates by 0.5 in each of them."""
    rows = [row([40.5, 50.5, 60.5], "entropy"), row([40, 50, 60], "uncertainty")]
    assert choose(rows, [0]) is rows[0]


@given(st.permutations(range(4)))
def test_choose_does_not_depend_on_the_order_of_rows(order: list[int]) -> None:
    rows = [row([50, 51, 52], name) for name in ("random", "uncertainty", "entropy", "margin")]
    assert choose([rows[number] for number in order], [0]) is rows[0]


def test_the_simplest_of_the_good_and_the_best_without_an_offset_are_always_finalists() -> None:
    strong, stronger, small = Serving("confidence", 0.5), Serving("confidence", 0.75), Recipe("fastfill", 0.1, 128, 40)
    rows = [
        row([52, 53, 54], serving=strong),
        row([51.9, 52.9, 53.9], serving=stronger),
        row([51.4, 53.5, 53.7], serving=strong, recipe=small),
        row([47, 48, 49], recipe=small),
        row([48, 49, 50]),
    ]
    assert finalists(rows, [0], 2) == [(RECIPE, strong), (RECIPE, stronger), (RECIPE, NONE), (small, strong)]


def test_selection_of_has_each_trial_s_distance_to_the_best_and_the_chosen_settings() -> None:
    rows = [row([50, 51, 52], "entropy", CONFIDENCE), row([48, 49, 50])]
    found = selection_of(rows, rows[1:], ("top1",), [0], 100, {})
    assert [item.behind for item in found.candidates] == pytest.approx([0, 2])
    assert found.chosen == found.candidates[0]
    assert [(item.policy, item.behind) for item in found.screened] == [("random", 0)]
    assert type(found).from_json(found.to_json()) == found
    fit = settings_of(found, FitSettings(loss="alignment"))
    assert (fit.loss, fit.inner_width, fit.offset, fit.offset_strength) == ("fastfill", 512, "confidence", 0.5)
