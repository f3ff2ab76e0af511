"""Fit the transformation on training pairs with Ray Train: data-parallel, checkpointed every epoch.

Guarantee: the weights are a function of the pairs, the settings and the number of workers, whatever
Ray does in between: a fit that lost a worker or its driver and went on gives the same weights as one
that did not. Rank r reads the parts r, r + n, ... once into memory and shuffles them itself. What comes
out is measured on pairs that were held out. This module does not know where the pairs come from.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.train
import torch
from ray.data import DataContext
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    UserCallback,
)
from ray.train.torch import TorchTrainer, get_device, prepare_model
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline import parquet, selection, storage
from pipeline.actors import may_grow
from pipeline.config import Config, Fit
from pipeline.errors import ConfigError, DataError, SnapshotConflict
from pipeline.identity import check_settings_of, fix_settings, stage_settings
from pipeline.networks import LinearTransformation, Transformation
from pipeline.offset import Classifier
from pipeline.run import Run
from pipeline.transformation import TransformationInfo, has_transformation, read_info, save_transformation
from training.attempts import fit_to_the_end, no_failure_but_announced_ones
from training.candidates import settings_of
from training.folds import FOLDER, OnStep
from training.learner import Epoch, FitData, Job, Learner, can_classify, columns_of, cut, make_arrays
from training.linear_fit import fit_linear
from training.linear_parts import over_parts
from training.losses import needs_classifier, needs_labels
from training.outcome import describe
from training.select import LEAST_SECONDS, select

Fitted = tuple[Transformation, Classifier | None]
"""The network, and the classifier where the job needed one."""

_LOG = logging.getLogger(__name__)
_STATE = "state.pt"
_READ_CPUS = 0.25
_LEAST_PAIRS = 3  # of a worker: a batch of two, and one that is watched
_POLL_SECONDS = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
_START_SECONDS = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"


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
    network, classifier = _train(config, run, job, on_epoch)
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
        _LOG.warning("another driver has fitted the transformation meanwhile; its fit is used")
    storage.delete(_training_folder(run))
    storage.delete(run.path(FOLDER))


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


def _train(config: Config, run: Run, job: Job, on_epoch: Callable[[Epoch], None] | None) -> Fitted:
    """Run Ray Train to the last epoch, and load the last checkpoint; a linear fit needs it for a classifier alone."""
    if job.fit.num_epochs == 0:
        if not (job.classify or needs_classifier(job.fit)):
            return job.network(), None
        on_epoch = None
    folder = _training_folder(run)
    _drop_broken_snapshot(storage.join(folder, _fingerprint(job)))
    os.environ.setdefault(_POLL_SECONDS, "0.2")  # each epoch waits for the controller's next look, 2 s by default
    os.environ.setdefault(_START_SECONDS, "1800")  # workers may wait for nodes; a withdrawn request brings none
    scaling = _scaling(config)  # of all attempts: GPUs that are lost are waited for, and not done without
    with _quiet_data(), _reporting(on_epoch) as callbacks:

        def make_trainer() -> TorchTrainer:
            return TorchTrainer(
                _worker,
                train_loop_config={"job": job},
                scaling_config=scaling,
                run_config=_run_config(job, folder, callbacks),
                datasets={f"train-{rank}": _share(job, rank) for rank in range(job.fit.num_workers)},
                dataset_config=DataConfig(datasets_to_split=[]),
            )

        checkpoint = fit_to_the_end(make_trainer, job.fit.max_failures)
    state, network = _read_checkpoint(checkpoint, torch.device("cpu")), job.network()
    stopping = state["stopping"]
    network.load_state_dict(state["network"] if stopping is None else stopping["weights"])
    if state["classifier"] is None:
        return network, None
    weight, bias = state["classifier"]
    return network, Classifier(weight.numpy(), None if bias is None else bias.numpy())


def _worker(config: dict[str, Job]) -> None:
    """The loop of one Ray Train worker."""
    job, context, device = config["job"], ray.train.get_context(), get_device()
    rank = context.get_world_rank()
    torch.set_num_threads(max(1, _node_cpus() // context.get_local_world_size()))
    share = ray.train.get_dataset_shard(f"train-{rank}")
    tables = list(share.iter_batches(batch_size=None, batch_format="pyarrow"))
    learner = Learner(job, make_arrays(pa.concat_tables(tables), job), rank, device, prepare_model)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        learner.restore(_read_checkpoint(checkpoint, device))
    learner.prepare()
    if learner.done and checkpoint is None:
        _report(learner, rank, {})
    while not learner.done:
        _report(learner, rank, learner.run_epoch())


def _report(learner: Learner, rank: int, figures: Epoch) -> None:
    """Tell the driver; rank 0 keeps the state."""
    with tempfile.TemporaryDirectory() as folder:
        if rank == 0:
            torch.save(learner.state(), Path(folder, _STATE))
        saved = Checkpoint.from_directory(folder) if rank == 0 else None
        ray.train.report({**figures, "pid": os.getpid()}, checkpoint=saved)


@contextmanager
def _quiet_data() -> Iterator[None]:
    """Ray Data without progress bars and log lines in the user's terminal."""
    context, logger = DataContext.get_current().copy(), logging.getLogger("ray.data")
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.use_datasource_v2 = False  # (m) a first read of 4 small parts takes 1.5 s instead of 5
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with DataContext.current(context):
            yield
    finally:
        logger.setLevel(level)


