"""The published protocol on real data: CIFAR-100, 10,000 images as gallery and queries, a recipe of known figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.config.load import load_config
from pipeline.config.tree import Config
from pipeline.embedding.decode import Limits, decode_image
from pipeline.evaluation import curve as curves
from pipeline.evaluation.gallery_arrays import load_gallery
from pipeline.index import commits
from pipeline.models.encoder import load_encoder
from pipeline.reporting.audit import audit
from pipeline.run import Run
from pipeline.serving.searcher import Searcher
from tests.support.cifar100 import CONFIG, options

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


RECIPE = (
    "fit.transformation=fastfill",
    "fit.loss=alignment+uncertainty",
    "fit.epochs=40",
    "fit.calibrate=false",
    "plan.policy=uncertainty",
)


@pytest.fixture(scope="module")
def finished(cifar100: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished backfill by the shipped config with a recipe of known figures, by the command that a user types."""
    run = os.environ.get("FASTFILL_CIFAR100_RUN") or str(tmp_path_factory.mktemp("cifar100") / "run")
    settings = [f"run={run}", f"data_root={cifar100}", *RECIPE]
    command = [sys.executable, "-m", "jobs.cli", "backfill", "--config", CONFIG]
    start = time.monotonic()
    subprocess.run([*command, *options(settings)], check=True)
    print(f"the whole job took {time.monotonic() - start:.0f} s")
    return load_config(CONFIG, tuple(settings))


@pytest.fixture(scope="module")
def figures(finished: Config) -> Any:
    result = curves.read_curve(Run(finished.run))
    print(json.dumps({name: order["area"] for name, order in result["orders"].items()}, indent=1))  # type: ignore[index]
    return result


def test_reference_figures_of_both_encoders_are_met(figures: Any) -> None:
    assert [round(figures["old_old"][name], 1) for name in ("top1", "top5", "map")] == [28.1, 56.5, 12.7]
    assert [round(figures["new_new"][name], 1) for name in ("top1", "top5", "map")] == [52.0, 76.4, 30.4]


def test_uncertainty_order_reaches_the_area_and_beats_random(figures: Any) -> None:
    area, random = (figures["orders"][name]["area"] for name in ("uncertainty", "random"))
    assert area["top1"] >= 46.8
    assert area["map"] >= 26.6
    assert area["top1"] - random["top1"] >= 0.8
    assert area["map"] - random["map"] >= 0.8


def test_the_last_point_is_the_new_model_exactly(figures: Any) -> None:
    for order in figures["orders"].values():
        assert [order["points"][-1][name] for name in ("top1", "top5", "map")] == [
            figures["new_new"][name] for name in ("top1", "top5", "map")
        ]
    assert figures["published"]["points"][-1]["top1"] == pytest.approx(figures["new_new"]["top1"], abs=0.02)


def test_last_snapshot_answers_as_a_plain_reembedding(finished: Config, cifar100: Path) -> None:
    images = pq.read_table(cifar100 / "test.parquet", columns=["image"])["image"].to_pylist()[:1000]
    encoder, limits = finished.encoders.new, Limits(10**6, 10**6)
    pixels = np.stack([decode_image(data, encoder.preprocess, limits) for data in images])
    with torch.inference_mode():
        plain = load_encoder(encoder, torch.device("cpu"))(torch.from_numpy(pixels)).numpy()
    gallery = load_gallery(Run(finished.run))
    np.testing.assert_allclose(gallery.embedded[:1000], plain, atol=1e-5, rtol=1e-4)
    with Searcher(finished.run) as searcher:
        found = searcher.search(plain[:200], 2)
    assert commits.read_commit(Run(finished.run), found.commit).counts.embedded == 10_000
    own = (found.ids == np.arange(200)[:, None]) & (found.distances < 1e-3)
    assert own.any(axis=1).all()


def test_the_run_is_whole(finished: Config) -> None:
    report = audit(finished.run)
    assert report.ok, report.problems
