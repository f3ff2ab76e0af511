"""The expected curve: between the ends of the gallery, with the bend of held-out pairs, and a band."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.expected import Ends, Expected, expect, fraction_for

FRACTIONS = np.linspace(0, 1, 22)
CURVE = 40 + 12 * FRACTIONS**0.5


def test_a_gallery_that_is_like_the_pairs_gets_their_curve() -> None:
    found = expect(np.stack([CURVE, CURVE]), FRACTIONS, Ends(CURVE[0], CURVE[-1], 0, 0))
    assert found.values == pytest.approx(CURVE)
    assert found.low == pytest.approx(CURVE)
    assert found.high == pytest.approx(CURVE)


@given(st.floats(0, 100), st.floats(0, 100), st.floats(0, 5), st.floats(0, 5))
def test_the_ends_are_those_of_the_gallery_with_their_errors(
    start: float, end: float, start_error: float, end_error: float
) -> None:
    found = expect(np.stack([CURVE, CURVE + 1]), FRACTIONS, Ends(start, end, start_error, end_error))
    assert found.values[[0, -1]] == pytest.approx([start, end], abs=1e-9)
    assert (found.high - found.values)[[0, -1]] == pytest.approx([2 * start_error, 2 * end_error], abs=1e-9)


def test_folds_that_disagree_make_the_band_wider_between_the_ends() -> None:
    folds = np.stack([CURVE, 40 + 12 * FRACTIONS])
    found = expect(folds, FRACTIONS, Ends(40, 52, 0, 0))
    assert (found.high - found.low)[10] > 1
    assert (found.high - found.low)[[0, -1]] == pytest.approx(0)


def test_the_fraction_is_where_the_curve_stays_above() -> None:
    fractions = np.array([0.0, 0.5, 1.0])
    assert fraction_for(np.array([50.0, 90.0, 100.0]), fractions, 95) == pytest.approx(0.75)
    assert fraction_for(np.array([96.0, 90.0, 100.0]), fractions, 95) == pytest.approx(0.75)
    assert fraction_for(np.array([96.0, 97.0, 100.0]), fractions, 95) == 0
    assert fraction_for(np.array([50.0, 60.0, 70.0]), fractions, 95, full=100) == 1


def test_it_is_stored_whole() -> None:
    found = expect(np.stack([CURVE, CURVE]), FRACTIONS, Ends(41, 50, 1, 2))
    again = Expected.from_json(found.to_json())  # type: ignore[arg-type] - as JSON gives it
    assert again.values.tolist() == found.values.tolist()
    reached = found.to_json()["reached"]
    assert isinstance(reached, dict)
    assert reached["95"]["low"] <= reached["95"]["fraction"] <= reached["95"]["high"]
