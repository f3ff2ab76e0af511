"""Fit the transformation on training pairs with Ray Train: data-parallel, checkpointed every epoch.

Guarantee: the weights are a function of the pairs, the settings and the number of workers, whatever
Ray does in between: a fit that lost a worker or its driver and went on gives the same weights as one
that did not. Rank r reads the parts r, r + n, ... once into memory and shuffles them itself. What comes
out is measured on pairs that were held out. This module does not know where the pairs come from.
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
from pipeline.models.networks import LinearTransformation, Transformation
from pipeline.models.transformation import TransformationInfo, has_transformation, read_info, save_transformation
from pipeline.planning import selection
from pipeline.run import Run
from pipeline.storage import objects, parquet
from training.fitting.learner import Epoch, FitData, Job, can_classify, cut
from training.fitting.linear_fit import fit_linear
from training.fitting.linear_parts import over_parts
from training.fitting.losses import needs_classifier, needs_labels
from training.fitting.trainer import train, training_folder
from training.outcome import describe
from training.select import LEAST_SECONDS, select
from training.simulation.folds import FOLDER, OnStep
from training.simulation.trials import settings_of

_logger = logging.getLogger(__name__)
_LEAST_PAIRS = 3  # of a worker: a batch of two, and one that is watched


def fit(
    config: Config,
    run: Run,
    data: FitData,
    on_epoch: Callable[[Epoch], None] | None = None,
    on_step: OnStep = lambda what, done, total: None,
    seconds: float = LEAST_SECONDS,
) -> TransformationInfo:
    """Fit, measure and save the run's transformation; one that is there already is left as it is.

    With `fit.transformation: auto` it is chosen first, by measurement.

    A fit that was stopped goes on after its last whole epoch. With the gallery metric `cosine` the
    targets are normalised as well, and a given classifier is applied to unit vectors.

    Args:
        config: the run's.
        run: with its pairs.
        data: the pairs.
        on_step: of a selection and of a linear fit, told what is done, how much of it, and of how much.
        seconds: that a selection may take for fits after the simplest one's.
        on_epoch: called from a thread of this process after each epoch with `epoch` (from 0), `epochs`,
            `loss`, `alignment`, `lr`, `images_per_second` and `pid` (of rank 0's process).

    Raises:
        ConfigError: the settings do not fit the data: no labels for the loss, too few parts or pairs.
        DataError: the pairs break their contract, or the loss became infinite.
        TransientError: workers failed more than `fit.max_failures` times on nodes that live.
        IncompatibleRun: another driver has fitted it with other settings meanwhile.
    """
    settings = stage_settings(config, "fit")
    if has_transformation(run):
        check_settings_of(run, "fit", settings)
        return read_info(run)
    chosen = None
    if config.fit.transformation == "auto":
        _check_before_selection(config, data)
        chosen = select(config, run, data, on_step, seconds)
        config = config.model_copy(update={"fit": settings_of(chosen, config.fit)})
    config = config.model_copy(update={"fit": config.fit.resolved(data.num_classes is not None)})
    classify = chosen is not None and can_classify(data)
    job = _with_linear(replace(make_job(config, data), classify=classify), on_step)
    network, classifier = train(config, run, job, on_epoch)
    info, parts = describe(config, job, network, classifier)
    fix_settings(run, "fit", settings)
    parts |= {} if chosen is None else {selection.PART: chosen.to_json().encode()}
    _save(run, network, info, parts)
    return read_info(run)


def _save(run: Run, network: Transformation, info: TransformationInfo, parts: dict[str, bytes]) -> None:
    """Keep a fit, unless another driver with these settings was faster: the first one counts."""
    try:
        save_transformation(run, network, info, parts)
    except SnapshotConflict:
        _logger.warning("another driver has fitted the transformation meanwhile; its fit is used")
    objects.delete(training_folder(run))
    objects.delete(run.path(FOLDER))


def make_job(config: Config, data: FitData) -> Job:
    """Check the settings against the data, and cut the work.

    Raises:
        ConfigError, DataError: as `fit`.
    """
    fit, workers = config.fit, config.fit.num_workers
    if needs_classifier(fit):
        _check_classes(fit, data)
    if len(data.train_parts) < workers:
        raise ConfigError(
            "there are fewer parts of training pairs than workers",
            expected=f"at most {len(data.train_parts)} workers",
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
            "there are too few training pairs for so many workers",
            expected=f"at least {_LEAST_PAIRS} pairs per worker",
            found=f"{smallest} in the smallest of {workers} shares",
            where="fit.num_workers",
        )
    return Job(fit, data, config.seed, config.gallery.metric == "cosine", *cut(fit, smallest, workers))


def _with_linear(job: Job, on_step: OnStep) -> Job:
    """The job with the linear fit that its kind is, or starts from."""
    if job.fit.kind == "fastfill":
        return job
    data, done = job.data, itertools.count(1)
    parts = 2 * len(data.train_parts)  # two passes
    network = LinearTransformation(data.d_old, data.d_new, data.d_side, job.normalize)
    one_pass = over_parts(job, lambda: on_step("fit: parts of the pairs", next(done), parts))
    return replace(job, linear=fit_linear(one_pass, network))


def _check_before_selection(config: Config, data: FitData) -> None:
    """What does not fit the data is refused before anything is tried."""
    simplest = config.fit.model_copy(update={"transformation": "linear", "loss": "alignment", "offset": "none"})
    make_job(config.model_copy(update={"fit": simplest}), data)
    if data.classifier is not None:
        _check_classes(simplest, data)


def _check_classes(fit: FitSettings, data: FitData) -> None:
    if data.num_classes is None and needs_labels(fit.mode):
        raise ConfigError(
            f"the loss {fit.mode!r} needs labels",
            expected="pairs.columns.label",
            found="training pairs without labels",
            where="fit.loss",
            remedy="set fit.loss to alignment+uncertainty, which needs neither labels nor a classifier",
        )
    if data.classifier is None:
        if data.num_classes is None:
            raise ConfigError(
                "an offset by confidence needs a classifier, or labels to fit one on",
                expected="fit.classifier or pairs.columns.label",
                where="fit.offset",
                remedy="set fit.offset to uncertainty, which needs neither",
            )
        return
    weight, bias = data.classifier
    num_classes = data.num_classes or 1
    fits = weight.shape[0] >= num_classes and weight.shape[1] == data.d_new
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        raise DataError(
            "the classifier does not fit the pairs",
            expected=f"weight ({num_classes}, {data.d_new}), bias ({num_classes},)",
            found=f"weight {weight.shape}, bias {None if bias is None else bias.shape}",
            where="fit.classifier",
        )
