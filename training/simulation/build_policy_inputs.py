"""What the policies of a transformation will know: made of its held-out pairs, when it is fitted.

The glue between the fit and `planning.policy_inputs`; guarantee: only held-out pairs go in. It does not know what the
policies do with it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.arrays import Float32, Int64
from pipeline.config.tree import Config
from pipeline.evaluation.metrics import EvaluateOptions, evaluate
from pipeline.models.offset import LinearClassifier
from pipeline.planning.policy_inputs import PolicyInputs, build_policy_inputs
from pipeline.planning.signals import Scored
from training.fitting.learner import PairArrays
from training.fitting.losses import NO_LABEL
from training.simulation.staleness_cost import fit_learned, staleness_cost

_MEASURED = 16_384


def policy_inputs_of(
    config: Config,
    table: pa.Table,
    pairs: PairArrays,
    z: Float32,
    s: Float32,
    served: Float32,
    classifier: LinearClassifier | None,
    label_names: tuple[str, ...] | None,
) -> PolicyInputs:
    """The reference of a fitted network, with the learned policy's model, and the need of each group.

    Args:
        config: `gallery.metric` and `seed` count.
        table: the held-out pairs as they are stored: `index`, and maybe `group`.
        pairs: the same by ascending index.
        z: (N, d) float32, as h gives them.
        s: (N,) float32.
        served: (N, d) float32, the transformed vectors as they are served.
        classifier: on new embeddings.
        label_names: the label of each class number, where that is not the number itself.
    """
    weights = None if classifier is None else (classifier.weight, classifier.bias)
    metric, seed, labels = config.gallery.metric, config.seed, measurable(pairs.labels)
    known = build_policy_inputs(pairs.old, z, s, pairs.new, pairs.labels, weights, metric, seed, label_names)
    rows = np.sort(np.random.default_rng(seed).permutation(len(z))[:_MEASURED])
    none = np.full(len(rows), None, dtype=object)
    scored = Scored(rows, s[rows], z[rows], pairs.old[rows], none, none)
    some = None if labels is None else labels[rows]
    known = fit_learned(scored, known, staleness_cost(served[rows], pairs.new[rows], some, metric, seed), seed)
    if labels is None or "group" not in table.schema.names or not table["group"].drop_null():
        return known
    groups = table.sort_by("index")["group"].to_numpy()
    names, need = group_needs(served[rows], pairs.new[rows], labels[rows], groups[rows], metric)
    return replace(known, group_names=names, group_need=need)


def measurable(labels: Int64 | None) -> Int64 | None:
    """The labels, or None where no two images have the same."""
    if labels is None:
        return None
    there = labels[labels != NO_LABEL]
    return labels if len(np.unique(there)) < len(there) else None


def group_needs(
    served: Float32, new: Float32, labels: Int64, groups: NDArray[np.object_], metric: str
) -> tuple[tuple[str, ...], Float32]:
    """The groups, and (G,) float32 in [0, 1]: how much average precision their queries lack with nothing embedded.

    Args:
        served: (N, d) float32.
        new: (N, d) float32.
        labels: (N,) int64, -1 for none.
        groups: (N,) str or None.
        metric: the gallery's.
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
