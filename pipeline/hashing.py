"""Hashes of ids, for shards and for samples; the same on every machine."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.arrays import Int64


def splitmix64(values: Int64, seed: int) -> NDArray[np.uint64]:
    """A bijective 64-bit hash of each id, (N,) uint64; the same on every machine and in every version.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014).
    """
    with np.errstate(over="ignore"):
        z = values.astype(np.uint64) + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def shard_of(ids: Int64, num_shards: int) -> NDArray[np.int32]:
    """The shard of each id, (N,) int32 in [0, num_shards): independent of the run's seed."""
    return (splitmix64(ids, seed=0x5A4D) % np.uint64(num_shards)).astype(np.int32)
