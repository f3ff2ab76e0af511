"""Calibration by kind: the distance of a transformed hit becomes the one that its embedded vector is expected to have.

A transformed vector's distance to a query is on another scale than an embedded vector's, so a ranking of both as they
are is worse than a ranking of either (METHOD.md). One monotone, piecewise linear map per run corrects this. It maps
the key of a transformed hit; embedded hits keep theirs. A key is the squared Euclidean distance for l2, and minus the
similarity for ip and cosine: the smaller, the nearer.

    expected key of a transformed hit = map(its key)

The map matches quantiles: a share of all keys between queries and transformed vectors is below `observed[i]`, and the
same share of the keys of their embeddings is below `expected[i]`. Ranks within one kind do not change.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import NDArray

from pipeline.arrays import Bools, Float32, Int64
from pipeline.errors import DataError
from pipeline.run import Run
from pipeline.storage import documents

Float64 = NDArray[np.float64]

PART = "calibration.json"
MIN_PAIRS = 20

_MOST_PAIRS = 5000
_MOST_QUERIES = 2000
_LEVELS = np.unique(np.concatenate([np.geomspace(1e-5, 0.02, 24), np.linspace(0.02, 1, 40)]))
_LEAST_KEYS = 10  # below the lowest quantile: with fewer it is mostly noise
_ANCHORS = {"l2": 0.0, "cosine": -1.0}  # the least key that there is; ip has none
_FAR = 2.0**600  # so far out that the line to it has slope 1 to the last bit


@dataclass(frozen=True)
class Calibration:
    """The map through some knots: linear between them, and with slope 1 below the first and above the last.

    Attributes:
        observed: keys of transformed vectors, strictly increasing.
        expected: what each is mapped to, strictly increasing.
    """

    observed: tuple[float, ...]
    expected: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check the knots.

        Raises:
            DataError: they are not strictly increasing, not finite, or not of the same number.
        """
        if not self.observed or len(self.observed) != len(self.expected):
            found = f"{len(self.observed)} and {len(self.expected)}"
            raise DataError("a calibration has as many expected keys as observed ones", found=found)
        for name, knots in (("observed", self.observed), ("expected", self.expected)):
            if not (np.isfinite(knots).all() and (np.diff(knots) > 0).all()):
                raise DataError(f"the {name} keys of a calibration do not increase", expected="finite, ascending")

    def apply(self, keys: Float32) -> Float32:
        """Map keys of any shape; never decreasing, also in float32, and infinity stays infinity."""
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
        """As the JSON file `calibration.json`."""
        return documents.encode(asdict(self))

    @classmethod
    def from_bytes(cls, data: bytes, where: str = PART) -> Self:
        """The inverse of `to_bytes`.

        Raises:
            DataError: it was not written by `to_bytes`, or was changed.
        """
        return documents.parse(cls, data, where, must_be_checked=True)

    @cached_property
    def _knots(self) -> tuple[Float64, Float64]:
        """The knots, and one far out; moved by the last bits so that no piece rises above the start of the next."""
        observed = np.array([*self.observed, self.observed[-1] + _FAR])
        expected = np.array([*self.expected, self.expected[-1] + _FAR])
        for left in range(len(observed) - 1):
            expected[left + 1] = max(expected[left + 1], expected[left])
            while (end := _end_of_piece(observed, expected, left)) > expected[left + 1]:
                expected[left + 1] = np.nextafter(end, np.inf)
        return observed, expected


def read_calibration(run: Run) -> Calibration | None:
    """The calibration of the run's transformation; None if it was fitted without one.

    Raises:
        DataError: there is no transformation, or the file is missing or damaged.
    """
    from pipeline.models.transformation import read_part  # here: torch takes seconds

    data = read_part(run, PART)
    return None if data is None else Calibration.from_bytes(data, run.transformation)


