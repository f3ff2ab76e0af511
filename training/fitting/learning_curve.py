"""Extrapolate the linear map's quality to more training pairs. Pure.

    held-out quality of the maps fitted on 1, 2, 3 and all folds -> q = a - b n^-c through them -> n for a target q

Source: the error falls as a power law of the number of examples; Hestness et al., "Deep Learning Scaling is
Predictable, Empirically" (2017).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_EXPONENTS = (0.25, 0.5, 1.0)
_MOST = 100.0
"""A predicted number above this many times the present pairs is not trusted."""


@dataclass(frozen=True, slots=True)
class LearningCurve:
    """Quality in per cent, for ascending numbers of pairs."""

    pairs: tuple[int, ...]
    quality: tuple[float, ...]

    def pairs_for(self, target: float) -> int | None:
        """The number of pairs at which `target` is expected; None if over 100 times the present number, or never."""
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
    """a, b and c of a - b n^-c by least squares, with c from _EXPONENTS; None if the quality does not rise."""
    found: list[tuple[float, float, float, float]] = []
    for exponent in _EXPONENTS:
        design = np.stack([np.ones(len(pairs)), -(np.asarray(pairs, np.float64) ** -exponent)], axis=1)
        (best, gain), *_ = np.linalg.lstsq(design, np.asarray(quality, np.float64), rcond=None)
        error = float(np.square(design @ (best, gain) - quality).sum())
        if gain > 0:
            found.append((error, float(best), float(gain), exponent))
    return min(found)[1:] if found else None
