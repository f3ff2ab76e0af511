"""Build the policy inputs of a fitted transformation from its held-out pairs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.arrays import NO_LABEL, Float32, Int64
from pipeline.evaluation.metrics import EvaluateOptions, evaluate
from pipeline.planning.policy_inputs import HeldOutPairs, PolicyInputs, build_policy_inputs
from training.simulation.folds import Fold
from training.simulation.staleness_cost import fit_learned, staleness_cost

_MEASURED = 16_384  # pairs


def policy_inputs_of(
    fold: Fold,
    served: Float32,
    groups: NDArray[np.object_],
    label_names: tuple[str, ...] | None,
    metric: str,
    seed: int,
) -> PolicyInputs:
    """The policy inputs of N held-out pairs by ascending index, with the model of `learned` and the group needs.

    served is (N, d) float32, the transformed vectors as they are served; groups is (N,) str or None.
    """
    known = policy_inputs_of_fold(fold, metric, seed, label_names)
    pairs, labels = fold.pairs, fold.labels()
    rows = np.sort(np.random.default_rng(seed).permutation(len(served))[:_MEASURED])
    some = None if labels is None else labels[rows]
    costs = staleness_cost(served[rows], pairs.new[rows], some, metric, seed)
    known = fit_learned(replace(fold.take(rows).scored(), ids=rows), known, costs, seed)
    if labels is None or all(group is None for group in groups.tolist()):
        return known
    names, need = group_needs(served[rows], pairs.new[rows], labels[rows], groups[rows], metric)
    return replace(known, group_names=names, group_need=need)


def policy_inputs_of_fold(
    fold: Fold, metric: str, seed: int, label_names: tuple[str, ...] | None = None
) -> PolicyInputs:
    """The policy inputs without the model of the policy `learned`."""
    pairs, known = fold.pairs, fold.classifier
    weights = None if known is None else (known.weight, known.bias)
    held_out = HeldOutPairs(pairs.old, fold.z, fold.s, pairs.new, pairs.labels, label_names)
    return build_policy_inputs(held_out, weights, metric, seed)


def groups_of(table: pa.Table) -> NDArray[np.object_]:
    """The groups of stored pairs by ascending index, (N,) str or None."""
    if "group" not in table.schema.names:
        return np.full(table.num_rows, None, dtype=object)
    groups: NDArray[np.object_] = table.sort_by("index")["group"].to_numpy()
    return groups


def group_needs(
    served: Float32, new: Float32, labels: Int64, groups: NDArray[np.object_], metric: str
) -> tuple[tuple[str, ...], Float32]:
    """The groups, and their needs, (G,) float32: the loss in average precision while nothing is embedded, in [0, 1].

    served and new are (N, d) float32, labels (N,) int64 with -1 for none, groups (N,) str or None.
    """
    queries = np.flatnonzero(labels != NO_LABEL)
    precision = [
        evaluate(
            new[queries],
            side,
            labels[queries],
            labels,
            EvaluateOptions(metric=metric, query_ids=queries, gallery_ids=np.arange(len(new))),
        ).average_precision
        for side in (new, served)
    ]
    gap, mine = precision[0] - precision[1], groups[queries]
    names = sorted({name for name, value in zip(mine, gap, strict=True) if name is not None and not np.isnan(value)})
    means = np.array([np.nanmean(gap[mine == name]) for name in names])
    spread = np.ptp(means) if len(means) else 0.0
    need = (means - means.min()) / spread if spread > 0 else np.zeros(len(means))
    return tuple(names), need.astype(np.float32)
