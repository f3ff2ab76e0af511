"""Small whole backfills with each kind of metric, codec, encoder and input that the other tests do not use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from jobs.cli import main
from pipeline.arrays import vectors_to_arrow
from pipeline.config.load import load_config
from pipeline.embedding.decode import Limits, decode_image
from pipeline.embedding.embedder import Embedder
from pipeline.evaluation.curve import read_curve
from pipeline.index import commits
from pipeline.models.transformation import read_info
from pipeline.run import Run
from tests.support.galleries import NEW_DIM, PREPROCESS, digits, write_config, write_manifest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

FAST = {"plan__waves": 2, "plan__unit_images": 32}  # as the pairs that are copied were embedded
OF_A_FUNCTION = {"function": "tests.support.own_functions:new_encoder", "dim": NEW_DIM, "preprocess": PREPROCESS}


def fastfill(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), catch_exceptions=False)


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


def inner_product_sq8(folder: Path, make_run: Callable[..., str]) -> str:
    return make_run(folder, gallery__metric="ip", index__factory="IVF4,SQ8", **FAST)


def pq_of_a_function(folder: Path, make_run: Callable[..., str]) -> str:
    return make_run(folder, index__factory="IVF4,PQ10x4", encoders__new=OF_A_FUNCTION, **FAST)


def cosine_with_side_and_torchvision(folder: Path, make_run: Callable[..., str]) -> str:
    """With a fit of its own, which is most of its time: the other two use the one that is there."""
    path = write_config(
        folder,
        encoders__new=with_torchvision(folder / "weights"),
        gallery__metric="cosine",
        gallery__columns__side="side",
        pairs__columns__side="side",
        fit={"transformation": "fastfill", "inner_width": 32, "epochs": 2, "batch_size": 64},
        **FAST,
    )
    with_side(folder)
    return path


@pytest.mark.parametrize("variant", [inner_product_sq8, pq_of_a_function, cosine_with_side_and_torchvision])
def test_a_whole_backfill_of_each_variant_is_whole(
    variant: Callable[..., str], tmp_path: Path, make_run: Callable[..., str]
) -> None:
    path = variant(tmp_path, make_run)
    result = fastfill("backfill", "--config", path)
    assert result.exit_code == 0, result.output
    audit = fastfill("audit", "--config", path, "--json")
    assert json.loads(audit.stdout)["problems"] == []
    config = load_config(path)
    run = Run(config.run)
    counts = commits.read_commit(run, 2).counts
    assert (counts.embedded, counts.transformed, counts.rejected) == (300, 0, 0)
    info = read_info(run)
    assert info.normalize == (config.gallery.metric == "cosine")
    assert info.d_side == (3 if config.gallery.columns.side else None)
    curve: Any = read_curve(run)
    exact = config.index.factory == "Flat"  # but for ties: normalised once more by FAISS, the last bits differ
    assert curve["distance"] == config.gallery.metric
    assert curve["published"]["points"][-1]["map"] == pytest.approx(curve["new_new"]["map"], abs=1e-3 if exact else 5)


def test_given_new_embeddings_give_the_curve_of_a_plan_before_it_is_run(
    tmp_path: Path, make_run: Callable[..., str]
) -> None:
    columns = {"id": "name", "image": "image", "label": "digit"}
    plain = make_run(tmp_path / "plain", gallery__columns=columns, **FAST)
    refused = fastfill("plan", "--measure", "0", "--config", plain), fastfill("evaluate", "--curve", "--config", plain)
    assert [result.exit_code for result in refused] == [0, 2]
    assert "gallery.columns.new_embedding" in refused[1].stderr
    given = make_run(tmp_path / "given", gallery__columns=columns | {"new_embedding": "new"}, **FAST)
    images, labels = digits(300)
    spec = load_config(given).encoders.new
    pixels = np.stack([decode_image(data, spec.preprocess, Limits(10**6, 10**6)) for data in images])
    new = Embedder(spec, "cpu", batch_size=16, threads=1).embed(pixels)
    write_manifest(tmp_path / "given" / "data" / "gallery.parquet", images, labels, new=vectors_to_arrow(new))
    assert fastfill("plan", "--measure", "0", "--config", given).exit_code == 0
    curve = json.loads(fastfill("evaluate", "--curve", "--config", given, "--json").stdout)
    assert (curve["num_queries"], curve["published"]) == (300, {"points": []})
    assert fastfill("backfill", "--config", given).exit_code == 0
    after = json.loads(fastfill("evaluate", "--curve", "--config", given, "--json").stdout)
    assert len(after["published"]["points"]) == 3
    for order in curve["orders"]:
        assert after["orders"][order]["area"] == pytest.approx(curve["orders"][order]["area"], abs=0.01)
