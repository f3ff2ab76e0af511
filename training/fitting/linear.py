"""The affine map from old to new embeddings, fitted from sums over the pairs, and its error. Pure.

    pairs -> Sums per fold (added up over blocks) -> lambda, or Procrustes, by cross-validation
          -> the map of all folds, and for each fold the map of the others

Shape suffixes: n = pairs, i = inputs (old, with side), o = outputs (new), g = lambdas. Sources: ridge regression, Hoerl
and Kennard (Technometrics 12, 1970); orthogonal Procrustes, Schonemann (Psychometrika 31, 1966).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from pipeline.arrays import Float32, Int64
from pipeline.hashing import splitmix64

Float64 = NDArray[np.float64]
NUM_FOLDS = 5
LAMBDAS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_SALT = 0x11EA
_BLOCK = 4096
_FEW = 10
"""Pairs per input up to which Procrustes is tried: with more it does not win, and it is the slowest step."""


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums over some pairs, float64: of x, y, x x', x y' and |y|^2. A least-squares fit needs no more."""

    count: int
    x_i: Float64
    y_o: Float64
    xx_ii: Float64
    xy_io: Float64
    yy: float

    @classmethod
    def of(cls, x_ni: NDArray[np.floating], y_no: NDArray[np.floating]) -> Self:
        """The sums of pairs in memory, in float64, block by block."""
        d_in, d_out = x_ni.shape[1], y_no.shape[1]
        xx_ii, xy_io, yy = np.zeros((d_in, d_in)), np.zeros((d_in, d_out)), 0.0
        x_i, y_o = np.zeros(d_in), np.zeros(d_out)
        for start in range(0, len(x_ni), _BLOCK):
            x, y = (item[start : start + _BLOCK].astype(np.float64) for item in (x_ni, y_no))
            xx_ii += x.T @ x
            xy_io += x.T @ y
            x_i += x.sum(axis=0)
            y_o += y.sum(axis=0)
            yy += float(np.vdot(y, y))
        return cls(len(x_ni), x_i, y_o, xx_ii, xy_io, yy)

    def copy(self) -> Self:
        """The same sums in arrays of their own."""
        arrays = (self.x_i.copy(), self.y_o.copy(), self.xx_ii.copy(), self.xy_io.copy())
        return type(self)(self.count, *arrays, self.yy)

    def absorb(self, other: Self, sign: int = 1) -> Self:
        """Add the sums of `other`, or subtract them with sign -1, in place."""
        arrays = (self.x_i, self.y_o, self.xx_ii, self.xy_io)
        for mine, more in zip(arrays, (other.x_i, other.y_o, other.xx_ii, other.xy_io), strict=True):
            (np.add if sign > 0 else np.subtract)(mine, more, out=mine)
        return type(self)(self.count + sign * other.count, *arrays, self.yy + sign * other.yy)

    def without(self, other: Self) -> Self:
        """The sums of those pairs that are not among the other's."""
        return self.copy().absorb(other, sign=-1)

    def about(self, mean_i: Float64, mean_o: Float64) -> tuple[Float64, Float64, float]:
        """The sums xx (I, I), xy (I, O) and yy of x - mean_i and y - mean_o."""
        n = self.count
        shift_i, shift_o = self.x_i - n * mean_i, self.y_o - n * mean_o
        xx_ii = self.xx_ii - np.outer(mean_i, self.x_i) - np.outer(shift_i, mean_i)
        xy_io = self.xy_io - np.outer(mean_i, self.y_o) - np.outer(shift_i, mean_o)
        return xx_ii, xy_io, self.yy - float(mean_o @ self.y_o) - float(shift_o @ mean_o)


Folds = list[Sums]
"""The sums of each fold, NUM_FOLDS of them."""


@dataclass(frozen=True, slots=True)
class Affine:
    """y = (x - mean_i) weight_io + mean_o, float64."""

    weight_io: Float64
    mean_i: Float64
    mean_o: Float64

    def __call__(self, x_ni: Float32) -> Float32:
        """(N, I) to (N, O), both float32."""
        weight = self.weight_io.astype(np.float32)
        found: Float32 = (x_ni - self.mean_i.astype(np.float32)) @ weight + self.mean_o.astype(np.float32)
        return found


@dataclass(frozen=True, slots=True)
class Fitted:
    """A map and its cross-validation.

    Attributes:
        map: fitted on all pairs.
        without: for each fold, the map fitted on the others.
        lam: the weight of the ridge penalty, in units of the mean variance of the inputs; None for Procrustes.
        error: the cross-validated squared error, as the mean over pairs and dimensions.
        deviation_i: standard deviations of the inputs; 1 for constant inputs.
    """

    map: Affine
    without: tuple[Affine, ...]
    lam: float | None
    error: float
    deviation_i: Float64


def folds_of(indices: Int64) -> Int64:
    """The fold of each pair, (N,) int64, by a hash of its index."""
    found: Int64 = (splitmix64(indices, _SALT) % np.uint64(NUM_FOLDS)).astype(np.int64)
    return found


def sums_of(x_ni: Float32, y_no: Float32, folds_n: Int64) -> Folds:
    """The sums of each fold."""
    rows = [np.flatnonzero(folds_n == fold) for fold in range(NUM_FOLDS)]
    return [Sums.of(x_ni[mine], y_no[mine]) for mine in rows]


