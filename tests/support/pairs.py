"""Synthetic training pairs and a small config of the fit, for tests of the fit without images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from pipeline.arrays import Float32, Int64, vectors_to_arrow
from pipeline.config.load import validate
from pipeline.config.tree import Config
from pipeline.models.networks import Transformation
from pipeline.storage import objects, parquet
from training.fit import make_job
from training.fitting.learner import FitData, Job, Learner, PairArrays, make_arrays

CPU = torch.device("cpu")
D_OLD, D_NEW, CLASSES, PARTS = 8, 12, 5, 4


def fit_config(folder: Path, metric: str = "l2", **fit_settings: object) -> Config:
    small: dict[str, object] = {"inner_width": 32, "epochs": 6, "batch_size": 64, "warmup_epochs": 2, "lr": 5e-3}
    if "transformation" not in fit_settings:
        small |= {"transformation": "fastfill", "loss": "fastfill"}
    tree: dict[str, object] = {
        "run": str(folder / "run"),
        "device": "cpu",
        "encoders": {"new": {"export": "new.pt2", "dim": D_NEW, "preprocess": {"size": 4}}},
        "gallery": {"manifest": "gallery", "columns": {}, "metric": metric},
        "pairs": {"manifest": "pairs", "columns": {}},
        "fit": small | fit_settings,
    }
    return validate(tree, where="test")


def synthetic_pairs(num: int, labelled: bool = True) -> tuple[Float32, Float32, Int64]:
    """Old embeddings are a bent and noisy view of new ones, which are noisier in the higher classes."""
    random = np.random.default_rng(0)
    labels = random.integers(0, CLASSES, num)
    centres = random.normal(size=(CLASSES, D_NEW))
    new = centres[labels] + (0.2 + 0.2 * labels[:, None]) * random.normal(size=(num, D_NEW))
    old = np.tanh(new @ random.normal(size=(D_NEW, D_OLD)) / 3) + 0.2 * random.normal(size=(num, D_OLD))
    return old.astype(np.float32), new.astype(np.float32), labels


def hard_pairs(num: int) -> tuple[Float32, Float32, Int64]:
    """Many classes that overlap, and old embeddings that lose much, the more the higher the class: areas differ."""
    random, classes = np.random.default_rng(0), 40
    labels = random.integers(0, classes, num)
    new = random.normal(size=(classes, D_NEW))[labels] + 0.6 * random.normal(size=(num, D_NEW))
    noise = 0.05 + 0.45 * labels[:, None] / classes
    old = np.tanh(new @ random.normal(size=(D_NEW, D_OLD)) / 3) + noise * random.normal(size=(num, D_OLD))
    return old.astype(np.float32), new.astype(np.float32), labels


def synthetic_fit_data(folder: Path, num: int = 640, labelled: bool = True, hard: bool = False) -> FitData:
    old, new, labels = hard_pairs(num) if hard else synthetic_pairs(num)
    parts = []
    for part in range(PARTS + 1):
        rows = np.arange(num)[::-1][part :: PARTS + 1]
        table = pa.table(
            {
                "index": rows,
                "label": pa.array(labels[rows].astype(np.int32), mask=np.full(len(rows), not labelled)),
                "old": vectors_to_arrow(old[rows]),
                "new": vectors_to_arrow(new[rows]),
            }
        )
        parts.append(str(folder / "pairs" / f"part-{part}.parquet"))
        objects.put(parts[-1], parquet.parquet_bytes(table.schema, [table]))
    num_train = num * PARTS // (PARTS + 1)
    num_classes = int(labels.max()) + 1
    return FitData(parts[:-1], parts[-1:], num_train, num_classes if labelled else None, D_OLD, D_NEW)


def fit_job(config: Config, data: FitData) -> Job:
    return make_job(config.fit, data, config.gallery.metric, config.seed)


def read_pairs(parts: list[str], job: Job) -> PairArrays:
    return make_arrays(pa.concat_tables([parquet.read_parquet(uri) for uri in parts]), job)


def same_network(module: nn.Module) -> nn.Module:
    return module


def make_learner(job: Job, rank: int = 0) -> Learner:
    parts = job.data.train_parts[rank :: job.fit.num_workers]
    learner = Learner(job, read_pairs(parts, job), rank, CPU, same_network)
    learner.prepare()
    return learner


def assert_same_weights(found: Transformation, expected: Transformation) -> None:
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=0, atol=0, msg=name)
