"""Exact neighbours and clusters among vectors in memory, by FAISS; the same bits each time on the same machine."""

from __future__ import annotations

import faiss
import numpy as np

from pipeline.arrays import Float32, Int64

_ITERATIONS = 20


def nearest(
    queries: Float32, base: Float32, k: int, own: Int64 | None = None, metric: str = "l2"
) -> tuple[Float32, Int64]:
    """The k nearest rows of `base` by exact search: keys float32 and rows int64, both (N, k), best first.

    A key is the squared Euclidean distance, or the negative inner product: smaller is nearer.

    Args:
        queries: (N, d) float32.
        base: (M, d) float32.
        k: at most M, or M - 1 with `own`.
        own: (N,) int64, the row to leave out for each query, or -1.
        metric: l2, ip or cosine.
    """
    kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    left, right = (_unit(side) if metric == "cosine" else np.ascontiguousarray(side) for side in (queries, base))
    keys, rows = faiss.knn(left, right, k if own is None else k + 1, metric=kind)
    keys = np.maximum(keys, 0) if metric == "l2" else -keys
    if own is None:
        return keys, rows
    left_out = rows == own[:, None]
    left_out[~left_out.any(axis=1), -1] = True
    return keys[~left_out].reshape(len(rows), k), rows[~left_out].reshape(len(rows), k)


def paired_keys(queries: Float32, found: Float32, metric: str) -> Float32:
    """The keys of each query to vectors of its own, (Q, k) float32, from (Q, d) and (Q, k, d); l2 or ip."""
    if metric == "l2":
        difference = found - queries[:, None]
        squared: Float32 = np.einsum("qkd,qkd->qk", difference, difference)
        return squared
    products: Float32 = np.einsum("qd,qkd->qk", queries, found)
    return -products


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


def _unit(vectors: Float32) -> Float32:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Float32 = np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0)
    return unit
