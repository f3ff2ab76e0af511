"""What equals what: bytes on equal processors, decoded vectors within a tolerance across them.

The contract. Equal inputs give equal bytes on equal processors with equal builds of the libraries, equal batches and
equal threads. Another processor, batch size or number of threads adds up the terms of a matrix product in another
order, so the last bits differ. Three things follow:

- A file that holds vectors may get another name (its sha256) if another machine makes it anew. Both files are right.
  So nothing is refused because of such a name: the first file that is published counts.
- Bytes that are only copied stay equal everywhere: ids, kinds, parts of the vector log, segments of an exact codec.
- Whatever compares vectors that two machines or two batches computed uses `same_vectors`.

Where a vector lies between two codes or two lists, rounding may choose the other one. The decoded vectors then differ
by a step of the codec, and both are equally near to what was stored.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.arrays import Float32, Int64

ROUNDING = 1e-5
"""How far two computations of a float32 vector may lie apart, over its length.

A sum of d products in float32 is off by about sqrt(d) 2^-24 of its size: 3e-6 for d = 2048. Measured between AVX-512
and SSE kernels of MKL, OpenBLAS, oneDNN and FAISS: at most 5e-7 for products of up to 2,048 terms, 9e-7 for whole
encoders (CIFAR-100's, float32), 4e-7 between one row and 500 rows at a time. Weights or products in TF32 or bfloat16
lie farther apart, and are another configuration, not another processor.
"""

_SIDES: tuple[tuple[int, Literal["left", "right"]], ...] = ((-1, "left"), (1, "right"))


def same_vectors(one: Float32, other: Float32) -> NDArray[np.bool_]:
    """Which rows of two (n, d) arrays are the same vector, but for rounding: (n,) bool.

    |a - b| <= ROUNDING * max(|a|, |b|), so that the order of the two does not count.
    """
    size = np.maximum(np.linalg.norm(one, axis=1), np.linalg.norm(other, axis=1))
    same: NDArray[np.bool_] = np.linalg.norm(one - other, axis=1) <= ROUNDING * size
    return same


def find_same(vectors: Float32, among: Float32) -> Int64:
    """Which row of `among` (M, d) each of `vectors` (N, d) is, but for rounding: (N,) int64, -1 for none.

    Vectors that are the same have the same projection on any direction, so only rows with the same one are compared.
    If several rows are the same, it is the last one.
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
