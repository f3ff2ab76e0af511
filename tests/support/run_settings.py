"""Configs whose weight files exist, and runs started with them, for tests of a run's identity."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from pipeline.config.identity import (
    STAGES,
    fix_settings,
    stage_settings,
    start,
    weight_fingerprints,
)
from pipeline.config.load import resolve, validate
from pipeline.config.tree import Config
from pipeline.run import Run

GALLERY = {"gallery": "0123"}


def config(folder: Path, data: str = "data", **changes: Any) -> Config:
    """A config whose weights are there; changes are `section__key=value`."""
    inputs = folder / data
    if not inputs.exists():
        inputs.mkdir()
        for name in ("old.pt2", "new.pt2", "classifier.safetensors"):
            (inputs / name).write_bytes(name.encode())
    preprocess = {"size": 8}
    manifest = {"manifest": "a.parquet", "columns": {"id": "id", "image": "image"}}
    tree: dict[str, Any] = {
        "run": str(folder / "run"),
        "data_root": str(inputs),
        "encoders": {
            "old": {"export": "old.pt2", "dim": 3, "preprocess": dict(preprocess)},
            "new": {"export": "new.pt2", "dim": 4, "preprocess": dict(preprocess)},
        },
        "gallery": copy.deepcopy(manifest),
        "pairs": copy.deepcopy(manifest),
        "fit": {"classifier": {"path": "classifier.safetensors"}},
    }
    for name, value in changes.items():
        *parents, last = name.split("__")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return resolve(validate(tree, where="test"))


def fingerprints(item: Config) -> dict[str, str]:
    return GALLERY | weight_fingerprints(item)


def begin(item: Config) -> Run:
    return start(item, fingerprints(item))


def finish(item: Config) -> Run:
    """A run whose stages all have something to keep."""
    run = begin(item)
    for name in STAGES:
        fix_settings(run, name, stage_settings(item, name))
    return run
