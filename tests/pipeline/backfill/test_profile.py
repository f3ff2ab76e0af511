"""The tuner measures the decoder that will run; the rest of it needs Ray, and is tested end to end."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch

from benchmarks.photographs import photograph
from pipeline.backfill import profile
from pipeline.config.tree import PreprocessSettings
from pipeline.embedding import gpu_decode
from pipeline.embedding.decode import Limits

LIMITS = Limits(max_pixels=1_000_000, max_bytes=10_000_000)


@pytest.mark.parametrize("where", ["cpu", "device"])
def test_the_configured_decoder_is_measured_and_rejects_are_left_out(
    monkeypatch: pytest.MonkeyPatch, where: Literal["cpu", "device"]
) -> None:
    made: list[torch.device] = []

    class Noted(gpu_decode.DeviceDecoder):
        def __init__(self, preprocess: PreprocessSettings, limits: Limits, device: torch.device) -> None:
            super().__init__(preprocess, limits, device)
            made.append(device)

    monkeypatch.setattr(gpu_decode, "DeviceDecoder", Noted)
    preprocess = PreprocessSettings(resize=96, center_crop=80, decoder=where)
    decode = profile._decoder(preprocess, LIMITS, torch.device("cpu"))
    pixels, seconds = decode([photograph(1, 200, 150), b"nothing", photograph(2, 200, 150)])
    assert np.stack(pixels).shape == (2, 3, 80, 80)
    assert seconds > 0
    assert made == ([torch.device("cpu")] if where == "device" else [])


@pytest.mark.parametrize(("largest", "sizes"), [(256, [32, 64, 128, 256]), (100, [32, 64]), (20, [20])])
def test_only_batches_that_a_unit_is_cut_into_are_measured(largest: int, sizes: list[int]) -> None:
    assert profile.batch_sizes(largest) == sizes
