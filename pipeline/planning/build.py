"""Make the plan: score the gallery, find the cut points, lay the gallery out by wave, in Ray tasks per part.

    gallery/part-* -> score (h, policy) -> scored/part-* -> cut points -> transformed/LAYOUT/part-*, plan/LAYOUT/wave-*/

The driver sees one small row per part and per wave, never an image, and nothing is sorted as a whole. `plan/plan.json`
is written last and once: a second driver takes the plan that exists. LAYOUT is a digest of the scored parts, which
differ by rounding between processors, so no file of a plan is ever replaced.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Self

import numpy as np
import pyarrow as pa

from pipeline import parallel
from pipeline.arrays import Float32, Int64
from pipeline.config.identity import Identity, check_settings_of, fix_settings, settings_digest, stage_settings
from pipeline.config.method import PlanSettings
from pipeline.config.tree import BackfillSettings, Config
from pipeline.embedding import reject_rules
from pipeline.errors import DataError
from pipeline.hashing import shard_of
from pipeline.manifest import normalised
from pipeline.planning import cut_points
from pipeline.planning.cut_points import CutSearch, Digits, Tally, count_digit, needs_ids
from pipeline.planning.plan import FROM_PAIRS, SCORED, UNITS_PER_FILE, Plan, Wave, read_plan, row_groups, wave_sizes
from pipeline.planning.unit_files import cut_units
from pipeline.run import Run
from pipeline.schema import UNITS, transformed_schema
from pipeline.storage import documents, interface, objects, parquet

if TYPE_CHECKING:
    from pipeline.planning.score import ScoreSettings

logger = logging.getLogger(__name__)

_PARTS_AT_ONCE = 8  # parts that one task counts: about a million images
_LEAST_TASKS = 16


@dataclass(frozen=True, slots=True)
class LayoutSettings:
    """How the scored gallery is cut into waves, shards and units."""

    plan: PlanSettings
    seed: int
    num_shards: int
    unit_images: int
    identity: Identity  # the plan's settings as the run keeps them

    @classmethod
    def of(cls, config: Config) -> Self:
        """The settings of a run."""
        return cls(config.plan, config.seed, config.index.shards, config.unit_images, stage_settings(config, "plan"))


def make_plan(config: Config, run: Run, on_step: Callable[[str], None] = lambda step: None) -> Plan:
    """Transform and score the gallery, find the cut points, write the waves; an existing plan is returned as it is.

    The run's gallery and transformation are in place. `on_step` is called with the name of each step as it starts.

    Raises:
        ConfigError: a wave would have no image, or the policy raised an exception.
        DataError: the gallery does not fit the transformation, the policy gave a NaN, or an image of the manifest is
            neither scored nor rejected.
        IncompatibleRun: another driver has laid the gallery out with other settings.
    """
    settings = LayoutSettings.of(config)
    plan = read_plan(run)
    if plan is None:
        from pipeline.planning.score import ScoreSettings  # here: the tasks of this module must not wait for torch

        score = ScoreSettings(config.plan, config.seed, config.encoders, config.device)
        try:
            plan = _plan(run, settings, score, config.backfill, on_step)
        except DataError:  # perhaps a faster driver has made the plan and removed the scored parts
            plan = _plan_of_other(run)
            if plan is None:
                raise
    check_settings_of(run, "plan", settings.identity)
    return plan


def arrange(
    run: Run,
    scored: str,
    counts: list[int],
    settings: LayoutSettings,
    on_step: Callable[[str], None] = lambda step: None,
    from_pairs: int = 0,
) -> tuple[list[Wave], Digits]:
    """Cut a scored gallery into waves, lay it out, write the units.

    Args:
        run: the run, with the layout of its parts.
        scored: the folder of the scored parts, inside the run.
        counts: images of each part.
        settings: how to cut.
        on_step: called with the name of each step as it starts.
        from_pairs: images that were embedded for the fit; they have the highest priority and a wave of their own.

    Returns:
        the waves, and the cut points between them, (6, W - 1).

    Raises:
        ConfigError: a wave would have no image.
        IncompatibleRun: another driver has laid the gallery out with other settings.
    """
    first = FROM_PAIRS if from_pairs else FROM_PAIRS + 1
    sizes = [from_pairs] * (first == FROM_PAIRS) + wave_sizes(settings.plan.waves, sum(counts) - from_pairs)
    on_step("cut")
    cuts = find_cuts(
        np.cumsum(sizes)[:-1], lambda search: count_parts(run, scored, len(counts), search.levels, settings.seed)
    )
    on_step("lay out")
    fix_settings(run, "plan", settings.identity)
    list(parallel.on_ray(lay_out_part, (run, scored, settings, cuts, first), range(len(counts))))
    on_step("cut units")
    waves = [Wave(wave, size, -(-size // settings.unit_images)) for wave, size in enumerate(sizes, first)]
    groups = [row_groups(place, settings.num_shards) for place in range(len(waves))]
    list(parallel.on_ray(cut_wave, (run, len(counts), settings.unit_images), zip(waves, groups, strict=True)))
    return waves, cuts


def find_cuts(ranks: Int64, count: Callable[[CutSearch], Iterable[tuple[cut_points.Codes, Int64]]]) -> Digits:
    """The keys at the given ranks, (6, C); `count` yields counts of a pass that together cover all parts."""
    search = CutSearch(np.asarray(ranks, dtype=np.int64))
    while not search.done:
        tally = Tally(search.levels)
        for codes, counts in count(search):
            tally.add(codes, counts)
        search.advance(*tally.result())
    return search.cuts


def count_parts(
    run: Run, scored: str, num_parts: int, levels: list[cut_points.Codes], seed: int
) -> Iterable[tuple[cut_points.Codes, Int64]]:
    """The counts of one pass over the scored parts; a task counts several parts if there are many."""
    step = max(1, min(_PARTS_AT_ONCE, num_parts // _LEAST_TASKS))
    parts = (range(first, min(first + step, num_parts)) for first in range(0, num_parts, step))
    return parallel.on_ray(_count_some, (run, scored, levels, seed), parts)


def lay_out_part(run: Run, scored: str, settings: LayoutSettings, cuts: Digits, first: int, part: int) -> None:
    """Rewrite a scored part with one row group per (wave, shard), rows sorted by id; waves count from `first`."""
    rows = parquet.read_parquet(run.part(scored, part))
    ids = rows["id"].to_numpy()
    num_waves, num_shards = cuts.shape[1] + 1, settings.num_shards
    waves = cut_points.bucket(_keys(rows, settings.seed), cuts)
    shards = shard_of(ids, num_shards)
    groups = waves.astype(np.int64) * num_shards + shards
    order = np.lexsort((ids, groups))
    starts = np.searchsorted(groups[order], np.arange(num_waves * num_shards + 1))
    rows = (
        rows.append_column("wave", pa.array(waves + np.int32(first)))
        .append_column("shard", pa.array(shards))
        .take(order)
    )
    schema = transformed_schema(rows.schema.field("vector").type.list_size)
    row_groups = (rows.slice(start, end - start) for start, end in itertools.pairwise(starts))
    objects.put_once(run.transformed_part(part), parquet.parquet_bytes(schema, row_groups))


def cut_wave(run: Run, num_parts: int, unit_images: int, found: tuple[Wave, range]) -> None:
    """Write the units files of a wave in locality order: by object, then by offset or row in it.

    `found` is the wave, and its row groups in each part.
    """
    wave, groups = found
    parts = [run.transformed_part(part) for part in range(num_parts)]
    units = cut_units(parts, list(groups), wave.images, unit_images)
    for first in range(0, wave.units, UNITS_PER_FILE):
        some = itertools.islice(units, UNITS_PER_FILE)
        objects.put_once(run.wave_units(wave.wave, first), parquet.parquet_bytes(UNITS, some))


def _plan(
    run: Run, settings: LayoutSettings, score: ScoreSettings, backfill: BackfillSettings, on_step: Callable[[str], None]
) -> Plan:
    from pipeline.planning.score import score_gallery

    on_step("transform")
    scored = f"{SCORED}/{settings_digest(settings.identity)}"
    parts = score_gallery(run, scored, score, backfill)
    counts, from_pairs = [part.images for part in parts], sum(part.from_pairs for part in parts)
    rejected = _check_whole(run, counts)
    place = replace(run, layout=_layout(settings, [part.sha256 for part in parts]))
    waves, cuts = arrange(place, scored, counts, settings, on_step, from_pairs)
    plan = _describe(place, settings, counts, rejected, waves, cuts)
    try:  # without an attempt id: if another driver wrote equal bytes at the same time, both may go on
        objects.put_if_absent(run.plan, documents.encode(plan))
    except interface.AlreadyExists:
        plan = _plan_of_other(run) or plan
    objects.delete(run.path(SCORED))
    return plan


def _plan_of_other(run: Run) -> Plan | None:
    plan = read_plan(run)
    if plan is not None:
        logger.warning("another driver has planned this run meanwhile; this one uses that plan")
    return plan


def _layout(settings: LayoutSettings, scored: list[str]) -> str:
    """The folder of the plan's parts: a digest of everything they are made from, so equal names mean equal bytes."""
    made_from = {
        "settings": settings.identity,
        "seed": settings.seed,
        "unit_images": settings.unit_images,
        "scored": scored,
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]


