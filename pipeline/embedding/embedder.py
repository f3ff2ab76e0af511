"""The embedding actor: pixels in, vectors out; the only part of the stream that needs torch.

Equal weights, preprocess, images and batches give equal vectors. Vectors that are not finite become rejects.
"""

from __future__ import annotations

import math
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch

from pipeline.arrays import Float32, vectors_to_arrow
from pipeline.config import tree as settings
from pipeline.embedding import worker_metrics
from pipeline.embedding.decode import Limits, Pixels
from pipeline.errors import ConfigError
from pipeline.models.device import resolve_device
from pipeline.models.encoder import EmbeddingModel, load_encoder

if TYPE_CHECKING:
    from pipeline.embedding.gpu_decode import DeviceDecoder

_IN_FLIGHT = 2
_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Embedder:
    """An encoder on its device; also used in-process to embed a few images without Ray.

    On a GPU one batch computes while the next is copied, within one call of `embed`. So a unit is cut into at least
    two batches, unless the network is compiled: then its batches have one size.
    """

    def __init__(self, encoder: settings.EncoderSettings, device: str, batch_size: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self._device = resolve_device(device)
        self._copies = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._batch_size = batch_size
        self._precision = _PRECISIONS[encoder.precision]
        self._model: EmbeddingModel = load_encoder(encoder, self._device)
        self._network: Callable[[torch.Tensor], torch.Tensor] = self._model
        self._padded = encoder.compile
        if encoder.compile:
            self._network = torch.compile(self._model, dynamic=False)

    def embed(self, pixels: Pixels | torch.Tensor) -> Float32:
        """Embed (N, C, H, W) uint8, on the host or the device, to (N, d) float32, in order."""
        vectors = np.zeros((len(pixels), self._model.dim), dtype=np.float32)
        waiting: deque[tuple[int, _Batch]] = deque()
        size = min(self._batch_size, self.largest_batch(len(pixels)))
        for start in range(0, len(pixels), size):
            waiting.append((start, self._launch(pixels[start : start + size])))
            if len(waiting) == _IN_FLIGHT:
                _land(*waiting.popleft(), vectors)
        for item in waiting:
            _land(*item, vectors)
        return vectors

    def largest_batch(self, num_images: int) -> int:
        """The largest batch that `embed` makes of so many images, whatever size is configured."""
        if self._copies is None or self._padded:
            return max(1, num_images)
        return max(1, math.ceil(num_images / _IN_FLIGHT))

    def rates(self, pixels: Pixels, sizes: Iterable[int], seconds: float) -> dict[int, float]:
        """Images per second by batch size, from the smallest up to the first that does not fit into memory.

        Args:
            pixels: (N, C, H, W) uint8, repeated to fill larger batches.
            sizes: batch sizes, ascending; at least the first is measured.
            seconds: roughly how long to measure, without compilation; sizes that would take longer are left out.

        Raises:
            ConfigError: the smallest size does not fit into memory.
        """
        configured, found, left = self._batch_size, dict[int, float](), seconds
        try:
            for size in sizes:
                self._batch_size = size
                batches = np.resize(pixels, (_IN_FLIGHT * size, *pixels.shape[1:]))
                try:
                    self.embed(batches)  # warm-up: chooses kernels, allocates memory
                    start = time.perf_counter()
                    self.embed(batches)
                except torch.OutOfMemoryError as error:
                    torch.cuda.empty_cache()
                    if not found:
                        raise self._too_small(batches[:size]) from error
                    break
                spent = time.perf_counter() - start
                found[size] = len(batches) / spent
                left -= 2 * spent  # with the warm-up, without one-off work
                if 4 * spent > left:  # the next has twice as many
                    break
        finally:
            self._batch_size = configured
        return found

    @property
    def device(self) -> torch.device:
        """The encoder's device."""
        return self._device

    def _too_small(self, batch: Pixels) -> ConfigError:
        return ConfigError(
            "a batch does not fit into the device's memory",
            expected=f"memory for the encoder and a batch of {len(batch)} images",
            found=f"out of memory on {self._device}",
            where="device",
            remedy="let fewer actors share the GPU (backfill.gpus_per_actor), or use a device with more memory",
        )

    def _copied(self, pixels: Pixels, num_rows: int) -> torch.Tensor:
        """The pixels on the device, then zeros. It always copies: blocks of the object store are read-only."""
        host = torch.empty((num_rows, *pixels.shape[1:]), dtype=torch.uint8, pin_memory=self._copies is not None)
        host.numpy()[: len(pixels)], host.numpy()[len(pixels) :] = pixels, 0
        if self._copies is None:
            return host
        with torch.cuda.stream(self._copies):
            batch = host.to(self._device, non_blocking=True)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._copies)
        batch.record_stream(computing)  # otherwise the next copy could reuse its memory while it is read
        return batch

    @torch.inference_mode()
    def _launch(self, pixels: Pixels | torch.Tensor) -> _Batch:
        """Start a batch; on a GPU it returns before the batch is done."""
        num_rows = self._batch_size if self._padded else len(pixels)
        if not isinstance(pixels, torch.Tensor):
            batch = self._copied(pixels, num_rows)
        elif len(pixels) < num_rows:
            batch = torch.cat([pixels, pixels.new_zeros((num_rows - len(pixels), *pixels.shape[1:]))])
        else:
            batch = pixels
        with torch.autocast(self._device.type, self._precision, enabled=self._precision != torch.float32):
            embeddings = self._network(batch)[: len(pixels)]
        if self._copies is None:
            return _Batch(embeddings, None)
        host = torch.empty(embeddings.shape, dtype=torch.float32, pin_memory=True)
        host.copy_(embeddings, non_blocking=True)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self._device))
        return _Batch(host, done)


