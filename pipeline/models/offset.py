"""The offset: a transformed vector is served as far from every query as its embedding is to be expected.

For an unbiased z the expected squared distance to the unknown embedding x is E|q - x|^2 = |q - z|^2 + E|x - z|^2:
larger than to its mean by the variance, which differs between images. z alone is therefore too near to every
query, most of all where it is least certain, and crowds out what is embedded. Both are mended by moving z along a
direction u in which embeddings hardly vary, so that it comes no nearer to any query:

    z' = z + sqrt(strength * r2 * c / mean(c)) * u

    r2   mean of |x - z|^2 over held-out pairs
    c    how uncertain an image is: `confidence` is 1 - max softmax(W z + b), of the new encoder's classifier;
         `uncertainty` is exp(s), less what the surest tenth has
    u    the eigenvector of the covariance of new embeddings with the least eigenvalue

An embedded image has no offset, so a backfill ends where it always did. With the metric `cosine` z' is normalised;
an inner product does not see such an offset, so `ip` has none. This is ours, not the paper's; what it is worth is
measured in benchmarks/quality/recipes.py. This module knows neither files nor how z was fitted.
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
    """A fitted offset.

    Attributes:
        kind: which c.
        factor: what c is multiplied by to give a squared length.
        floor: of exp(s); 0 for `confidence`.
        direction: u, (d_new,) float32, of length 1.
        normalize: whether vectors have length 1.
        classifier: for `confidence`.
    """

    kind: OffsetKind
    factor: float
    floor: float
    direction: Float32
    normalize: bool
    classifier: LinearClassifier | None

    def apply(self, z: Float32, s: Float32) -> Float32:
        """z' (N, d_new) float32, of z (N, d_new) and s (N,).

        Raises:
            DataError: an offset is not finite.
        """
        squared = self.factor * _uncertain(self.kind, z, s, self.floor, self.classifier)
        if not np.isfinite(squared).all():
            raise DataError("an offset is not finite", found=f"{int((~np.isfinite(squared)).sum())} images")
        served = z + np.sqrt(squared, dtype=np.float32)[:, None] * self.direction
        if self.normalize:
            served /= np.linalg.norm(served, axis=1, keepdims=True)
        result: Float32 = served
        return result

    def to_bytes(self) -> bytes:
        """As safetensors; the numbers are its metadata."""
        tensors = {"direction": self.direction}
        if self.classifier is not None:
            tensors["weight"] = self.classifier.weight
            tensors |= {} if self.classifier.bias is None else {"bias": self.classifier.bias}
        numbers = {name: getattr(self, name) for name in ("kind", "factor", "floor", "normalize")}
        return save(tensors, {"offset": json.dumps(numbers)})

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The inverse of `to_bytes`."""
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
        raise ConfigError("an inner product does not see an offset", expected="none", found=kind, where="fit.offset")
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
    """The direction in which M embeddings (M, d) vary least, (d,) float32, of length 1."""
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
    assert classifier is not None, "checked where the offset is fitted"
    confident: Float32 = 1 - classifier.probabilities(z).max(axis=1)
    return confident
