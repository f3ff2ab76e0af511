"""Plan what is left of the gallery anew, once a wave is embedded and something was learnt from it.

    transformed/part-* (waves after this one) -> score by the new h or order -> relearnt/wave-WWW/scored
    -> cut points -> relearnt/wave-WWW/transformed, relearnt/wave-WWW/plan

Guarantee: the waves that are left keep their sizes, and hold the images that they held together before, each once.
Every file is created once, the first one counts, and it is a function of those before it. So a driver that goes on
after a kill, or works at the same time on another processor, comes to the same plan. `plan/plan.json` of the place is
last, and from then on no file there changes. No unit of a wave that is left may be embedded before that, which
`backfill` sees to. Does not know what was learnt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np

from pipeline import documents, planner, storage
from pipeline.config import Config
from pipeline.errors import DataError
from pipeline.plan import SCORED, Plan
from pipeline.run import Run

OnStep = Callable[[str], None]


def is_replanned(run: Run, wave: int) -> bool:
    """Whether what is left after a wave is planned anew, whole."""
    return storage.exists(run.relearnt(wave).plan)


def replan(config: Config, run: Run, plan: Plan, wave: int, on_step: OnStep = lambda step: None) -> None:
    """Score, cut and lay out the images of the waves after `wave`; nothing where it is done.

    Args:
        config: the run's config.
        run: the run, with the transformation in `run.relearnt(wave)`.
        plan: the run's plan; `wave` is one of its `relearn_after`.
        wave: all units up to it are durable, and none after it is embedded.
        on_step: told the name of each step as it starts.

    Raises:
        DataError: images are missing, or the policy gave a NaN.
    """
    place = run.relearnt(wave)
    if is_replanned(run, wave):
        storage.delete(place.path(SCORED))  # of a driver that was killed before it did so
        return
    from pipeline.score import Scoring, score_parts  # here: the tasks of this module must not wait for torch

    on_step("transform what is left")
    parts = score_parts(config, Scoring(run, place, SCORED, plan.place(run, wave + 1, wave - 1), wave))
    images = sum(part.images for part in parts)
    sizes = [item.images for item in plan.waves[wave:]]
    if images != sum(sizes):
        raise DataError(
            "images are missing from what is planned anew",
            expected=f"{sum(sizes)} images in the waves after {wave}",
            found=images,
            where=place.path(SCORED),
            remedy="`fastfill audit` names what is damaged",
        )
    try:
        _lay_out(config, plan, place, wave, len(parts), on_step)
    except DataError:
        if not is_replanned(run, wave):  # else another driver was faster, and took the scored parts away
            raise
    storage.delete(place.path(SCORED))


def _lay_out(config: Config, plan: Plan, place: Run, wave: int, parts: int, on_step: OnStep) -> None:
    """From scored parts to the marker that says that all is there."""
    sizes = [item.images for item in plan.waves[wave:]]
    on_step("cut what is left")
    found = planner.find_cuts(
        np.cumsum(sizes)[:-1],
        lambda search: planner.count_parts(place, SCORED, parts, search.levels, config.seed),
    )
    on_step("lay out what is left")
    planner.lay_out(place, SCORED, parts, found, config, wave + 1)
    units = planner.cut_waves(place, parts, sizes, plan.num_shards, plan.unit_images, wave + 1)
    assert units == [item.units for item in plan.waves[wave:]], "of the same sizes"
    outcome = {"after_wave": wave, "images": sum(sizes), "fingerprint": hashlib.sha256(found.tobytes()).hexdigest()}
    storage.put_once(place.plan, documents.encode(outcome))
