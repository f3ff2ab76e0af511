"""The embedding actor: pixels in, vectors out. The only part of the stream that needs torch.

Guarantee: for given weights and preprocess, the same images in the same batches give the same vectors;
what is not finite becomes a reject. It does not know where the images came from, or what becomes of
the vectors.
"""

from __future__ import annotations

import time
import uuid

import numpy as np
import pyarrow as pa
import torch

from pipeline import config as settings
from pipeline import worker_metrics
from pipeline.encoders import EmbeddingModel, load_encoder
from pipeline.images import Pixels
from pipeline.schema import Float32, vectors_to_arrow
from pipeline.transformation import resolve_device


class Embedder:
    """An encoder on its device; also used in-process, where a few images are embedded without Ray."""

    def __init__(self, encoder: settings.Encoder, device: str, batch_size: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self._device = resolve_device(device)
        self._batch_size = batch_size
        self._model: EmbeddingModel = load_encoder(encoder, self._device)

    def embed(self, pixels: Pixels) -> Float32:
        """(N, C, H, W) uint8 to (N, d) float32, in batches of the configured size, in order."""
        batches = [self._forward(pixels[start : start + self._batch_size]) for start in self._starts(len(pixels))]
        return np.concatenate(batches) if batches else np.zeros((0, self._model.dim), dtype=np.float32)

    def _starts(self, count: int) -> range:
        return range(0, count, self._batch_size)

    @torch.inference_mode()
    def _forward(self, pixels: Pixels) -> Float32:
        batch = torch.from_numpy(np.array(pixels))  # a copy: blocks of the object store are read-only
        if self._device.type == "cuda":
            batch = batch.pin_memory().to(self._device, memory_format=torch.channels_last, non_blocking=True)
        embeddings: Float32 = self._model(batch).cpu().numpy()
        return embeddings


class EmbedStage:
    """The actor: pixels in, vectors out, one unit a call; each encoder is loaded when its first unit comes."""

    def __init__(self, encoders: list[settings.Encoder], backfill: settings.Backfill, device: str) -> None:
        self._encoders, self._backfill, self._device = encoders, backfill, device
        self._embedders: dict[int, Embedder] = {}
        self._name = uuid.uuid4().hex[:16]  # tells it from others where its units are counted

    def _embedder(self, work: int) -> Embedder:
        if work not in self._embedders:
            self._embedders[work] = Embedder(
                self._encoders[work], self._device, self._backfill.batch_size, self._backfill.threads_per_actor
            )
        return self._embedders[work]

    def __call__(self, block: pa.Table) -> pa.Table:
        start = time.perf_counter()
        work = block["work"][0].as_py()
        encoder = self._encoders[work]
        shape = (encoder.preprocess.channels, *(encoder.preprocess.image_size or ()))
        pixels = block["pixels"].combine_chunks().flatten().to_numpy().reshape(-1, *shape)
        stages, reasons = block["stage"].to_pylist(), block["reason"].to_pylist()
        good = np.array([not stage for stage in stages], dtype=bool)
        vectors = np.zeros((len(pixels), encoder.dim), dtype=np.float32)
        vectors[good] = self._embedder(work).embed(pixels if good.all() else pixels[good])
        for row in np.flatnonzero(~np.isfinite(vectors).all(axis=1)):
            stages[row], reasons[row], vectors[row] = "embed", "not finite", 0.0
        seconds = time.perf_counter() - start
        worker_metrics.observe("embed", len(pixels), seconds)
        return pa.table(
            {
                "number": block["number"],
                "id": block["id"],
                "etag": block["etag"],
                "stage": pa.array(stages, pa.string()),
                "reason": pa.array(reasons, pa.string()),
                "load": block["load"],
                "embed_seconds": np.full(len(pixels), seconds),
                "actor": pa.repeat(self._name, len(pixels)),
                "vector": vectors_to_arrow(vectors),
            }
        )
