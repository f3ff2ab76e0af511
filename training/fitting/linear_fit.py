"""A linear transformation with its error estimate, in two passes over the pairs.

    pass 1: sums over all pairs   -> the map, and for each fold the map fitted without it
    pass 2: sums over a sample    -> s: a ridge regression of the log squared error on x and z, both out of fold

Another partition of the pairs changes the result by rounding alone, within 1e-5. A pass runs over arrays in memory
(`over_arrays`) or over Parquet parts on many machines (`fitting.linear_parts`).

The errors of the nearest pairs would predict s better, but the transformation would then have to store the pairs. The
policy `neighbour_residual` ranks by these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from pipeline.arrays import Float32, Int64
from pipeline.errors import DataError
from pipeline.hashing import splitmix64
from pipeline.models.networks import LinearTransformation, ResidualTransformation, Transformation, inputs
from training.fitting import linear
from training.fitting.linear import Affine, Float64, Folds, folds_of

ERROR_PAIRS = 100_000
"""About this many pairs, drawn by a hash of their indices, are enough to fit s."""

_SALT = 0x5EE5
_LEAST = 1e-10
"""Floor of the squared error as a share of the new embeddings' variance: its logarithm must be finite."""

_SPAN = 4.0
"""s is clipped to this many standard deviations of the log errors around their mean."""

BlockSums = Callable[[Int64, Float32, Float32], Folds]
"""Sums over pairs, given their indices (N,), inputs (N, I) and new embeddings (N, O)."""

OnePass = Callable[[BlockSums, float], Folds]
"""Calls a BlockSums on blocks of the `sampled` share of the pairs, and adds up the sums in order."""


@dataclass(frozen=True, slots=True)
class LinearFit:
    """A fitted linear transformation.

    Attributes:
        network: the transformation.
        without, lam, error: as in `linear.Fitted`.
        deviation: standard deviations of the inputs, (I,) float64.
        growing: ascending numbers of pairs, each with the map fitted on that many; the last one has all pairs.
    """

    network: LinearTransformation
    without: tuple[Affine, ...]
    lam: float | None
    error: float
    deviation: Float64
    growing: tuple[tuple[int, Affine], ...] = ()

    def start(self, network: Transformation) -> None:
        """Copy the linear fit into a `linear` transformation, or into a `residual` one as its start."""
        if isinstance(network, ResidualTransformation):
            network.deviation.copy_(torch.tensor(self.deviation))
            network.scale.fill_(float(np.sqrt(self.error)))
        of_linear = network.linear if isinstance(network, ResidualTransformation) else network
        of_linear.load_state_dict(self.network.state_dict())


def fit_linear(one_pass: OnePass, network: LinearTransformation) -> LinearFit:
    """Fit a linear transformation by calling `one_pass` twice; the weights of `network` are overwritten.

    Raises:
        DataError: an embedding is not finite.
    """
    found = one_pass(_pair_sums, 1.0)
    if not all(np.isfinite(fold.xx_ii).all() and np.isfinite(fold.yy) for fold in found):
        remedy = "look for NaN and infinite values in the old and new embeddings of the pairs"
        raise DataError("the training pairs hold embeddings that are not finite", remedy=remedy)
    fitted = linear.fit(found)
    total = linear.total(found)
    of_map = fitted.map
    xx_ii, _, yy = total.about(of_map.mean_i, of_map.mean_o)
    variance_o = np.einsum("io,io->o", of_map.weight_io, xx_ii @ of_map.weight_io) / total.count
    errors = ErrorSums(
        without=fitted.without,
        about=(of_map.mean_i, fitted.deviation_i, of_map.mean_o, linear.deviations(variance_o)),
        normalize=network.normalize,
        least=_LEAST * max(yy, 1e-30) / total.count / len(of_map.mean_o),
    )
    _fill(network, of_map, errors, one_pass(errors, ERROR_PAIRS / total.count))
    return LinearFit(network, fitted.without, fitted.lam, fitted.error, fitted.deviation_i, _growing(found, fitted))


def over_arrays(indices: Int64, old: Float32, new: Float32, side: Float32 | None, normalize: bool) -> OnePass:
    """A pass over pairs in memory; with `normalize`, `new` must have length 1 already."""
    x_ni = inputs_of(old, side, normalize)

    def one_pass(function: BlockSums, share: float) -> Folds:
        rows = slice(None) if share >= 1 else sampled(indices, share)
        return function(indices[rows], x_ni[rows], new[rows])

    return one_pass


