"""Early stopping: keep the weights with the least error on watched pairs, and say when to stop. Pure."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from pipeline.arrays import Int64
from pipeline.hashing import splitmix64

PATIENCE = 10
"""Epochs without a better error after which a fit ends."""

_SALT = 0x5709
_SHARE = 10

Weights = dict[str, Tensor]


def num_stopping(count: int) -> int:
    """How many of `count` pairs are watched instead of fitted on: a tenth, at least one."""
    return max(1, count // _SHARE)


def stopping_rows(count: int) -> tuple[Int64, Int64]:
    """The rows to fit on and the rows to watch, both ascending, drawn by a hash of the row number."""
    order = np.argsort(splitmix64(np.arange(count), _SALT), kind="stable")
    watched = num_stopping(count)
    return np.sort(order[watched:]), np.sort(order[:watched])


class Stopping:
    """The best weights so far, and how many epochs ago they were seen."""

    def __init__(self) -> None:
        self.error, self.weights, self._since = math.inf, Weights(), 0

    @property
    def over(self) -> bool:
        """True if the fit should end."""
        return self._since >= PATIENCE

    def observe(self, error: float, weights: Weights) -> None:
        """Copy the weights of an epoch if their error on the watched pairs is the least so far."""
        if error < self.error or not self.weights:
            copied = {name: tensor.detach().clone() for name, tensor in weights.items()}
            self.error, self.weights, self._since = error, copied, 0
        else:
            self._since += 1

    def state(self) -> dict[str, object]:
        """Everything that `restore` needs."""
        return {"error": self.error, "weights": self.weights, "since": self._since}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state()`."""
        self.error, self.weights, self._since = state["error"], state["weights"], state["since"]
