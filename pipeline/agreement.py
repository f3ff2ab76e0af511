"""The backfilling curve without labels: how far each state answers as the new model alone would.

Beside evaluate. Pure: the share of a query's nearest K gallery images in new/new that are among its nearest K while a
part of the gallery is still transformed. At fraction 1 it is 100 by definition. Distances are exact.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pipeline.arrays import Float32, Float64, Int64
from pipeline.calibration import Calibration
from pipeline.evaluate import recall
from pipeline.nearest import nearest, nearest_by_kind

NEIGHBOURS = 10


def agreement_curve(
    transformed: Float32,
    embedded: Float32,
    queries: Int64,
    orders: Mapping[str, Int64],
    points: int,
    metric: str,
    calibration: Calibration | None = None,
) -> dict[str, Float64]:
    """Of each order, the agreement in per cent at each point, (P,) float64; as `evaluate.simulate_curve` cuts it.

    Args:
        transformed: (N, d) float32, as served.
        embedded: (N, d) float32, the new encoder on the same images.
        queries: (Q,) rows whose new embeddings are the queries; a row is no neighbour of its own.
        orders: name -> permutation (N,) of the rows, the first to embed first.
        points: P, at least 2.
        metric: l2, ip or cosine.
        calibration: maps the keys of transformed vectors; None to rank both kinds as they are.
    """
    exact = among(embedded[queries], embedded, queries, metric)
    cuts = np.arange(points) * len(embedded) // (points - 1)
    curves = {}
    for name, order in orders.items():
        state, left, values = transformed.copy(), np.ones(len(embedded), np.bool_), []
        for start, end in zip(np.concatenate([[0], cuts]), cuts, strict=False):
            rows = order[start:end]
            state[rows], left[rows] = embedded[rows], False
            found = nearest_by_kind(embedded[queries], state, exact.shape[1], queries, metric, left, calibration)[1]
            values.append(recall(found, exact))
        curves[name] = np.array(values)
    return curves


def among(queries: Float32, gallery: Float32, own: Int64, metric: str) -> Int64:
    """Each query's NEIGHBOURS nearest rows but its own, (Q, K) int64, or fewer where there are fewer."""
    return nearest(queries, gallery, min(NEIGHBOURS, len(gallery) - 1), own, metric)[1]
