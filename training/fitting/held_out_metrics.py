"""What a fitted transformation is worth, on pairs that it has not seen.

Guarantee: the same network and pairs give the same figures. It does not know how the network was fitted.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.arrays import Float32, Int64
from pipeline.config.tree import Config
from pipeline.evaluation.metrics import EvaluateOptions, evaluate, nearest_rows, recall
from pipeline.models.device import resolve_device
from pipeline.models.networks import Transformation
from pipeline.models.transformation import HeldOutFigures, TransformationInfo, apply
from training.fitting.learner import Job, PairArrays
from training.fitting.learning_curve import LearningCurve
from training.fitting.linear_fit import LinearFit, inputs_of
from training.fitting.losses import NO_LABEL

_LOG = logging.getLogger(__name__)
_MEASURED_PAIRS = 10_000
_APPLY_BATCH = 8192


def transform(config: Config, network: Transformation, pairs: PairArrays) -> tuple[Float32, Float32]:
    """z (N, d_new) and s (N,) float32 of the pairs; the network is moved to where `config.device` says, and back."""
    device = torch.device("cpu") if config.device == "cpu" else resolve_device("auto")
    z, s = apply(network.to(device).eval(), pairs.old, pairs.side, device, _APPLY_BATCH)
    network.cpu()
    return z, s


def held_out_metrics(config: Config, job: Job, pairs: PairArrays, z: Float32, s: Float32) -> TransformationInfo:
    """Measure a transformation on pairs it has not seen, and warn if it is worse than doing nothing.

    Alignment and rank correlation are over all pairs, retrieval over at most 10,000 of them, which are
    the gallery and the queries at once. Without labels, retrieval is the share of the 10 nearest of
    new/new that are found.

    Args:
        config: the run's.
        job: what was fitted.
        pairs: the held-out pairs.
        z: (N, d_new), as they would be served.
        s: (N,) their uncertainties.
    """
    error = np.square(pairs.new - z).mean(axis=1)
    found = _retrieval(pairs, {"transformed": z}, config.gallery.metric)
    new, old = found["transformed"], found["old_old"]
    better = all(new[name] >= old[name] for name in old if name != "top5")
    if not better:
        _LOG.warning(
            "The transformation is worse than the old model on held-out pairs (%s against %s): a gallery that is "
            "served through it answers worse than today's.",
            _rounded(new),
            _rounded(old),
        )
    figures: HeldOutFigures = {"alignment": float(error.mean()), "spearman": spearman(s, error), **found}
    data, fit = job.data, job.fit
    return TransformationInfo(
        d_old=data.d_old,
        d_new=data.d_new,
        d_side=data.d_side,
        inner_width=fit.inner_width,
        normalize=job.normalize,
        loss=fit.mode,
        seed=job.seed,
        epochs=fit.num_epochs,
        num_train=data.num_train,
        num_held_out=len(error),
        better_than_old=better,
        held_out=figures,
        kind=fit.kind,
    )


def pairs_to_pass_old(pairs: PairArrays, fit: LinearFit, normalize: bool, metric: str) -> int | None:
    """With how many training pairs the linear map is to be expected to be as good as the old model on held-out pairs.

    Returns:
        None if no number is to be expected to do.
    """
    x_ni = inputs_of(pairs.old, pairs.side, normalize)
    found = _retrieval(pairs, {str(count): of_some(x_ni) for count, of_some in fit.growing}, metric)
    counts, most = tuple(count for count, _ in fit.growing), 0
    for name, old in found["old_old"].items():
        if name != "top5":
            curve = LearningCurve(counts, tuple(found[str(count)][name] for count in counts))
            needed = curve.pairs_for(old)
            if needed is None:
                return None
            most = max(most, needed)
    return most if most > counts[-1] else None


def _rounded(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in figures.items())


def spearman(a: Float32, b: Float32) -> float:
    """Spearman's rank correlation of two (N,) arrays, ties by their mean rank; 0 where one is constant."""
    ranks_a, ranks_b = _ranks(a), _ranks(b)
    if ranks_a.std() == 0 or ranks_b.std() == 0:
        return 0.0
    return float(np.corrcoef(ranks_a, ranks_b)[0, 1])


def _ranks(values: Float32) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return ranks


def _retrieval(pairs: PairArrays, transformed: dict[str, Float32], metric: str) -> dict[str, dict[str, float]]:
    """The figures of each transformed gallery by its name, of old/old and of new/new; see `retrieval`."""
    num = len(pairs.old)
    rows = np.arange(num) if pairs.labels is None else np.flatnonzero(pairs.labels != NO_LABEL)
    labels = None if pairs.labels is None else pairs.labels[rows]
    if labels is None or len(np.unique(labels)) == len(labels):
        rows, labels = np.arange(num), None
    some = np.unique(np.linspace(0, len(rows) - 1, _MEASURED_PAIRS).astype(np.int64))
    rows, labels = rows[some], None if labels is None else labels[some]
    old, new = pairs.old[rows], pairs.new[rows]
    kinds = {name: (new, z[rows]) for name, z in transformed.items()} | {"old_old": (old, old), "new_new": (new, new)}
    return retrieval(kinds, labels, metric, "agreement10")


def retrieval(
    kinds: dict[str, tuple[Float32, Float32]], labels: Int64 | None, metric: str, agreement: str
) -> dict[str, dict[str, float]]:
    """What images that are gallery and queries at once find, in per cent.

    Args:
        kinds: by name, queries (N, d) and gallery (N, d) of the same images; one of them is `new_new`.
        labels: (N,) int64, each of them on two images at least somewhere; None to measure without labels.
        metric: l2, ip or cosine.
        agreement: what the figure without labels is called.

    Returns:
        of each kind top1, top5 and map; without labels the share of the 10 nearest of new/new that are found.
    """
    if labels is not None:
        return {
            name: evaluate(*sides, labels, labels, EvaluateOptions(metric=metric, self_match=True)).as_dict()
            for name, sides in kinds.items()
        }
    found = {name: nearest_rows(*sides, np.arange(len(sides[0])), metric) for name, sides in kinds.items()}
    return {name: {agreement: recall(each, found["new_new"])} for name, each in found.items()}
