"""Policies: which images are re-embedded first. Pure functions from the scored columns to a priority.

An image with a higher priority comes earlier; ties are broken by the plan. A policy sees one part of
the gallery at a time, so a priority must not depend on what else is in the part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline import user_code
from pipeline.errors import DataError
from pipeline.schema import Float32, Int64, splitmix64


@dataclass(frozen=True, slots=True)
class Scored:
    """The scored columns of N images, row i of each belongs to `ids[i]`.

    Attributes:
        ids: (N,) int64.
        uncertainty: (N,) float32, s = log sigma^2 of the transformation.
        transformed: (N, d_new) float32.
        old_embeddings: (N, d_old) float32.
        labels: (N,) str or None.
        groups: (N,) str or None.
    """

    ids: Int64
    uncertainty: Float32
    transformed: Float32
    old_embeddings: Float32
    labels: NDArray[np.object_]
    groups: NDArray[np.object_]


Policy = Callable[[Scored], Float32]


def load_policy(name: str, seed: int) -> Policy:
    """A policy by its name in the config: `uncertainty`, `random`, or the user's own `module:function`.

    Raises:
        ConfigError: the function cannot be imported.
    """
    if name == "uncertainty":
        return uncertainty
    if name == "random":
        return lambda scored: random(scored, seed)
    return user_code.load_function(name, "the policy", f"plan.policy: {name}")


def prioritise(policy: Policy, scored: Scored, where: str) -> Float32:
    """The priorities of a part, (N,) float32, checked.

    Raises:
        ConfigError: the policy raised something.
        DataError: the policy gave another shape, or a NaN.
    """
    with user_code.own_code("the policy failed", where):
        priority = np.asarray(policy(scored), dtype=np.float32)
    if priority.shape != scored.ids.shape or np.isnan(priority).any():
        raise DataError(
            "the policy gave unusable priorities",
            expected=f"{len(scored.ids)} numbers, none of them NaN",
            found=f"shape {priority.shape}, {int(np.isnan(priority).sum())} NaN",
            where=where,
        )
    return priority


def uncertainty(scored: Scored) -> Float32:
    """Most uncertain first: FastFill's order (arXiv 2303.04766, section 3.3)."""
    return scored.uncertainty


def random(scored: Scored, seed: int) -> Float32:
    """A shuffle by a stable hash of the id, as a fraction of 1."""
    return (splitmix64(scored.ids, seed) >> np.uint64(40)).astype(np.float32) / np.float32(2**24)