class EmbedStage:
    """The actor: one unit per call; each encoder is loaded when its first unit arrives."""

    def __init__(
        self, encoders: list[settings.EncoderSettings], backfill: settings.BackfillSettings, device: str
    ) -> None:
        self._encoders, self._backfill, self._device = encoders, backfill, device
        self._embedders: dict[int, Embedder] = {}
        self._decoders: dict[int, DeviceDecoder] = {}
        self._name = uuid.uuid4().hex[:16]  # identifies this actor in the acknowledgements

    def _embedder(self, work: int) -> Embedder:
        if work not in self._embedders:
            self._embedders[work] = Embedder(
                self._encoders[work], self._device, self._backfill.batch_size, self._backfill.threads_per_actor
            )
        return self._embedders[work]

    def _decoder(self, work: int) -> DeviceDecoder:
        from pipeline.embedding.gpu_decode import DeviceDecoder  # here: it takes seconds, and few runs need it

        if work not in self._decoders:
            limits = Limits(self._backfill.max_image_pixels, self._backfill.max_image_bytes)
            preprocess, device = self._encoders[work].preprocess, self._embedder(work).device
            self._decoders[work] = DeviceDecoder(preprocess, limits, device)
        return self._decoders[work]

    def __call__(self, block: pa.Table) -> pa.Table:
        start = time.perf_counter()
        work = block["work"][0].as_py()
        encoder, embedder = self._encoders[work], self._embedder(work)
        stages, reasons = block["stage"].to_pylist(), block["reason"].to_pylist()
        if "encoded" in block.column_names:
            pixels, rejects = self._decoder(work).decode(block["encoded"].to_pylist())
            for row, reject in rejects.items():
                if not stages[row]:  # it was fetched
                    stages[row], reasons[row] = reject.stage, reject.reason
        else:
            shape = (encoder.preprocess.channels, *(encoder.preprocess.image_size or ()))
            pixels = block["pixels"].combine_chunks().flatten().to_numpy().reshape(-1, *shape)
        good = np.array([not stage for stage in stages], dtype=bool)
        vectors = np.zeros((len(pixels), encoder.dim), dtype=np.float32)
        vectors[good] = embedder.embed(pixels if good.all() else pixels[good])
        for row in np.flatnonzero(~np.isfinite(vectors).all(axis=1)).tolist():
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


@dataclass(frozen=True, slots=True)
class _Batch:
    """Embeddings in the host's memory, (B, d) float32, valid once `done` has happened."""

    embeddings: torch.Tensor
    done: torch.cuda.Event | None


def _land(start: int, batch: _Batch, vectors: Float32) -> None:
    if batch.done is not None:
        batch.done.synchronize()
    vectors[start : start + len(batch.embeddings)] = batch.embeddings.numpy()
