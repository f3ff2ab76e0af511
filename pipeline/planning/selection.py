"""What a selection found: the table of all candidates, the one that was chosen, and its curve.

Part of the transformation that was fitted by it. `training.select` makes it; the plan takes the policy from it, and
fit and report show it.
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
    """One row of the table; figures are means over the folds, in per cent.

    Attributes:
        transformation, loss, lambda_disc, inner_width, epochs, offset, offset_strength, calibrate: settings of `fit`.
        policy: the order.
        area: by metric, the plain mean of the curve's points.
        area_std: by metric, the sample deviation over the folds.
        start: by metric, with nothing embedded yet.
        fraction95, fraction99: by metric, the fraction from which on the curve stays at so many per cent of its end.
        lowest: by metric, the lowest point of the curve.
        behind: of the best candidate, in points of the score: the mean of the metrics that count.
        behind_error: the standard error of that, paired by fold.
    """

    loss: LossMode
    lambda_disc: float
    inner_width: int
    epochs: int | None
    offset: OffsetKind
    offset_strength: float
    policy: str
    area: CurveFigures
    area_std: CurveFigures
    start: CurveFigures
    fraction95: CurveFigures
    fraction99: CurveFigures
    behind: float
    behind_error: float
    transformation: TransformationKind = "fastfill"
    calibrate: bool = False
    lowest: CurveFigures = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Selection:
    """The outcome.

    Attributes:
        metrics: whose mean area counts.
        folds: how often each recipe was fitted.
        num_measured: pairs of a fold, or images of its share of the probe set, that were gallery and queries.
        chosen: the candidate.
        candidates: all that were measured in full, the best score first.
        screened: all that were tried, with a few orders, points and queries, by which finalists were found.
        ends: old/old and new/new over the folds; empty without labels.
        fractions: of the points of `curves`.
        curves: of the chosen one, per metric and fold its value at each point.
        measured_on: `pairs` that were held out, or images of the `probe` set.
        likeness: of these pairs and the probe set; None without one.
        left_out: names of recipes that there was no time to try.
        failed: names of recipes whose fit failed.
    """

    metrics: tuple[str, ...]
    folds: int
    num_measured: int
    chosen: TrialResult
    candidates: tuple[TrialResult, ...]
    screened: tuple[TrialResult, ...]
    ends: dict[str, CurveFigures]
    fractions: tuple[float, ...]
    curves: dict[str, list[list[float]]]
    measured_on: Literal["pairs", "probe"] = "pairs"
    likeness: DistributionShift | None = None
    left_out: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()

    def best_of_each_recipe(self) -> list[TrialResult]:
        """The chosen trial, and the best one of each other recipe; the best score first."""
        found: dict[tuple[object, ...], TrialResult] = {}
        for row in (self.chosen, *self.candidates):
            found.setdefault((row.transformation, row.loss, row.lambda_disc, row.inner_width, row.epochs), row)
        return sorted(found.values(), key=lambda row: row.behind)

    def passes_old(self) -> float | None:
        """The fraction from which on the chosen curve reaches the old model, in each metric that counts.

        Returns:
            0 where it always is; None where it never is, or nothing was measured of the old model.
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
            DataError: it is not what `to_json` gives.
        """
        where = "the selection"
        return cls.from_tree(documents.decode(text.encode() if isinstance(text, str) else text, where), where)

    @classmethod
    def from_tree(cls, tree: documents.Tree, where: str) -> Self:
        """As `from_json`, of the tree in its file."""
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
    """A recipe in a table: its kind, the loss if that is not the kind's own, and the weight of its second term."""
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
    """The selection that the run's transformation was fitted by, or None where its settings were given.

    Raises:
        DataError: there is no transformation, or the file is missing or damaged.
    """
    data = read_part(run, PART)
    return None if data is None else Selection.from_json(data)


def resolve_policy(run: Run, policy: str) -> str:
    """The policy that `plan.policy` means: for `auto` the one that was selected, and `uncertainty` if none was.

    Raises:
        ConfigError: it is `selected`, and nothing was.
    """
    if policy not in ("auto", "selected"):
        return policy
    found = read_selection(run)
    if found is None and policy == "auto":
        return "uncertainty"
    if found is None:
        raise ConfigError(
            "nothing was selected for this run",
            expected="a transformation that was fitted with `fit.transformation: auto`",
            where="plan.policy: selected",
            remedy="set plan.policy to auto or to a name, or start a run with fit.transformation auto",
        )
    return found.chosen.policy
