"""Exact neighbours in a ranking that maps the keys of transformed rows: the k nearest of each kind, merged."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.arrays import Bools, Float32, Int64
from pipeline.knn import nearest
from pipeline.models.calibration import Calibration


@dataclass(frozen=True, slots=True)
class CalibratedRows:
    """The rows whose keys a calibration maps, (M,) bool, and the calibration; None if there is none."""

    transformed: Bools
    calibration: Calibration | None


def nearest_by_kind(
    queries: Float32, base: Float32, k: int, own: Int64, metric: str, mapped_rows: CalibratedRows
) -> tuple[Float32, Int64]:
    """As `nearest`, with the keys of some rows mapped: the k nearest of each kind, merged.

    Equal keys are in the order of `index.segment.search_by_kind`.

    Args:
        queries: (N, d) float32.
        base: (M, d) float32.
        k: at most M - 1.
        own: (N,) int64, the row to leave out for each query, or -1.
        metric: l2, ip or cosine.
        mapped_rows: the rows whose keys are mapped, and the map.
    """
    transformed, calibration = mapped_rows.transformed, mapped_rows.calibration
    if calibration is None or not transformed.any():
        return nearest(queries, base, k, own, metric)
    found = []
    for kind in np.unique(transformed):
        rows = np.flatnonzero(transformed == kind)
        keys, places = nearest(queries, base[rows], min(k + 1, len(rows)), metric=metric)
        places = rows[places]
        keys[places == own[:, None]] = np.inf
        found.append((calibration.apply(keys) if kind else keys, np.full(keys.shape, kind), keys, places))
    mapped, kinds, raw, rows = (np.concatenate(pair, axis=1) for pair in zip(*found, strict=True))
    order = np.lexsort((rows, raw, kinds, mapped), axis=1)[:, :k]
    return np.take_along_axis(mapped, order, axis=1), np.take_along_axis(rows, order, axis=1)
