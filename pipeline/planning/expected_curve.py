"""The expected curve of a backfill with its band: how quality grows with the re-embedded fraction.

We estimate the curve from its two ends and its bend. The bend comes from held-out pairs: how far the curve of their
own simulated backfill is from the straight line. The ends come from the probe set, searched in the whole transformed
gallery: M(new, h(old)) is the start, and the end is

    M(new, new) at the gallery's size = M(new, h(old)) of the gallery + (M(new, new) - M(new, h(old))) of the probe set

because a metric falls with the number of competing images, about equally for both. Without labels the end is 100 by
definition. With labels the probe set's own backfill gives a second bend: of few images, but the gallery's own. Its
weight grows with their number. The band is the sampling error: of the ends and of the probe set's bend over queries,
and of the pairs' bend over folds (`interval`). The fractions for 95 and 99 % have bands from draws of these errors.
Each drawn curve is measured by its own end, so an error that both ends share hardly counts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from pipeline.arrays import Float64
from pipeline.errors import DataError
from pipeline.run import Run
from pipeline.storage import documents

REACHED = (95, 99)
_BAND = 2.0  # standard errors
_BAND_QUANTILES = (0.0228, 0.9772)  # two standard deviations of a normal distribution
_DRAWS = 1000
_WORTH = 2000
"""Number of gallery images whose own bend weighs as much as that of the held-out pairs. The new encoder was trained on
the pairs and is better on them (measured by benchmarks/quality/expected.py)."""

BAND_SAYS = "with intervals of two standard errors"
_CURVES = ("fractions", "values", "low", "high")


@dataclass(frozen=True, slots=True)
class CurveEnds:
    """A metric with nothing embedded and with all embedded, in per cent, with standard errors in points."""

    start: float
    end: float
    start_error: float
    end_error: float
    correlation: float = 0.0  # of the two errors, as both are measured with the same queries
    # The number of queries of each mean; 0 if it is known, or not such a mean
    start_queries: int = 0
    end_queries: int = 0


@dataclass(frozen=True, slots=True)
class Reached:
    """The fraction from which a curve stays at so many per cent of its end, and its band."""

    fraction: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Expected:
    """The expected curve of one metric over `fractions` (P,), in per cent; `low` and `high` are the band."""

    fractions: Float64
    values: Float64
    low: Float64
    high: Float64
    reached: dict[int, Reached]  # for each of REACHED
    sample: int = 0  # number of images that represent the gallery; 0 if it is the whole gallery
    sampled: str = ""  # the reason for a sample, in words

    def to_json(self) -> dict[str, object]:
        """The JSON tree."""
        reached = {str(percent): asdict(found) for percent, found in self.reached.items()}
        curves: dict[str, object] = {name: getattr(self, name).tolist() for name in _CURVES}
        return curves | {"reached": reached, "sample": self.sample, "sampled": self.sampled}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        reached = {int(percent): Reached(**found) for percent, found in tree["reached"].items()}
        curves = {name: np.clip(tree[name], 0, 1 if name == "fractions" else 100) for name in _CURVES}
        return cls(**curves, reached=reached, sample=tree.get("sample", 0), sampled=tree.get("sampled", ""))


def expected_uri(run: Run) -> str:
    """The URI of a run's expected curve."""
    return run.path("reports", "expected.json")


