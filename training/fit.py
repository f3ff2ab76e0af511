"""Fit the transformation of a run: choose its settings if they are `auto`, fit, measure, and store.

The weights are a function of the pairs, the settings and the number of workers. A fit that was interrupted continues
and gives the same weights.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import replace

from pipeline.config.identity import check_settings_of, fix_settings, stage_settings
from pipeline.config.method import FitSettings
from pipeline.config.tree import Config
from pipeline.errors import ConfigError, DataError, SnapshotConflict
from pipeline.models.networks import Transformation
from pipeline.models.transformation import TransformationInfo, has_transformation, read_info, save_transformation
from pipeline.planning import selection_result
from pipeline.run import Run
from pipeline.storage import objects, parquet
from training.fitting.learner import Epoch, FitData, Job, can_classify, cut, with_linear
from training.fitting.linear_parts import over_parts
from training.fitting.losses import needs_classifier, needs_labels
from training.fitting.trainer import train, training_folder
from training.outcome import describe
from training.select import LEAST_SECONDS, select
from training.simulation.folds import FOLDER, OnStep
from training.simulation.trials import settings_of

_logger = logging.getLogger(__name__)
_LEAST_PAIRS = 3  # per worker: a batch of two, and one watched pair


def fit(
    config: Config,
    run: Run,
    data: FitData,
    on_epoch: Callable[[Epoch], None] | None = None,
    on_step: OnStep = lambda what, done, total: None,
    seconds: float = LEAST_SECONDS,
) -> TransformationInfo:
    """Fit, measure and store the run's transformation, unless it is stored already.

    With `fit.transformation: auto` the settings are chosen first, by measurement. An interrupted fit continues after
    its last complete epoch. With the gallery metric `cosine` the targets are normalised, and a given classifier is
    applied to vectors of length 1.

    Args:
        on_epoch: called from a thread of this process after each epoch with `epoch` (from 0), `epochs`,
            `loss`, `alignment`, `lr`, `images_per_second` and `pid` (of rank 0's process).
        on_step, seconds: as in `select`.

    Raises:
        ConfigError: the settings do not fit the data: no labels for the loss, too few parts or pairs.
        DataError: the pairs are invalid, or the loss is not finite.
        TransientError: workers failed more than `fit.max_failures` times on nodes that are alive.
        IncompatibleRun: another driver has fitted the transformation with other settings meanwhile.
    """
    settings = stage_settings(config, "fit")
    if has_transformation(run):
        check_settings_of(run, "fit", settings)
        return read_info(run)
    fit, chosen = config.fit, None
    if fit.transformation == "auto":
        _check_before_selection(fit, data)
        chosen = select(config, run, data, on_step, seconds)
        fit = settings_of(chosen, fit)
    classify = chosen is not None and can_classify(data)
    job = make_job(fit.resolved(data.num_classes is not None), data, config.gallery.metric, config.seed)
    job = _with_linear(replace(job, classify=classify), on_step)
    network, classifier = train(run, job, config.device, on_epoch)
    info, parts = describe(job, network, classifier, config.device)
    fix_settings(run, "fit", settings)
    parts |= {} if chosen is None else {selection_result.PART: chosen.to_json().encode()}
    _save(run, network, info, parts)
    return read_info(run)


def _save(run: Run, network: Transformation, info: TransformationInfo, parts: dict[str, bytes]) -> None:
    """Store a fit, unless another driver with the same settings has stored one first."""
    try:
        save_transformation(run, network, info, parts)
    except SnapshotConflict:
        _logger.warning("another driver has fitted the transformation in the meantime: its fit is used")
    objects.delete(training_folder(run))
    objects.delete(run.path(FOLDER))


def make_job(fit: FitSettings, data: FitData, metric: str, seed: int) -> Job:
    """Check the settings against the pairs, and cut the work; raises as `fit`."""
    return Job(fit, data, seed, metric, *_cut_checked(fit, data))


def _cut_checked(fit: FitSettings, data: FitData) -> tuple[int, int]:
    """Steps per pass over a rank's pairs, and the rank's batch size."""
    workers = fit.num_workers
    if needs_classifier(fit):
        _check_classes(fit, data)
    if len(data.train_parts) < workers:
        raise ConfigError(
            "fit.num_workers is larger than the number of parts of training pairs",
            expected=f"at most {len(data.train_parts)}",
            found=workers,
            where="fit.num_workers",
        )
    rows = []
    for uri in data.train_parts:
        with parquet.open_parquet(uri) as file:
            rows.append(file.metadata.num_rows)
    smallest = min(sum(rows[rank::workers]) for rank in range(workers))
    if smallest < _LEAST_PAIRS:
        raise ConfigError(
            "there are too few training pairs for this many workers",
            expected=f"at least {_LEAST_PAIRS} pairs per worker",
            found=f"{smallest} in the smallest of {workers} shares",
            where="fit.num_workers",
        )
    return cut(fit, smallest, workers)


def _with_linear(job: Job, on_step: OnStep) -> Job:
    """The job with the linear fit that it needs, if any, from passes over the stored parts."""
    done, parts = itertools.count(1), 2 * len(job.data.train_parts)  # two passes
    return with_linear(job, lambda: over_parts(job, lambda: on_step("fit: parts of the pairs", next(done), parts)))


def _check_before_selection(fit: FitSettings, data: FitData) -> None:
    """Refuse settings that do not fit the data before the first fit."""
    simplest = fit.model_copy(update={"transformation": "linear", "loss": "alignment", "offset": "none"})
    _cut_checked(simplest, data)
    if data.classifier is not None:
        _check_classes(simplest, data)


def _check_classes(fit: FitSettings, data: FitData) -> None:
    if data.num_classes is None and needs_labels(fit.mode):
        raise ConfigError(
            f"the loss {fit.mode!r} needs labels",
            expected="pairs.columns.label",
            found="training pairs without labels",
            where="fit.loss",
            remedy="name a label column, or set fit.loss=alignment+uncertainty, which needs no labels",
        )
    if data.classifier is None:
        if data.num_classes is None:
            raise ConfigError(
                "fit.offset=confidence needs a classifier, or labels to fit one on",
                expected="fit.classifier or pairs.columns.label",
                where="fit.offset",
                remedy="set one of these, or fit.offset=uncertainty, which needs neither",
            )
        return
    weight, bias = data.classifier
    num_classes = data.num_classes or 1
    fits = weight.shape[0] >= num_classes and weight.shape[1] == data.d_new
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        raise DataError(
            "the classifier in fit.classifier does not match the training pairs",
            expected=f"weight ({num_classes}, {data.d_new}), bias ({num_classes},)",
            found=f"weight {weight.shape}, bias {None if bias is None else bias.shape}",
            where="fit.classifier",
        )
