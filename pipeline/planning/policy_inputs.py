"""Inputs of policies beyond the image itself: held-out pairs, the classifier, and the learned policy's model.

Made with the transformation, stored with it, and read when the gallery is scored. No pair in it has trained the
transformation.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from pipeline.arrays import NO_LABEL, Float32, Int64, tensor_metadata
from pipeline.errors import DataError
from pipeline.knn import cluster, nearest
from pipeline.models.transformation import read_part
from pipeline.run import Run

PART = "reference.safetensors"

_MOST_PAIRS = 16_384
_MOST_QUERIES = 4096
_REACH = 10  # a query retrieves vectors that are as near as its tenth nearest pair
_MODEL = "model."


@dataclass(frozen=True, slots=True, eq=False)
class PolicyInputs:
    """M held-out pairs and what was learned from them; None if missing. Arrays are float32, labels and rows int64."""

    metric: str  # the gallery's; with `cosine` all new and transformed vectors have length 1
    old: Float32  # (M, d_old)
    transformed: Float32  # (M, d_new), z without an offset
    uncertainty: Float32  # (M,), s
    residual: Float32  # (M,), |new - z|^2
    labels: Int64  # (M,) class numbers, -1 for none
    centroids: Float32  # (K, d_new), class means of new embeddings; by k-means if there are no labels
    queries: Float32  # (Q, d_new), new embeddings of some of the pairs
    query_rows: Int64  # (Q,), their rows
    reach: Float32  # (Q,), squared distance (negative product for `ip`) to the query's tenth nearest transformed vector
    centroid_labels: Int64 | None = None  # (K,) classes; None for k-means
    classifier_weight: Float32 | None = None  # (C, d_new), of the new encoder's classifier, or a fitted one
    classifier_bias: Float32 | None = None  # (C,)
    mean: Float32 | None = None  # (S,) of the signals that the learned policy uses
    scale: Float32 | None = None  # (S,)
    signals: tuple[str, ...] = ()  # their names
    model: dict[str, Float32] | None = None  # the learned policy's tensors
    label_names: tuple[str, ...] | None = None  # the label of each class number; None if the number is the label
    group_names: tuple[str, ...] = ()  # groups of the pairs
    # (G,), 1 for the group whose quality suffers most, 0 for the one that suffers least
    group_need: Float32 | None = None

    def to_bytes(self) -> bytes:
        """As safetensors; fields that are not arrays are in its metadata."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        tensors = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
        tensors |= {f"{_MODEL}{name}": value for name, value in (self.model or {}).items()}
        words = {name: values[name] for name in ("metric", "signals", "label_names", "group_names")}
        contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
        return save(contiguous, {"reference": json.dumps(words)})

    @classmethod
    def from_bytes(cls, data: bytes, where: str = PART) -> Self:
        """The inverse of `to_bytes`.

        Raises:
            DataError: it was not written by `to_bytes`.
        """
        try:
            words = tensor_metadata(data, "reference")
            tensors = load(data)
        except (SafetensorError, ValueError, KeyError) as error:
            raise DataError("the policy inputs are damaged", found=repr(error), where=where) from error
        model = {name.removeprefix(_MODEL): tensors.pop(name) for name in sorted(tensors) if name.startswith(_MODEL)}
        tuples = {name: tuple(value) for name, value in words.items() if isinstance(value, list)}
        return cls(**{**words, **tuples, **tensors, "model": model or None})


@dataclass(frozen=True, slots=True, eq=False)
class HeldOutPairs:
    """N held-out pairs and their transformed embeddings."""

    old: Float32  # (N, d_old)
    z: Float32  # (N, d_new), transformed, without an offset
    s: Float32  # (N,), the uncertainty
    new: Float32  # (N, d_new), of length 1 if the metric is cosine
    labels: Int64 | None = None  # (N,), -1 for none
    label_names: tuple[str, ...] | None = None  # the label of each class number; None if the number is the label


def load_policy_inputs(run: Run) -> PolicyInputs | None:
    """The inputs that the run's transformation was saved with; None for transformations of early versions.

    Raises:
        DataError: there is no transformation, or the file is missing or damaged.
    """
    data = read_part(run, PART)
    return None if data is None else PolicyInputs.from_bytes(data, run.transformation)


def build_policy_inputs(
    pairs: HeldOutPairs, classifier: tuple[Float32, Float32 | None] | None, metric: str, seed: int
) -> PolicyInputs:
    """Build the inputs from held-out pairs; at most 16,384 of them are kept, drawn at random.

    `classifier` is the weight (C, d_new) and bias (C,) of a classifier on new embeddings.
    """
    old, z, new = pairs.old, pairs.z, pairs.new
    rng = np.random.default_rng(seed)
    labels = np.full(len(old), NO_LABEL, np.int64) if pairs.labels is None else pairs.labels
    centroids, centroid_labels = _centroids(new, labels, seed)
    kept = np.sort(rng.permutation(len(old))[:_MOST_PAIRS])
    query_rows = np.sort(rng.permutation(len(kept))[:_MOST_QUERIES])
    weight, bias = (None, None) if classifier is None else classifier
    return PolicyInputs(
        metric=metric,
        old=old[kept],
        transformed=z[kept],
        uncertainty=pairs.s[kept],
        residual=np.square(new - z).sum(axis=1)[kept],
        labels=labels[kept],
        centroids=centroids,
        centroid_labels=centroid_labels,
        queries=new[kept][query_rows],
        query_rows=query_rows,
        reach=_reach(new[kept], z[kept], query_rows, metric),
        classifier_weight=weight,
        classifier_bias=bias,
        label_names=pairs.label_names,
    )


def keys(queries: Float32, vectors: Float32, metric: str) -> Float32:
    """Squared distances of each query to each vector, (Q, N) float32; negative products for `ip`."""
    products = queries @ vectors.T
    if metric == "ip":
        return -products
    lengths = [np.einsum("nd,nd->n", side, side) for side in (queries, vectors)]
    squared: Float32 = lengths[0][:, None] + lengths[1] - 2 * products
    return squared


def _centroids(new: Float32, labels: Int64, seed: int) -> tuple[Float32, Int64 | None]:
    """Class means and their classes; without labels about sqrt(N) centroids by k-means."""
    classes, places = np.unique(labels, return_inverse=True)
    if classes[-1] == NO_LABEL:
        return cluster(new, max(1, round(len(new) ** 0.5)), seed), None
    sums = np.zeros((len(classes), new.shape[1]))
    np.add.at(sums, places, new)
    means = (sums / np.bincount(places)[:, None]).astype(np.float32)
    known = classes != NO_LABEL
    return means[known], classes[known]


def _reach(new: Float32, z: Float32, rows: Int64, metric: str) -> Float32:
    far, _ = nearest(new[rows], z, min(_REACH, len(new) - 1), rows, "ip" if metric == "ip" else "l2")
    return far[:, -1]
