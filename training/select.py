"""Choose transformation, ranking and order by the curves that they give on pairs that were held out.

    pairs -> folds -> fit the simplest recipe on all folds but one (`folds`), then others while there is time
          -> z, s of the fold left out
          -> simulate the backfill of that fold: each way to rank with a few orders, then the best with all of them
          -> the simplest candidate within one standard error of the best, and the table of all

Guarantee: what is measured on a fold was fitted without it: the network and its classifier, offset and calibration, and
what the policies know of pairs. These are fitted on another fold, with the classifier that had not seen that one.
With `measured_on: probe` it is the probe set that is measured, a share of it by each fold's network.
The selection is a function of the pairs, the probe set, the settings, the seed, and of which recipes there was time
for. A fit of a fold, or a whole selection, that is there is not made again. This module does not fit what is served in
the end; `fit` does that, with the settings chosen here.
"""

from __future__ import annotations

import itertools
import logging
import time
from dataclasses import replace

import numpy as np
import pyarrow as pa
import ray

from pipeline.config.method import LossMode, SelectSettings
from pipeline.config.tree import Config
from pipeline.errors import ConfigError, FastfillError
from pipeline.evaluation import probe_set
from pipeline.evaluation.gallery_arrays import codes_of
from pipeline.evaluation.metrics import METRICS
from pipeline.planning.distribution_shift import DistributionShift, distribution_shift
from pipeline.planning.policies import POLICIES
from pipeline.planning.selection import Selection
from pipeline.run import Run
from pipeline.storage import documents, objects
from training.fitting.held_out_metrics import retrieval
from training.fitting.learner import FitData, PairArrays, can_classify, make_arrays
from training.fitting.losses import NO_LABEL, needs_labels
from training.simulation.folds import (
    FOLDER,
    Fits,
    Fold,
    OnStep,
    OutOfTime,
    Split,
    by_chance,
    digest,
    fit_folds,
    job_of,
    split,
    taken,
)
from training.simulation.simulate import FINAL, SCREENING, SimulationDetail, measure_fold
from training.simulation.trials import Recipe, Serving, Trial, TrialRow, finalists, selection_of

logger = logging.getLogger(__name__)

_SCREENING = ("random", "uncertainty", "least_confidence")
"""Orders with which all offsets of all recipes are tried before the finalists meet every order."""

LEAST_SECONDS = 60.0
"""For fits after the simplest one's, if nobody knows what the backfill will take."""

LEAST_SHARE = 100
"""Images of the probe set that each fold's network is measured on, at least."""

_LEAST_QUERIES = 50
"""Of a fold, that have a match: with fewer, quality is not told by labels."""

Sides = list[tuple[Fold, Fold]]
"""For each fold what is measured, and the pairs that offset and policies are fitted on."""


def select(config: Config, run: Run, data: FitData, on_step: OnStep, seconds: float = LEAST_SECONDS) -> Selection:
    """Measure candidates and choose one.

    Args:
        config: `select` says what is tried.
        run: with its probe set, if there is one. Fits and the selection are kept below FOLDER, until the caller has
            what it wants of them.
        data: all pairs; those that `fit` will hold out take part as any others.
        on_step: told what is done, how much of it, and of how much.
        seconds: for fits after the simplest one's, if `select.minutes` does not say it.

    Raises:
        ConfigError: a loss, a metric or an order needs labels that the pairs do not have, or the probe set is to be
            measured and is too small.
        DataError: the pairs break their contract.
    """
    settings = config.select
    seconds = seconds if settings.minutes is None else 60 * settings.minutes
    sample = _sample(config, run, data)
    if settings.measured_on == "probe":
        sample = _measured(sample, settings)
    _check(config, data, sample)
    parts = split(config, data, settings, sample)
    decides = [settings.model_dump(mode="json"), parts.digest()]
    kept = run.path(FOLDER, f"{digest(config, data, decides)}.json")
    if objects.exists(kept):
        return Selection.from_tree(documents.decode(objects.read_bytes(kept), kept, documents.REDO), kept)
    found = _select(config, run, data, parts, on_step, seconds)
    objects.put(kept, documents.encode(found))
    return found


