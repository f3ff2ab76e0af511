"""Whether the pairs look like the gallery: what was measured on held-out pairs tells little where they do not.

Two questions. Do their old embeddings look alike? By the nearest-neighbour two-sample test (Schilling, JASA 1986;
Henze, Annals of Statistics 1988): of a pooled sample, the share of neighbours that come from the same side, beside
what it is when the sides are drawn by lot. And once there is a transformation: is it as near to the new encoder on
images of the gallery as on held-out pairs? Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.arrays import Float32, Float64

_NEIGHBOURS = 10
_MOST = 2000
_LOTS = 200
_FAR = 4.0
"""Standard deviations beyond which a share of neighbours is no chance: images that are near-copies cling together."""

_LARGER = 1.1
"""An error that is larger by so much says that pairs of this kind are missing."""

_SURE = 3.0  # standard errors of the ratio


@dataclass(frozen=True, slots=True)
class DistributionShift:
    """How much held-out pairs look like images of the gallery.

    Attributes:
        same_side: of the old embeddings, the share of nearest neighbours from their own side: 0.5 where both look
            alike, 1 where they are apart.
        noise: the standard deviation of that share where sides are drawn by lot.
        error_ratio: the mean squared distance of transformed vectors from the new embeddings, of the gallery's images
            over that of held-out pairs; None where there is no transformation yet.
        error_noise: its standard error.
    """

    same_side: float
    noise: float
    error_ratio: float | None = None
    error_noise: float = 0.0

    @property
    def apart(self) -> bool:
        """Whether the old embeddings differ by more than chance has it."""
        return self.same_side - 0.5 > _FAR * self.noise

    @property
    def further(self) -> bool:
        """Whether the transformation is clearly worse on the gallery than on held-out pairs."""
        return self.error_ratio is not None and self.error_ratio - _SURE * self.error_noise > _LARGER

    def warnings(self, known: bool = False) -> Sequence[str]:
        """A sentence for each of the two that is so, and what to do; nothing where pairs look like the gallery.

        Args:
            known: whether it was chosen by images of the gallery already, so that there is nothing to do.
        """
        found = []
        if self.apart:
            found.append(
                f"The pairs do not look like the gallery: {self.same_side:.1%} of the nearest old embeddings are from "
                f"their own side, where 50 % (± {100 * self.noise:.1f}) would be alike."
            )
        if self.further:
            found.append(
                "The transformation is further from the new encoder on the gallery than on the pairs: "
                f"{self.error_ratio:.2f} (± {self.error_noise:.2f}) times their squared error."
            )
        if found and not known:
            found.append(
                "What held-out pairs promise may not hold here. Take pairs of the gallery's kind; or, in a new run, "
                "name some of its images with their labels in probe.manifest and choose by them "
                "(select.measured_on: probe)."
            )
        return found


def distribution_shift(
    pairs: Float32, gallery: Float32, seed: int, errors: tuple[Float64, Float64] | None = None
) -> DistributionShift:
    """Compare images of both sides.

    Args:
        pairs: (M, d) float32, old embeddings of pairs.
        gallery: (N, d) float32, those of images of the gallery; of both at most 2,000 are taken, equally many, by
            chance.
        seed: of that chance.
        errors: |new - z|^2 of held-out pairs and of images of the gallery, each (n,) float64.
    """
    from pipeline.knn import nearest  # here: what only shows a likeness must not wait for faiss

    rng, count = np.random.default_rng(seed), min(len(pairs), len(gallery), _MOST)
    pool = np.concatenate([side[rng.permutation(len(side))[:count]] for side in (pairs, gallery)])
    rows = np.arange(len(pool))
    _, found = nearest(pool, pool, min(_NEIGHBOURS, len(pool) - 1), rows)
    sides = rows < count

    def same(sides: NDArray[np.bool_]) -> float:
        return float((sides[found] == sides[:, None]).mean())

    noise = float(np.std([same(rng.permutation(sides)) for _ in range(_LOTS)]))
    return DistributionShift(same(sides), noise, *_ratio(errors))


def _ratio(errors: tuple[Float64, Float64] | None) -> tuple[float | None, float]:
    """That of the second mean to the first, and its standard error, by the delta method."""
    if errors is None:
        return None, 0.0
    means = [float(side.mean()) for side in errors]
    if not all(means):
        return None, 0.0
    relative = [float(side.var(ddof=1)) / len(side) / mean**2 for side, mean in zip(errors, means, strict=True)]
    ratio = means[1] / means[0]
    return ratio, ratio * float(np.sqrt(sum(relative)))
