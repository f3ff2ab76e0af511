"""Encoders of the benchmarks: what they are trained on, and what is left of a training."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from benchmarks.quality import encoders
from benchmarks.quality.encoders import RECIPES, SCARCE_GROUP, Prototypes, encoder, rows_of
from pipeline.config.tree import EncoderSettings, PreprocessSettings
from pipeline.models.encoder import load_encoder


def test_only_the_scarce_group_loses_images() -> None:
    groups = [SCARCE_GROUP if row % 4 == 0 else "others" for row in range(400)]
    rows = rows_of(replace(RECIPES["biased"], kept=0.1), groups)
    kept = [groups[row] for row in rows]
    assert kept.count("others") == 300
    assert kept.count(SCARCE_GROUP) == 10
    assert rows_of(RECIPES["strong-old"], groups).tolist() == list(range(400))


def test_prototypes_say_how_near_each_point_is() -> None:
    head, z = Prototypes(3, 4), torch.randn(5, 4)
    expected = -torch.cdist(z, head.points).square()
    torch.testing.assert_close(head(z), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["biased", "no-classifier"])
def test_encoder_training_that_was_stopped_goes_on_to_the_same_bytes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoders, "RECIPES", {name: replace(RECIPES[name], width=4, dim=6, epochs=2)})
    monkeypatch.setattr(encoders, "_BATCH", 8)
    write_images(tmp_path / "train.parquet")
    whole = encoder(name, tmp_path, tmp_path / "whole")
    epoch, done = encoders._epoch, []

    def stopped(*arguments: object) -> float:
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return epoch(*arguments)  # type: ignore[arg-type] - passed on

    with monkeypatch.context() as patch:
        patch.setattr(encoders, "_epoch", stopped)
        with pytest.raises(KeyboardInterrupt):
            encoder(name, tmp_path, tmp_path / "slices")
    slices = encoder(name, tmp_path, tmp_path / "slices")
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    preprocess = PreprocessSettings(size=32, pixel_range=255, mean=(125.3, 123.0, 113.9), std=(63.0, 62.1, 66.7))
    loaded = [
        load_encoder(EncoderSettings(export=str(found.export), dim=6, preprocess=preprocess), torch.device("cpu"))
        for found in (whole, slices)
    ]
    assert torch.equal(*(model(images) for model in loaded))
    assert (whole.classifier is None) == (name == "no-classifier")
    assert whole.classifier is None or whole.classifier.exists()


def write_images(path: Path) -> None:
    rng, images = np.random.default_rng(0), []
    for _ in range(24):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "png")
        images.append(file.getvalue())
    labels = np.arange(24) % 3
    columns = {"image": images, "label": labels, "coarse_label_name": [f"group {label}" for label in labels]}
    pq.write_table(pa.table(columns), path)
