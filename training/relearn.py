"""Learn on the way: fit again with the gallery's own embedded images, and plan what is left by what was learnt.

    vector log (waves up to W) + old embeddings -> relearnt/wave-WWW/pairs -> fit -> relearnt/wave-WWW/tried
    -> the better of it and what served so far -> relearnt/wave-WWW/transformation -> pipeline.replan

Guarantee: every file is created once and is a function of the log and of what lies before it, so a run that was killed
here goes on to the same bytes as one that was not (on an equal processor: see `pipeline.equality`). An image that is
held out, or left, has trained nothing. It does not publish, and knows no commit.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pipeline import documents, fan_out, probe_set, reference, replan, storage
from pipeline import offset as offsets
from pipeline.config import Config
from pipeline.embeddings import embedding_log, read_embeddings
from pipeline.errors import ConfigError, DataError, SnapshotConflict
from pipeline.offset import Classifier, Offset
from pipeline.plan import Plan
from pipeline.reference import Reference, load_reference
from pipeline.run import Run
from pipeline.schema import Int64, splitmix64, vectors_to_arrow
from pipeline.selection import read_selection, resolve_relearn
from pipeline.transformation import has_transformation, load_transformation, read_part, save_transformation
from pipeline.vector_log import VectorLog, part_files
from training.candidates import settings_of
from training.fit import fit
from training.knowledge import reference_of
from training.learner import Epoch, FitData, Job, make_arrays
from training.learnt import Learnt, compare
from training.measure import transform
from training.pairs import MIN_PAIRS, NUM_STRIPES, build_pairs, fit_data

_LOG = logging.getLogger(__name__)
_SALT = 0x1EA2  # of the sample alone
_HASHES = 2**64


def relearn(
    config: Config,
    run: Run,
    plan: Plan,
    wave: int,
    on_epoch: Callable[[Epoch], None] | None = None,
    on_step: replan.OnStep = lambda step: None,
) -> Learnt | None:
    """Learn from the waves up to `wave`, all of which are in the log, and plan anew what is left.

    Args:
        config: the run's.
        run: the run.
        plan: its plan.
        wave: one of `plan.relearn_after`; no unit of a later wave is embedded.
        on_epoch: as in `training.fit.fit`.
        on_step: told the name of each step as it starts.

    Returns:
        what was learnt; None where what is left was planned anew before.

    Raises:
        ConfigError, DataError, TransientError: as `training.fit.fit` and `pipeline.replan.replan`.
    """
    place, done = run.relearnt(wave), replan.is_replanned(run, wave)
    if not has_transformation(place):
        on_step("gather what is embedded")
        data = fit_data(config, run, build_pairs(config, run))
        images = _gather(config, run, plan, wave, data)
        on_step("learn from it")
        if images.num_rows < MIN_PAIRS:
            _keep(_before(run, plan, wave), place, Learnt(wave, "nothing", images.num_rows))
        elif resolve_relearn(run, config).what == "order":
            _learn_order(config, run, plan, wave, data, images)
        else:
            _learn_transformation(config, run, plan, wave, data, images, on_epoch)
    replan.replan(config, run, plan, wave, on_step)
    return None if done else read_learnt(run, wave)


def read_learnt(run: Run, wave: int) -> Learnt:
    """What was learnt after a wave."""
    return _read(run.relearnt(wave))


def _before(run: Run, plan: Plan, wave: int) -> Run:
    """Where the transformation lies that serves the waves after `wave` so far."""
    return plan.place(run, wave + 1, wave - 1)


def _gather(config: Config, run: Run, plan: Plan, wave: int, data: FitData) -> pa.Table:
    """Embedded images as pairs, at most about `relearn.images` of them by a hash: the columns of the pairs' parts.

    Raises:
        DataError: the gallery has no side information where the pairs have, or an old embedding is missing.
    """
    log, embedded = plan.log(run), sum(item.images for item in plan.waves[:wave])
    most = np.uint64(min(_HASHES - 1, _HASHES * config.relearn.images // embedded))
    uris = [uri for number in range(1, wave + 1) for uri in part_files(log.parts_uri, number).values()]
    found = pa.concat_tables(fan_out.each(_sampled, (most, config.seed), uris, embedded)).sort_by("id")
    ids: Int64 = found["id"].to_numpy()
    old_log = embedding_log(config, run, "gallery", "old")
    columns = ["id", "old"] + (["side"] if data.d_side is not None else [])
    each = fan_out.each(_old_of, (run, old_log, ids, columns), range(plan.num_parts), plan.num_gallery)
    known = pa.concat_tables(each).sort_by("id")
    if not np.array_equal(known["id"].to_numpy(), ids):
        raise DataError(
            "embedded images have no old embedding",
            expected=f"{len(ids)}, each once",
            found=known.num_rows,
            where=run.path("gallery"),
            remedy="`fastfill audit` names what is damaged",
        )
    with storage.open_parquet(data.train_parts[0]) as file:
        schema = file.schema_arrow
    given = {"index": pa.array(~ids), "old": known["old"], "new": found["vector"]}  # ~: beside the ids of the pairs
    given |= {"side": known["side"]} if "side" in columns else {}
    return pa.table(
        [given.get(field.name, pa.nulls(len(ids), field.type)) for field in schema], schema=schema.remove_metadata()
    )


def _sampled(most: np.uint64, seed: int, uri: str) -> pa.Table:
    table = storage.read_parquet(uri, ["id", "vector"])
    return table.filter(pa.array(splitmix64(table["id"].to_numpy(), seed + _SALT) <= most))


def _old_of(run: Run, log: VectorLog, ids: Int64, columns: list[str], part: int) -> pa.Table:
    rows, old = read_embeddings(run, "gallery", part, "old_embedding", log)
    if "side" in columns and "side" not in rows.schema.names:
        raise DataError("the pairs have side information and the gallery has none", where=run.part("gallery", part))
    wanted = np.isin(rows["id"].to_numpy(), ids)
    rows = rows.filter(pa.array(wanted))
    return rows.append_column("old", vectors_to_arrow(old[wanted])).select(columns)


def _job(config: Config, data: FitData) -> Job:
    return Job(config.fit, data, config.seed, config.gallery.metric == "cosine", 0, 0)


def _decide(place: Run, learnt: Learnt) -> Learnt:
    """Keep what was decided, or find what was before a kill: on another machine the last bits may be others."""
    storage.put_once(place.path("learnt.json"), documents.encode(learnt))
    return _read(place)


def _read(place: Run) -> Learnt:
    where = place.path("learnt.json")
    return Learnt.from_json(storage.read_bytes(where), where)


def _keep(source: Run, place: Run, learnt: Learnt, known: Reference | None = None) -> None:
    """Let a transformation be that of a place, maybe with other knowledge for the policy."""
    network, info = load_transformation(source, torch.device("cpu"))
    parts = {name: data for name in (reference.PART, offsets.PART) if (data := read_part(source, name)) is not None}
    parts |= {} if known is None else {reference.PART: known.to_bytes()}
    _decide(place, learnt)
    with contextlib.suppress(SnapshotConflict):  # another driver was here meanwhile: the first one counts
        save_transformation(place, network, info, parts)


def _learn_order(config: Config, run: Run, plan: Plan, wave: int, data: FitData, images: pa.Table) -> None:
    """The policy knows the embedded images as well: no transformation was fitted on them."""
    source, job = _before(run, plan, wave), _job(config, data)
    table = pa.concat_tables([*map(storage.read_parquet, data.held_out_parts), images]).sort_by("index")
    pairs = make_arrays(table, job)
    network, _ = load_transformation(source, torch.device("cpu"))
    z, s = transform(config, network, pairs)
    part, known = read_part(source, offsets.PART), load_reference(source)
    served = z if part is None else Offset.from_bytes(part).apply(z, s)
    classifier = None if data.classifier is None else Classifier(*data.classifier)
    if known is not None and known.classifier_weight is not None:
        classifier = Classifier(known.classifier_weight, known.classifier_bias)
    anew = reference_of(config, table, pairs, z, s, served, classifier, data.label_names)
    _keep(source, run.relearnt(wave), Learnt(wave, "order", images.num_rows), anew)


def _learn_transformation(
    config: Config,
    run: Run,
    plan: Plan,
    wave: int,
    data: FitData,
    images: pa.Table,
    on_epoch: Callable[[Epoch], None] | None,
) -> None:
    """Fit on pairs and embedded images, and take what is better on images that are left."""
    place, source, chosen = run.relearnt(wave), _before(run, plan, wave), read_selection(run)
    tried = Run(place.path("tried"))
    held = splitmix64(images["index"].to_numpy(), config.seed + _SALT + 1) < np.uint64(
        int(_HASHES * config.pairs.held_out_fraction)
    )
    settings = config.fit if chosen is None else settings_of(chosen, config.fit)
    config = config.model_copy(update={"select": None, "fit": settings})
    if not has_transformation(tried):
        try:
            mine = _write_pairs(config, place, data, images, held)
            fit(config, tried, mine, on_epoch, classify=_classifies(source))
        except (ConfigError, DataError) as error:  # the wave must be published all the same, and no setting may change
            _LOG.warning("nothing is learnt after wave %d, for the fit failed: %s", wave, error)
            _keep(source, place, Learnt(wave, "nothing", images.num_rows))
            return
    held_out = images.filter(pa.array(held))
    if not held_out.num_rows:  # of a handful of images
        held_out = pa.concat_tables(map(storage.read_parquet, data.held_out_parts))
    probe = probe_set.gather(config, run, plan)
    kept = None if probe is None else probe_set.as_of(run, plan, probe, wave - 1)
    errors, precision = compare(config, source, tried, wave, kept, make_arrays(held_out, _job(config, data)))
    learnt = _decide(place, Learnt(wave, "transformation", images.num_rows, errors, precision))
    _keep(tried if learnt.taken else source, place, learnt)


def _classifies(source: Run) -> bool:
    """Whether the policy may ask for a classifier: the transformation so far kept one."""
    known = load_reference(source)
    return known is not None and known.classifier_weight is not None


def _write_pairs(config: Config, place: Run, data: FitData, images: pa.Table, held: NDArray[np.bool_]) -> FitData:
    """The pairs, and beside them the images, each once: repeated up to the number of pairs they took mAP far down.

    They are not like the rest: an order takes the hardest ones first.
    """
    mine = images.filter(pa.array(~held))
    stripes = (splitmix64(mine["index"].to_numpy(), config.seed + 2) % np.uint64(NUM_STRIPES)).astype(np.int64)
    parts = []
    for stripe in np.unique(stripes).tolist():
        rows = np.flatnonzero(stripes == stripe)
        parts.append(place.part("pairs/train", stripe))
        storage.put_once(parts[-1], storage.parquet_bytes(images.schema, [mine.take(pa.array(rows))]))
    rest = place.part("pairs/held_out", 0)
    storage.put_once(rest, storage.parquet_bytes(images.schema, [images.filter(pa.array(held))]))
    return replace(
        data,
        train_parts=[*data.train_parts, *parts],
        held_out_parts=[*data.held_out_parts, rest],
        num_train=data.num_train + mine.num_rows,
    )