def added(first: Folds | None, second: Folds | None) -> Folds | None:
    """The sums of both, fold by fold, in the arrays of the first; None stands for no pairs."""
    if first is None or second is None:
        return first or second
    return [one.absorb(other) for one, other in zip(first, second, strict=True)]


def total(folds: Folds) -> Sums:
    """The sums of all folds."""
    found = folds[0].copy()
    for fold in folds[1:]:
        found = found.absorb(fold)
    return found


def fit(folds: Folds) -> Fitted:
    """The map with the least cross-validated error: ridge with a lambda of LAMBDAS, or Procrustes if pairs are few.

    At least two of the folds must have pairs.
    """
    everything = total(folds)
    few = everything.count < _FEW * len(everything.x_i)
    errors_g = np.zeros(len(LAMBDAS))
    for fold in folds:
        errors_g += _ridge_errors(everything.without(fold), fold) if fold.count else 0.0
    best = int(np.argmin(errors_g))
    lam: float | None = LAMBDAS[best]
    error = float(errors_g[best])
    if few:
        turned = sum(_error(procrustes(everything.without(fold)), fold) for fold in folds if fold.count)
        if turned < error:
            lam, error = None, turned
    makes = procrustes if lam is None else functools.partial(ridge, lam=lam)
    variance_i = np.diag(everything.about(*_means(everything))[0]) / everything.count
    return Fitted(
        map=makes(everything),
        without=tuple(makes(everything.without(fold)) for fold in folds),
        lam=lam,
        error=max(error, 0.0) / everything.count / len(everything.y_o),
        deviation_i=deviations(variance_i),
    )


def ridge(sums: Sums, lam: float) -> Affine:
    """W = (X'X + lambda tr(X'X)/d I)^-1 X'Y on centred x and y."""
    mean_i, mean_o = _means(sums)
    xx_ii, xy_io, _ = sums.about(mean_i, mean_o)
    d_in = len(mean_i)
    penalty = lam * np.trace(xx_ii) / d_in
    regular = xx_ii + (penalty if penalty > 0 else 1.0) * np.eye(d_in)
    return Affine(np.linalg.solve(regular, xy_io).astype(np.float64, copy=False), mean_i, mean_o)


def procrustes(sums: Sums) -> Affine:
    """A rotation R = UV' from X'Y = USV', scaled by c = tr(S) / tr(R'X'XR); semi-orthogonal if the widths differ."""
    mean_i, mean_o = _means(sums)
    xx_ii, xy_io, _ = sums.about(mean_i, mean_o)
    u_ik, s_k, v_ko = np.linalg.svd(xy_io, full_matrices=False)
    spread = float(np.vdot(u_ik, xx_ii @ u_ik))
    scale = s_k.sum() / spread if spread > 0 else 0.0
    return Affine(scale * (u_ik @ v_ko), mean_i, mean_o)


def deviations(variance: Float64) -> Float64:
    """Square roots of variances; 1 for a variance near zero, so that dividing by it changes nothing."""
    usable = variance > 1e-12 * max(float(variance.max(initial=0.0)), 1e-300)
    found: Float64 = np.sqrt(np.where(usable, variance, 1.0))
    return found


def _means(sums: Sums) -> tuple[Float64, Float64]:
    return sums.x_i / max(sums.count, 1), sums.y_o / max(sums.count, 1)


def _error(map_: Affine, fold: Sums) -> float:
    """The squared error of a map, summed over a fold's pairs and dimensions."""
    xx_ii, xy_io, yy = fold.about(map_.mean_i, map_.mean_o)
    weight_io = map_.weight_io
    return yy - 2 * float(np.vdot(weight_io, xy_io)) + float(np.vdot(weight_io, xx_ii @ weight_io))


def _ridge_errors(part: Sums, fold: Sums) -> Float64:
    """The squared error on a fold of the ridge map fitted on `part`, for each of LAMBDAS, (G,).

    In the eigenbasis Q of the part's X'X, W = Q D G with D = 1 / (eigenvalues + penalty) and G = Q'X'Y. With A, B, yy
    the fold's sums about the part's means, the error is yy - 2 D'v + D'P D, where v = rows of (G * Q'B) summed and
    P = Q'AQ * GG'.
    """
    mean_i, mean_o = _means(part)
    xx_ii, xy_io, _ = part.about(mean_i, mean_o)
    fold_xx, fold_xy, yy = fold.about(mean_i, mean_o)
    values_i, q_ii = np.linalg.eigh(xx_ii)
    values_i = np.maximum(values_i, 0)
    g_io = q_ii.T @ xy_io
    v_i = np.einsum("io,io->i", g_io, q_ii.T @ fold_xy)
    p_ii = (q_ii.T @ fold_xx @ q_ii) * (g_io @ g_io.T)
    scale = values_i.mean()
    found = np.empty(len(LAMBDAS))
    for number, lam in enumerate(LAMBDAS):
        penalty = lam * scale
        d_i = 1 / (values_i + (penalty if penalty > 0 else 1.0))
        found[number] = yy - 2 * float(d_i @ v_i) + float(d_i @ p_ii @ d_i)
    return found
