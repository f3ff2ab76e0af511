"""Make the plan: score the gallery, find the cut points, lay the gallery out by wave. Ray tasks per part.

    gallery/part-* -> score (h, policy) -> scored/part-* -> cut points -> transformed/LAYOUT/part-*, plan/LAYOUT/wave-*/

Guarantee: the driver sees one small row per part and per wave, never an image; nothing is sorted as a
whole. `plan/plan.json` is written last, once; a driver that finds it there takes it and drops its own plan. No file
of a plan is replaced: LAYOUT is a digest of the scored parts, which differ by rounding between processors.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa
import ray

from pipeline.arrays import Float32, Int64
from pipeline.config.identity import Identity, check_settings_of, fix_settings, settings_digest, stage_settings
from pipeline.config.tree import Config, unit_images
from pipeline.embedding import rejects
from pipeline.errors import DataError
from pipeline.hashing import shard_of
from pipeline.manifest import normalised
from pipeline.planning import cut_points
from pipeline.planning.cut_points import CutSearch, Digits, Tally, count_digit, needs_ids
from pipeline.planning.plan import FROM_PAIRS, SCORED, UNITS_PER_FILE, Plan, Wave, read_plan, row_groups, wave_sizes
from pipeline.planning.unit_files import cut_units
from pipeline.run import Run
from pipeline.schema import UNITS, transformed_schema
from pipeline.storage import documents, objects, parquet

logger = logging.getLogger(__name__)

_TASK_CPUS = 0.5
_PARTS_AT_ONCE = 8  # that one task counts: about a million images
_LEAST_TASKS = 16


def make_plan(config: Config, run: Run, on_step: Callable[[str], None] = lambda step: None) -> Plan:
    """Transform and score the gallery, find the cut points, write the waves; nothing where it is done.

    Args:
        config: the run's config.
        run: the run, with its gallery and its transformation in place.
        on_step: told the name of each step as it starts.

    Raises:
        ConfigError: a wave would have no image, or the policy raised something.
        DataError: the gallery does not fit the transformation, the policy gave a NaN, or an image of the
            manifest is neither scored nor rejected.
        IncompatibleRun: another driver has laid the gallery out with other settings.
    """
    settings = stage_settings(config, "plan")
    plan = read_plan(run)
    if plan is None:
        try:
            plan = _plan(config, run, settings, on_step)
        except DataError:  # perhaps because a faster driver has made the plan, and removed the scored parts
            plan = _plan_of_other(run)
            if plan is None:
                raise
    check_settings_of(run, "plan", settings)
    return plan


def _plan(config: Config, run: Run, settings: Identity, on_step: Callable[[str], None]) -> Plan:
    from pipeline.planning.score import score_gallery  # here: the tasks of this module must not wait for torch

    on_step("transform")
    scored = f"{SCORED}/{settings_digest(settings)}"
    parts = score_gallery(config, run, scored)
    counts, from_pairs = [part.images for part in parts], sum(part.from_pairs for part in parts)
    rejected = _check_whole(run, counts)
    place = replace(run, layout=_layout(config, settings, [part.sha256 for part in parts]))
    waves, found = arrange(config, place, scored, counts, on_step, from_pairs)
    plan = _describe(config, place, counts, rejected, waves, found)
    try:  # equal bytes are the same plan, of a driver that planned at the same time: both may go on, no attempt id
        objects.put_if_absent(run.plan, documents.encode(plan))
    except objects.AlreadyExists:
        plan = _plan_of_other(run) or plan
    objects.delete(run.path(SCORED))
    return plan


def _plan_of_other(run: Run) -> Plan | None:
    """The plan that another driver has made meanwhile, with a line that says so."""
    plan = read_plan(run)
    if plan is not None:
        logger.warning("another driver has planned this run meanwhile; this one goes on with that plan")
    return plan


def _layout(config: Config, settings: Identity, scored: list[str]) -> str:
    """The folder of the plan's parts: a digest of all that they are made from, so equal names are equal bytes."""
    made_from = {"settings": settings, "seed": config.seed, "unit_images": unit_images(config), "scored": scored}
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]


def _check_whole(run: Run, counts: list[int]) -> int:
    """The number of images that the old encoder could not read; with those scored they are the whole manifest."""
    gallery = normalised.read_manifest(run, "gallery")
    assert gallery is not None, "the gallery is normalised before it is scored"
    rejected = rejects.count_before_plan(run)
    if sum(counts) + rejected != gallery.num_rows:
        raise DataError(
            "images of the gallery are missing from the plan",
            expected=f"{gallery.num_rows} images, as the manifest has",
            found=f"{sum(counts)} with an old embedding, {rejected} rejected",
            where=run.path("gallery"),
            remedy="delete this folder's `old` and `old-rejects`, and run the same command again",
        )
    return rejected


