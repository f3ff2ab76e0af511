"""The record of a selection: all trials, the chosen one, and its curve.

`training.select` makes it and the transformation keeps it; the plan takes the policy from it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Literal, Self

import numpy as np

from pipeline.config.method import LossMode, OffsetKind, TransformationKind
from pipeline.errors import ConfigError, DataError
from pipeline.models.transformation import read_part
from pipeline.planning.distribution_shift import DistributionShift
from pipeline.run import Run
from pipeline.storage import documents

PART = "selection.json"
_TUPLES = ("metrics", "fractions", "left_out", "failed")  # fields that JSON has as lists
CurveFigures = dict[str, float]


@dataclass(frozen=True, slots=True)
class TrialResult:
    """One row of the table: settings of `fit`, and figures, which are means over the folds in per cent."""

    loss: LossMode
    lambda_disc: float
    inner_width: int
    epochs: int | None
    offset: OffsetKind
    offset_strength: float
    policy: str  # the order of the backfill
    area: CurveFigures  # plain mean of the curve's points
    area_std: CurveFigures  # sample deviation over the folds
    start: CurveFigures  # with nothing embedded
    fraction95: CurveFigures  # from which the curve stays at 95 % of its end
    fraction99: CurveFigures  # the same for 99 %
    behind: float  # how far behind the best trial, in points of the score (mean area of the metrics that count)
    behind_error: float  # its standard error, paired by fold
    transformation: TransformationKind = "fastfill"
    calibrate: bool = False
    lowest: CurveFigures = field(default_factory=dict)  # lowest point of the curve


@dataclass(frozen=True, slots=True)
class Selection:
    """The outcome of a selection."""

    metrics: tuple[str, ...]  # whose mean area is the score
    folds: int  # number of fits of each recipe
    num_measured: int  # pairs of a fold, or images of its share of the probe set, used as gallery and queries
    chosen: TrialResult
    candidates: tuple[TrialResult, ...]  # trials that were measured in full, the best score first
    screened: tuple[TrialResult, ...]  # all trials of the first round, with few orders, points and queries
    ends: dict[str, CurveFigures]  # old/old and new/new over the folds; empty without labels
    fractions: tuple[float, ...]  # of the points of `curves`
    curves: dict[str, list[list[float]]]  # of the chosen trial, by metric and fold
    measured_on: Literal["pairs", "probe"] = "pairs"  # held-out `pairs`, or images of the `probe` set
    likeness: DistributionShift | None = None  # of these pairs and the probe set; None without one
    left_out: tuple[str, ...] = ()  # names of recipes that were not tried for lack of time
    failed: tuple[str, ...] = ()  # names of recipes whose fit failed

    def best_of_each_recipe(self) -> list[TrialResult]:
        """The chosen trial, and the best one of each other recipe; the best score first."""
        found: dict[tuple[object, ...], TrialResult] = {}
        for row in (self.chosen, *self.candidates):
            found.setdefault((row.transformation, row.loss, row.lambda_disc, row.inner_width, row.epochs), row)
        return sorted(found.values(), key=lambda row: row.behind)

    def passes_old(self) -> float | None:
        """The fraction from which the chosen curve reaches the old model in each metric of the score.

        Returns:
            0 if it always does; None if it never does, or the old model was not measured.
        """
        old = self.ends.get("old_old", {})
        if any(metric not in old for metric in self.metrics):
            return None
        behind = np.zeros(len(self.fractions), np.bool_)
        for metric in self.metrics:
            behind |= np.mean(self.curves[metric], axis=0) < old[metric]
        if behind[-1]:
            return None
        return 0.0 if not behind.any() else self.fractions[int(np.flatnonzero(behind)[-1]) + 1]

    def to_json(self) -> str:
        """As one JSON object."""
        return json.dumps(asdict(self), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The inverse of `to_json`.

        Raises:
            DataError: it was not written by `to_json`.
        """
        where = "the selection"
        return cls.from_tree(documents.decode(text.encode() if isinstance(text, str) else text, where), where)

    @classmethod
    def from_tree(cls, tree: documents.Tree, where: str) -> Self:
        """As `from_json`, from a decoded tree."""
        try:
            return cls._from_tree(dict(tree))
        except (KeyError, TypeError) as error:
            raise DataError("not a selection", found=repr(error), where=where, remedy=documents.REDO) from error

    @classmethod
    def _from_tree(cls, tree: documents.Tree) -> Self:
        tree["chosen"] = TrialResult(**tree["chosen"])
        tree.pop("learning", None)  # of version 0.1
        if tree.get("likeness") is not None:
            tree["likeness"] = DistributionShift(**tree["likeness"])
        tree |= {name: tuple(TrialResult(**item) for item in tree.get(name, ())) for name in ("candidates", "screened")}
        return cls(**tree | {name: tuple(tree.get(name, ())) for name in _TUPLES})


def recipe_name(transformation: TransformationKind, loss: LossMode, lambda_disc: float) -> str:
    """A recipe in a table: its kind, the loss if it is not the kind's default, and the weight of the second term."""
    if transformation != "fastfill":
        return transformation if loss == "alignment" else f"{transformation} {loss} {lambda_disc:g}"
    name = loss if loss == "fastfill" else f"fastfill, {loss}"
    return f"{name} {lambda_disc:g}" if loss in ("fastfill", "alignment+discriminative") else name


def describe(selection: Selection) -> str:
    """For people: what was chosen, how far the others are behind, and what was not tried."""
    chosen = selection.chosen
    mine = recipe_name(chosen.transformation, chosen.loss, chosen.lambda_disc)
    first = selection.metrics[0]
    others: dict[str, TrialResult] = {}
    for row in selection.best_of_each_recipe():
        name = recipe_name(row.transformation, row.loss, row.lambda_disc)
        if name != mine:
            others.setdefault(name, row)
    text = f"Chosen: {mine}, in the order {chosen.policy}: area {chosen.area[first]:.1f} % {first}"
    if others:
        compared = (f"{name} {row.area[first] - chosen.area[first]:+.1f}" for name, row in others.items())
        text += f" ({', '.join(compared)})"
    text += "."
    if selection.left_out:
        text += f" Not tried for lack of time: {', '.join(selection.left_out)}; raise select.minutes to try more."
    if selection.failed:
        text += f" Could not be fitted: {', '.join(selection.failed)}."
    return text


def read_selection(run: Run) -> Selection | None:
    """The selection of the run's transformation; None if its settings were given.

    Raises:
        DataError: there is no transformation, or the file is missing or damaged.
    """
    data = read_part(run, PART)
    return None if data is None else Selection.from_json(data)


def resolve_policy(run: Run, policy: str) -> str:
    """The policy that `plan.policy` means: for `auto` the selected one, or `uncertainty` without a selection.

    Raises:
        ConfigError: it is `selected`, and there was no selection.
    """
    if policy not in ("auto", "selected"):
        return policy
    found = read_selection(run)
    if found is None and policy == "auto":
        return "uncertainty"
    if found is None:
        raise ConfigError(
            "this run has no selection to take the policy from",
            expected="a transformation that was fitted with `fit.transformation: auto`",
            where="plan.policy: selected",
            remedy="set plan.policy to auto or to a name, or start a run with fit.transformation auto",
        )
    return found.chosen.policy
