"""An encoder that takes its time, as a large network does; how long is the environment's to say."""

from __future__ import annotations

import os
import time

import torch
from torch import nn

from tests.support.own_functions import new_encoder

SECONDS = "FASTFILL_TEST_SECONDS_PER_IMAGE"  # what a raylet was started with, its actors have


class Slow(nn.Module):
    """The network, after a pause for each image; the vectors are the same at any pace."""

    def __init__(self, network: nn.Module, seconds: float) -> None:
        super().__init__()
        self.network = network
        self.seconds = seconds

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds * len(pixels))
        embeddings: torch.Tensor = self.network(pixels)
        return embeddings


def encoder() -> nn.Module:
    """The encoder of the tests' galleries, at the pace that the environment says; without one, at its own."""
    return Slow(new_encoder(), float(os.environ.get(SECONDS, 0)))
