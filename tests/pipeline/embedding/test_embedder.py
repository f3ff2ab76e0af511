"""The embedder: batches in, vectors out, whatever the batch size, precision and compilation."""

from __future__ import annotations

import shutil
import time

import numpy as np
import pytest
import torch

from pipeline.backfill.profile import batch_sizes
from pipeline.config.tree import EncoderSettings
from pipeline.embedding.embedder import Embedder, _Batch
from pipeline.errors import ConfigError

DIM = 20
PIXELS = np.random.default_rng(0).integers(0, 256, (37, 1, 8, 8), dtype=np.uint8)


def embedder(batch_size: int, **changes: object) -> Embedder:
    spec = {
        "function": "tests.support.own_functions:new_encoder",
        "dim": DIM,
        "preprocess": {"channels": 1, "size": 8},
    } | changes
    return Embedder(EncoderSettings.model_validate(spec), "cpu", batch_size, threads=1)


@pytest.mark.parametrize("batch_size", [1, 5, 16, 37, 64])
def test_batches_of_any_size_give_the_vectors_in_order(batch_size: int) -> None:
    whole = embedder(len(PIXELS)).embed(PIXELS)
    assert whole.shape == (len(PIXELS), DIM)
    assert len(np.unique(whole, axis=0)) == len(PIXELS)
    np.testing.assert_allclose(embedder(batch_size).embed(PIXELS), whole, rtol=1e-4, atol=1e-5)


def test_read_only_pixels_are_taken_and_left_as_they_are() -> None:
    pixels = PIXELS.copy()
    pixels.setflags(write=False)
    np.testing.assert_array_equal(embedder(16).embed(pixels), embedder(16).embed(PIXELS))


def test_no_pixels_give_no_vectors() -> None:
    assert embedder(16).embed(PIXELS[:0]).shape == (0, DIM)


def test_bfloat16_gives_float32_vectors_near_the_exact_ones() -> None:
    exact, found = embedder(16).embed(PIXELS), embedder(16, precision="bfloat16").embed(PIXELS)
    assert found.dtype == np.float32
    error = np.linalg.norm(found - exact, axis=1) / np.linalg.norm(exact, axis=1)
    assert 0.0 < error.max() < 0.03


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_network_gives_the_same_vectors_also_for_the_last_batch() -> None:
    found = embedder(16, compile=True).embed(PIXELS)
    np.testing.assert_allclose(found, embedder(16).embed(PIXELS), rtol=1e-4, atol=1e-5)


def test_rates_are_measured_up_to_the_batch_that_memory_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    found = embedder(16)
    network = found._network

    def small(batch: torch.Tensor) -> torch.Tensor:
        if len(batch) > 64:
            raise torch.OutOfMemoryError("too large")
        return network(batch)

    monkeypatch.setattr(found, "_network", small)
    rates = found.rates(PIXELS, [16, 32, 64, 128, 256], seconds=60.0)
    assert list(rates) == [16, 32, 64]
    assert min(rates.values()) > 0
    np.testing.assert_array_equal(found.embed(PIXELS), embedder(16).embed(PIXELS))  # its own batch size is kept


def test_rates_of_the_smallest_batch_are_measured_whatever_the_time() -> None:
    assert list(embedder(16).rates(PIXELS, [16, 32], seconds=0.0)) == [16]


def test_memory_that_does_not_hold_the_smallest_batch_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    found = embedder(16)

    def full(batch: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(found, "_network", full)
    with pytest.raises(ConfigError, match="does not fit into the device's memory"):
        found.rates(PIXELS, [16, 32], seconds=60.0)
    assert found._batch_size == 16


def test_the_first_call_of_a_size_may_take_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    found = embedder(16)
    network, compiled = found._network, set[int]()

    def slow_at_first(batch: torch.Tensor) -> torch.Tensor:
        if len(batch) not in compiled:
            compiled.add(len(batch))
            time.sleep(1.0)
        return network(batch)

    monkeypatch.setattr(found, "_network", slow_at_first)
    assert list(found.rates(PIXELS, [16, 32], seconds=0.9)) == [16, 32]


def gpu_like(monkeypatch: pytest.MonkeyPatch, batch_size: int) -> tuple[Embedder, list[int]]:
    """An embedder that cuts as on a GPU, and the sizes of the batches that it launches; that takes no stream."""
    found, launched = embedder(batch_size), list[int]()

    def launch(pixels: np.ndarray) -> _Batch:
        launched.append(len(pixels))
        return _Batch(torch.zeros(len(pixels), DIM), None)

    monkeypatch.setattr(found, "_copies", object())
    monkeypatch.setattr(found, "_launch", launch)
    return found, launched


@pytest.mark.parametrize(("unit", "largest"), [(256, 128), (37, 19), (1, 1)])
def test_a_batch_that_is_recommended_on_a_gpu_is_one_that_a_unit_runs_in(
    monkeypatch: pytest.MonkeyPatch, unit: int, largest: int
) -> None:
    sizes = batch_sizes(gpu_like(monkeypatch, unit)[0].largest_batch(unit))
    assert max(sizes) == largest
    for size in sizes:
        found, launched = gpu_like(monkeypatch, size)
        found.embed(np.resize(PIXELS, (unit, 1, 8, 8)))
        assert max(launched) == size


@pytest.mark.parametrize("padded", [True, False])
def test_a_compiled_network_takes_a_whole_unit_at_once_on_a_gpu(monkeypatch: pytest.MonkeyPatch, padded: bool) -> None:
    found, launched = gpu_like(monkeypatch, 256)
    monkeypatch.setattr(found, "_padded", padded)
    found.embed(np.resize(PIXELS, (256, 1, 8, 8)))
    assert launched == ([256] if padded else [128, 128])
    assert found.largest_batch(256) == launched[0]


def test_rates_on_a_gpu_warm_up_with_batches_of_the_same_size(monkeypatch: pytest.MonkeyPatch) -> None:
    found, launched = gpu_like(monkeypatch, 256)
    assert list(found.rates(PIXELS, [16, 32], seconds=60.0)) == [16, 32]
    assert launched == [16] * 4 + [32] * 4


def test_a_compiled_network_sees_batches_of_one_shape_and_memory_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    found = embedder(16)
    network, seen = found._network, set[tuple[torch.Size, tuple[int, ...]]]()

    def noted(batch: torch.Tensor) -> torch.Tensor:
        seen.add((batch.shape, batch.stride()))
        return network(batch)

    monkeypatch.setattr(found, "_network", noted)
    monkeypatch.setattr(found, "_padded", True)
    vectors = found.embed(PIXELS)
    assert len(seen) == 1
    np.testing.assert_allclose(vectors, embedder(16).embed(PIXELS), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.embed(torch.from_numpy(PIXELS)), vectors)
    assert len(seen) == 1
