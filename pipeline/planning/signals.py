"""What can be told of an image before it is embedded: numbers that policies order by, and that one learns from.

Pure functions of the scored columns and the reference. A signal of an image does not depend on the others but for
float32 round-off, and none is NaN. Where the image is itself one of the held-out pairs, that pair does not count as its
neighbour, nor as a query: what it says would hold for no other image.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.arrays import Float32, Int64
from pipeline.equality import find_same
from pipeline.knn import nearest
from pipeline.models.offset import LinearClassifier
from pipeline.planning.policy_inputs import NO_LABEL, PolicyInputs, keys

SignalColumns = dict[str, Float32]

_NEIGHBOURS = 10
_SLACK = np.float32(1e-4)  # the tenth pair is within reach, whatever the last bits of its distance are
_NUMBERS_AT_ONCE = 2**24  # 64 MB: logits, or distances to the queries


@dataclass(frozen=True, slots=True)
class Scored:
    """The scored columns of N images, row i of each belongs to `ids[i]`.

    Attributes:
        ids: (N,) int64.
        uncertainty: (N,) float32, s = log sigma^2 of the transformation.
        transformed: (N, d_new) float32, h of the old embedding, without an offset.
        old_embeddings: (N, d_old) float32.
        labels: (N,) str or None.
        groups: (N,) str or None.
        traffic: (N,) float32, not negative: how much an image's place in the results counts; None where not given.
    """

    ids: Int64
    uncertainty: Float32
    transformed: Float32
    old_embeddings: Float32
    labels: NDArray[np.object_]
    groups: NDArray[np.object_]
    traffic: Float32 | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """Some rows: z (B, d_new), old (B, d_old), s (B,), and of each the pair that it is itself (B,) int64, or -1."""

    z: Float32
    old: Float32
    s: Float32
    own: Int64


def signals(scored: Scored, reference: PolicyInputs, names: Collection[str] | None = None) -> SignalColumns:
    """The signals of N images, each (N,) float32; all that the reference has the means for, or those asked for.

    Args:
        scored: the images.
        reference: what is known of pairs.
        names: which; a name stands for all signals of its kind, which come with it.
    """
    kinds = [kind for kind in _KINDS if kind.possible(reference) and (names is None or set(kind.names) & set(names))]
    own = find_same(scored.old_embeddings, reference.old)  # the two may come from nodes of different kinds
    widest = max(len(item) for item in (reference.queries, reference.centroids, _classes(reference)))
    size, found = max(1, min(8192, _NUMBERS_AT_ONCE // widest)), []
    for start in range(0, max(1, len(own)), size):
        part = slice(start, start + size)
        columns = scored.transformed[part], scored.old_embeddings[part], scored.uncertainty[part], own[part]
        block = Block(*columns)
        found.append({name: column for kind in kinds for name, column in kind.function(block, reference).items()})
    return {name: np.concatenate([block[name] for block in found]).astype(np.float32) for name in found[0]}


def _classes(reference: PolicyInputs) -> Float32 | Int64:
    return reference.labels[:0] if reference.classifier_weight is None else reference.classifier_weight


def _probabilities(z: Float32, reference: PolicyInputs) -> Float32:
    assert reference.classifier_weight is not None, "asked only where there is a classifier"
    return LinearClassifier(reference.classifier_weight, reference.classifier_bias).probabilities(z)


def _itself(block: Block, reference: PolicyInputs) -> SignalColumns:
    """s, and how short the vectors are: an embedding that an encoder is sure of is long."""
    lengths = {"norm": block.z, "old_norm": block.old}
    short = {name: 1 / (1 + np.linalg.norm(side, axis=1)) for name, side in lengths.items()}
    return {"uncertainty": block.s, **short}


def _confidence(block: Block, reference: PolicyInputs) -> SignalColumns:
    """Of the classifier on z: the entropy, and how near its best class is to the second, and to certainty."""
    shares = _probabilities(block.z, reference)
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    best = np.sort(np.partition(shares, -2, axis=1)[:, -2:], axis=1) if shares.shape[1] > 1 else shares[:, [0, 0]]
    return {
        "entropy": -(shares * logs).sum(axis=1),
        "margin": 1 - (best[:, 1] - best[:, 0]),
        "least_confidence": 1 - best[:, 1],
    }


def _centroid(block: Block, reference: PolicyInputs) -> SignalColumns:
    """Squared distance to the nearest centroid, and how much farther the second is."""
    far = np.maximum(keys(block.z, reference.centroids, "l2"), 0)
    two = np.sort(np.partition(far, 1, axis=1)[:, :2], axis=1) if far.shape[1] > 1 else far[:, [0, 0]]
    return {"centroid": two[:, 0], "centroid_margin": two[:, 0] - two[:, 1]}


def _neighbour(block: Block, reference: PolicyInputs) -> SignalColumns:
    """Of the nearest pairs by z, and by the old embedding."""
    k = min(_NEIGHBOURS, len(reference.old) - 1)
    found: SignalColumns = {}
    for side, vectors, base in (
        ("neighbour", block.z, reference.transformed),
        ("old", block.old, reference.old),
    ):
        distances, rows = nearest(vectors, base, k, block.own)
        found[f"{side}_distance"] = distances.mean(axis=1)
        found[f"{side}_residual"] = reference.residual[rows].mean(axis=1)
        if reference.centroid_labels is not None:
            found[f"{side}_purity"] = 1 - _largest_share(reference.labels[rows])
    return found


def _largest_share(labels: Int64) -> Float32:
    """The share of the most frequent label in each row of (B, k); -1 (none) is like no other."""
    same = (labels[:, :, None] == labels[:, None, :]) & (labels != NO_LABEL)[:, :, None]
    share: Float32 = (same.sum(axis=2).max(axis=1) / labels.shape[1]).astype(np.float32)
    return share


def _hubness(block: Block, reference: PolicyInputs) -> SignalColumns:
    """How many queries have the image within their reach, as a share of their mean; and whom it would be wrong for."""
    reach = reference.reach + _SLACK * np.abs(reference.reach)
    hits = keys(block.z, reference.queries, reference.metric) <= reach
    there = np.flatnonzero(block.own >= 0)
    places = np.searchsorted(reference.query_rows, block.own[there])
    known = places < len(reference.query_rows)
    there, places = there[known], places[known]
    known = reference.query_rows[places] == block.own[there]
    hits[there[known], places[known]] = False
    share = np.float32(len(reference.old) / len(reference.queries) / _NEIGHBOURS)
    counts = hits.sum(axis=1) * share
    found = {"hubness": 1 / (1 + counts), "hits": counts}
    labels = reference.labels[reference.query_rows]
    if reference.classifier_weight is not None and reference.centroid_labels is not None:
        shares = _probabilities(block.z, reference)
        right = np.where(labels >= 0, shares[:, np.minimum(np.maximum(labels, 0), shares.shape[1] - 1)], 0)
        found["hits_right"] = (hits * right).sum(axis=1) * share
    return found


@dataclass(frozen=True, slots=True)
class _Kind:
    """Signals that come from the same computation."""

    names: tuple[str, ...]
    function: Callable[[Block, PolicyInputs], SignalColumns]
    needs_classifier: bool = False

    def possible(self, reference: PolicyInputs) -> bool:
        """Whether the reference has what it needs."""
        return not self.needs_classifier or reference.classifier_weight is not None


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
