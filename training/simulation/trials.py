"""The trials of a selection, their measurements, and the rule that chooses one. Pure.

The choice does not depend on the order of the measurements.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import get_args

import numpy as np

from pipeline.arrays import Float64
from pipeline.config.method import FitSettings, LossMode, OffsetKind, TransformationKind
from pipeline.planning.expected_curve import REACHED, fraction_for
from pipeline.planning.policies import POLICIES
from pipeline.planning.selection_result import CurveFigures, Selection, TrialResult, recipe_name

_KINDS = get_args(TransformationKind)
_LOSSES = get_args(LossMode)
_OFFSETS = get_args(OffsetKind)
TrialEnds = dict[str, CurveFigures]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a transformation is fitted: settings of `fit` with these names."""

    loss: LossMode
    lambda_disc: float
    inner_width: int
    epochs: int | None
    transformation: TransformationKind = "fastfill"

    def of(self, fit: FitSettings) -> FitSettings:
        """`fit` with these settings."""
        return fit.model_copy(update=asdict(self))

    def __str__(self) -> str:
        return recipe_name(self.transformation, self.loss, self.lambda_disc)


@dataclass(frozen=True, slots=True)
class Serving:
    """How transformed vectors are served: `fit.offset`, `fit.offset_strength` and `fit.calibrate`."""

    offset: OffsetKind
    strength: float
    calibrate: bool = True


@dataclass(frozen=True, slots=True)
class Trial:
    """A recipe, how its vectors are served, and the policy."""

    recipe: Recipe
    serving: Serving
    policy: str

    def simplicity(self) -> tuple[float, ...]:
        """Sort key: simpler kind, no offset, calibrated, simpler policy, fewer terms in the loss, smaller network."""
        recipe, serving = self.recipe, self.serving
        sizes = (recipe.inner_width, recipe.epochs or 0, recipe.lambda_disc)
        served = (_OFFSETS.index(serving.offset), not serving.calibrate)
        simple = (*served, POLICIES[self.policy].simplicity, _LOSSES.index(recipe.loss))
        return (_KINDS.index(recipe.transformation), *simple, *sizes, serving.strength)


@dataclass(frozen=True, slots=True)
class TrialRow:
    """The measured curves of a trial, per fold, point and metric, (F, P, M) float64 in per cent."""

    trial: Trial
    curves: Float64

    def areas(self) -> Float64:
        """The mean over the points, per fold and metric, (F, M)."""
        areas: Float64 = self.curves.mean(axis=1)
        return areas

    def scores(self, columns: Sequence[int]) -> Float64:
        """The mean area over some metrics, per fold, (F,)."""
        scores: Float64 = self.areas()[:, list(columns)].mean(axis=1)
        return scores


def choose(rows: Iterable[TrialRow], columns: Sequence[int]) -> TrialRow:
    """The simplest trial within one standard error of the best: of the difference, paired by fold."""
    ranked = _ranked(rows, columns)
    best = ranked[0].scores(columns)

    def as_good(row: TrialRow) -> bool:
        behind = best - row.scores(columns)
        return bool(behind.mean() <= behind.std(ddof=1) / np.sqrt(len(behind)))

    return min((row for row in ranked if as_good(row)), key=lambda row: row.trial.simplicity())


def finalists(rows: Iterable[TrialRow], columns: Sequence[int], most: int) -> list[tuple[Recipe, Serving]]:
    """The `most` best recipes and servings, the best one without an offset, and the one that `choose` takes."""
    ranked = _ranked(rows, columns)
    found = list(dict.fromkeys((row.trial.recipe, row.trial.serving) for row in ranked))
    plain = [item for item in found if item[1].offset == "none"]
    simple = choose(ranked, columns).trial
    return list(dict.fromkeys([*found[:most], *plain[:1], (simple.recipe, simple.serving)]))


def _ranked(rows: Iterable[TrialRow], columns: Sequence[int]) -> list[TrialRow]:
    return sorted(rows, key=lambda row: (-row.scores(columns).mean(), row.trial.simplicity()))


def settings_of(selection: Selection, fit: FitSettings) -> FitSettings:
    """`fit` with the chosen settings."""
    chosen = selection.chosen
    update: dict[str, object] = {name: getattr(chosen, name) for name in Recipe.__slots__}
    update |= {"offset": chosen.offset, "calibrate": chosen.calibrate}
    update |= {"offset_strength": chosen.offset_strength} if chosen.offset != "none" else {}
    return fit.model_copy(update=update)


def selection_of(
    rows: Sequence[TrialRow],
    screened: Sequence[TrialRow],
    names: Sequence[str],
    columns: Sequence[int],
    num_measured: int,
    ends: TrialEnds,
) -> Selection:
    """Choose among `rows`, and describe the outcome as it is stored and shown.

    `screened` are the trials of the first round, `names` the metrics, and `columns` those that count.
    """

    def described(some: Sequence[TrialRow]) -> tuple[TrialResult, ...]:
        ranked = _ranked(some, columns)
        return tuple(_described(row, names, columns, ranked[0].scores(columns)) for row in ranked)

    best, chosen = _ranked(rows, columns)[0].scores(columns), choose(rows, columns)
    points = chosen.curves.shape[1]
    return Selection(
        metrics=tuple(names[column] for column in columns),
        folds=len(best),
        num_measured=num_measured,
        chosen=_described(chosen, names, columns, best),
        candidates=described(rows),
        screened=described(screened),
        ends=ends,
        fractions=tuple(np.linspace(0, 1, points).tolist()),
        curves={name: chosen.curves[:, :, column].tolist() for column, name in enumerate(names)},
    )


def _described(row: TrialRow, names: Sequence[str], columns: Sequence[int], best: Float64) -> TrialResult:
    areas, behind = row.areas(), best - row.scores(columns)
    mean, points = row.curves.mean(axis=0), np.linspace(0, 1, row.curves.shape[1])
    reached = {
        percent: {name: fraction_for(mean[:, column], points, percent) for column, name in enumerate(names)}
        for percent in REACHED
    }
    return TrialResult(
        **asdict(row.trial.recipe),
        offset=row.trial.serving.offset,
        offset_strength=row.trial.serving.strength,
        calibrate=row.trial.serving.calibrate,
        policy=row.trial.policy,
        area=dict(zip(names, areas.mean(axis=0).tolist(), strict=True)),
        area_std=dict(zip(names, areas.std(axis=0, ddof=1).tolist(), strict=True)),
        start=dict(zip(names, mean[0].tolist(), strict=True)),
        lowest=dict(zip(names, mean.min(axis=0).tolist(), strict=True)),
        fraction95=reached[95],
        fraction99=reached[99],
        behind=float(behind.mean()),
        behind_error=float(behind.std(ddof=1) / np.sqrt(len(behind))),
    )