def read_expected(data: bytes, where: str) -> dict[str, Expected]:
    """The expected curves by metric, from the bytes of their file.

    Raises:
        DataError: the file is damaged or of another format.
    """
    tree = documents.decode(data, where, documents.REDO)
    try:
        return {name: Expected.from_json(item) for name, item in tree.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError("not expected curves", found=repr(error), where=where, remedy=documents.REDO) from error


def expect(
    curves: Float64 | None,
    fractions: Float64,
    ends: CurveEnds,
    sample: int = 0,
    sampled: str = "",
    own: Float64 | None = None,
) -> Expected:
    """Lay the bends of held-out curves, and of the probe set's own, between the ends of a gallery.

    Args:
        curves: (F, P) of F folds, in per cent; None if pairs have no labels.
        fractions: (P,).
        ends: of the gallery.
        sample: number of images that represent the gallery; 0 for all.
        sampled: the reason.
        own: (Q, P) of the probe set's queries in its own backfill, in per cent; required if `curves` is None.
    """
    nothing = np.zeros((1, len(fractions)))
    bend, wobble = _bend(nothing if curves is None else curves, fractions)
    if own is not None:
        share, (mine, noise) = 1.0 if curves is None else len(own) / (len(own) + _WORTH), _bend(own, fractions)
        few = np.asarray(np.linalg.qr(noise, mode="r"))  # the same squares and products, in as many rows as points
        bend, wobble = (1 - share) * bend + share * mine, np.concatenate([(1 - share) * wobble, share * few])
    values = (1 - fractions) * ends.start + fractions * ends.end + bend
    errors = np.concatenate([_end_errors(ends, fractions), wobble])
    error = np.sqrt(np.square(errors).sum(axis=0))
    reached = {percent: _reached(values, errors, fractions, percent) for percent in REACHED}
    values = np.clip(values, 0, 100)
    one_of = [1 / queries if queries else 0.0 for queries in (ends.start_queries, ends.end_queries)]
    low, high = interval(values, error, (1 - fractions) * one_of[0] + fractions * one_of[1])
    return Expected(fractions, values, low, high, reached, sample, sampled)


def interval(values: Float64, errors: Float64, one_of: Float64) -> tuple[Float64, Float64]:
    """An interval of two standard errors around figures in per cent, inside 0 to 100 and around the figure.

    It holds each p with |figure - p| <= 2 sqrt(p (1 - p) / n + e^2). With e = 0 that is Wilson's score interval of a
    proportion of n queries (Wilson 1927; Brown, Cai and DasGupta 2001). e^2 is the variance beyond a proportion's, if
    the figure is a sum of several means. A mean of values in [0, 1], such as mAP, has less variance than a proportion:
    then n is the number of queries of a proportion with that variance (Korn and Graubard 1998).

    Args:
        values: (P,).
        errors: (P,) standard errors, in points.
        one_of: (P,) 1 / n of each; 0 if it is not a mean over queries.
    """
    figure, variance = values / 100, np.square(errors / 100)
    binomial = figure * (1 - figure)
    inverse = np.array(one_of, np.float64)
    np.divide(variance, binomial, out=inverse, where=variance < binomial * one_of)
    beyond = np.maximum(variance - binomial * inverse, 0)
    z = _BAND**2
    centre = (figure + z * inverse / 2) / (1 + z * inverse)
    half = np.sqrt(np.maximum(z * (binomial * inverse + beyond * (1 + z * inverse) + z * inverse**2 / 4), 0))
    half /= 1 + z * inverse
    low, high = (100 * np.clip(side, 0, 1) for side in (centre - half, centre + half))
    return np.minimum(low, values), np.maximum(high, values)


def fraction_for(values: Float64, fractions: Float64, percent: float, full: float | None = None) -> float:
    """The least fraction from which a curve (P,) stays at so many per cent of `full`, by default its end.

    Linear between points; 1 if it is not reached before the end.
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


def _bend(curves: Float64, fractions: Float64) -> tuple[Float64, Float64]:
    """The mean distance of curves (n, P) from the straight line, (P,); and (n, P) whose squares sum to its variance."""
    bend, num = curves - (1 - fractions) * curves[:, :1] - fractions * curves[:, -1:], len(curves)
    return bend.mean(axis=0), (bend - bend.mean(axis=0)) / np.sqrt(num * max(num - 1, 1))


def _end_errors(ends: CurveEnds, fractions: Float64) -> Float64:
    """(2, P): the effect of one standard deviation of the error that both ends share, and of the end's own error."""
    shared = ends.correlation * ends.end_error
    own = np.sqrt(max(ends.end_error**2 - shared**2, 0.0))
    return np.stack([(1 - fractions) * ends.start_error + fractions * shared, fractions * own])


def _reached(values: Float64, errors: Float64, fractions: Float64, percent: float) -> Reached:
    """The band comes from curves drawn with independent errors (E, P), each measured by its own end."""
    drawn = values + np.random.default_rng(0).normal(size=(_DRAWS, len(errors))) @ errors
    found = np.quantile([fraction_for(curve, fractions, percent) for curve in drawn], _BAND_QUANTILES)
    fraction = fraction_for(values, fractions, percent)
    return Reached(fraction, float(min(found[0], fraction)), float(max(found[1], fraction)))
