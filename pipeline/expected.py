"""What a backfill is expected to give: the curve of this gallery with a band, before it is paid for.

Two things are known. Pairs that were held out give the bend of the way from the first state to the last: by how much
the curve of their own backfill, simulated with the run's order, is off the straight line. The probe set gives the two
ends for this gallery: its queries are searched in the whole transformed gallery, which is the first state itself; and
the last is

    M(new, new) at the gallery's size = M(new, h(old)) of the gallery + (M(new, new) - M(new, h(old))) of the probe set

because a metric falls with the number of images that compete, much alike for both. Without labels the last state is
100 by definition. The band is what sampling leaves open: the standard error of the ends over the probe's queries,
and of the bend over folds of the pairs. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from pipeline.ranking import Float64
from pipeline.run import Run

REACHED = (95, 99)
_BAND = 2.0  # standard errors
BAND_SAYS = "with two standard errors"


def expected_uri(run: Run) -> str:
    """Where the expected curve of a run is kept."""
    return run.path("reports", "expected.json")


@dataclass(frozen=True, slots=True)
class Ends:
    """A metric before anything is embedded and when all is, in per cent, with standard errors in points."""

    start: float
    end: float
    start_error: float
    end_error: float


@dataclass(frozen=True, slots=True)
class Expected:
    """The expected curve of one metric over `fractions` (P,), in per cent; `low` and `high` are the band."""

    fractions: Float64
    values: Float64
    low: Float64
    high: Float64

    def reached(self) -> dict[int, tuple[float, float, float]]:
        """For 95 and 99 per cent of the end: the fraction from which on the curve stays there, and its band."""
        end = float(self.values[-1])
        curves = (self.values, self.high, self.low)
        return {
            percent: tuple(fraction_for(curve, self.fractions, percent, end) for curve in curves)  # type: ignore[misc]
            for percent in REACHED
        }

    def to_json(self) -> dict[str, object]:
        """As JSON shows it."""
        reached = {
            str(percent): dict(zip(("fraction", "low", "high"), found, strict=True))
            for percent, found in self.reached().items()
        }
        return {name: getattr(self, name).tolist() for name in self.__slots__} | {"reached": reached}

    @classmethod
    def from_json(cls, tree: dict[str, list[float]]) -> Self:
        """The inverse of `to_json`."""
        return cls(**{name: np.array(tree[name]) for name in cls.__slots__})


def expect(curves: Float64, fractions: Float64, ends: Ends) -> Expected:
    """Lay the bend of held-out curves between the ends of a gallery.

    Args:
        curves: (F, P) of F folds, in per cent.
        fractions: (P,).
        ends: of the gallery.
    """
    bend = curves - (1 - fractions) * curves[:, :1] - fractions * curves[:, -1:]
    values = (1 - fractions) * ends.start + fractions * ends.end + bend.mean(axis=0)
    wobble = bend.std(axis=0, ddof=1) / np.sqrt(len(bend)) if len(bend) > 1 else np.zeros(len(fractions))
    parts = [(1 - fractions) * ends.start_error, fractions * ends.end_error, wobble]
    error = np.sqrt(np.square(parts).sum(axis=0))
    return Expected(fractions, values, values - _BAND * error, values + _BAND * error)


def fraction_for(values: Float64, fractions: Float64, percent: float, full: float | None = None) -> float:
    """The least fraction from which on a curve (P,) stays at so many per cent of `full`, by default its end.

    Between points it is linear; 1 where it is not reached before the end.
    """
    target = (values[-1] if full is None else full) * percent / 100
    below = np.flatnonzero(values < target)
    if not len(below):
        return 0.0
    last = int(below[-1])
    if last == len(values) - 1:
        return 1.0
    step = (target - values[last]) / (values[last + 1] - values[last])
    return float(fractions[last] + step * (fractions[last + 1] - fractions[last]))