class _EpochCallback(UserCallback):
    """Runs in Ray Train's controller and hands each epoch's figures to the driver."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    def after_report(self, run_context: object, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        self._queue.put_nowait(metrics[0])


@contextmanager
def _reporting(on_epoch: Callable[[Epoch], None] | None) -> Iterator[list[UserCallback]]:
    """Ray Train callbacks that have `on_epoch` called in this process, from a thread."""
    if on_epoch is None:
        yield []
        return
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue = Queue(
        actor_options={"num_cpus": 0, "scheduling_strategy": here}
    )  # elsewhere its node might go, and the fit

    def listen() -> None:
        while (figures := queue.get()) is not None:
            on_epoch(figures)

    listener = threading.Thread(target=listen, name="fit-epochs", daemon=True)
    listener.start()
    try:
        yield [_EpochCallback(queue)]
    finally:
        queue.put(None)
        listener.join()
        queue.shutdown()


def _run_config(job: Job, folder: str, callbacks: list[UserCallback]) -> RunConfig:
    """A fixed name and folder: Ray Train goes on from the last checkpoint that it finds there."""
    filesystem, path = storage.arrow_filesystem(folder)
    return RunConfig(  # type: ignore[call-arg]  # mypy sees the class of Ray Train v1
        name=_fingerprint(job),
        storage_path=path,
        storage_filesystem=filesystem,
        failure_config=no_failure_but_announced_ones(),
        checkpoint_config=CheckpointConfig(num_to_keep=2),
        callbacks=callbacks,  # type: ignore[arg-type]  # the same
        worker_runtime_env={"env_vars": {"OMP_WAIT_POLICY": "PASSIVE"}},
        logging_config=LoggingConfig(log_level="ERROR"),
    )


def _share(job: Job, rank: int) -> ray.data.Dataset:
    """The pairs of one rank: each n-th part."""
    columns = columns_of(job.data)
    parts = job.data.train_parts[rank :: job.fit.num_workers]
    filesystem, _ = storage.arrow_filesystem(parts[0])
    paths = [storage.arrow_filesystem(part)[1] for part in parts]
    return ray.data.read_parquet(paths, filesystem=filesystem, columns=columns, partitioning=None, num_cpus=_READ_CPUS)


def _scaling(config: Config) -> ScalingConfig:
    """Workers that leave CPUs for Ray Data: with all of them taken, the first read would wait for ever.

    A fit that has to have GPUs waits for those that an autoscaler brings; else it takes what is there.
    """
    resources: dict[str, float] = ray.cluster_resources()
    gpus, workers = resources.get("GPU", 0), config.fit.num_workers
    wants_gpu = config.device.startswith("cuda")
    if wants_gpu and gpus < workers and not may_grow():
        raise ConfigError(
            "there are fewer GPUs than workers", expected=f"{workers} GPUs", found=gpus, where="device, fit.num_workers"
        )
    cpus = min(1.0, resources.get("CPU", 0) / 2 / workers) or 1.0
    use_gpu = wants_gpu or (config.device == "auto" and gpus >= workers)
    return ScalingConfig(num_workers=workers, use_gpu=use_gpu, resources_per_worker={"CPU": cpus})


def _node_cpus() -> int:
    """Cores of this node, or fewer where Ray was started with fewer."""
    here = ray.get_runtime_context().get_node_id()
    nodes: list[dict[str, Any]] = ray.nodes()
    resources = next(node["Resources"] for node in nodes if node["NodeID"] == here)
    return int(min(os.cpu_count() or 1, resources.get("CPU", 1)))


def _fingerprint(job: Job) -> str:
    """Names the training folder, so that another job starts afresh and not from a foreign checkpoint."""
    data = job.data
    settings = job.fit.model_dump(mode="json", exclude={"classifier", "max_failures"})
    shape = [job.seed, job.normalize, data.num_train, data.num_classes, data.d_old, data.d_new, data.d_side]
    shape += [job.classify] if job.classify else []
    digest = hashlib.sha256(json.dumps([settings, shape]).encode())
    for tensor in data.classifier or ():
        digest.update(b"" if tensor is None else tensor.tobytes())
    return "fit-" + digest.hexdigest()[:16]


def _training_folder(run: Run) -> str:
    return storage.join(run.transformation, "training")


def _drop_broken_snapshot(folder: str) -> None:
    """Start afresh where a driver died while Ray Train wrote its snapshot, which it does in place."""
    try:
        json.loads(storage.read_bytes(storage.join(folder, "checkpoint_manager_snapshot.json")))
    except FileNotFoundError:
        return
    except ValueError:
        _LOG.warning("the record of the interrupted fit in %s is damaged: fitting from the first epoch", folder)
        storage.delete(folder)


def _read_checkpoint(checkpoint: Checkpoint, device: torch.device) -> dict[str, Any]:
    with checkpoint.as_directory() as folder:
        state: dict[str, Any] = torch.load(Path(folder, _STATE), map_location=device, weights_only=True)
    return state


def _check_before_selection(config: Config, data: FitData) -> None:
    """What does not fit the data is refused before anything is tried."""
    simplest = config.fit.model_copy(update={"transformation": "linear", "loss": "alignment", "offset": "none"})
    make_job(config.model_copy(update={"fit": simplest}), data)
    if data.classifier is not None:
        _check_classes(simplest, data)


def _check_classes(fit: Fit, data: FitData) -> None:
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