def _select(config: Config, run: Run, data: FitData, parts: Split, on_step: OnStep, seconds: float) -> Selection:
    settings, recipes = config.select, _recipes(config, data)
    fits = _fits(config, run, data, recipes, parts, on_step, seconds)
    left_out = tuple(str(recipe) for recipe in recipes if recipe not in fits)
    recipes = list(fits)
    sides = {recipe: _sides(found, settings) for recipe, found in fits.items()}
    some = [measured for measured, _ in sides[recipes[0]]]
    columns, names = _columns(settings, some[0])
    known = [name for name in settings.policies or POLICIES if _possible(name, data)]
    servings = _servings(config, settings, data)
    first = [name for name in _SCREENING if name in known] or known[:1]
    tried = [(recipe, serving) for recipe in recipes for serving in servings]
    screened = _measure(config, sides, tried, first, SCREENING, "screen", on_step)
    rows = _measure(config, sides, finalists(screened, columns, settings.finalists), known, FINAL, "orders", on_step)
    found = selection_of(rows, screened, names, columns, len(some[0].s), _ends(config, some))
    alike = _likeness(config, fits[recipes[0]])
    return replace(found, measured_on=settings.measured_on, likeness=alike, left_out=left_out)


def _fits(
    config: Config, run: Run, data: FitData, recipes: list[Recipe], parts: Split, on_step: OnStep, seconds: float
) -> dict[Recipe, Fits]:
    """The fits of the simplest recipe, and of others in order, as far as there is time.

    One of the others that fails is left out: it is only tried.
    """
    fits = {recipes[0]: fit_folds(config, run, data, recipes[0], parts, on_step)}
    ends = time.monotonic() + seconds
    for recipe in recipes[1:]:
        try:
            fits[recipe] = fit_folds(config, run, data, recipe, parts, on_step, ends - time.monotonic())
        except OutOfTime:
            continue
        except (FastfillError, ray.exceptions.RayError) as error:
            reason = error.summary if isinstance(error, FastfillError) else type(error).__name__
            logger.warning("%s cannot be fitted on these pairs, and is not tried: %s", recipe, reason)
    return fits


def _sample(config: Config, run: Run, data: FitData) -> PairArrays | None:
    """The probe set with its own labels, as numbers; None where there is none yet."""
    table = probe_set.embedded(config.probe, config.encoders, run)
    if table is None:
        return None
    count = table.num_rows
    columns = {"index": table["id"], "label": pa.nulls(count, pa.int32()), "old": table["old"], "new": table["new"]}
    columns |= {"side": table["side"]} if data.d_side is not None else {}
    codes, names = codes_of(table["label"])
    recipe = Recipe("alignment", 0.0, config.fit.inner_width, config.fit.epochs, "linear")  # any will do
    job = job_of(config, data, recipe)
    return replace(make_arrays(pa.table(columns), job), labels=codes if names else None)


def _measured(sample: PairArrays | None, settings: SelectSettings) -> PairArrays:
    """The images of the probe set that are measured.

    Where some have labels it is those alone: an answer without a label is neither right nor wrong.

    Raises:
        ConfigError: they are too few.
    """
    least = settings.folds * LEAST_SHARE
    found, what = sample, "images"
    if sample is not None and sample.labels is not None:
        found, what = taken(sample, np.flatnonzero(sample.labels != NO_LABEL)), "images with a label"
    if found is None or len(found.old) < least:
        raise too_few(0 if found is None else len(found.old), what, settings)
    return found


def too_few(count: int, what: str, settings: SelectSettings) -> ConfigError:
    """That the probe set is too small to be measured in the place of pairs."""
    return ConfigError(
        "the probe set is too small to choose by",
        expected=f"at least {settings.folds * LEAST_SHARE} {what}, {LEAST_SHARE} for each of {settings.folds} folds",
        found=count,
        where="select.measured_on, probe.images, probe.manifest",
        remedy="name more images in probe.manifest, in a new run (`--set run=...`), or lower select.folds; by chance "
        "probe.images are drawn, but no more than a tenth of the gallery, or 200",
    )


def _sides(fits: Fits, settings: SelectSettings) -> Sides:
    if settings.measured_on == "pairs":
        return _comparable(list(zip(fits.held, [*fits.held[1:], fits.held[0]], strict=True)))
    count, most = len(fits.held), settings.folds * settings.max_measured
    rows = np.random.default_rng(0).permutation(by_chance(len(fits.sample[0].s), most))
    measured = [fold.take(np.sort(rows[number::count])) for number, fold in enumerate(fits.sample)]
    return _comparable(list(zip(measured, fits.held, strict=True)))


def _comparable(sides: Sides) -> Sides:
    """All by labels, or none where one fold has too few queries for that."""
    if all(_num_queries(measured) >= _LEAST_QUERIES for measured, _ in sides):
        return sides
    return [(fold.unlabelled(), other) for fold, other in sides]


