"""Early stopping: which weights count, and when a fit has gone on for long enough. Pure.

Guarantee: the weights that count are no worse than the first ones that were seen, by the error that is told.
"""

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
    """How many of so many pairs are watched instead of fitted on: a tenth, and one at least."""
    return max(1, count // _SHARE)


def stopping_rows(count: int) -> tuple[Int64, Int64]:
    """The rows to fit on and the rows to watch, both ascending: drawn by a hash of the row's number."""
    order = np.argsort(splitmix64(np.arange(count), _SALT), kind="stable")
    watched = num_stopping(count)
    return np.sort(order[watched:]), np.sort(order[:watched])


class Stopping:
    """The best weights so far, and how many epochs ago they were."""

    def __init__(self) -> None:
        self.error, self.weights, self._since = math.inf, Weights(), 0

    @property
    def over(self) -> bool:
        """Whether the fit should end."""
        return self._since >= PATIENCE

    def observe(self, error: float, weights: Weights) -> None:
        """Take the weights of an epoch if their error is the least so far.

        Args:
            error: on the watched pairs.
            weights: copied if they are the best.
        """
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
