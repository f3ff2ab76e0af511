"""How good the linear map gets with more pairs, from what it reaches with a part of them. Pure.

    quality on held-out pairs of the maps that 1, 2, 3 and all folds give -> a - b n^-c through these -> n for a target

Source: learning curves of statistical learners fall as an inverse power law of the number of examples; Hestness et
al., "Deep Learning Scaling is Predictable, Empirically" (2017).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_EXPONENTS = (0.25, 0.5, 1.0)
_MOST = 100.0
"""A prediction of more than so many times the pairs there are is none."""


@dataclass(frozen=True, slots=True)
class LearningCurve:
    """Quality against the number of pairs.

    Attributes:
        pairs: numbers of pairs, ascending.
        quality: in per cent, of each.
    """

    pairs: tuple[int, ...]
    quality: tuple[float, ...]

    def pairs_for(self, target: float) -> int | None:
        """The number of pairs with which the quality is to be expected to reach `target`.

        Returns:
            None where no number up to 100 times the present one does, or the quality does not rise with the pairs.
        """
        if self.quality[-1] >= target:
            return self.pairs[-1]
        fitted = _power_law(self.pairs, self.quality)
        if fitted is None:
            return None
        best, gain, exponent = fitted
        if best <= target:
            return None
        needed = (gain / (best - target)) ** (1 / exponent)
        return None if needed > _MOST * self.pairs[-1] else int(np.ceil(max(needed, self.pairs[-1] + 1)))


def _power_law(pairs: Sequence[int], quality: Sequence[float]) -> tuple[float, float, float] | None:
    """a, b and c of a - b n^-c by least squares, c of _EXPONENTS; None where the quality does not rise."""
    found: list[tuple[float, float, float, float]] = []
    for exponent in _EXPONENTS:
        design = np.stack([np.ones(len(pairs)), -(np.asarray(pairs, np.float64) ** -exponent)], axis=1)
        (best, gain), *_ = np.linalg.lstsq(design, np.asarray(quality, np.float64), rcond=None)
        error = float(np.square(design @ (best, gain) - quality).sum())
        if gain > 0:
            found.append((error, float(best), float(gain), exponent))
    return min(found)[1:] if found else None
