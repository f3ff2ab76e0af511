"""Calibration: maps the distance of a transformed hit to the distance that its embedding is expected to have.

Distances of transformed and embedded vectors are on different scales, so ranking both as they are is worse than ranking
either (docs/method.md). A run has one monotone, piecewise linear map of the keys of transformed hits; embedded hits
keep theirs. A key is the squared Euclidean distance for l2, and minus the similarity for ip and cosine: smaller is
nearer.

    expected key of a transformed hit = map(its key)

The map matches ranks: `observed[i]` is the mean key of a query's r-th nearest transformed vector, `expected[i]` that of
its r-th nearest embedded vector. Ranks within one kind do not change.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Self

import numpy as np

from pipeline.arrays import Float32, Float64
from pipeline.errors import DataError
from pipeline.run import Run
from pipeline.storage import documents

PART = "calibration.json"
MIN_PAIRS = 20

_MOST_PAIRS = 5000
_MOST_QUERIES = 2000
_NUM_RANKS = 64
_ANCHORS = {"l2": 0.0, "cosine": -1.0}  # the least possible key; ip has none
_FAR = 2.0**600  # so far that the line to it has slope 1 to the last bit


@dataclass(frozen=True)
class Calibration:
    """The map: linear between its knots, with slope 1 outside."""

    observed: tuple[float, ...]  # keys of transformed vectors, strictly increasing
    expected: tuple[float, ...]  # the key to which each is mapped, strictly increasing

    def __post_init__(self) -> None:
        """Check the knots; raises DataError if they are not finite, ascending and of the same number."""
        if not self.observed or len(self.observed) != len(self.expected):
            found = f"{len(self.observed)} and {len(self.expected)}"
            raise DataError("a calibration needs as many expected keys as observed ones", found=found)
        for name, knots in (("observed", self.observed), ("expected", self.expected)):
            if not (np.isfinite(knots).all() and (np.diff(knots) > 0).all()):
                raise DataError(f"the {name} keys of a calibration do not increase", expected="finite, ascending")

    def apply(self, keys: Float32) -> Float32:
        """Map keys of any shape. The map never decreases, also in float32; infinity stays infinity."""
        return self.apply_exactly(keys.astype(np.float64)).astype(np.float32)

    def apply_exactly(self, keys: Float64) -> Float64:
        """As `apply`, in float64."""
        first = self.observed[0]
        mapped = np.asarray(np.interp(keys, *self._knots, right=np.inf))
        below = keys < first
        if below.any():
            mapped[below] = (keys[below] - first) + self.expected[0]
        return mapped

    def to_bytes(self) -> bytes:
        """The bytes of `calibration.json`."""
        return documents.encode(asdict(self))

    @classmethod
    def from_bytes(cls, data: bytes, where: str = PART) -> Self:
        """Read what `to_bytes` wrote; raises DataError if it was changed."""
        return documents.parse(cls, data, where, must_be_checked=True)

    @cached_property
    def _knots(self) -> tuple[Float64, Float64]:
        """The knots and one far out, corrected by the last bits so that rounding keeps the map monotone."""
        observed = np.array([*self.observed, self.observed[-1] + _FAR])
        expected = np.array([*self.expected, self.expected[-1] + _FAR])
        for left in range(len(observed) - 1):
            expected[left + 1] = max(expected[left + 1], expected[left])
            while (end := _end_of_piece(observed, expected, left)) > expected[left + 1]:
                expected[left + 1] = np.nextafter(end, np.inf)
        return observed, expected


def read_calibration(run: Run) -> Calibration | None:
    """The calibration of the run's transformation; None if it has none."""
    from pipeline.models.transformation import read_part  # here: torch takes seconds

    data = read_part(run, PART)
    return None if data is None else Calibration.from_bytes(data, run.transformation)


def fit_calibration(z: Float32, new: Float32, metric: str, seed: int) -> Calibration | None:
    """Fit the map on held-out pairs: at most 5,000, and 2,000 of their new embeddings as queries.

    Args:
        z: (M, d) float32, the transformed vectors as they are served.
        new: (M, d) float32; row i is the new embedding of the image of z[i].
        metric: l2, ip or cosine.
        seed: seed of the sample.

    Returns:
        None if there are fewer than 20 pairs, or if their keys hardly vary.
    """
    if z.shape != new.shape:
        raise DataError("z and new must have the same shape", expected=new.shape, found=z.shape)
    if len(z) < MIN_PAIRS:
        return None
    drawn = np.random.default_rng(seed).permutation(len(z))[:_MOST_PAIRS]
    sides = [_unit(side[drawn]) if metric == "cosine" else side[drawn] for side in (z, new)]
    queries = sides[1][:_MOST_QUERIES]
    ranks = np.unique(np.geomspace(1, len(drawn) - 1, _NUM_RANKS).astype(np.int64)) - 1
    observed, expected = (_mean_keys(queries, side, metric)[ranks] for side in sides)
    return _through(observed, expected, metric)


def _through(observed: Float64, expected: Float64, metric: str) -> Calibration | None:
    """The map through the knots that increase in both coordinates."""
    knots = [(_ANCHORS[metric],) * 2] if metric in _ANCHORS else []
    for knot in zip(observed.tolist(), expected.tolist(), strict=True):
        if not knots or (knot[0] > knots[-1][0] and knot[1] > knots[-1][1]):
            knots.append(knot)
    return Calibration(*zip(*knots, strict=True)) if len(knots) > 1 else None


def _mean_keys(queries: Float32, vectors: Float32, metric: str) -> Float64:
    """(M - 1,) the mean key of each rank over the queries; query i leaves out row i."""
    keys = queries @ vectors.T
    if metric == "l2":
        keys *= -2
        keys += np.einsum("nd,nd->n", queries, queries)[:, None]
        keys += np.einsum("nd,nd->n", vectors, vectors)
        np.maximum(keys, 0, out=keys)
    else:
        np.negative(keys, out=keys)
    np.fill_diagonal(keys, np.inf)
    keys.sort(axis=1)
    found: Float64 = keys[:, :-1].mean(axis=0, dtype=np.float64)
    return found


def _unit(vectors: Float32) -> Float32:
    unit: Float32 = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-30))
    return unit


def _end_of_piece(observed: Float64, expected: Float64, left: int) -> np.float64:
    """The value of `np.interp` at the end of the piece that starts at knot `left`."""
    width = observed[left + 1] - observed[left]
    slope = (expected[left + 1] - expected[left]) / width
    end: np.float64 = slope * width + expected[left]
    return end
