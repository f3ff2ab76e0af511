"""One rank's fit of the transformation: its pairs, its network, and what an epoch does to it. No Ray.

Guarantee: the weights after an epoch are a function of the job, the rank's pairs and the state before.
It does not know where the pairs come from, nor who else fits at the same time but for what `wrap` does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from pipeline import offset
from pipeline.config import Fit
from pipeline.errors import DataError
from pipeline.schema import Float32, Int64, vectors_from_arrow
from pipeline.transformation import TransformationNetwork
from training.losses import NO_LABEL, Classifier, Loss, combined, fit_classifier, needs_classifier, uses_uncertainty

Epoch = dict[str, float]
Wrap = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True, slots=True)
class FitData:
    """Training and held-out pairs, as Parquet parts.

    Columns: `index` int64 (unique), `label` int32 (null where there is none), `old`, `new` and
    optionally `side`, fixed-size lists of float32.

    Attributes:
        train_parts: URIs; at least as many as there are workers.
        held_out_parts: URIs of pairs that are only measured on.
        num_train: rows of all train parts.
        num_classes: labels are in [0, num_classes); None where no pair has a label.
        classifier: the new encoder's own, weight (C, d_new) and bias (C,) or None, float32.
        label_names: the label of each class number, where that is not the number itself.
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
    """Whether there is a classifier, or what one can be fitted on."""
    return data.classifier is not None or data.num_classes is not None


@dataclass(frozen=True, slots=True)
class PairArrays:
    """N pairs by ascending index: old (N, d_old), new (N, d_new), side (N, d_side) float32, labels (N,) int64."""

    old: Float32
    new: Float32
    side: Float32 | None
    labels: Int64 | None


@dataclass(frozen=True, slots=True)
class Job:
    """All that a worker needs to know; every rank does `steps` per epoch of `rank_batch` pairs each.

    With `classify` a classifier is taken or fitted even where neither loss nor offset needs one: for orders by it.
    """

    fit: Fit
    data: FitData
    seed: int
    normalize: bool
    steps: int
    rank_batch: int
    classify: bool = False

    def network(self) -> TransformationNetwork:
        """The network with its first weights, a function of the seed."""
        torch.manual_seed(self.seed)
        data = self.data
        network = TransformationNetwork(data.d_old, data.d_new, self.fit.inner_width, data.d_side, self.normalize)
        network.uncertainty_shapes_z = uses_uncertainty(self.fit.loss)
        return network

    def lr(self, epoch: int) -> float:
        """The learning rate of an epoch: METHOD's warm-up, then a cosine that reaches 0 at `epochs`."""
        warmup = self.fit.warmup_epochs
        if epoch < warmup:
            return self.fit.lr * (epoch + 1) / warmup
        return self.fit.lr * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (self.fit.epochs - warmup)))


