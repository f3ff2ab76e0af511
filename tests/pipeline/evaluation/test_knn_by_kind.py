"""Exact neighbours among vectors of two kinds, against a full sort."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.arrays import Float32
from pipeline.evaluation.knn_by_kind import CalibratedRows, nearest_by_kind
from pipeline.knn import nearest
from pipeline.models.calibration import Calibration

NUM = 80


def integers(num: int, seed: int) -> Float32:
    """Small whole numbers: their keys are exact in float32, and many are equal."""
    return np.random.default_rng(seed).integers(0, 4, (num, 3)).astype(np.float32)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_nearest_by_kind_is_a_full_sort_of_mapped_keys_with_ties(metric: str, share: float) -> None:
    queries, base, own = integers(30, 0), integers(NUM, 1), np.arange(30) - 1
    transformed = np.random.default_rng(2).random(NUM) < share
    map_ = Calibration((-30.0, 0.0, 2.0, 30.0), (-40.0, 0.0, 1.0, 20.0))
    products = queries @ base.T
    raw = -products if metric == "ip" else np.square(queries[:, None] - base).sum(axis=2)
    mapped = np.where(transformed, map_.apply(raw), raw)
    mapped[np.arange(1, 30), own[1:]] = np.inf
    if not transformed.any():
        expected = nearest(queries, base, 7, own, metric)[1]
    else:
        rows = np.broadcast_to(np.arange(NUM), raw.shape)
        expected = np.lexsort((rows, raw, np.broadcast_to(transformed, raw.shape), mapped), axis=1)[:, :7]
    keys, found = nearest_by_kind(queries, base, 7, own, metric, CalibratedRows(transformed, map_))
    assert np.array_equal(keys, np.take_along_axis(mapped, expected, axis=1))
    assert (found != own[:, None]).all()
    inner = keys < keys[:, -1:]  # FAISS chooses among equals at the end of a kind
    assert np.array_equal(found[inner], expected[inner])


def test_nearest_by_kind_without_a_map_is_nearest() -> None:
    queries, base, own = integers(30, 0), integers(NUM, 1), np.arange(30)
    transformed = np.arange(NUM) % 2 == 0
    expected = nearest(queries, base, 7, own)
    found = nearest_by_kind(queries, base, 7, own, "l2", CalibratedRows(transformed, None))
    assert np.array_equal(found[0], expected[0])
    assert np.array_equal(found[1], expected[1])
