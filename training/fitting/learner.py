"""One worker's fit of the transformation: its pairs, its network, and the steps of an epoch. No Ray.

The weights after an epoch are a function of the job, the worker's pairs and the state before it.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from pipeline.arrays import NO_LABEL, Float32, Int64, vectors_from_arrow
from pipeline.config.method import FitSettings
from pipeline.errors import DataError
from pipeline.models import offset
from pipeline.models.networks import LinearTransformation, Transformation, TransformationNetwork, make
from training.fitting.linear_fit import LinearFit, OnePass, fit_linear
from training.fitting.losses import (
    FittedClassifier,
    Loss,
    combined,
    errors,
    fit_classifier,
    needs_classifier,
    uses_uncertainty,
)
from training.fitting.stopping import Stopping, num_stopping, stopping_rows

_LEAST_STEPS = 8
"""Batches in a pass over the pairs: with few pairs the batch is made smaller than `fit.batch_size`."""

_WATCHED_BATCH = 8192

Epoch = dict[str, float]
Wrap = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True, slots=True)
class FitData:
    """Training and held-out pairs, as Parquet parts.

    Columns: `index` int64 (unique), `label` int32 (null for none), `old`, `new` and optionally `side`, fixed-size
    lists of float32.

    Attributes:
        train_parts, held_out_parts: URIs; at least as many train parts as there are workers.
        num_train: rows of all train parts.
        num_classes: labels are in [0, num_classes); None if no pair has a label.
        classifier: the new encoder's own, weight (C, d_new) and bias (C,) or None, float32.
        label_names: the label of each class number; None if the numbers are the labels.
    """

    train_parts: list[str]
    held_out_parts: list[str]
    num_train: int
    num_classes: int | None
    d_old: int
    d_new: int
    d_side: int | None = None
    classifier: tuple[Float32, Float32 | None] | None = None
    label_names: tuple[str, ...] | None = None


def can_classify(data: FitData) -> bool:
    """True if there is a classifier, or labels to fit one on."""
    return data.classifier is not None or data.num_classes is not None


def columns_of(data: FitData) -> list[str]:
    """The columns of a part that a fit reads."""
    labels, side = data.num_classes is not None, data.d_side is not None
    return ["index", "old", "new", *(["label"] if labels else []), *(["side"] if side else [])]


@dataclass(frozen=True, slots=True)
class PairArrays:
    """N pairs by ascending index: old (N, d_old), new (N, d_new), side (N, d_side) float32, labels (N,) int64."""

    old: Float32
    new: Float32
    side: Float32 | None
    labels: Int64 | None

    def take(self, rows: Int64) -> PairArrays:
        """Some of the pairs."""
        side = None if self.side is None else self.side[rows]
        labels = None if self.labels is None else self.labels[rows]
        return PairArrays(self.old[rows], self.new[rows], side, labels)

    def measurable_labels(self) -> Int64 | None:
        """The labels, or None if no two images share one: retrieval cannot be measured by these."""
        if self.labels is None:
            return None
        labelled = self.labels[self.labels != NO_LABEL]
        return self.labels if len(np.unique(labelled)) < len(labelled) else None


@dataclass(frozen=True, slots=True)
class Job:
    """One fit: its settings, its pairs, and how the work is cut.

    Attributes:
        metric: the gallery's; with `cosine` the network's output and its targets have length 1.
        steps: batches of `rank_batch` pairs in which every rank goes over its pairs once.
        classify: take or fit a classifier even if neither loss nor offset needs one: policies may rank by it.
        linear: the map that `linear` is, and that `residual` starts from; None for other kinds.
    """

    fit: FitSettings
    data: FitData
    seed: int
    metric: str
    steps: int
    rank_batch: int
    classify: bool = False
    linear: LinearFit | None = None

    @property
    def normalize(self) -> bool:
        """True if vectors are served with length 1."""
        return self.metric == "cosine"

    def network(self) -> Transformation:
        """The network with its first weights: a function of the seed, and of the linear fit if there is one."""
        torch.manual_seed(self.seed)
        data, fit = self.data, self.fit
        network = make(fit.kind, data.d_old, data.d_new, fit.inner_width, data.d_side, self.normalize)
        if isinstance(network, TransformationNetwork):
            network.uncertainty_shapes_z = uses_uncertainty(fit.mode)
        elif self.linear is not None:
            self.linear.start(network)
        return network

    def lr(self, epoch: int) -> float:
        """The learning rate of an epoch: a linear warm-up, then a cosine that falls to 0 (docs/method.md)."""
        warmup = self.fit.warmup_epochs
        if epoch < warmup:
            return self.fit.lr * (epoch + 1) / warmup
        return self.fit.lr * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (self.fit.num_epochs - warmup)))

    def steps_of(self, epoch: int) -> range:
        """The numbers of an epoch's steps: a pass over the pairs, or an equal share of `fit.steps`."""
        epochs = self.fit.num_epochs
        ends = [
            part * self.steps if self.fit.epochs else part * self.fit.steps // epochs for part in (epoch, epoch + 1)
        ]
        return range(*ends)


