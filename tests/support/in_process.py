"""The planner's steps in this process and thread: what Ray would start as tasks and actors is just called."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
import pytest

from pipeline import parallel
from pipeline.config.tree import BackfillSettings
from pipeline.planning import score
from pipeline.planning.score import ScoredPart, Scorer, ScoreSettings
from pipeline.run import Run

NUM_PARTS = 2

T = TypeVar("T")


def plan_in_process(patch: pytest.MonkeyPatch) -> None:
    """Score, count, lay out and cut without Ray; for galleries of NUM_PARTS parts."""
    patch.setattr(score, "score_gallery", _score_gallery)
    patch.setattr(parallel, "on_ray", _in_turn)


def score_each(scorer: Scorer) -> list[ScoredPart]:
    """What a scorer gives for each part of the gallery."""
    found = [scorer({"id": np.array([part])}) for part in range(NUM_PARTS)]
    return [ScoredPart(int(item["images"][0]), str(item["sha256"][0]), int(item["from_pairs"][0])) for item in found]


def _score_gallery(run: Run, folder: str, settings: ScoreSettings, backfill: BackfillSettings) -> list[ScoredPart]:
    return score_each(Scorer(run, folder, settings))


def _in_turn(function: Callable[..., T], shared: tuple[object, ...], pieces: Iterable[object]) -> Iterator[T]:
    return (function(*shared, piece) for piece in pieces)
