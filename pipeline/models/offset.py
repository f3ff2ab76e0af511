"""The offset: places a transformed vector as far from every query as its embedding is expected to be.

For an unbiased z the expected squared distance to the unknown embedding x is E|q - x|^2 = |q - z|^2 + E|x - z|^2. So z
is too near to every query by its variance, which differs between images, and uncertain images crowd out embedded ones.
The offset moves z along a direction u in which embeddings hardly vary, away from all queries:

    z' = z + sqrt(strength * r2 * c / mean(c)) * u

    r2   mean of |x - z|^2 over held-out pairs
    c    uncertainty of an image: `confidence` is 1 - max softmax(W z + b) of the new encoder's classifier;
         `uncertainty` is exp(s) minus its tenth percentile, at least 0
    u    the eigenvector of the covariance of new embeddings with the least eigenvalue

With the metric `cosine` z' is normalised. With `ip` the offset has no effect, so there is none. The offset is ours, not
the paper's; benchmarks/quality/recipes.py measures it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from pipeline.arrays import Float32, tensor_metadata
from pipeline.errors import ConfigError, DataError

OffsetKind = Literal["uncertainty", "confidence"]

PART = "offset.safetensors"
_FLOOR_PERCENT = 10.0


@dataclass(frozen=True, slots=True)
class LinearClassifier:
    """A linear classifier on new embeddings: weight (C, d_new), bias (C,) or None, float32."""

    weight: Float32
    bias: Float32 | None

    def probabilities(self, z: Float32) -> Float32:
        """softmax(W z + b), (N, C) float32, of z (N, d_new)."""
        logits = z @ self.weight.T
        if self.bias is not None:
            logits += self.bias
        logits -= logits.max(axis=1, keepdims=True)
        np.exp(logits, out=logits)
        logits /= logits.sum(axis=1, keepdims=True)
        return logits


@dataclass(frozen=True, slots=True)
class Offset:
    """A fitted offset."""

    kind: OffsetKind  # which c
    factor: float  # squared length of the offset per unit of c
    floor: float  # subtracted from exp(s); 0 for `confidence`
    direction: Float32  # u, (d_new,) float32, of length 1
    normalize: bool  # whether vectors have length 1
    classifier: LinearClassifier | None  # classifier of `confidence`

    def apply(self, z: Float32, s: Float32) -> Float32:
        """z' (N, d_new) float32, of z (N, d_new) and s (N,); raises DataError if it is not finite."""
        squared = self.factor * _uncertain(self.kind, z, s, self.floor, self.classifier)
        if not np.isfinite(squared).all():
            raise DataError("an offset is not finite", found=f"{int((~np.isfinite(squared)).sum())} images")
        served = z + np.sqrt(squared, dtype=np.float32)[:, None] * self.direction
        if self.normalize:
            served /= np.linalg.norm(served, axis=1, keepdims=True)
        result: Float32 = served
        return result

    def to_bytes(self) -> bytes:
        """The bytes of a safetensors file, with the numbers in its metadata."""
        tensors = {"direction": self.direction}
        if self.classifier is not None:
            tensors["weight"] = self.classifier.weight
            tensors |= {} if self.classifier.bias is None else {"bias": self.classifier.bias}
        numbers = {name: getattr(self, name) for name in ("kind", "factor", "floor", "normalize")}
        return save(tensors, {"offset": json.dumps(numbers)})

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read what `to_bytes` wrote."""
        numbers = tensor_metadata(data, "offset")
        tensors = load(data)
        weight = tensors.get("weight")
        classifier = None if weight is None else LinearClassifier(weight, tensors.get("bias"))
        return cls(**numbers, direction=tensors["direction"], classifier=classifier)


@dataclass(frozen=True, slots=True)
class HeldOutPairs:
    """Held-out pairs, transformed: z (M, d_new), s (M,) and the new embeddings (M, d_new), all float32."""

    z: Float32
    s: Float32
    new: Float32


def fit_offset(
    kind: OffsetKind, strength: float, pairs: HeldOutPairs, classifier: LinearClassifier | None, metric: str
) -> Offset:
    """Fit the offset of a transformation on held-out pairs.

    Args:
        kind: which c.
        strength: the share of the expected squared error that is added.
        pairs: the held-out pairs.
        classifier: needed for `confidence`.
        metric: the gallery's metric.

    Raises:
        ConfigError: the metric is `ip`, or `confidence` has no classifier.
    """
    if metric == "ip":
        raise ConfigError(
            "fit.offset has no effect with metric `ip`: the offset vector is orthogonal to every query, so inner "
            "products do not change",
            expected="none",
            found=kind,
            where="fit.offset",
            remedy="set fit.offset to none, or use the metric l2 or cosine",
        )
    if kind == "confidence" and classifier is None:
        raise ConfigError(
            "this offset needs a classifier, or labels to fit one on", found=kind, where="fit.offset",
            remedy="set fit.classifier, or pairs.columns.label, or fit.offset to uncertainty",
        )  # fmt: skip
    floor = float(np.percentile(np.exp(pairs.s), _FLOOR_PERCENT)) if kind == "uncertainty" else 0.0
    mean = float(_uncertain(kind, pairs.z, pairs.s, floor, classifier).mean())
    error = float(np.square(pairs.new - pairs.z).sum(axis=1).mean())
    factor = strength * error / mean if mean > 0 else 0.0
    return Offset(kind, factor, floor, least_varying(pairs.new), metric == "cosine", classifier)


def least_varying(new: Float32) -> Float32:
    """The direction of length 1 in which embeddings (M, d) vary least, (d,) float32."""
    _, vectors = np.linalg.eigh(np.cov(new, rowvar=False, dtype=np.float64).reshape(new.shape[1], -1))
    direction = vectors[:, 0] * np.sign(vectors[np.abs(vectors[:, 0]).argmax(), 0])
    result: Float32 = direction.astype(np.float32)
    return result


def _uncertain(
    kind: OffsetKind, z: Float32, s: Float32, floor: float, classifier: LinearClassifier | None
) -> NDArray[np.float32]:
    if kind == "uncertainty":
        result: Float32 = np.maximum(np.exp(s) - np.float32(floor), 0)
        return result
    assert classifier is not None, "checked by `fit_offset`"
    confident: Float32 = 1 - classifier.probabilities(z).max(axis=1)
    return confident