def make_arrays(table: pa.Table, job: Job) -> PairArrays:
    """Rows of parts as arrays, sorted by index, the targets normalised where the metric asks for it.

    Raises:
        DataError: a vector is null, a label is out of range, or a width is wrong.
    """
    data, table = job.data, table.sort_by("index")
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
        if labels.min() < NO_LABEL or labels.max() >= data.num_classes:
            raise DataError("labels out of range", expected=f"0 to {data.num_classes - 1}", found=labels.max())
    if job.normalize:
        new = functional.normalize(torch.tensor(new), dim=1).numpy()
    return PairArrays(old, new, side, labels)


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware: elsewhere it is emulated, and slower than float32."""
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
        self._model = wrap(self.network)
        fit = job.fit
        self._optimizer = torch.optim.Adam(
            self.network.parameters(),
            lr=fit.lr,
            weight_decay=fit.weight_decay,
            fused=True,  # (m) on a CPU the step takes 3 ms instead of 15 at width 2048
        )
        self._bfloat16 = fit.precision == "bfloat16" or (fit.precision == "auto" and computes_bfloat16(device))
        self._classifier: Classifier | None = None
        self.epoch = 0

    def state(self) -> dict[str, object]:
        """Everything that the next epoch depends on."""
        known = self._classifier
        return {
            "epoch": self.epoch,
            "network": self.network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "classifier": None if known is None else (known.weight_cd, known.bias_c),
        }

    @property
    def classifier(self) -> offset.Classifier | None:
        """The classifier that `prepare` took or fitted, as arrays; None where none was needed."""
        if self._classifier is None:
            return None
        bias = self._classifier.bias_c
        return offset.Classifier(self._classifier.weight_cd.cpu().numpy(), None if bias is None else bias.cpu().numpy())

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state()`."""
        self.epoch = state["epoch"]
        self.network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        if state["classifier"] is not None:
            self._classifier = Classifier(*state["classifier"])

    def prepare(self) -> None:
        """Take the given classifier, or fit one, where the job needs one and `restore` brought none."""
        data = self._job.data
        if self._classifier is not None or not (self._job.classify or needs_classifier(self._job.fit)):
            return
        if data.classifier is not None:
            weight, bias = data.classifier
            bias_c = None if bias is None else torch.tensor(bias).to(self._device)
            self._classifier = Classifier(torch.tensor(weight).to(self._device), bias_c)
            return
        assert data.num_classes is not None, "checked before the fit"
        new_nd, label_n = (self._columns[name].to(self._device) for name in ("new", "label"))
        self._classifier = fit_classifier(
            new_nd, label_n, data.num_classes, lambda epoch: self._batches(epoch, stream=1), self._wrap
        )

    def run_epoch(self) -> Epoch:
        """Fit one epoch; every rank gets the same figures.

        Raises:
            DataError: the loss is not finite.
        """
        fit, epoch, started = self._job.fit, self.epoch, time.monotonic()
        for group in self._optimizer.param_groups:
            group["lr"] = self._job.lr(epoch)
        self._set_modes(frozen=epoch >= fit.freeze_batchnorm_at * fit.epochs)
        loss = Loss(fit.loss, fit.lambda_disc, fit.label_smoothing, self._classifier)
        totals = torch.zeros(2, device=self._device)
        for rows in self._batches(epoch, stream=0):
            totals += self._step(loss, {name: column[rows] for name, column in self._columns.items()})
        if distributed.is_initialized():
            distributed.all_reduce(totals)
            totals /= distributed.get_world_size()
        objective, alignment = (totals / self._job.steps).tolist()
        if not math.isfinite(objective):
            remedy = "look for extreme values in the embeddings, or lower fit.lr"
            raise DataError("the loss is not finite", found=objective, where=f"epoch {epoch}", remedy=remedy)
        self.epoch += 1
        images = self._job.steps * self._job.rank_batch * fit.num_workers
        return {
            "epoch": epoch,
            "epochs": fit.epochs,
            "loss": objective,
            "alignment": alignment,
            "lr": self._job.lr(epoch),
            "images_per_second": images / (time.monotonic() - started),
        }

    def _batches(self, epoch: int, stream: int) -> Iterator[Tensor]:
        """Row numbers of each batch, `steps` times (rank_batch,): a shuffle that (seed, epoch, rank) decides alone."""
        job = self._job
        shuffle = np.random.default_rng((job.seed, epoch, self._rank, stream)).permutation(len(self._columns["old"]))
        yield from torch.from_numpy(shuffle[: job.steps * job.rank_batch]).view(job.steps, job.rank_batch)

    def _set_modes(self, frozen: bool) -> None:
        """Train mode; with `frozen`, BatchNorm normalises by its running statistics and leaves them alone."""
        self.network.train()
        for module in self.network.modules():
            if frozen and isinstance(module, nn.BatchNorm1d):
                module.eval()

    def _step(self, loss: Loss, rows: dict[str, Tensor]) -> Tensor:
        batch = {name: tensor.to(self._device, non_blocking=True) for name, tensor in rows.items()}
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bfloat16):
            z_bd, s_b = self._model(batch["old"], batch.get("side"))
        objective, alignment = combined(loss, z_bd.float(), s_b.float(), batch["new"], batch.get("label"))
        self._optimizer.zero_grad(set_to_none=True)
        objective.backward()
        self._optimizer.step()
        return torch.stack([objective.detach(), alignment])
