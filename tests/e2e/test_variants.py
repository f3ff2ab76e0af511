"""One small whole backfill for each kind of metric, codec, encoder and input that the others do not use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from click.testing import CliRunner
from safetensors.torch import save_file

from jobs.cli import main
from pipeline import snapshot
from pipeline.config_file import load_config
from pipeline.curve import read_curve
from pipeline.run import Run
from pipeline.schema import vectors_to_arrow
from pipeline.transformation import read_info
from tests.galleries import NEW_DIM, PREPROCESS, digits, write_config, write_manifest

pytestmark = pytest.mark.usefixtures("ray_cluster")

FAST = {"fit__epochs": 2, "plan__waves": 2, "plan__unit_images": 128}
OF_A_FUNCTION = {"function": "tests.own_functions:new_encoder", "dim": NEW_DIM, "preprocess": PREPROCESS}


def with_torchvision(folder: Path) -> dict[str, Any]:
    """An untrained ResNet-18, cut before its classifier, with its weights as safetensors."""
    folder.mkdir(parents=True)
    save_file(torchvision.models.resnet18(weights=None).state_dict(), folder / "resnet.safetensors")
    source = {"model": "resnet18", "state_dict": str(folder / "resnet.safetensors"), "cut_at": "flatten"}
    return {"torchvision": source, "dim": 512, "preprocess": {"channels": 3, "size": 8}}


def with_side(folder: Path) -> None:
    """Three numbers of side information beside each image."""
    for name, count, first in (("gallery", 300, 0), ("training", 200, 300)):
        side = np.random.default_rng(first).normal(size=(count, 3)).astype(np.float32)
        write_manifest(folder / "data" / f"{name}.parquet", *digits(count, first), side=vectors_to_arrow(side))


def cosine(folder: Path, make_run: Callable[..., str]) -> str:
    return write_config(folder, gallery__metric="cosine", **FAST)


def inner_product_sq8(folder: Path, make_run: Callable[..., str]) -> str:
    return make_run(folder, gallery__metric="ip", index__factory="IVF4,SQ8", **{**FAST, "fit__epochs": 8})


def pq_of_a_function(folder: Path, make_run: Callable[..., str]) -> str:
    return make_run(folder, index__factory="IVF4,PQ10x4", encoders__new=OF_A_FUNCTION, **{**FAST, "fit__epochs": 8})


def side_and_torchvision(folder: Path, make_run: Callable[..., str]) -> str:
    encoder = with_torchvision(folder / "weights")
    path = write_config(
        folder, encoders__new=encoder, gallery__columns__side="side", pairs__columns__side="side", **FAST
    )
    with_side(folder)
    return path


@pytest.mark.parametrize("variant", [cosine, inner_product_sq8, pq_of_a_function, side_and_torchvision])
def test_a_whole_backfill_of_each_variant_is_whole(
    variant: Callable[..., str], tmp_path: Path, make_run: Callable[..., str]
) -> None:
    path = variant(tmp_path, make_run)
    result = CliRunner().invoke(main, ["backfill", "--config", path], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    audit = CliRunner().invoke(main, ["audit", "--config", path, "--json"], catch_exceptions=False)
    assert json.loads(audit.stdout)["problems"] == []
    config = load_config(path)
    run = Run(config.run)
    counts = snapshot.read_commit(run, 2).counts
    assert (counts.embedded, counts.transformed, counts.rejected) == (300, 0, 0)
    info = read_info(run)
    assert info.normalize == (config.gallery.metric == "cosine")
    assert info.d_side == (3 if config.gallery.columns.side else None)
    curve: Any = read_curve(run)
    exact = config.index.factory == "Flat"
    assert curve["distance"] == config.gallery.metric
    assert curve["published"]["points"][-1]["map"] == pytest.approx(curve["new_new"]["map"], abs=1e-6 if exact else 5)
