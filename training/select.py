"""Choose transformation, offset, calibration and policy by simulated backfills of held-out pairs.

    pairs -> folds -> fit the simplest recipe on all folds but one (`simulation.folds`), then others while time is left
          -> z, s of the fold left out
          -> simulate its backfill: every offset with a few policies, then the finalists with all policies
          -> the simplest trial within one standard error of the best, and the table of all

Nothing is measured on the pairs that it was fitted on: offset, calibration and policy inputs come from another fold.
With `select.measured_on: probe`, each fold's network is measured on a share of the probe set instead. The outcome is a
function of the pairs, the probe set, the settings, the seed, and the recipes that there was time for. Fits of folds and
whole selections are stored and reused. `training.fit` then fits the chosen settings on all pairs.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pyarrow as pa
import ray

from pipeline.arrays import NO_LABEL
from pipeline.config.method import LossMode, SelectSettings
from pipeline.config.tree import Config
from pipeline.errors import ConfigError, FastfillError
from pipeline.evaluation import probe_set
from pipeline.evaluation.gallery_arrays import codes_of
from pipeline.evaluation.metrics import METRICS
from pipeline.planning.distribution_shift import DistributionShift, distribution_shift
from pipeline.planning.policies import POLICIES
from pipeline.planning.selection_result import Selection
from pipeline.run import Run
from pipeline.storage import documents, objects
from training.fitting.held_out_metrics import retrieval
from training.fitting.learner import FitData, PairArrays, can_classify, make_arrays
from training.fitting.losses import needs_labels
from training.simulation.folds import (
    FOLDER,
    Fits,
    Fold,
    FoldSettings,
    OnStep,
    OutOfTime,
    Split,
    by_chance,
    fit_folds,
    split,
)
from training.simulation.simulate import FINAL, SCREENING, FoldPair, SimulationDetail, measure_fold
from training.simulation.trials import Recipe, Serving, Trial, TrialRow, finalists, selection_of

logger = logging.getLogger(__name__)

_SCREENING = ("random", "uncertainty", "least_confidence")
"""The policies of the first round; finalists are tried with every policy."""

LEAST_SECONDS = 60.0
"""Time for fits after the simplest one, if the duration of the backfill is not known."""

LEAST_SHARE = 100
"""Images of the probe set per fold, at least."""

_LEAST_QUERIES = 50
"""Queries of a fold that have a match: with fewer, quality is measured without labels."""


def select(config: Config, run: Run, data: FitData, on_step: OnStep, seconds: float = LEAST_SECONDS) -> Selection:
    """Measure trials and choose one.

    Fits and the selection are stored below FOLDER until the caller deletes them.

    Args:
        data: all pairs, also those that `fit` will hold out.
        on_step: called with the name of a step, its progress, and its total.
        seconds: time for fits after the simplest one, unless `select.minutes` is set.

    Raises:
        ConfigError: labels are needed and missing, or the probe set is too small to be measured.
        DataError: the pairs are invalid.
    """
    settings = config.select
    given = FoldSettings(config.fit, settings, data, config.gallery.metric, config.seed, config.device)
    seconds = seconds if settings.minutes is None else 60 * settings.minutes
    table = probe_set.embedded(config.probe, config.encoders, run)
    sample = None if table is None else _sample(given, table)
    if settings.measured_on == "probe":
        sample = _measured(sample, settings)
    _check(given, sample)
    parts = split(given, sample)
    kept = run.path(FOLDER, f"{given.digest([settings.model_dump(mode='json'), parts.digest()])}.json")
    if objects.exists(kept):
        return Selection.from_tree(documents.decode(objects.read_bytes(kept), kept, documents.REDO), kept)
    found = _select(given, run, parts, on_step, seconds)
    objects.put(kept, documents.encode(found))
    return found


def _select(given: FoldSettings, run: Run, parts: Split, on_step: OnStep, seconds: float) -> Selection:
    settings, data = given.select, given.data
    tried = _fit_recipes(given, run, parts, on_step, seconds)
    fits, recipes = tried.fits, list(tried.fits)
    pairs = {recipe: _fold_pairs(found, settings) for recipe, found in fits.items()}
    some = [pair.measured for pair in pairs[recipes[0]]]
    columns, names = _columns(settings, some[0])
    known = [name for name in settings.policies or POLICIES if _possible(name, data)]
    first = [name for name in _SCREENING if name in known] or known[:1]
    every = [(recipe, serving) for recipe in recipes for serving in _servings(given)]

    screened = _measure(given, pairs, every, first, SCREENING, partial(on_step, "select: screen"))
    final = finalists(screened, columns, settings.finalists)
    rows = _measure(given, pairs, final, known, FINAL, partial(on_step, "select: orders"))
    found = selection_of(rows, screened, names, columns, len(some[0].s), _ends(some, given.metric))
    return replace(
        found,
        measured_on=settings.measured_on,
        likeness=_distribution_shift(fits[recipes[0]], given.seed),
        left_out=tried.out_of_time,
        failed=tried.failed,
    )


@dataclass(slots=True)
class _Tried:
    """Fits by recipe, and the names of the recipes that have none: there was no time, or the fit failed."""

    fits: dict[Recipe, Fits]
    out_of_time: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()


def _fit_recipes(given: FoldSettings, run: Run, parts: Split, on_step: OnStep, seconds: float) -> _Tried:
    """Fit the simplest recipe, then the others in order while time is left; a failure of the others is logged."""
    first, *others = _recipes(given)
    tried = _Tried({first: fit_folds(given, run, first, parts, on_step)})
    ends = time.monotonic() + seconds
    for recipe in others:
        try:
            tried.fits[recipe] = fit_folds(given, run, recipe, parts, on_step, ends - time.monotonic())
        except OutOfTime:
            tried.out_of_time += (str(recipe),)
        except (FastfillError, ray.exceptions.RayError) as error:
            tried.failed += (str(recipe),)
            reason = error.summary if isinstance(error, FastfillError) else type(error).__name__
            logger.warning("%s could not be fitted on these pairs and is left out: %s", recipe, reason)
    return tried


def _sample(given: FoldSettings, table: pa.Table) -> PairArrays:
    count = table.num_rows
    columns = {"index": table["id"], "label": pa.nulls(count, pa.int32()), "old": table["old"], "new": table["new"]}
    columns |= {"side": table["side"]} if given.data.d_side is not None else {}
    codes, names = codes_of(table["label"])
    job = given.job(Recipe("alignment", 0.0, given.fit.inner_width, given.fit.epochs, "linear"))  # any recipe will do
    return replace(make_arrays(pa.table(columns), job), labels=codes if names else None)


def _measured(sample: PairArrays | None, settings: SelectSettings) -> PairArrays:
    """The measured images of the probe set: the labelled ones, if there are any; a ConfigError if too few."""
    least = settings.folds * LEAST_SHARE
    found, what = sample, "images"
    if sample is not None and sample.labels is not None:
        found, what = sample.take(np.flatnonzero(sample.labels != NO_LABEL)), "images with a label"
    if found is None or len(found.old) < least:
        raise too_few(0 if found is None else len(found.old), what, settings)
    return found


def too_few(count: int, what: str, settings: SelectSettings) -> ConfigError:
    """The error if the probe set is too small for `select.measured_on: probe`."""
    return ConfigError(
        "the probe set is too small for select.measured_on=probe",
        expected=f"at least {settings.folds * LEAST_SHARE} {what}, {LEAST_SHARE} for each of {settings.folds} folds",
        found=count,
        where="select.measured_on, probe.images, probe.manifest",
        remedy="start a new run (`--set run=...`) with more images in probe.manifest, or lower select.folds. "
        "Without probe.manifest, probe.images are drawn at random: at most a tenth of the gallery or 200, whichever is "
        "larger",
    )


def _fold_pairs(fits: Fits, settings: SelectSettings) -> list[FoldPair]:
    """The folds to measure: held-out pairs, or shares of the probe set."""
    if settings.measured_on == "pairs":
        return _comparable([FoldPair(*pair) for pair in zip(fits.held, [*fits.held[1:], fits.held[0]], strict=True)])
    count, most = len(fits.held), settings.folds * settings.max_measured
    rows = np.random.default_rng(0).permutation(by_chance(len(fits.sample[0].s), most))
    measured = [fold.take(np.sort(rows[number::count])) for number, fold in enumerate(fits.sample)]
    return _comparable([FoldPair(*pair) for pair in zip(measured, fits.held, strict=True)])


def _comparable(pairs: list[FoldPair]) -> list[FoldPair]:
    """All folds measured by labels, or none if a fold has too few queries for that."""
    if all(_num_queries(pair.measured) >= _LEAST_QUERIES for pair in pairs):
        return pairs
    return [replace(pair, measured=pair.measured.unlabelled()) for pair in pairs]


def _num_queries(fold: Fold) -> int:
    """The number of images that share a label with another one."""
    if fold.pairs.labels is None:
        return 0
    _, counts = np.unique(fold.pairs.labels[fold.pairs.labels != NO_LABEL], return_counts=True)
    return int(counts[counts > 1].sum())


def _check(given: FoldSettings, sample: PairArrays | None) -> None:
    """Refuse settings that need labels or a classifier which are not there."""
    settings, data = given.select, given.data
    if settings.policies and not any(_possible(name, data) for name in settings.policies):
        raise ConfigError(
            "every policy in select.policies needs labels or a classifier, and there are none",
            expected="pairs.columns.label, fit.classifier, or other policies",
            found=", ".join(settings.policies),
            where="select.policies",
        )
    labelled = data.num_classes is not None
    if settings.measured_on == "probe" and sample is not None:
        labelled = sample.labels is not None
    if labelled and "recall10" in settings.metrics:
        raise ConfigError(
            "select.metrics has recall10, which is for images without labels",
            expected=", ".join(METRICS),
            found=", ".join(settings.metrics),
            where="select.metrics",
        )
    losses = _losses(given)
    wanting = [loss for loss in losses if needs_labels(loss)]
    alone = settings.transformations == ("fastfill",)
    if data.num_classes is None and alone and len(wanting) == len(losses):
        raise ConfigError(
            "every loss in select.losses needs labels, and the pairs have none",
            expected="pairs.columns.label",
            found=", ".join(wanting),
            where="select.losses",
        )


def _losses(given: FoldSettings) -> tuple[LossMode, ...]:
    """The losses of `fastfill` to choose from: the one that `fit.loss` names, or `select.losses`."""
    return given.select.losses if given.fit.loss == "auto" else (given.fit.loss,)


def _recipes(given: FoldSettings) -> list[Recipe]:
    """The recipes in the order in which they are tried: the simplest first."""
    settings, fit, labelled = given.select, given.fit, given.data.num_classes is not None
    found = [
        Recipe("alignment", fit.lambda_disc, fit.inner_width, fit.epochs, kind)
        for kind in ("linear", "residual")
        if kind in settings.transformations
    ]
    if "fastfill" not in settings.transformations:
        return found
    widths, epochs = settings.inner_widths or (fit.inner_width,), settings.epochs or (fit.epochs,)
    return found + [
        Recipe(loss, weight, width, count, "fastfill")
        for loss in _losses(given)
        if labelled or not needs_labels(loss)
        for weight in (settings.lambdas if needs_labels(loss) else (fit.lambda_disc,))
        for width, count in itertools.product(widths, epochs)
    ]


def _servings(given: FoldSettings) -> list[Serving]:
    """Every offset, calibrated or not. With metric `ip` an offset has no effect."""
    settings = given.select
    kinds = [kind for kind in settings.offsets if kind != "confidence" or can_classify(given.data)]
    kinds = [kind for kind in kinds if kind == "none" or given.metric != "ip"] or ["none"]
    return [
        Serving(kind, strength, calibrate)
        for kind in kinds
        for strength in (settings.strengths if kind != "none" else (0.0,))
        for calibrate in (True, False)
    ]


def _possible(policy: str, data: FitData) -> bool:
    there = {"classifier": can_classify(data), "labels": data.num_classes is not None, "learned": True}
    return all(there.get(item, False) for item in POLICIES[policy].needs)


def _columns(settings: SelectSettings, fold: Fold) -> tuple[list[int], tuple[str, ...]]:
    """The columns of a curve that count, and the names of all columns."""
    names = METRICS if fold.labels() is not None else ("recall10",)
    columns = [names.index(metric) for metric in settings.metrics if metric in names]
    return columns or list(range(len(names))), names


def _measure(
    given: FoldSettings,
    pairs: dict[Recipe, list[FoldPair]],
    tried: list[tuple[Recipe, Serving]],
    policies: list[str],
    detail: SimulationDetail,
    on_done: Callable[[int, int], None],
) -> list[TrialRow]:
    task = ray.remote(num_cpus=1)(measure_fold)
    stored = {recipe: [ray.put(pair) for pair in some] for recipe, some in pairs.items()}
    tasks = [
        [task.remote(pair, serving, policies, detail, given.metric, given.seed) for pair in stored[recipe]]
        for recipe, serving in tried
    ]
    rows = []
    for done, ((recipe, serving), parts) in enumerate(zip(tried, tasks, strict=True), start=1):
        curves = ray.get(parts)
        rows += [
            TrialRow(Trial(recipe, serving, policy), np.stack([curve[policy] for curve in curves]))
            for policy in policies
        ]
        on_done(done, len(tried))
    return rows


def _distribution_shift(fits: Fits, seed: int) -> DistributionShift | None:
    """The shift between pairs and probe set, in old embeddings and in a recipe's errors; None without a probe set."""
    if not fits.sample:
        return None
    errors = [
        np.concatenate([np.square(fold.pairs.new - fold.z).sum(axis=1, dtype=np.float64) for fold in folds])
        for folds in (fits.held, fits.sample[:1])
    ]
    old = np.concatenate([fold.pairs.old for fold in fits.held])
    return distribution_shift(old, fits.sample[0].pairs.old, seed, (errors[0], errors[1]))


def _ends(folds: list[Fold], metric: str) -> dict[str, dict[str, float]]:
    """The figures of old/old and new/new, as means over the folds; without labels their agreement with new/new."""
    found: dict[str, list[dict[str, float]]] = {"old_old": [], "new_new": []}
    for fold in folds:
        labels = fold.labels()
        rows = np.arange(len(fold.s)) if labels is None else np.flatnonzero(labels != NO_LABEL)
        old, new = fold.pairs.old[rows], fold.pairs.new[rows]
        sides = {"old_old": (old, old), "new_new": (new, new)}
        figures = retrieval(sides, None if labels is None else labels[rows], metric, "recall10")
        for name, each in figures.items():
            found[name].append(each)
    return {
        name: {metric: float(np.mean([item[metric] for item in some])) for metric in some[0]}
        for name, some in found.items()
    }
