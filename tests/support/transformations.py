"""Saved transformations with made-up held-out metrics."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.models.networks import TransformationNetwork
from pipeline.models.transformation import TransformationInfo, save_transformation
from pipeline.run import Run


def fitted(folder: Path, better_than_old: bool) -> Run:
    """A run with a transformation that is, or is not, better than the old embeddings."""
    run = Run(str(folder))
    figures = {"transformed": {"top1": 12.34, "map": 5.0}, "old_old": {"top1": 20.0, "map": 7.0}, "alignment": 0.5}
    info = TransformationInfo(4, 3, None, 8, False, "fastfill", 0, 1, 10, 2, better_than_old, figures)
    torch.manual_seed(0)
    save_transformation(run, TransformationNetwork(4, 3, 8), info)
    return run
