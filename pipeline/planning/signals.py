"""Signals: numbers known of an image before it is embedded; policies order by them, and one learns from them.

A signal depends on its image alone, except for float32 rounding, and is never NaN. A held-out pair is excluded from
the neighbours and queries of its own image; otherwise its signal would be optimistic.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.arrays import NO_LABEL, Float32, Int64
from pipeline.equality import find_same
from pipeline.knn import nearest
from pipeline.models.offset import LinearClassifier
from pipeline.planning.policy_inputs import PolicyInputs, keys

SignalColumns = dict[str, Float32]

_NEIGHBOURS = 10
_SLACK = np.float32(1e-4)  # keeps the tenth pair within reach despite rounding of its distance
_NUMBERS_AT_ONCE = 2**24  # 64 MB: logits, or distances to the queries


@dataclass(frozen=True, slots=True)
class Scored:
    """The scored columns of N images; row i belongs to `ids[i]`."""

    ids: Int64  # (N,)
    uncertainty: Float32  # (N,), s = log sigma^2 of the transformation
    transformed: Float32  # (N, d_new), without an offset
    old_embeddings: Float32  # (N, d_old)
    labels: NDArray[np.object_]  # (N,) str or None
    groups: NDArray[np.object_]  # (N,) str or None
    # (N,) float32, not negative: the weight of an image in the results; None if not given
    traffic: Float32 | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """Some rows: z (B, d_new), old (B, d_old), s (B,), and the held-out pair that each image is (B,) int64, or -1."""

    z: Float32
    old: Float32
    s: Float32
    own: Int64


def signals(scored: Scored, inputs: PolicyInputs, names: Collection[str] | None = None) -> SignalColumns:
    """The signals of N images, each (N,) float32; all that the inputs allow, or the kinds of the named ones."""
    kinds = [kind for kind in _KINDS if kind.possible(inputs) and (names is None or set(kind.names) & set(names))]
    own = find_same(scored.old_embeddings, inputs.old)  # they may come from different processors
    widest = max(len(item) for item in (inputs.queries, inputs.centroids, _classes(inputs)))
    size, found = max(1, min(8192, _NUMBERS_AT_ONCE // widest)), []
    for start in range(0, max(1, len(own)), size):
        part = slice(start, start + size)
        columns = scored.transformed[part], scored.old_embeddings[part], scored.uncertainty[part], own[part]
        block = Block(*columns)
        found.append({name: column for kind in kinds for name, column in kind.function(block, inputs).items()})
    return {name: np.concatenate([block[name] for block in found]).astype(np.float32) for name in found[0]}


def _classes(inputs: PolicyInputs) -> Float32 | Int64:
    return inputs.labels[:0] if inputs.classifier_weight is None else inputs.classifier_weight


def _probabilities(z: Float32, inputs: PolicyInputs) -> Float32:
    assert inputs.classifier_weight is not None, "asked only where there is a classifier"
    return LinearClassifier(inputs.classifier_weight, inputs.classifier_bias).probabilities(z)


def _itself(block: Block, inputs: PolicyInputs) -> SignalColumns:
    """s, and how short the vectors are: an encoder gives long vectors if it is certain."""
    lengths = {"norm": block.z, "old_norm": block.old}
    short = {name: 1 / (1 + np.linalg.norm(side, axis=1)) for name, side in lengths.items()}
    return {"uncertainty": block.s, **short}


def _confidence(block: Block, inputs: PolicyInputs) -> SignalColumns:
    """Of the classifier on z: entropy, closeness of the best two classes, and doubt about the best one."""
    shares = _probabilities(block.z, inputs)
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    best = np.sort(np.partition(shares, -2, axis=1)[:, -2:], axis=1) if shares.shape[1] > 1 else shares[:, [0, 0]]
    return {
        "entropy": -(shares * logs).sum(axis=1),
        "margin": 1 - (best[:, 1] - best[:, 0]),
        "least_confidence": 1 - best[:, 1],
    }


def _centroid(block: Block, inputs: PolicyInputs) -> SignalColumns:
    """Squared distance to the nearest centroid, and minus its lead over the second."""
    far = np.maximum(keys(block.z, inputs.centroids, "l2"), 0)
    two = np.sort(np.partition(far, 1, axis=1)[:, :2], axis=1) if far.shape[1] > 1 else far[:, [0, 0]]
    return {"centroid": two[:, 0], "centroid_margin": two[:, 0] - two[:, 1]}


def _neighbour(block: Block, inputs: PolicyInputs) -> SignalColumns:
    """Of the nearest pairs by z, and by the old embedding."""
    k = min(_NEIGHBOURS, len(inputs.old) - 1)
    found: SignalColumns = {}
    for side, vectors, base in (
        ("neighbour", block.z, inputs.transformed),
        ("old", block.old, inputs.old),
    ):
        distances, rows = nearest(vectors, base, k, block.own)
        found[f"{side}_distance"] = distances.mean(axis=1)
        found[f"{side}_residual"] = inputs.residual[rows].mean(axis=1)
        if inputs.centroid_labels is not None:
            found[f"{side}_purity"] = 1 - _largest_share(inputs.labels[rows])
    return found


def _largest_share(labels: Int64) -> Float32:
    """The share of the most frequent label in each row of (B, k); -1 (none) equals no label."""
    same = (labels[:, :, None] == labels[:, None, :]) & (labels != NO_LABEL)[:, :, None]
    share: Float32 = (same.sum(axis=2).max(axis=1) / labels.shape[1]).astype(np.float32)
    return share


def _hubness(block: Block, inputs: PolicyInputs) -> SignalColumns:
    """Hubness: the number of held-out queries whose k-th neighbour is farther than this image, over the mean.

    `hits_right` counts them by the probability that the image is of the query's class.
    """
    reach = inputs.reach + _SLACK * np.abs(inputs.reach)
    hits = keys(block.z, inputs.queries, inputs.metric) <= reach
    there = np.flatnonzero(block.own >= 0)
    places = np.searchsorted(inputs.query_rows, block.own[there])
    known = places < len(inputs.query_rows)
    there, places = there[known], places[known]
    known = inputs.query_rows[places] == block.own[there]
    hits[there[known], places[known]] = False
    share = np.float32(len(inputs.old) / len(inputs.queries) / _NEIGHBOURS)
    counts = hits.sum(axis=1) * share
    found = {"hubness": 1 / (1 + counts), "hits": counts}
    labels = inputs.labels[inputs.query_rows]
    if inputs.classifier_weight is not None and inputs.centroid_labels is not None:
        shares = _probabilities(block.z, inputs)
        right = np.where(labels >= 0, shares[:, np.minimum(np.maximum(labels, 0), shares.shape[1] - 1)], 0)
        found["hits_right"] = (hits * right).sum(axis=1) * share
    return found


@dataclass(frozen=True, slots=True)
class _Kind:
    """Signals that come from the same computation."""

    names: tuple[str, ...]
    function: Callable[[Block, PolicyInputs], SignalColumns]
    needs_classifier: bool = False

    def possible(self, inputs: PolicyInputs) -> bool:
        return not self.needs_classifier or inputs.classifier_weight is not None


_KINDS = (
    _Kind(("uncertainty", "norm", "old_norm"), _itself),
    _Kind(("entropy", "margin", "least_confidence"), _confidence, needs_classifier=True),
    _Kind(("centroid", "centroid_margin"), _centroid),
    _Kind(
        (
            "neighbour_distance",
            "neighbour_residual",
            "neighbour_purity",
            "old_distance",
            "old_residual",
            "old_purity",
        ),
        _neighbour,
    ),
    _Kind(("hubness", "hits", "hits_right"), _hubness),
)