def cut(fit: FitSettings, count: int, workers: int) -> tuple[int, int]:
    """Steps per pass over a rank's `count` pairs, and the rank's batch size: at least 2, at most an eighth of them."""
    if fit.kind == "residual":
        count -= num_stopping(count)
    batch = max(2, min(fit.batch_size // workers, count // _LEAST_STEPS))
    return max(1, count // batch), batch


def with_linear(job: Job, make_pass: Callable[[], OnePass]) -> Job:
    """The job with its linear fit, if it needs one; else `make_pass` is not called."""
    if job.fit.kind == "fastfill":
        return job
    data = job.data
    network = LinearTransformation(data.d_old, data.d_new, data.d_side, job.normalize)
    return replace(job, linear=fit_linear(make_pass(), network))


def make_arrays(table: pa.Table, job: Job) -> PairArrays:
    """Rows of parts as arrays, sorted by index; the targets have length 1 if the job's metric is `cosine`.

    Raises:
        DataError: a vector is null, a label is out of range, or a width is wrong.
    """
    return unsorted_arrays(table.sort_by("index"), job)


def unsorted_arrays(table: pa.Table, job: Job) -> PairArrays:
    """As `make_arrays`, in the order of the rows."""
    data = job.data
    try:
        old, new = vectors_from_arrow(table["old"]), vectors_from_arrow(table["new"])
        side = vectors_from_arrow(table["side"]) if data.d_side is not None else None
    except ValueError as error:
        raise DataError("training pairs without embeddings", found=error) from error
    expected = (data.d_old, data.d_new, data.d_side)
    found = (old.shape[1], new.shape[1], None if side is None else side.shape[1])
    if found != expected:
        raise DataError("training pairs of another width", expected=f"old, new, side: {expected}", found=found)
    labels = None
    if data.num_classes is not None:
        labels = table["label"].cast(pa.int64()).fill_null(pa.scalar(NO_LABEL)).to_numpy()
        if labels.min(initial=0) < NO_LABEL or labels.max(initial=0) >= data.num_classes:
            raise DataError("labels out of range", expected=f"0 to {data.num_classes - 1}", found=labels.max())
    if job.normalize:
        new = functional.normalize(torch.tensor(new), dim=1).numpy()
    return PairArrays(old, new, side, labels)


def computes_bfloat16(device: torch.device) -> bool:
    """True if the device multiplies bfloat16 in hardware; emulated, it is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    known = torch.cpu.get_capabilities()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


class Learner:
    """One rank's fit: its pairs, the network, the optimiser, the loss. `wrap` makes a module data-parallel."""

    def __init__(self, job: Job, pairs: PairArrays, rank: int, device: torch.device, wrap: Wrap) -> None:
        self._job, self._rank, self._device, self._wrap = job, rank, device, wrap
        arrays = {"old": pairs.old, "new": pairs.new, "side": pairs.side, "label": pairs.labels}
        self._columns = {name: torch.tensor(array) for name, array in arrays.items() if array is not None}
        self.network = job.network().to(device)
        fit, learns = job.fit, job.fit.num_epochs > 0
        self._model = wrap(self.network) if learns else self.network
        self._optimizer = _optimizer(fit, self.network) if learns else None
        self._stopping = Stopping() if fit.kind == "residual" else None
        count = len(pairs.old)
        self._rows, self._watched = np.arange(count), np.arange(0)
        if self._stopping is not None:
            self._rows, self._watched = stopping_rows(count)
        self._bfloat16 = fit.precision == "bfloat16" or (fit.precision == "auto" and computes_bfloat16(device))
        self._classifier: FittedClassifier | None = None
        self.epoch = 0

    def state(self) -> dict[str, object]:
        """Everything that the next epoch depends on."""
        known = self._classifier
        return {
            "epoch": self.epoch,
            "network": self.network.state_dict(),
            "optimizer": None if self._optimizer is None else self._optimizer.state_dict(),
            "classifier": None if known is None else (known.weight_cd, known.bias_c),
            "stopping": None if self._stopping is None else self._stopping.state(),
        }

    @property
    def done(self) -> bool:
        """True if the last epoch is over, or early stopping has ended the fit."""
        return self.epoch >= self._job.fit.num_epochs or (self._stopping is not None and self._stopping.over)

    def fitted(self) -> Transformation:
        """The network with the weights that count, in eval mode."""
        if self._stopping is not None:
            self.network.load_state_dict(self._stopping.weights)
        return self.network.eval()

    @property
    def classifier(self) -> offset.LinearClassifier | None:
        """The classifier that `prepare` took or fitted, as arrays; None if none was needed."""
        if self._classifier is None:
            return None
        bias = self._classifier.bias_c
        return offset.LinearClassifier(
            self._classifier.weight_cd.cpu().numpy(), None if bias is None else bias.cpu().numpy()
        )

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state()`."""
        self.epoch = state["epoch"]
        self.network.load_state_dict(state["network"])
        if self._optimizer is not None:
            self._optimizer.load_state_dict(state["optimizer"])
        if self._stopping is not None:
            self._stopping.restore(state["stopping"])
        if state["classifier"] is not None:
            self._classifier = FittedClassifier(*state["classifier"])

    def prepare(self) -> None:
        """Find the classifier and measure the first weights, unless `restore` brought them."""
        self._find_classifier()
        if self._stopping is not None and not self._stopping.weights:
            self._stopping.observe(self._watched_error(), self.network.state_dict())

    def _find_classifier(self) -> None:
        """Take the given classifier, or fit one, if the job needs one."""
        data = self._job.data
        if self._classifier is not None or not (self._job.classify or needs_classifier(self._job.fit)):
            return
        if data.classifier is not None:
            weight, bias = data.classifier
            bias_c = None if bias is None else torch.tensor(bias).to(self._device)
            self._classifier = FittedClassifier(torch.tensor(weight).to(self._device), bias_c)
            return
        assert data.num_classes is not None, "checked before the fit"
        new_nd, label_n = (self._columns[name].to(self._device) for name in ("new", "label"))
        self._classifier = fit_classifier(
            new_nd, label_n, data.num_classes, lambda number: iter(self._shuffled(number, stream=1)), self._wrap
        )

    def run_epoch(self) -> Epoch:
        """Fit one epoch; every rank returns the same figures.

        Raises:
            DataError: the loss is not finite.
        """
        fit, epoch, started = self._job.fit, self.epoch, time.monotonic()
        optimizer, steps = self._optimizer, len(self._job.steps_of(epoch))
        assert optimizer is not None, "a linear transformation has no epochs"
        torch.manual_seed(int(np.random.SeedSequence((self._job.seed, epoch, self._rank)).generate_state(1)[0]))
        for group in optimizer.param_groups:
            group["lr"] = self._job.lr(epoch)
        self._set_modes(frozen=epoch >= fit.freeze_batchnorm_at * fit.num_epochs)
        totals = torch.zeros(2, device=self._device)
        for rows in self._batches(epoch):
            totals += self._step(optimizer, self._batch(rows))
        if distributed.is_initialized():
            distributed.all_reduce(totals)
            totals /= distributed.get_world_size()
        objective, alignment = (totals / steps).tolist()
        if not math.isfinite(objective):
            remedy = "look for extreme values in the embeddings, or lower fit.lr"
            raise DataError("the loss is not finite", found=objective, where=f"epoch {epoch}", remedy=remedy)
        if self._stopping is not None:
            self._stopping.observe(self._watched_error(), self.network.state_dict())
        self.epoch += 1
        images = steps * self._job.rank_batch * fit.num_workers
        return {
            "epoch": epoch,
            "epochs": fit.num_epochs,
            "loss": objective,
            "alignment": alignment,
            "lr": self._job.lr(epoch),
            "images_per_second": images / (time.monotonic() - started),
        }

    def _batches(self, epoch: int) -> Iterator[Tensor]:
        """Row numbers of each batch of an epoch, (rank_batch,); an epoch may span several passes over the pairs."""
        steps = self._job.steps_of(epoch)
        for number, in_pass in itertools.groupby(steps, lambda step: step // self._job.steps):
            shuffled = self._shuffled(number, stream=0)
            yield from (shuffled[step % self._job.steps] for step in in_pass)

    def _shuffled(self, number: int, stream: int) -> Tensor:
        """Row numbers of each batch of a pass, (steps, rank_batch): shuffled by (seed, pass, rank) alone."""
        job = self._job
        shuffle = np.random.default_rng((job.seed, number, self._rank, stream)).permutation(len(self._rows))
        rows = self._rows[shuffle[: job.steps * job.rank_batch]]
        return torch.from_numpy(rows).view(job.steps, job.rank_batch)

    def _batch(self, rows: Tensor) -> dict[str, Tensor]:
        return {name: column[rows].to(self._device, non_blocking=True) for name, column in self._columns.items()}

    def _watched_error(self) -> float:
        """The mean loss of the watched pairs over all ranks, without its weight by s."""
        loss, sums = self._loss(), torch.zeros(2, dtype=torch.float64, device=self._device)
        self.network.eval()
        with torch.no_grad():
            for start in range(0, len(self._watched), _WATCHED_BATCH):
                batch = self._batch(torch.from_numpy(self._watched[start : start + _WATCHED_BATCH]))
                z_bd, _ = self.network(batch["old"], batch.get("side"))
                error_b, _ = errors(loss, z_bd, batch["new"], batch.get("label"))
                sums += torch.stack([error_b.double().sum(), torch.tensor(len(error_b)).to(sums)])
        if distributed.is_initialized():
            distributed.all_reduce(sums)
        return float(sums[0] / sums[1])

    def _loss(self) -> Loss:
        fit = self._job.fit
        return Loss(fit.mode, fit.lambda_disc, fit.label_smoothing, self._classifier)

    def _set_modes(self, frozen: bool) -> None:
        """Train mode; with `frozen`, BatchNorm uses its running statistics and does not update them."""
        self.network.train()
        for module in self.network.modules():
            if frozen and isinstance(module, nn.BatchNorm1d):
                module.eval()

    def _step(self, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bfloat16):
            z_bd, s_b = self._model(batch["old"], batch.get("side"))
        objective, alignment = combined(self._loss(), z_bd.float(), s_b.float(), batch["new"], batch.get("label"))
        optimizer.zero_grad(set_to_none=True)
        objective.backward()
        optimizer.step()
        return torch.stack([objective.detach(), alignment])


def _optimizer(fit: FitSettings, network: nn.Module) -> torch.optim.Optimizer:
    """Adam as in the paper; AdamW (decoupled weight decay) for `residual`."""
    kind = torch.optim.AdamW if fit.kind == "residual" else torch.optim.Adam
    return kind(
        network.parameters(),
        lr=fit.lr,
        weight_decay=fit.weight_decay,
        fused=True,  # (m) on a CPU the step takes 3 ms instead of 15 at width 2048
    )
