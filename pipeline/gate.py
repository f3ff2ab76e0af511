"""The gate: why a snapshot must not be served. Pure decisions on what is stored.

So far one check: the transformed gallery must not be worse than the old one (METHOD, "Guard").
"""

from __future__ import annotations

from pipeline.commits import Commit
from pipeline.run import Run
from pipeline.transformation import read_info


def blockers(run: Run, commit: Commit) -> list[str]:
    """Why this snapshot must not become `prod`, one sentence each; empty where it may.

    A transformation that is worse than old/old on held-out pairs blocks every snapshot that still
    serves transformed vectors of images which are yet to be embedded.
    """
    info = read_info(run)
    waiting = commit.counts.transformed - commit.counts.rejected
    if info.better_than_old or not waiting:
        return []
    return [
        f"on held-out pairs the transformed gallery is worse than the old one ({_figures(info.held_out)}), "
        f"and {waiting:,} images are still transformed"
    ]


def _figures(held_out: dict[str, float | dict[str, float]]) -> str:
    texts = []
    for name in ("transformed", "old_old"):
        figures = held_out.get(name)
        if isinstance(figures, dict):
            texts.append(f"{name} " + ", ".join(f"{key} {value:.1f}" for key, value in figures.items()))
    return " against ".join(texts)