def arrange(
    config: Config,
    run: Run,
    scored: str,
    counts: list[int],
    on_step: Callable[[str], None] = lambda step: None,
    from_pairs: int = 0,
) -> tuple[list[Wave], Digits]:
    """Cut a scored gallery into waves, lay it out, write the units.

    Args:
        config: the run's config.
        run: the run, with the layout that its parts go to.
        scored: the folder of the scored parts, inside the run.
        counts: images of each part.
        on_step: told the name of each step as it starts.
        from_pairs: images that were embedded for the fit: those of the highest priority, which get a wave of their own.

    Returns:
        the waves, and the cut points between them, (6, W - 1).

    Raises:
        ConfigError: a wave would have no image.
        IncompatibleRun: another driver has laid the gallery out with other settings.
    """
    first = FROM_PAIRS if from_pairs else FROM_PAIRS + 1
    sizes = [from_pairs] * (first == FROM_PAIRS) + wave_sizes(config.plan.waves, sum(counts) - from_pairs)
    on_step("cut")
    found = find_cuts(
        np.cumsum(sizes)[:-1], lambda search: count_parts(run, scored, len(counts), search.levels, config.seed)
    )
    on_step("lay out")
    fix_settings(run, "plan", stage_settings(config, "plan"))
    lay_out(run, scored, len(counts), found, config, first)
    on_step("cut units")
    cut = [Wave(wave, size, -(-size // unit_images(config))) for wave, size in enumerate(sizes, first)]
    cut_waves(run, len(counts), cut, config.index.shards, unit_images(config))
    return cut, found


def find_cuts(ranks: Int64, count: Callable[[CutSearch], Iterable[tuple[cut_points.Codes, Int64]]]) -> Digits:
    """The keys at the given ranks, (6, C); `count` gives shares of a pass, which together are all parts."""
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
    """The shares of one pass over the scored parts, by tasks of Ray; as many parts to a task as the pass allows."""
    task = ray.remote(num_cpus=_TASK_CPUS)(_count_some)
    step = max(1, min(_PARTS_AT_ONCE, num_parts // _LEAST_TASKS))
    parts = (range(first, min(first + step, num_parts)) for first in range(0, num_parts, step))
    stored = ray.put(levels)
    waiting = [task.remote(run, scored, some, stored, seed) for some in parts]
    while waiting:
        ready, waiting = ray.wait(waiting)
        yield ray.get(ready[0])


def _count_some(
    run: Run, scored: str, parts: range, levels: list[cut_points.Codes], seed: int
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


def lay_out(run: Run, scored: str, num_parts: int, found: Digits, config: Config, first: int) -> None:
    """Write `transformed/` from the scored parts: tasks of Ray; `first` is the number of the first wave."""
    task = ray.remote(num_cpus=_TASK_CPUS)(lay_out_part)
    ray.get([task.remote(run, scored, part, found, config, first) for part in range(num_parts)])


def lay_out_part(run: Run, scored: str, part: int, found: Digits, config: Config, first: int) -> None:
    """Rewrite a scored part with one row group per (wave, shard), rows sorted by id; waves count from `first`."""
    rows = parquet.read_parquet(run.part(scored, part))
    ids = rows["id"].to_numpy()
    num_waves, num_shards = found.shape[1] + 1, config.index.shards
    waves = cut_points.bucket(_keys(rows, config.seed), found)
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


def cut_waves(run: Run, num_parts: int, waves: list[Wave], num_shards: int, unit_images: int) -> None:
    """Write the units of all waves by tasks of Ray."""
    task = ray.remote(num_cpus=_TASK_CPUS)(cut_wave)
    each = (row_groups(place, num_shards) for place in range(len(waves)))
    ray.get([task.remote(run, num_parts, wave, groups, unit_images) for wave, groups in zip(waves, each, strict=True)])


def cut_wave(run: Run, num_parts: int, wave: Wave, groups: range, unit_images: int) -> None:
    """Write the units files of a wave in locality order: by object, then by offset or row in it.

    Args:
        run: the run, with the layout of the plan.
        num_parts: of `transformed/`.
        wave: which.
        groups: its row groups in each part.
        unit_images: images of each unit but the last.
    """
    parts = [run.transformed_part(part) for part in range(num_parts)]
    units = cut_units(parts, list(groups), wave.images, unit_images)
    for first in range(0, wave.units, UNITS_PER_FILE):
        some = itertools.islice(units, UNITS_PER_FILE)
        objects.put_once(run.wave_units(wave.wave, first), parquet.parquet_bytes(UNITS, some))


def _describe(config: Config, run: Run, counts: list[int], rejected: int, waves: list[Wave], found: Digits) -> Plan:
    from pipeline.planning.selection import resolve_policy

    with parquet.open_parquet(run.transformed_part(0)) as file:
        dim = file.schema_arrow.field("vector").type.list_size
    plan = Plan(
        policy=resolve_policy(run, config.plan.policy),
        seed=config.seed,
        num_gallery=sum(counts),
        num_parts=len(counts),
        num_shards=config.index.shards,
        dim=dim,
        unit_images=unit_images(config),
        waves=tuple(waves),
        fingerprint=hashlib.sha256(found.tobytes()).hexdigest(),
        deleted_images=config.plan.deleted_images,
        num_rejected=rejected,
        layout=run.layout,
    )
    digest = hashlib.sha256(json.dumps(asdict(plan)).encode()).hexdigest()
    return Plan(**{name: getattr(plan, name) for name in Plan.__slots__} | {"fingerprint": digest})
