"""The planner's steps in this process and thread: what Ray would start as tasks and actors is just called."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pipeline.config.tree import Config
from pipeline.planning import build, score
from pipeline.planning.plan import Wave, row_groups
from pipeline.planning.score import ScoredPart, Scorer
from pipeline.run import Run

NUM_PARTS = 2


def plan_in_process(patch: pytest.MonkeyPatch) -> None:
    """Score, count, lay out and cut without Ray; for galleries of NUM_PARTS parts."""
    patch.setattr(score, "score_gallery", lambda *scored: score_each(Scorer(*scored)))
    patch.setattr(build, "count_parts", _count_parts)
    patch.setattr(build, "lay_out", _lay_out)
    patch.setattr(build, "cut_waves", _cut_waves)


def score_each(scorer: Scorer) -> list[ScoredPart]:
    """What a scorer gives for each part of the gallery."""
    found = [scorer({"id": np.array([part])}) for part in range(NUM_PARTS)]
    return [ScoredPart(int(item["images"][0]), str(item["sha256"][0]), int(item["from_pairs"][0])) for item in found]


def _count_parts(run: Run, scored: str, parts: int, levels: Any, seed: int) -> Iterator[Any]:
    yield build._count_some(run, scored, range(parts), levels, seed)


def _lay_out(run: Run, scored: str, parts: int, found: Any, config: Config, first: int) -> None:
    for part in range(parts):
        build.lay_out_part(run, scored, part, found, config, first)


def _cut_waves(run: Run, parts: int, waves: list[Wave], shards: int, images: int) -> None:
    for place, wave in enumerate(waves):
        build.cut_wave(run, parts, wave, row_groups(place, shards), images)