def _num_queries(fold: Fold) -> int:
    """How many have a label that another has too."""
    if fold.pairs.labels is None:
        return 0
    _, counts = np.unique(fold.pairs.labels[fold.pairs.labels != NO_LABEL], return_counts=True)
    return int(counts[counts > 1].sum())


def _check(config: Config, data: FitData, sample: PairArrays | None) -> None:
    settings = config.select
    if settings.policies and not any(_possible(name, data) for name in settings.policies):
        raise ConfigError(
            "every order to choose from needs what is not given",
            expected="labels in pairs.columns.label, fit.classifier, or other orders",
            found=", ".join(settings.policies),
            where="select.policies",
        )
    labelled = data.num_classes is not None
    if settings.measured_on == "probe" and sample is not None:
        labelled = sample.labels is not None
    if labelled and "recall10" in settings.metrics:
        raise ConfigError(
            "what has labels is measured by them",
            expected=", ".join(METRICS),
            found=", ".join(settings.metrics),
            where="select.metrics",
        )
    losses = _losses(config)
    wanting = [loss for loss in losses if needs_labels(loss)]
    alone = settings.transformations == ("fastfill",)
    if data.num_classes is None and alone and len(wanting) == len(losses):
        raise ConfigError(
            "every loss to choose from needs labels",
            expected="pairs.columns.label",
            found=", ".join(wanting),
            where="select.losses",
        )


def _losses(config: Config) -> tuple[LossMode, ...]:
    """Of `fastfill`, to choose from; one that `fit` names is the only one."""
    return config.select.losses if config.fit.loss == "auto" else (config.fit.loss,)


def _recipes(config: Config, data: FitData) -> list[Recipe]:
    """What is tried, in this order: the simplest first."""
    settings, fit, labelled = config.select, config.fit, data.num_classes is not None
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
        for loss in _losses(config)
        if labelled or not needs_labels(loss)
        for weight in (settings.lambdas if needs_labels(loss) else (fit.lambda_disc,))
        for width, count in itertools.product(widths, epochs)
    ]


def _servings(config: Config, settings: SelectSettings, data: FitData) -> list[Serving]:
    kinds = [kind for kind in settings.offsets if kind != "confidence" or can_classify(data)]
    kinds = [kind for kind in kinds if kind == "none" or config.gallery.metric != "ip"] or ["none"]
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
    """Which columns of a curve count, and what its columns are."""
    names = METRICS if fold.labels() is not None else ("recall10",)
    columns = [names.index(metric) for metric in settings.metrics if metric in names]
    return columns or list(range(len(names))), names


def _measure(
    config: Config,
    sides: dict[Recipe, Sides],
    tried: list[tuple[Recipe, Serving]],
    policies: list[str],
    detail: SimulationDetail,
    what: str,
    on_step: OnStep,
) -> list[TrialRow]:
    """The curves of each recipe and offset under each order, by tasks of Ray."""
    task = ray.remote(num_cpus=1)(measure_fold)
    stored = {recipe: [(ray.put(one), ray.put(other)) for one, other in some] for recipe, some in sides.items()}
    tasks = [
        [task.remote(config, one, other, serving, policies, detail) for one, other in stored[recipe]]
        for recipe, serving in tried
    ]
    rows = []
    for done, ((recipe, serving), parts) in enumerate(zip(tried, tasks, strict=True), start=1):
        curves = ray.get(parts)
        rows += [
            TrialRow(Trial(recipe, serving, policy), np.stack([curve[policy] for curve in curves]))
            for policy in policies
        ]
        on_step(f"select: {what}", done, len(tried))
    return rows


def _likeness(config: Config, fits: Fits) -> DistributionShift | None:
    """Whether the pairs look like the probe set, and a recipe gives as much of both."""
    if not fits.sample:
        return None
    errors = [
        np.concatenate([np.square(fold.pairs.new - fold.z).sum(axis=1, dtype=np.float64) for fold in folds])
        for folds in (fits.held, fits.sample[:1])
    ]
    old = np.concatenate([fold.pairs.old for fold in fits.held])
    return distribution_shift(old, fits.sample[0].pairs.old, config.seed, (errors[0], errors[1]))


def _ends(config: Config, folds: list[Fold]) -> dict[str, dict[str, float]]:
    """old/old and new/new over the folds, as means: by labels, else how far they agree with new/new."""
    found: dict[str, list[dict[str, float]]] = {"old_old": [], "new_new": []}
    for fold in folds:
        labels, metric = fold.labels(), config.gallery.metric
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
