"""What policies know besides the image itself: held-out pairs, the classifier, and the model of the learned policy.

Part of a transformation: made where that is fitted, stored with it, read where the gallery is scored. Guarantee: what
is loaded is what was saved, bit for bit, and no pair in it has trained the transformation. It does not know which
policy wants what.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from pipeline.arrays import Float32, Int64, tensor_metadata
from pipeline.errors import DataError
from pipeline.knn import cluster, nearest
from pipeline.models.transformation import read_part
from pipeline.run import Run

PART = "reference.safetensors"
NO_LABEL = -1

_MOST_PAIRS = 16_384
_MOST_QUERIES = 4096
_REACH = 10  # a query retrieves what is as near as the tenth of the pairs
_MODEL = "model."


@dataclass(frozen=True, slots=True, eq=False)
class PolicyInputs:
    """What is known of M held-out pairs; None where there is none. All float32 but labels and rows, which are int64.

    Attributes:
        metric: the gallery's; with `cosine` all new and transformed vectors have length 1.
        old: (M, d_old), and `transformed` (M, d_new), which is z as it comes, and `uncertainty` (M,), which is s.
        residual: (M,), |new - z|^2.
        labels: (M,) class numbers, -1 for none.
        centroids: (K, d_new), class means of the new embeddings, or those of k-means where there are no labels.
        centroid_labels: (K,) the classes; None for k-means.
        queries: (Q, d_new) new embeddings of some of the pairs, `query_rows` (Q,) says of which.
        reach: (Q,) the squared distance (negative product for `ip`) of the query's tenth nearest transformed vector.
        classifier_weight: (C, d_new), and `classifier_bias` (C,): the new encoder's own classifier, or a fitted one.
        mean, scale: (S,) of the signals that the learned policy sees, `signals` their names.
        model: the learned policy's tensors.
        label_names: the label of each class number as the manifest has it; None where the number is the label.
        group_names: groups of the pairs, and `group_need` (G,): 1 for the one whose quality suffers most, 0 for the
            one that suffers least.
    """

    metric: str
    old: Float32
    transformed: Float32
    uncertainty: Float32
    residual: Float32
    labels: Int64
    centroids: Float32
    queries: Float32
    query_rows: Int64
    reach: Float32
    centroid_labels: Int64 | None = None
    classifier_weight: Float32 | None = None
    classifier_bias: Float32 | None = None
    mean: Float32 | None = None
    scale: Float32 | None = None
    signals: tuple[str, ...] = ()
    model: dict[str, Float32] | None = None
    label_names: tuple[str, ...] | None = None
    group_names: tuple[str, ...] = ()
    group_need: Float32 | None = None

    def to_bytes(self) -> bytes:
        """As safetensors; what is no array is in its metadata."""
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
            raise DataError("not what policies know of pairs", found=repr(error), where=where) from error
        model = {name.removeprefix(_MODEL): tensors.pop(name) for name in sorted(tensors) if name.startswith(_MODEL)}
        tuples = {name: tuple(value) for name, value in words.items() if isinstance(value, list)}
        return cls(**{**words, **tuples, **tensors, "model": model or None})


def load_policy_inputs(run: Run) -> PolicyInputs | None:
    """What the run's transformation was saved with; None where it was fitted before policies knew of pairs.

    Raises:
        DataError: there is no transformation, or the file is missing or damaged.
    """
    data = read_part(run, PART)
    return None if data is None else PolicyInputs.from_bytes(data, run.transformation)


def build_policy_inputs(
    old: Float32,
    z: Float32,
    s: Float32,
    new: Float32,
    labels: Int64 | None,
    classifier: tuple[Float32, Float32 | None] | None,
    metric: str,
    seed: int,
    label_names: Sequence[str] | None = None,
) -> PolicyInputs:
    """What policies may know of held-out pairs, of which at most 16,384 are kept, by chance.

    Args:
        old: (N, d_old) float32.
        z: (N, d_new) float32, as the transformation gives it, without an offset.
        s: (N,) float32.
        new: (N, d_new) float32, of length 1 where the metric is cosine.
        labels: (N,) int64, -1 for none.
        classifier: weight (C, d_new) and bias (C,) of a classifier on new embeddings.
        metric: the gallery's.
        seed: of the draws and of k-means.
        label_names: the label of each class number, where it is not the number itself.
    """
    rng = np.random.default_rng(seed)
    labels = np.full(len(old), NO_LABEL, np.int64) if labels is None else labels
    centroids, centroid_labels = _centroids(new, labels, seed)
    kept = np.sort(rng.permutation(len(old))[:_MOST_PAIRS])
    query_rows = np.sort(rng.permutation(len(kept))[:_MOST_QUERIES])
    weight, bias = (None, None) if classifier is None else classifier
    return PolicyInputs(
        metric=metric,
        old=old[kept],
        transformed=z[kept],
        uncertainty=s[kept],
        residual=np.square(new - z).sum(axis=1)[kept],
        labels=labels[kept],
        centroids=centroids,
        centroid_labels=centroid_labels,
        queries=new[kept][query_rows],
        query_rows=query_rows,
        reach=_reach(new[kept], z[kept], query_rows, metric),
        classifier_weight=weight,
        classifier_bias=bias,
        label_names=None if label_names is None else tuple(label_names),
    )


def keys(queries: Float32, vectors: Float32, metric: str) -> Float32:
    """How far each vector is from each query, (Q, N) float32: squared distances, or negative products for `ip`."""
    products = queries @ vectors.T
    if metric == "ip":
        return -products
    lengths = [np.einsum("nd,nd->n", side, side) for side in (queries, vectors)]
    squared: Float32 = lengths[0][:, None] + lengths[1] - 2 * products
    return squared


def _centroids(new: Float32, labels: Int64, seed: int) -> tuple[Float32, Int64 | None]:
    """Class means and their classes; by k-means, about sqrt(N) of them, where no pair has a label."""
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
