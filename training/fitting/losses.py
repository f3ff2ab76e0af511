"""FastFill's losses (arXiv 2303.04766, section 3) as pure functions, and the classifier that some of them need.

Shape suffixes: n = rows, b = batch, d = d_new, c = classes. Losses are per image; `combined` takes the mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from pipeline.arrays import NO_LABEL
from pipeline.config.method import FitSettings, LossMode

_CLASSIFIER_EPOCHS = 20
_CLASSIFIER_LR = 1e-2


@dataclass(frozen=True, slots=True)
class FittedClassifier:
    """The new encoder's own linear classifier, frozen: weight (C, d_new) and bias (C,) or None, float32."""

    weight_cd: Tensor
    bias_c: Tensor | None


@dataclass(frozen=True, slots=True)
class Loss:
    """The terms of the loss and their weights; a mode with the discriminative term needs a classifier."""

    mode: LossMode
    lambda_disc: float = 1.0
    label_smoothing: float = 0.1
    classifier: FittedClassifier | None = None


def needs_labels(mode: LossMode) -> bool:
    """True if the mode has the discriminative term."""
    return mode in ("alignment+discriminative", "fastfill")


def needs_classifier(fit: FitSettings) -> bool:
    """True if the loss or the offset of a fit needs a classifier."""
    return needs_labels(fit.mode) or fit.offset == "confidence"


def uses_uncertainty(mode: LossMode) -> bool:
    """True if s weighs the loss and so shapes z; in the other modes s is fitted without influence on z."""
    return mode in ("alignment+uncertainty", "fastfill")


def alignment(z_bd: Tensor, new_bd: Tensor) -> Tensor:
    """Mean over the dimensions of (new - z)^2, (B,)."""
    return (new_bd - z_bd).square().mean(dim=1)


def discriminative(z_bd: Tensor, label_b: Tensor, classifier: FittedClassifier, label_smoothing: float) -> Tensor:
    """Cross-entropy of W z + b against the label, (B,); `label_b` is int64, and label -1 (none) has loss 0."""
    logits_bc = functional.linear(z_bd, classifier.weight_cd, classifier.bias_c)
    return functional.cross_entropy(
        logits_bc, label_b, reduction="none", label_smoothing=label_smoothing, ignore_index=NO_LABEL
    )


def uncertainty_weighted(loss_b: Tensor, s_b: Tensor) -> Tensor:
    """0.5 * exp(-s) * L + 0.5 * s, (B,): equation 4 of the paper, with its minimum at s = log L.

    s is not detached: its gradient also reaches the layers that it is computed from.
    """
    return 0.5 * torch.exp(-s_b) * loss_b + 0.5 * s_b


def errors(loss: Loss, z_bd: Tensor, new_bd: Tensor, label_b: Tensor | None) -> tuple[Tensor, Tensor]:
    """The loss that s weighs, and its alignment term, both (B,); a ValueError if labels or classifier are missing."""
    align_b = alignment(z_bd, new_bd)
    if not needs_labels(loss.mode):
        return align_b, align_b
    if label_b is None or loss.classifier is None:
        raise ValueError(f"the loss {loss.mode!r} needs labels and a classifier")
    disc_b = discriminative(z_bd, label_b, loss.classifier, loss.label_smoothing)
    return align_b + loss.lambda_disc * disc_b, align_b


def combined(
    loss: Loss, z_bd: Tensor, s_b: Tensor, new_bd: Tensor, label_b: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loss of a batch in one of the four modes, and the mean alignment error (detached), both scalars.

    In the modes without uncertainty, z is fitted by the plain mean and s by the same formula with the loss detached.
    So s learns to predict log L without influence on z, and the policy `uncertainty` keeps its meaning. The network
    must then compute s from a detached z.

    Raises:
        ValueError: the mode needs labels and a classifier, and one is missing.
    """
    total_b, align_b = errors(loss, z_bd, new_bd, label_b)
    if uses_uncertainty(loss.mode):
        objective = uncertainty_weighted(total_b, s_b).mean()
    else:
        objective = total_b.mean() + uncertainty_weighted(total_b.detach(), s_b).mean()
    return objective, align_b.detach().mean()


def fit_classifier(
    new_nd: Tensor,
    label_n: Tensor,
    num_classes: int,
    batches: Callable[[int], Iterable[Tensor]],
    wrap: Callable[[nn.Module], nn.Module],
) -> FittedClassifier:
    """Fit a softmax classifier on new embeddings, for encoders that have none (DINO, CLIP).

    Adam on standardised embeddings; mean and deviation are folded into weight and bias afterwards. Every worker of a
    process group calls it with its own rows and returns the same classifier.

    Args:
        label_n: (N,) int64 in [0, num_classes); rows with label -1 (none) are ignored.
        batches: the row numbers of each batch of an epoch.
    """
    mean_d, deviation_d = _moments(new_nd)
    linear = nn.Linear(new_nd.shape[1], num_classes, device=new_nd.device)
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    model = wrap(linear)
    optimizer = torch.optim.Adam(linear.parameters(), lr=_CLASSIFIER_LR)
    for epoch in range(_CLASSIFIER_EPOCHS):
        for group in optimizer.param_groups:
            group["lr"] = _CLASSIFIER_LR * 0.5 * (1 + math.cos(math.pi * epoch / _CLASSIFIER_EPOCHS))
        for rows_b in batches(epoch):
            logits_bc = model((new_nd[rows_b] - mean_d) / deviation_d)
            loss = functional.cross_entropy(logits_bc, label_n[rows_b], reduction="sum", ignore_index=NO_LABEL)
            optimizer.zero_grad()
            (loss / len(rows_b)).backward()
            optimizer.step()
    weight_cd = linear.weight.detach() / deviation_d
    return FittedClassifier(weight_cd, linear.bias.detach() - weight_cd @ mean_d)


def _moments(x_nd: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (d,) float32 over the rows of all workers."""
    wide_nd = x_nd.double()
    sums_d = [torch.full_like(wide_nd[0], len(wide_nd)), wide_nd.sum(dim=0), wide_nd.square().sum(dim=0)]
    sums_3d = torch.stack(sums_d)
    if distributed.is_initialized():
        distributed.all_reduce(sums_3d)
    mean_d = sums_3d[1] / sums_3d[0]
    variance_d = (sums_3d[2] / sums_3d[0] - mean_d.square()).clamp(min=0)
    return mean_d.float(), (variance_d.sqrt() + 1e-6).float()