def _check_whole(run: Run, counts: list[int]) -> int:
    """Check that scored and rejected images are the whole manifest; returns the number of rejected ones."""
    gallery = normalised.read_manifest(run, "gallery")
    assert gallery is not None, "the gallery is normalised before it is scored"
    rejected = reject_rules.count_before_plan(run)
    if sum(counts) + rejected != gallery.num_rows:
        raise DataError(
            "images of the gallery are missing from the plan",
            expected=f"{gallery.num_rows} images, as the manifest has",
            found=f"{sum(counts)} with an old embedding, {rejected} rejected",
            where=run.path("gallery"),
            remedy=f"delete {run.path('gallery', 'old')} and {run.path('gallery', 'old-rejects')}, then repeat this "
            "command",
        )
    return rejected


def _count_some(
    run: Run, scored: str, levels: list[cut_points.Codes], seed: int, parts: range
) -> tuple[cut_points.Codes, Int64]:
    tally = Tally(levels)
    columns = ["priority", "id"] if needs_ids(levels) else ["priority"]
    for part in parts:
        rows = parquet.read_parquet(run.part(scored, part), columns)
        ids = rows["id"].to_numpy() if needs_ids(levels) else None
        tally.add(*count_digit(rows["priority"].to_numpy(), ids, seed, levels))
    return tally.result()


def _keys(rows: pa.Table, seed: int) -> Digits:
    priority: Float32 = rows["priority"].to_numpy()
    return cut_points.digits(priority, rows["id"].to_numpy(), seed)


def _describe(
    run: Run, settings: LayoutSettings, counts: list[int], rejected: int, waves: list[Wave], cuts: Digits
) -> Plan:
    from pipeline.planning.selection_result import resolve_policy

    with parquet.open_parquet(run.transformed_part(0)) as file:
        dim = file.schema_arrow.field("vector").type.list_size
    plan = Plan(
        policy=resolve_policy(run, settings.plan.policy),
        seed=settings.seed,
        num_gallery=sum(counts),
        num_parts=len(counts),
        num_shards=settings.num_shards,
        dim=dim,
        unit_images=settings.unit_images,
        waves=tuple(waves),
        fingerprint=hashlib.sha256(cuts.tobytes()).hexdigest(),
        deleted_images=settings.plan.deleted_images,
        num_rejected=rejected,
        layout=run.layout,
    )
    digest = hashlib.sha256(json.dumps(asdict(plan)).encode()).hexdigest()
    return Plan(**{name: getattr(plan, name) for name in Plan.__slots__} | {"fingerprint": digest})
