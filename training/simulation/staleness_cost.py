"""The staleness cost of an image, measured on held-out pairs, and the model that predicts it. Pure.

    held-out pairs as served -> cost of each -> its signals (`planning.signals`) -> two-layer networks in PolicyInputs

The same pairs and seed give the same cost and model, bit for bit, on one machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from pipeline.arrays import NO_LABEL, Float32, Float64, Int64
from pipeline.planning.policy_inputs import PolicyInputs, keys
from pipeline.planning.signals import Scored, signals

_MOST_QUERIES = 8192
_RELEVANT = 10
_KEYS_AT_ONCE = 2**22

_NETWORKS = 4
_WIDTH = 32
_STEPS, _EPOCHS = 400, (20, 60)  # this many steps, within these epochs (m): more of them overfit
_BATCH = 256
_LR = 2e-3
_DECAY = 1e-2
_CLIP = 4.0  # standard deviations: a few images cost a hundred times the mean, and would dominate the fit


def staleness_cost(served: Float32, new: Float32, labels: Int64 | None, metric: str, seed: int) -> Float32:
    """Staleness cost of image i, (N,) float32; negative if its transformed vector does better than its embedding.

    It is the drop in other queries' average precision and reciprocal rank if i keeps its transformed vector rather
    than its new embedding, with a random half of the gallery embedded (another half for each query). Both drops are
    summed over the queries, divided by their standard deviation over the images, and added. Relevant are the images
    of the query's label; without labels, its 10 nearest by new embeddings.

    Args:
        served: (N, d) float32, the transformed vectors as they are served, with their offset.
        new: (N, d) float32; with the metric `cosine` all vectors have length 1.
        labels: (N,) int64, -1 for none; None to measure without labels.
    """
    costs = np.zeros((2, len(new)))
    rng = np.random.default_rng(seed)
    queries = np.sort(rng.permutation(len(new))[:_MOST_QUERIES])
    for query, transformed, embedded, relevant in _queries(served, new, labels, metric, queries):
        halves = rng.random(len(new)) < 0.5
        others = ~relevant
        others[query] = False
        sides = [_Side(transformed[rows], embedded[rows], halves[rows]) for rows in (relevant, others)]
        ranking = _Ranking(*sides)
        costs[:, relevant] += ranking.of_relevant(sides[0].embedded) - ranking.of_relevant(sides[0].transformed)
        costs[:, others] += ranking.of_other(sides[1].embedded) - ranking.of_other(sides[1].transformed)
    deviations = costs.std(axis=1, keepdims=True)
    total = np.divide(costs, deviations, out=np.zeros_like(costs), where=deviations > 0).sum(axis=0)
    result: Float32 = total.astype(np.float32)
    return result


def fit_learned(scored: Scored, reference: PolicyInputs, costs: Float32, seed: int) -> PolicyInputs:
    """The policy inputs with a model of the staleness cost, for the policy `learned`.

    The model is the mean of small networks on standardised signals, fitted by AdamW on the squared error. Costs are
    clipped to four standard deviations. A pair of `reference` in `scored` is excluded from its own neighbours.
    """
    known = signals(scored, reference)
    columns = np.stack(list(known.values()), axis=1)
    mean, scale = columns.mean(axis=0), columns.std(axis=0)
    scale = np.where(scale > 0, scale, 1).astype(np.float32)
    centre, spread = float(costs.mean()), float(costs.std()) or 1.0
    x_ns, y_n = torch.from_numpy((columns - mean) / scale), torch.from_numpy((costs - centre) / spread)
    weight, bias, out, shift = (tensor.numpy() for tensor in _fit_networks(x_ns, y_n.clamp(-_CLIP, _CLIP), seed))
    model = {
        "weight": weight,
        "bias": bias,
        "out": out * np.float32(spread),
        "shift": np.array([shift.mean() * spread + centre], np.float32),
    }
    return replace(reference, signals=tuple(known), mean=mean, scale=scale, model=model)


def _fit_networks(x_ns: torch.Tensor, y_n: torch.Tensor, seed: int) -> list[torch.Tensor]:
    """weight (E, S, H), bias (E, H), out (E, H), shift (E,) of E networks, each with its own shuffle."""
    random = torch.Generator().manual_seed(seed)
    num, width = x_ns.shape
    weight_esh = (torch.rand((_NETWORKS, width, _WIDTH), generator=random) * 2 - 1) / width**0.5
    out_eh = (torch.rand((_NETWORKS, _WIDTH), generator=random) * 2 - 1) / _WIDTH**0.5
    tensors = [weight_esh, torch.zeros(_NETWORKS, _WIDTH), out_eh, torch.zeros(_NETWORKS)]
    for tensor in tensors:
        tensor.requires_grad_()
    optimizer = torch.optim.AdamW(tensors, lr=_LR, weight_decay=_DECAY)
    epochs = int(np.clip(_STEPS * _BATCH // num, *_EPOCHS))
    for _ in range(epochs):
        shuffles_en = torch.stack([torch.randperm(num, generator=random) for _ in range(_NETWORKS)])
        for rows_eb in shuffles_en.split(_BATCH, dim=1):
            hidden_ebh = functional.relu(torch.bmm(x_ns[rows_eb], tensors[0]) + tensors[1][:, None])
            predicted_eb = torch.bmm(hidden_ebh, tensors[2][:, :, None])[..., 0] + tensors[3][:, None]
            loss = (predicted_eb - y_n[rows_eb]).square().mean(dim=1).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return [tensor.detach() for tensor in tensors]


def _queries(
    served: Float32, new: Float32, labels: Int64 | None, metric: str, queries: Int64
) -> Iterator[tuple[int, Float32, Float32, NDArray[np.bool_]]]:
    """For each query that has a match: its row, its keys to all transformed and embedded vectors, the relevant rows."""
    size = max(1, _KEYS_AT_ONCE // len(new))
    for start in range(0, len(queries), size):
        rows = queries[start : start + size]
        embedded = keys(new[rows], new, metric)
        for query, near, far in zip(rows.tolist(), embedded, keys(new[rows], served, metric), strict=True):
            if labels is None:
                others = near.copy()
                others[query] = np.inf
                relevant = np.zeros(len(new), np.bool_)
                relevant[np.argpartition(others, min(_RELEVANT, len(new) - 1) - 1)[:_RELEVANT]] = True
            else:
                relevant = (labels == labels[query]) & (labels != NO_LABEL)
            relevant[query] = False
            if relevant.any():
                yield query, far, near, relevant


@dataclass(frozen=True, slots=True)
class _Side:
    """Some images for one query: both keys, and which of them are embedded in its half-embedded gallery."""

    transformed: Float32
    embedded: Float32
    halves: NDArray[np.bool_]

    @property
    def current(self) -> Float32:
        """The keys in the half-embedded gallery."""
        return np.where(self.halves, self.embedded, self.transformed)


class _Ranking:
    """A query's ranking, and its quality if one image alone gets another key. Ties count against the query.

    Quality is (2, n) float64 for n images moved one at a time: average precision (up to a constant), and the
    reciprocal rank of the first relevant image.
    """

    def __init__(self, relevant: _Side, others: _Side) -> None:
        self._sides = relevant.current, others.current
        self._relevant, self._others = (np.sort(side) for side in self._sides)
        self._before = np.searchsorted(self._others, self._relevant, side="right")
        self._place = np.arange(1, len(self._relevant) + 1)
        self._precision = self._place / (self._place + self._before)

    def of_other(self, at: Float32) -> Float64:
        """Quality with irrelevant image i moved to the key `at[i]`, for each of them, (2, I)."""
        now, then = (np.searchsorted(self._relevant, keys) for keys in (self._sides[1], at))
        nearer = self._change(self._place, self._before + 1)
        farther = self._change(self._place, np.maximum(self._before - 1, 0))
        change = np.where(then < now, nearer[now] - nearer[then], farther[then] - farther[now])
        first = self._before[0] - (now == 0) + (then == 0)
        return np.stack([change / len(self._place), 1 / (1 + first)])

    def of_relevant(self, at: Float32) -> Float64:
        """Quality with relevant image i moved to the key `at[i]`, for each of them, (2, R)."""
        now = np.empty(len(at), np.int64)
        now[np.argsort(self._sides[0], kind="stable")] = np.arange(len(at))
        then = np.searchsorted(self._relevant, at)
        later = self._change(self._place + 1, self._before)
        sooner = self._change(self._place - 1, self._before)
        moved = then > now
        change = np.where(moved, sooner[np.maximum(then, now + 1)] - sooner[now + 1], later[now] - later[then])
        place = then + ~moved
        own = place / (place + np.searchsorted(self._others, at, side="right"))
        nearest = np.full(len(at), self._relevant[0])
        nearest[now == 0] = self._relevant[1] if len(at) > 1 else np.inf
        first = np.searchsorted(self._others, np.minimum(nearest, at), side="right")
        return np.stack([(own - self._precision[now] + change) / len(at), 1 / (1 + first)])

    def _change(self, place: Int64, before: Int64) -> Float64:
        """(R + 1,) float64: the change of summed precision over the first 0, 1, ... relevant images at these places."""
        return np.concatenate([[0.0], np.cumsum(place / np.maximum(place + before, 1) - self._precision)])
