"""Equality of vectors that were computed twice: equal but for rounding.

Equal inputs give equal bytes if processors, libraries, batches and threads are equal. Otherwise a matrix product adds
its terms in another order, and the last bits differ. Therefore:

- A file of vectors that another machine makes again may have another sha256. The first published file is kept.
- Copied bytes are equal everywhere: ids, kinds, parts of the vector log, segments of an exact codec.
- Vectors that were computed twice are compared with `same_vectors`.

Rounding may also choose the neighbouring code or list. The decoded vectors then differ by one step of the codec.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.arrays import Float32, Int64

ROUNDING = 1e-5
"""Largest distance between two computations of a float32 vector, relative to its length.

A sum of d products in float32 is off by about sqrt(d) 2^-24 of its size: 3e-6 for d = 2048. Measured between AVX-512
and SSE kernels of MKL, OpenBLAS, oneDNN and FAISS: at most 9e-7, for whole encoders.
"""

_SIDES: tuple[tuple[int, Literal["left", "right"]], ...] = ((-1, "left"), (1, "right"))


def same_vectors(one: Float32, other: Float32) -> NDArray[np.bool_]:
    """Which rows of two (n, d) arrays are equal but for rounding: |a - b| <= ROUNDING * max(|a|, |b|), (n,) bool."""
    size = np.maximum(np.linalg.norm(one, axis=1), np.linalg.norm(other, axis=1))
    same: NDArray[np.bool_] = np.linalg.norm(one - other, axis=1) <= ROUNDING * size
    return same


def find_same(vectors: Float32, among: Float32) -> Int64:
    """The last row of `among` (M, d) that equals each of `vectors` (N, d) but for rounding: (N,) int64, -1 for none.

    Equal vectors have equal projections on any direction, so only rows with the same projection are compared.
    """
    direction = np.random.default_rng(0).standard_normal(vectors.shape[1])
    known, wanted = (side.astype(np.float64) @ direction for side in (among, vectors))
    order = np.argsort(known, kind="stable")
    lengths = np.linalg.norm(vectors, axis=1) * (1 + 2 * ROUNDING)  # the other vector may be the longer one
    reach = ROUNDING * np.linalg.norm(direction) * lengths
    first, after = (np.searchsorted(known[order], wanted + sign * reach, side) for sign, side in _SIDES)
    found = np.full(len(vectors), -1, np.int64)
    while len(rows := np.flatnonzero((found < 0) & (after > first))):
        after[rows] -= 1
        candidates = order[after[rows]]
        same = same_vectors(vectors[rows], among[candidates])
        found[rows[same]] = candidates[same]
    return found
