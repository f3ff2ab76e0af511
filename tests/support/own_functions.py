"""Functions of a user's own, as `module:function` in a config: policies and encoders, good and bad."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import nn

from pipeline.arrays import Float32
from pipeline.planning.signals import Scored


def undecided(scored: Scored) -> Float32:
    """A policy that is not a number for one image of each part."""
    return np.where(np.arange(len(scored.ids)) == 3, np.float32(np.nan), scored.uncertainty)


def small_encoder(dim: int, seed: int) -> nn.Module:
    """A small convolutional encoder of 8 x 8 grey images with random weights."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 36, dim)).eval()


def new_encoder() -> nn.Module:
    """The same network as `tests.support.galleries` exports for the new encoder."""
    return small_encoder(dim=20, seed=2)


class _Slow(nn.Module):
    """An encoder that takes its time, as a large one on a busy GPU does."""

    def __init__(self, encoder: nn.Module, seconds: float) -> None:
        super().__init__()
        self.encoder, self.seconds = encoder, seconds

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        embeddings: torch.Tensor = self.encoder(images)
        return embeddings


def slow_encoder() -> nn.Module:
    """`new_encoder`, with two seconds for every batch: a run of a few batches then lasts long enough to be watched."""
    return _Slow(new_encoder(), seconds=2.0).eval()
