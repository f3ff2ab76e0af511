"""The inverse of the hash that orders images."""

from __future__ import annotations

import numpy as np

from pipeline.arrays import Int64


def unmix(hashes: np.ndarray, seed: int) -> Int64:
    """The inverse of splitmix64, from its definition: there is one only if the hash is a bijection."""

    def unshift(value: int, by: int) -> int:
        found = value
        for _ in range(64 // by):
            found = value ^ (found >> by)
        return found

    ids = []
    for value in hashes.tolist():
        z = unshift(value, 31) * pow(0x94D049BB133111EB, -1, 2**64) % 2**64
        z = unshift(z, 27) * pow(0xBF58476D1CE4E5B9, -1, 2**64) % 2**64
        z = (unshift(z, 30) - (seed + 1) * 0x9E3779B97F4A7C15) % 2**64
        ids.append(z - 2**64 if z >= 2**63 else z)
    return np.array(ids, np.int64)