def sampled(indices: Int64, share: float) -> NDArray[np.bool_]:
    """(N,) bool: about this share (below 1) of the pairs, by a hash of their indices."""
    found: NDArray[np.bool_] = splitmix64(indices, _SALT) < np.uint64(share * 2.0**64)
    return found


def inputs_of(old: Float32, side: Float32 | None, normalize: bool) -> Float32:
    """The inputs (N, I) float32 of a linear map: old embeddings with side information."""
    found: Float32 = inputs(torch.tensor(old), None if side is None else torch.tensor(side), normalize).numpy()
    return found


def out_of_fold(without: tuple[Affine, ...], folds_n: Int64, x_ni: Float32) -> Float32:
    """z (N, O) float32 of each pair, by the map fitted without its fold."""
    z_no = np.empty((len(x_ni), len(without[0].mean_o)), dtype=np.float32)
    for fold, of_others in enumerate(without):
        mine = folds_n == fold
        z_no[mine] = of_others(x_ni[mine])
    return z_no


def _growing(folds: Folds, fitted: linear.Fitted) -> tuple[tuple[int, Affine], ...]:
    """`LinearFit.growing`: the maps of 1, 2, 3 and all folds."""
    parts = [linear.total(folds[:count]) for count in (1, 2, 3)]
    lam = fitted.lam
    maps = [
        (part.count, linear.procrustes(part) if lam is None else linear.ridge(part, lam))
        for part in parts
        if part.count
    ]
    return (*maps, (linear.total(folds).count, fitted.map))


def _pair_sums(indices: Int64, x_ni: Float32, y_no: Float32) -> Folds:
    return linear.sums_of(x_ni, y_no, folds_of(indices))


@dataclass(frozen=True, slots=True)
class ErrorSums:
    """Sums of standardised [x, z] and of r, the log of the mean squared error of z as it is served.

    Attributes:
        about: means and deviations of x, then of z.
        least: floor of the error.
    """

    without: tuple[Affine, ...]
    about: tuple[Float64, Float64, Float64, Float64]
    normalize: bool
    least: float

    def __call__(self, indices: Int64, x_ni: Float32, y_no: Float32) -> Folds:
        """See `BlockSums`."""
        folds_n = folds_of(indices)
        z_no = out_of_fold(self.without, folds_n, x_ni)
        served = functional.normalize(torch.from_numpy(z_no), dim=1).numpy() if self.normalize else z_no
        r_n = np.log(np.maximum(np.square(y_no - served).mean(axis=1, dtype=np.float64), self.least))
        mean_i, deviation_i, mean_o, deviation_o = (item.astype(np.float32) for item in self.about)
        features = np.concatenate([(x_ni - mean_i) / deviation_i, (z_no - mean_o) / deviation_o], axis=1)
        return linear.sums_of(features, r_n[:, None], folds_n)


def _fill(network: LinearTransformation, of_map: Affine, errors: ErrorSums, found: Folds) -> None:
    """Write the map and s into the network.

    s is the log of the expected error. As for a lognormal distribution, that is the expected log error plus half of
    its residual variance.
    """
    fitted, total = linear.fit(found), linear.total(found)
    mean_i, deviation_i, mean_o, deviation_o = errors.about
    weights = fitted.map.weight_io[:, 0]
    of_x, of_z = weights[: len(mean_i)] / deviation_i, weights[len(mean_i) :] / deviation_o
    bias = fitted.map.mean_o[0] - fitted.map.mean_i @ weights - mean_i @ of_x - mean_o @ of_z + fitted.error / 2
    mean = total.y_o[0] / total.count
    span = _SPAN * np.sqrt(max(total.yy / total.count - mean**2, 0.0)) + fitted.error / 2
    values = {
        "weight": of_map.weight_io,
        "mean_in": of_map.mean_i,
        "mean_new": of_map.mean_o,
        "error_in": of_x,
        "error_new": of_z,
        "error_bias": np.asarray(bias),
        "error_range": np.array([mean - span, mean + span]),
    }
    network.load_state_dict({name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()})
