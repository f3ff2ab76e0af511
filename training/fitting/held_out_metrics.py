"""The quality of a fitted transformation on held-out pairs."""

from __future__ import annotations

import logging

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.arrays import NO_LABEL, Float32, Int64
from pipeline.evaluation.metrics import EvaluateOptions, evaluate, nearest_rows, recall
from pipeline.models.device import resolve_device
from pipeline.models.networks import Transformation
from pipeline.models.transformation import APPLY_BATCH, HeldOutFigures, TransformationInfo, apply
from training.fitting.learner import Job, PairArrays
from training.fitting.learning_curve import LearningCurve
from training.fitting.linear_fit import LinearFit, inputs_of

_logger = logging.getLogger(__name__)
_MEASURED_PAIRS = 10_000


def transform(network: Transformation, pairs: PairArrays, device: str) -> tuple[Float32, Float32]:
    """z (N, d_new) and s (N,) float32 of the pairs; the network is moved to `device` (the config's), and back."""
    place = torch.device("cpu") if device == "cpu" else resolve_device("auto")
    z, s = apply(network.to(place).eval(), pairs.old, pairs.side, place, APPLY_BATCH)
    network.cpu()
    return z, s


def held_out_metrics(job: Job, pairs: PairArrays, z: Float32, s: Float32) -> TransformationInfo:
    """Measure a transformation on held-out pairs (z as they would be served), and warn if the old model is better.

    Alignment and rank correlation are over all pairs. Retrieval is over at most 10,000 of them, as gallery and queries
    at once; without labels it is the share of new/new's 10 nearest that are found.
    """
    error = np.square(pairs.new - z).mean(axis=1)
    found = _retrieval(pairs, {"transformed": z}, job.metric)
    new, old = found["transformed"], found["old_old"]
    better = all(new[name] >= old[name] for name in old if name != "top5")
    if not better:
        _logger.warning(
            "On held-out pairs, the transformed gallery answers worse than the old model (%s against %s).",
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
    """The number of pairs at which the linear map is expected to match the old model; None if now or never."""
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
    """Spearman's rank correlation of two (N,) arrays, ties by their mean rank; 0 if one is constant."""
    ranks_a, ranks_b = _ranks(a), _ranks(b)
    if ranks_a.std() == 0 or ranks_b.std() == 0:
        return 0.0
    return float(np.corrcoef(ranks_a, ranks_b)[0, 1])


def _ranks(values: Float32) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return ranks


def _retrieval(pairs: PairArrays, transformed: dict[str, Float32], metric: str) -> dict[str, dict[str, float]]:
    """The figures of each transformed gallery, of old/old and of new/new, by name; see `retrieval`."""
    known = pairs.measurable_labels()
    rows = np.arange(len(pairs.old)) if known is None else np.flatnonzero(known != NO_LABEL)
    labels = None if known is None else known[rows]
    some = np.unique(np.linspace(0, len(rows) - 1, _MEASURED_PAIRS).astype(np.int64))
    rows, labels = rows[some], None if labels is None else labels[some]
    old, new = pairs.old[rows], pairs.new[rows]
    kinds = {name: (new, z[rows]) for name, z in transformed.items()} | {"old_old": (old, old), "new_new": (new, new)}
    return retrieval(kinds, labels, metric, "agreement10")


def retrieval(
    kinds: dict[str, tuple[Float32, Float32]], labels: Int64 | None, metric: str, agreement: str
) -> dict[str, dict[str, float]]:
    """Retrieval quality in per cent, of images that are gallery and queries at once.

    Args:
        kinds: by name, queries (N, d) and gallery (N, d) of the same images; one of them is `new_new`.
        agreement: the name of the figure without labels: the share of new/new's 10 nearest that are found.
    """
    if labels is not None:
        return {
            name: evaluate(*sides, labels, labels, EvaluateOptions(metric=metric, self_match=True)).as_dict()
            for name, sides in kinds.items()
        }
    found = {name: nearest_rows(*sides, np.arange(len(sides[0])), metric) for name, sides in kinds.items()}
    return {name: {agreement: recall(each, found["new_new"])} for name, each in found.items()}
