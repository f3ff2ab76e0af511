"""The kinds of transformation. Each maps old embeddings into the new space and estimates its own error; all have one
interface. `training` fits them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.method import TransformationKind

_DROPOUT = 0.3


class Transformation(nn.Module):
    """The interface of every kind.

    Attributes:
        d_old, d_new: widths of the old and the new embeddings.
        d_side: width of the side information; None without it.
        normalize: inputs and z have unit length, because the metric is cosine.
    """

    def __init__(self, d_old: int, d_new: int, d_side: int | None = None, normalize: bool = False) -> None:
        super().__init__()
        self.d_old, self.d_new, self.d_side, self.normalize = d_old, d_new, d_side, normalize

    def forward(self, old: Tensor, side: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Transform a batch.

        Args:
            old: (B, d_old) float32.
            side: (B, d_side) float32, or None without side information.

        Returns:
            z (B, d_new) and s (B,), float32 outside of autocast. s is the log of the expected squared error of z,
            averaged over dimensions.
        """
        raise NotImplementedError


class TransformationNetwork(Transformation):
    """FastFill's network (arXiv 2303.04766): two branches, a trunk, z, and s as a linear function of z.

    s is computed before z is normalised, because its length is informative. Without `uncertainty_shapes_z` the
    gradient of s stops at its own head.
    """

    def __init__(
        self, d_old: int, d_new: int, inner_width: int = 2048, d_side: int | None = None, normalize: bool = False
    ) -> None:
        super().__init__(d_old, d_new, d_side, normalize)
        self.inner_width = inner_width
        self.uncertainty_shapes_z = True
        self.old_branch = _branch(d_old, d_new)
        self.side_branch = _branch(d_old if d_side is None else d_side, d_new)
        self.trunk = nn.Sequential(_block(4 * d_new, inner_width), _block(inner_width, inner_width))
        self.embedding = nn.Linear(inner_width, d_new)
        self.uncertainty = nn.Linear(d_new, 1)

    def forward(self, old: Tensor, side: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.normalize:
            old = functional.normalize(old, dim=1)
            side = None if side is None else functional.normalize(side, dim=1)
        branches = [self.old_branch(old), self.side_branch(old if side is None else side)]
        z = self.embedding(self.trunk(torch.cat(branches, dim=1)))
        s = self.uncertainty(z if self.uncertainty_shapes_z else z.detach()).squeeze(1)
        return functional.normalize(z, dim=1) if self.normalize else z, s


class LinearTransformation(Transformation):
    """An affine map, z = (x - mean_in) W + mean_new, and s as an affine function of x and z.

    x is the old embedding, followed by the side information; each has unit length with `normalize`. s is computed
    before z is normalised, and clamped to the range of the fit. `training.fitting.linear` computes everything from sums
    over the pairs.
    """

    weight: Tensor
    mean_in: Tensor
    mean_new: Tensor
    error_in: Tensor
    error_new: Tensor
    error_bias: Tensor
    error_range: Tensor

    def __init__(self, d_old: int, d_new: int, d_side: int | None = None, normalize: bool = False) -> None:
        super().__init__(d_old, d_new, d_side, normalize)
        d_in = d_old + (d_side or 0)
        shapes = {"weight": (d_in, d_new), "mean_in": (d_in,), "mean_new": (d_new,)}
        shapes |= {"error_in": (d_in,), "error_new": (d_new,), "error_bias": (), "error_range": (2,)}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape))

    def map(self, x: Tensor) -> Tensor:
        """z (B, d_new) before normalisation."""
        return (x - self.mean_in) @ self.weight + self.mean_new

    def expected_error(self, x: Tensor, z: Tensor) -> Tensor:
        """s (B,) from x and the z of `map`."""
        s = x @ self.error_in + z @ self.error_new + self.error_bias
        return torch.clamp(s, self.error_range[0], self.error_range[1])

    def forward(self, old: Tensor, side: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = inputs(old, side, self.normalize)
        z = self.map(x)
        s = self.expected_error(x, z)
        return functional.normalize(z, dim=1) if self.normalize else z, s


class ResidualTransformation(Transformation):
    """A linear transformation plus a small network, which starts at 0; s is that of the linear one.

    The network's inputs are standardised, and its output is in units of the linear transformation's error.
    """

    deviation: Tensor
    scale: Tensor

    def __init__(
        self, d_old: int, d_new: int, inner_width: int, d_side: int | None = None, normalize: bool = False
    ) -> None:
        super().__init__(d_old, d_new, d_side, normalize)
        self.inner_width = inner_width
        self.linear = LinearTransformation(d_old, d_new, d_side, normalize)
        d_in = d_old + (d_side or 0)
        self.register_buffer("deviation", torch.ones(d_in))
        self.register_buffer("scale", torch.ones(()))
        last = nn.Linear(inner_width, d_new)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.network = nn.Sequential(*_hidden(d_in, inner_width), *_hidden(inner_width, inner_width), last)

    def forward(self, old: Tensor, side: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with torch.autocast(old.device.type, enabled=False):  # only the network may use bfloat16
            x = inputs(old, side, self.normalize)
            z = self.linear.map(x)
            s = self.linear.expected_error(x, z)
            standard = (x - self.linear.mean_in) / self.deviation
        z = z + self.scale * self.network(standard)
        return functional.normalize(z, dim=1) if self.normalize else z, s


def inputs(old: Tensor, side: Tensor | None, normalize: bool) -> Tensor:
    """x (B, d_old + d_side): old embedding and side information, each of unit length with `normalize`."""
    parts = [old] if side is None else [old, side]
    return torch.cat([functional.normalize(part, dim=1) if normalize else part for part in parts], dim=1)


def make(
    kind: TransformationKind, d_old: int, d_new: int, inner_width: int, d_side: int | None, normalize: bool
) -> Transformation:
    """An unfitted transformation."""
    if kind == "linear":
        return LinearTransformation(d_old, d_new, d_side, normalize)
    if kind == "residual":
        return ResidualTransformation(d_old, d_new, inner_width, d_side, normalize)
    return TransformationNetwork(d_old, d_new, inner_width, d_side, normalize)


def _block(d_in: int, d_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d_in, d_out, bias=False), nn.BatchNorm1d(d_out), nn.ReLU())


def _branch(d_in: int, d_new: int) -> nn.Sequential:
    return nn.Sequential(_block(d_in, 2 * d_in), _block(2 * d_in, 2 * d_new))


def _hidden(d_in: int, d_out: int) -> list[nn.Module]:
    return [nn.Linear(d_in, d_out), nn.GELU(), nn.Dropout(_DROPOUT)]
