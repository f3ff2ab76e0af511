"""Exact neighbours and clusters among a few thousand vectors, for policies; by FAISS.

Guarantee: the same arrays give the same bits on the same machine. It knows nothing of segments or runs.
"""

from __future__ import annotations

import faiss
import numpy as np

from pipeline.schema import Float32, Int64

_ITERATIONS = 20


def nearest(queries: Float32, base: Float32, k: int, own: Int64 | None = None) -> tuple[Float32, Int64]:
    """The k nearest rows of `base` (M, d) by squared Euclidean distance: distances and rows, both (N, k), best first.

    Args:
        queries: (N, d) float32.
        base: (M, d) float32, M > k.
        k: at most M - 1.
        own: (N,) int64, the row that does not count for a query, or -1.
    """
    distances, rows = faiss.knn(np.ascontiguousarray(queries), np.ascontiguousarray(base), k + 1)
    left_out = np.zeros(rows.shape, np.bool_) if own is None else rows == own[:, None]
    left_out[~left_out.any(axis=1), -1] = True
    return np.maximum(distances[~left_out].reshape(-1, k), 0), rows[~left_out].reshape(-1, k)


def cluster(vectors: Float32, num_clusters: int, seed: int) -> Float32:
    """The centroids of k-means, (num_clusters, d) float32."""
    kmeans = faiss.Kmeans(
        vectors.shape[1],
        num_clusters,
        niter=_ITERATIONS,
        seed=seed % 2**31,
        min_points_per_centroid=1,
        max_points_per_centroid=len(vectors),
    )
    kmeans.train(np.ascontiguousarray(vectors))
    return np.asarray(kmeans.centroids, np.float32)