def fit_calibration(z: Float32, new: Float32, metric: str, seed: int) -> Calibration | None:
    """The map from pairs that the transformation has not seen.

    At most 5,000 pairs are used, and at most 2,000 of their new embeddings as queries. A query's own pair does not
    count.

    Args:
        z: (M, d) float32, the transformed vectors as they are served.
        new: (M, d) float32, row i is the new embedding of the image of z[i].
        metric: l2, ip or cosine.
        seed: of the draw.

    Returns:
        None if there are fewer than 20 pairs, or if their keys hardly vary.
    """
    if z.shape != new.shape:
        raise DataError("pairs have one transformed and one new vector each", expected=new.shape, found=z.shape)
    if len(z) < MIN_PAIRS:
        return None
    drawn = np.random.default_rng(seed).permutation(len(z))[:_MOST_PAIRS]
    sides = [_unit(side[drawn]) if metric == "cosine" else side[drawn] for side in (z, new)]
    queries = sides[1][:_MOST_QUERIES]
    levels = _LEVELS[_LEVELS * len(queries) * (len(drawn) - 1) >= _LEAST_KEYS]
    observed, expected = (np.quantile(_keys(queries, side, metric), levels) for side in sides)
    return _through(observed, expected, metric)


def _through(observed: Float64, expected: Float64, metric: str) -> Calibration | None:
    """The map through those of the knots that are above the ones before them in both."""
    knots = [(_ANCHORS[metric],) * 2] if metric in _ANCHORS else []
    for knot in zip(observed.tolist(), expected.tolist(), strict=True):
        if not knots or (knot[0] > knots[-1][0] and knot[1] > knots[-1][1]):
            knots.append(knot)
    return Calibration(*zip(*knots, strict=True)) if len(knots) > 1 else None


def _keys(queries: Float32, vectors: Float32, metric: str) -> Float32:
    """The keys of each query to all vectors but the one of its own row, in no order."""
    keys = queries @ vectors.T
    if metric == "l2":
        keys *= -2
        keys += np.einsum("nd,nd->n", queries, queries)[:, None]
        keys += np.einsum("nd,nd->n", vectors, vectors)
        np.maximum(keys, 0, out=keys)
    else:
        np.negative(keys, out=keys)
    others: Float32 = keys[~np.eye(*keys.shape, dtype=np.bool_)]
    return others


def _unit(vectors: Float32) -> Float32:
    unit: Float32 = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-30))
    return unit


def _end_of_piece(observed: Float64, expected: Float64, left: int) -> np.float64:
    """What `np.interp` would give at the next knot, by the piece that starts at this one."""
    width = observed[left + 1] - observed[left]
    slope = (expected[left + 1] - expected[left]) / width
    end: np.float64 = slope * width + expected[left]
    return end


@dataclass(frozen=True, slots=True)
class CalibratedRows:
    """The rows whose keys a calibration maps, (M,) bool, and the calibration; None if there is none."""

    transformed: Bools
    calibration: Calibration | None


def nearest_by_kind(
    queries: Float32, base: Float32, k: int, own: Int64, metric: str, mapped_rows: CalibratedRows
) -> tuple[Float32, Int64]:
    """As `nearest`, with the keys of some rows mapped: the k nearest of each kind, merged.

    Equal keys are in the order of `index.segment.search_by_kind`.

    Args:
        queries: (N, d) float32.
        base: (M, d) float32.
        k: at most M - 1.
        own: (N,) int64, the row to leave out for each query, or -1.
        metric: l2, ip or cosine.
        mapped_rows: the rows whose keys are mapped, and the map.
    """
    from pipeline.knn import nearest  # here: readers of a commit need no FAISS

    transformed, calibration = mapped_rows.transformed, mapped_rows.calibration
    if calibration is None or not transformed.any():
        return nearest(queries, base, k, own, metric)
    found = []
    for kind in np.unique(transformed):
        rows = np.flatnonzero(transformed == kind)
        keys, places = nearest(queries, base[rows], min(k + 1, len(rows)), metric=metric)
        places = rows[places]
        keys[places == own[:, None]] = np.inf
        found.append((calibration.apply(keys) if kind else keys, np.full(keys.shape, kind), keys, places))
    mapped, kinds, raw, rows = (np.concatenate(pair, axis=1) for pair in zip(*found, strict=True))
    order = np.lexsort((rows, raw, kinds, mapped), axis=1)[:, :k]
    return np.take_along_axis(mapped, order, axis=1), np.take_along_axis(rows, order, axis=1)
