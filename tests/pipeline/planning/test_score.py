"""Scoring a part: its policy knows what the transformation was saved with, and what the manifest says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.arrays import vectors_to_arrow
from pipeline.config.load import validate
from pipeline.config.tree import Config
from pipeline.errors import ConfigError, DataError
from pipeline.manifest.partition import Partition, write_part
from pipeline.models.networks import TransformationNetwork
from pipeline.models.transformation import TransformationInfo, save_transformation
from pipeline.planning.policy_inputs import PART, HeldOutPairs, build_policy_inputs
from pipeline.planning.score import Scorer, ScoreSettings
from pipeline.run import Run
from pipeline.storage import objects, parquet

NUM, D_OLD, D_NEW = 40, 5, 3
OLD = np.random.default_rng(0).normal(size=(NUM, D_OLD)).astype(np.float32)
TRAFFIC = (np.arange(NUM) % 4).astype(np.float32)


def scene(folder: Path, weights: object = TRAFFIC, **plan: object) -> tuple[Config, Run]:
    """A gallery of one part, and a transformation that knows of pairs."""
    columns = {"id": "id", "old_embedding": "old", "label": "label", "group": "label", "traffic": "weight"}
    labels = [f"{row % 3}" for row in range(NUM)]
    content = {"id": np.arange(NUM), "old": vectors_to_arrow(OLD), "label": labels, "weight": weights}
    pq.write_table(pa.table(content), folder / "gallery.parquet")
    gallery = {"manifest": str(folder / "gallery.parquet"), "columns": columns}
    encoder = {"export": "never-loaded.pt2", "dim": D_NEW, "preprocess": {"size": 4}}
    tree = {"run": str(folder / "run"), "device": "cpu", "encoders": {"new": encoder}, "plan": plan}
    config, run = validate(tree | {"gallery": gallery, "pairs": gallery}, "test"), Run(str(folder / "run"))
    part = Partition(config.gallery.manifest, [0], 0, 0, NUM)  # type: ignore[arg-type] - one file
    write_part(run.part("gallery", 0), part, config.gallery, 64, ".")
    info = TransformationInfo(D_OLD, D_NEW, None, 8, False, "alignment", 0, 1, 10, 10, True, {})
    new = np.random.default_rng(1).normal(size=(NUM, D_NEW)).astype(np.float32)
    made = build_policy_inputs(HeldOutPairs(OLD, new, new[:, 0], new + 1, np.arange(NUM) % 3), None, "l2", 0)
    torch.manual_seed(0)
    save_transformation(run, TransformationNetwork(D_OLD, D_NEW, 8), info, {PART: made.to_bytes()})
    return config, run


def settings_of(config: Config) -> ScoreSettings:
    return ScoreSettings(config.plan, config.seed, config.encoders, config.device)


def priorities(config: Config, run: Run) -> np.ndarray:
    scorer = Scorer(run, "scored", settings_of(config))
    uri = run.part("scored", 0)
    for _ in range(2):  # the second time it is there already
        found = scorer({"id": np.array([0])})
        assert found == {"part": [0], "images": [NUM], "sha256": [objects.sha256(uri)], "from_pairs": [0]}
    stored = parquet.read_parquet(uri)
    assert "traffic" not in stored.schema.names
    priority: np.ndarray = stored["priority"].to_numpy()
    return priority


def test_a_policy_that_knows_of_pairs_orders_a_gallery(tmp_path: Path) -> None:
    found = priorities(*scene(tmp_path, policy="class_mean"))
    assert found.std() > 0
    (tmp_path / "again").mkdir()
    assert np.array_equal(priorities(*scene(tmp_path / "again", policy="class_mean")), found)


def test_traffic_comes_from_the_manifest(tmp_path: Path) -> None:
    for name in ("plain", "weighed"):
        (tmp_path / name).mkdir()
    plain = priorities(*scene(tmp_path / "plain", policy="centroid"))
    weighed = priorities(*scene(tmp_path / "weighed", policy="centroid", traffic=True))
    assert np.array_equal(weighed, plain * TRAFFIC)


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf, None])
def test_traffic_that_is_no_weight_is_refused_with_its_row(tmp_path: Path, bad: float | None) -> None:
    weights = [1.0] * 7 + [bad] + [0.0] * (NUM - 8)
    with pytest.raises(DataError, match=r"a traffic weight is not usable(.|\n)*row 7, column weight"):
        scene(tmp_path, pa.array(weights, pa.float64()))


def test_score_with_a_policy_without_its_inputs_is_refused_before_any_part(tmp_path: Path) -> None:
    config, run = scene(tmp_path, policy="entropy")
    with pytest.raises(ConfigError, match="expected: classifier"):
        Scorer(run, "scored", settings_of(config))
