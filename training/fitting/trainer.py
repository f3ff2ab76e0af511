"""The Ray Train job of a fit: data-parallel, with a checkpoint every epoch, and retried after a failure."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

from pipeline.embedding.actor_pool import may_grow
from pipeline.errors import ConfigError
from pipeline.models.networks import Transformation
from pipeline.models.offset import LinearClassifier
from pipeline.run import Run
from pipeline.storage import objects
from training.fitting.learner import Epoch, Job, Learner, columns_of, make_arrays
from training.fitting.losses import needs_classifier
from training.fitting.retries import fit_to_the_end, no_failure_but_announced_ones

Fitted = tuple[Transformation, LinearClassifier | None]
"""The network, and the classifier if the job needed one."""

_logger = logging.getLogger(__name__)
_STATE = "state.pt"
_READ_CPUS = 0.25
_POLL_SECONDS = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
_START_SECONDS = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"


def train(run: Run, job: Job, device: str, on_epoch: Callable[[Epoch], None] | None) -> Fitted:
    """Run Ray Train to the last epoch and load the last checkpoint; a linear fit runs it only for a classifier."""
    if job.fit.num_epochs == 0:
        if not (job.classify or needs_classifier(job.fit)):
            return job.network(), None
        on_epoch = None
    folder = training_folder(run)
    _drop_broken_snapshot(objects.join(folder, _fingerprint(job)))
    os.environ.setdefault(_POLL_SECONDS, "0.2")  # an epoch ends at the controller's next poll; default 2 s
    os.environ.setdefault(_START_SECONDS, "1800")  # an autoscaler may be adding nodes
    scaling = _scaling(job.fit.num_workers, device)  # for all retries: a retry waits for lost GPUs to come back
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
    return network, LinearClassifier(weight.numpy(), None if bias is None else bias.numpy())


def _worker(config: dict[str, Job]) -> None:
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
    """Report an epoch to the driver; rank 0 adds the checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        if rank == 0:
            torch.save(learner.state(), Path(folder, _STATE))
        saved = Checkpoint.from_directory(folder) if rank == 0 else None
        ray.train.report({**figures, "pid": os.getpid()}, checkpoint=saved)


@contextmanager
def _quiet_data() -> Iterator[None]:
    """Keep Ray Data's progress bars and log lines out of the user's terminal."""
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
    """Ray Train callbacks that make a thread of this process call `on_epoch`."""
    if on_epoch is None:
        yield []
        return
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # The queue lives on this node: the loss of another node must not end the fit.
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})

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
    """Settings with a fixed name and folder, so that Ray Train continues from the last checkpoint there."""
    filesystem, path = objects.arrow_filesystem(folder)
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
    columns = columns_of(job.data)
    parts = job.data.train_parts[rank :: job.fit.num_workers]
    filesystem, _ = objects.arrow_filesystem(parts[0])
    paths = [objects.arrow_filesystem(part)[1] for part in parts]
    return ray.data.read_parquet(paths, filesystem=filesystem, columns=columns, partitioning=None, num_cpus=_READ_CPUS)


def _scaling(workers: int, device: str) -> ScalingConfig:
    """Workers that leave CPUs for Ray Data: if they took all, the first read would wait forever.

    With `device: cuda` the fit waits for GPUs that an autoscaler adds; with `auto` it uses the present ones.
    """
    resources: dict[str, float] = ray.cluster_resources()
    gpus = resources.get("GPU", 0)
    wants_gpu = device.startswith("cuda")
    if wants_gpu and gpus < workers and not may_grow():
        raise ConfigError(
            "the cluster has fewer GPUs than fit.num_workers",
            expected=f"{workers} GPUs",
            found=gpus,
            where="device, fit.num_workers",
            remedy=f"set fit.num_workers={max(1, int(gpus))}, or device=auto",
        )
    cpus = min(1.0, resources.get("CPU", 0) / 2 / workers) or 1.0
    use_gpu = wants_gpu or (device == "auto" and gpus >= workers)
    return ScalingConfig(num_workers=workers, use_gpu=use_gpu, resources_per_worker={"CPU": cpus})


def _node_cpus() -> int:
    """Cores of this node, or the number that Ray was started with if that is lower."""
    here = ray.get_runtime_context().get_node_id()
    nodes: list[dict[str, Any]] = ray.nodes()
    resources = next(node["Resources"] for node in nodes if node["NodeID"] == here)
    return int(min(os.cpu_count() or 1, resources.get("CPU", 1)))


def _fingerprint(job: Job) -> str:
    """The name of the training folder: another job must not continue from this one's checkpoint."""
    data = job.data
    settings = job.fit.model_dump(mode="json", exclude={"classifier", "max_failures"})
    shape = [job.seed, job.normalize, data.num_train, data.num_classes, data.d_old, data.d_new, data.d_side]
    shape += [job.classify] if job.classify else []
    digest = hashlib.sha256(json.dumps([settings, shape]).encode())
    for tensor in data.classifier or ():
        digest.update(b"" if tensor is None else tensor.tobytes())
    return "fit-" + digest.hexdigest()[:16]


def training_folder(run: Run) -> str:
    """The folder of a fit's checkpoints; deleted when the fit is done."""
    return objects.join(run.transformation, "training")


def _drop_broken_snapshot(folder: str) -> None:
    """Delete the folder of a fit if its driver died while Ray Train overwrote its record of checkpoints."""
    try:
        json.loads(objects.read_bytes(objects.join(folder, "checkpoint_manager_snapshot.json")))
    except FileNotFoundError:
        return
    except ValueError:
        _logger.warning("the record of the interrupted fit in %s is damaged: starting again at the first epoch", folder)
        objects.delete(folder)


def _read_checkpoint(checkpoint: Checkpoint, device: torch.device) -> dict[str, Any]:
    with checkpoint.as_directory() as folder:
        state: dict[str, Any] = torch.load(Path(folder, _STATE), map_location=device, weights_only=True)
    return state
