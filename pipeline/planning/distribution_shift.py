"""Distribution shift: do the pairs look like the gallery? If not, held-out pairs say little about it.

Two tests. Old embeddings: the nearest-neighbour two-sample test (Schilling, JASA 1986; Henze, Annals of Statistics
1988), the share of neighbours from the same side in a pooled sample, against random sides. And with a transformation:
its error on images of the gallery against its error on held-out pairs.
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
"""Standard deviations above which the share is not chance; near-copies of images raise it a little."""

_LARGER = 1.1
"""Ratio of errors above which pairs of the gallery's kind are missing."""

_SURE = 3.0  # standard errors of the ratio


@dataclass(frozen=True, slots=True)
class DistributionShift:
    """How much held-out pairs look like images of the gallery."""

    # The share of nearest old embeddings from the same side: 0.5 if both look alike, 1 if they are apart
    same_side: float
    noise: float  # standard deviation of that share for random sides
    # Mean squared error of the transformation on the gallery's images over that on held-out pairs; None without a
    # transformation
    error_ratio: float | None = None
    error_noise: float = 0.0  # its standard error

    @property
    def apart(self) -> bool:
        """Whether the old embeddings differ by more than chance."""
        return self.same_side - 0.5 > _FAR * self.noise

    @property
    def further(self) -> bool:
        """Whether the transformation is clearly worse on the gallery than on held-out pairs."""
        return self.error_ratio is not None and self.error_ratio - _SURE * self.error_noise > _LARGER

    def warnings(self, known: bool = False) -> Sequence[str]:
        """A sentence per shift that was found, and advice unless the recipe was chosen on the gallery (`known`)."""
        found = []
        if self.apart:
            found.append(
                f"The pairs do not look like the gallery: {self.same_side:.1%} of the nearest old embeddings are from "
                f"their own side; 50 % (± {100 * self.noise:.1f}) would mean alike."
            )
        if self.further:
            found.append(
                "The transformation is further from the new encoder on the gallery than on the pairs: "
                f"{self.error_ratio:.2f} (± {self.error_noise:.2f}) times their squared error."
            )
        if found and not known:
            found.append(
                "Figures from held-out pairs may not hold for this gallery. Use pairs of the gallery's kind. Or, in a "
                "new run, name some of its images with labels in probe.manifest and select on them "
                "(select.measured_on: probe)."
            )
        return found


def distribution_shift(
    pairs: Float32, gallery: Float32, seed: int, errors: tuple[Float64, Float64] | None = None
) -> DistributionShift:
    """Compare images of both sides; up to 2,000 of each are drawn, equally many.

    Args:
        pairs: (M, d) float32, old embeddings of pairs.
        gallery: (N, d) float32, of the gallery.
        seed: of the draw.
        errors: |new - z|^2 of held-out pairs and of images of the gallery, each (n,) float64.
    """
    from pipeline.knn import nearest  # here: commands that only show a shift must not wait for faiss

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
    """The second mean over the first, and its standard error by the delta method."""
    if errors is None:
        return None, 0.0
    means = [float(side.mean()) for side in errors]
    if not all(means):
        return None, 0.0
    relative = [float(side.var(ddof=1)) / len(side) / mean**2 for side, mean in zip(errors, means, strict=True)]
    ratio = means[1] / means[0]
    return ratio, ratio * float(np.sqrt(sum(relative)))
