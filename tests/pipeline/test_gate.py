"""The gate: a transformation that is worse than doing nothing is not served while anything depends on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.commits import Commit, Counts
from pipeline.gate import blockers
from pipeline.run import Run
from pipeline.transformation import TransformationInfo, TransformationNetwork, save_transformation


def fitted(folder: Path, better_than_old: bool) -> Run:
    """A run with a transformation that is, or is not, better than the old embeddings."""
    run = Run(str(folder))
    figures = {"transformed": {"top1": 12.34, "map": 5.0}, "old_old": {"top1": 20.0, "map": 7.0}, "alignment": 0.5}
    info = TransformationInfo(4, 3, None, 8, False, "fastfill", 0, 1, 10, 2, better_than_old, figures)
    torch.manual_seed(0)
    save_transformation(run, TransformationNetwork(4, 3, 8), info)
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Run]:
    return {better: fitted(tmp_path_factory.mktemp(str(better)), better) for better in (True, False)}


def commit(gallery: int, embedded: int, rejected: int) -> Commit:
    counts = Counts(gallery, gallery - embedded, embedded, rejected)
    return Commit(0, None, "codebook", "0", "l2", 1, 3, 2, 1, (), counts)


@settings(deadline=None)
@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50), st.booleans())
def test_a_snapshot_is_blocked_if_and_only_if_a_bad_transformation_still_serves_images_to_come(
    runs: dict[bool, Run], embedded: int, rejected: int, waiting: int, better: bool
) -> None:
    snapshot = commit(embedded + rejected + waiting, embedded, rejected)
    assert bool(blockers(runs[better], snapshot)) == (not better and waiting > 0)


def test_a_blocker_says_the_figures_and_how_many_images_wait(runs: dict[bool, Run]) -> None:
    (sentence,) = blockers(runs[False], commit(gallery=3000, embedded=995, rejected=5))
    assert "transformed top1 12.3, map 5.0 against old_old top1 20.0, map 7.0" in sentence
    assert "2,000 images are still transformed" in sentence
