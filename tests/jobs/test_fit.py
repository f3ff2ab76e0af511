"""The output of `fastfill fit`: the outlook, the choice and its table."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jobs.fit import show_selection
from jobs.shell.tables import say_outlook
from pipeline.models.transformation import TransformationInfo
from pipeline.planning.selection_result import Selection, TrialResult, describe

INFO = TransformationInfo(
    d_old=4, d_new=6, d_side=None, inner_width=8, normalize=False, loss="alignment", seed=0, epochs=0, num_train=900,
    num_held_out=100, better_than_old=False, kind="linear", pairs_to_pass_old=3000,
)  # fmt: skip


def candidate(transformation: str, area: float, behind: float) -> TrialResult:
    figures = {"top1": area, "top5": area, "map": area}
    return TrialResult(
        "alignment", 1.0, 8, None, "none", 0.0, "uncertainty", figures, figures, figures, figures, figures,
        behind, 0.1, transformation=transformation, calibrate=True, lowest=figures,
    )  # fmt: skip


LINEAR, RESIDUAL = candidate("linear", 40.0, 0.05), candidate("residual", 40.1, 0.0)
SELECTION = Selection(
    metrics=("top1",), folds=3, num_measured=100, chosen=LINEAR, candidates=(RESIDUAL, LINEAR), screened=(),
    ends={"old_old": {"top1": 45.0}}, fractions=(0.0, 0.5, 1.0), curves={"top1": [[30.0, 50.0, 60.0]]},
    left_out=("fastfill 0.1",),
)  # fmt: skip


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_outlook_of_a_worse_fit_says_when_a_snapshot_is_better_and_with_how_many_pairs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    say_outlook(INFO, SELECTION)
    text = said(capsys)
    assert "`prod` keeps serving the old system until a snapshot is better; that is expected at about 50% of" in text
    assert "With about 3,000 training pairs instead of 900" in text


def test_fit_whose_first_snapshot_is_as_good_as_the_old_model_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    say_outlook(INFO, SELECTION, first=0.5)
    assert said(capsys) == "The first snapshot is expected to be about as good as the old system."


def test_fit_that_more_pairs_cannot_improve_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    say_outlook(replace(INFO, pairs_to_pass_old=None), None)
    assert "More training pairs alone are not expected to change that." in said(capsys)


def test_outlook_of_a_fit_as_good_as_the_old_model_is_empty(capsys: pytest.CaptureFixture[str]) -> None:
    say_outlook(replace(INFO, better_than_old=True), SELECTION)
    assert said(capsys) == ""


def test_describe_a_selection_is_one_line_with_the_runner_up_and_the_untried_recipes() -> None:
    assert describe(SELECTION) == (
        "Chosen: linear, in the order uncertainty: area 40.0 % top1 (residual +0.1). "
        "Not tried for lack of time: fastfill 0.1; raise select.minutes to try more."
    )


def test_the_table_of_a_selection_fits_80_columns_and_marks_the_chosen_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    show_selection(SELECTION)
    lines = capsys.readouterr().err.splitlines()
    table = [line for line in lines if line.startswith(("│", "┃"))]
    assert all(len(line) <= 80 for line in table)
    assert any("*" in line and "linear" in line for line in table)
    assert any("residual" in line for line in table)
