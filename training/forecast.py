"""The expected curve of a planned gallery, from its held-out pairs and its probe set: `reports/expected.json`.

It is computed after the plan and before the first image, from stored embeddings alone. The end points come from the
probe set, searched in the transformed gallery; the shape comes from simulated backfills of held-out pairs and of the
probe set. `planning.expected_curve` has the formula.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline import parallel
from pipeline.arrays import Float32, Float64, Int64, vectors_from_arrow
from pipeline.config.method import PlanSettings
from pipeline.config.tree import Config, GallerySettings
from pipeline.evaluation import probe_set
from pipeline.evaluation.gallery_arrays import codes_of, labelled_sample
from pipeline.evaluation.metrics import METRICS, EvaluateOptions, Metrics, evaluate, nearest_rows, recall
from pipeline.evaluation.probe_set import ProbeSet
from pipeline.evaluation.simulated_curve import order_by_priority
from pipeline.models.calibration import read_calibration
from pipeline.planning.distribution_shift import DistributionShift, distribution_shift
from pipeline.planning.expected_curve import CurveEnds, Expected, expect, expected_uri, read_expected
from pipeline.planning.plan import Plan
from pipeline.planning.selection_result import read_selection, resolve_policy
from pipeline.run import Run
from pipeline.storage import documents, objects, parquet
from training.simulation.folds import by_chance
from training.simulation.held_out import FOLDS, HeldOut, fold_places, held_out, priorities
from training.simulation.simulate import FINAL, SimulatedGallery, SimulationDetail, curves_of, order_by, queries_of

_LEAST_FOLDED = 1000  # pairs; with fewer, a fold's curve is mostly noise, and many labels occur once
_LEAST_LABELLED = 100
_MOST_OWN = 10_000  # images of the probe set whose backfill is simulated: the time is quadratic
_LIMITED = "evaluate.max_images"


@dataclass(frozen=True, slots=True)
class SimulatedOrder:
    """A policy with its `group_boost`; `first` is the share of the pairs before it, like a gallery's pairs."""

    policy: str
    group_boost: float = 0.0
    first: float = 0.0


@dataclass(frozen=True, slots=True)
class Outlook:
    """The expected curves by metric (top1, top5 and map, or recall10); notes on their limits, or why there is none."""

    curves: dict[str, Expected]
    notes: tuple[str, ...]
    made_unix_seconds: float | None = None


def expected_curve(config: Config, run: Run, plan: Plan) -> Outlook:
    """The expected curve of the plan's order, computed once: by labels if the probe set has any, else by recall10.

    If only the probe set has labels, the shape comes from it alone. A gallery above `evaluate.max_images` is
    represented by a sample of that many images, and a partly labelled gallery by its labelled images or by the user's
    own sample. The figures are those of a gallery of that size.
    """
    uri = expected_uri(run)
    stored = objects.read_versioned(uri)
    if stored is not None:
        return _outlook(config.plan, read_expected(stored[0], uri), objects.stat(uri).modified_seconds)
    probe = probe_set.gather(config.probe, config.encoders, run, plan)
    if probe is None:
        why = "fewer than two of its images have all embeddings" if config.probe.images else "probe.images is 0"
        return Outlook({}, (f"No estimate of the quality: it needs a probe set, and the run has none ({why}).",))
    rows = _queries(probe)
    first = plan.num_from_pairs / plan.num_gallery
    order = SimulatedOrder(resolve_policy(run, config.plan.policy), config.plan.group_boost, first)
    shapes = _selected_shapes(run, order, config.plan.traffic, rows is not None)
    if shapes is None:
        shapes = curves_by_fold(held_out(config, run), order, config.gallery, config.seed, rows is not None)
    names, curves = shapes
    sample, own = (0, ""), dict[str, Float64]()
    if rows is None:
        ends = _ends_by_agreement(probe, config.gallery.metric)
    else:
        labelled = Labelled(probe.ids[rows], probe.new[rows], probe.labels[rows])
        transformed, metric = probe.transformed[rows], config.gallery.metric
        gallery, sample = _gallery_of(run, plan, probe, rows, config.evaluate.max_images)
        ends = ends_of(labelled, transformed, gallery, metric)
        own = _own(run, plan, labelled, transformed, metric)
    held = {name: curves[:, :, column] for column, name in enumerate(names)}
    fractions = np.linspace(0, 1, FINAL.points)
    found = {name: expect(held.get(name), fractions, end, *sample, own.get(name)) for name, end in ends.items()}
    objects.put(uri, documents.encode({name: item.to_json() for name, item in found.items()}))
    return _outlook(config.plan, found, objects.stat(uri).modified_seconds)


def _outlook(plan: PlanSettings, curves: dict[str, Expected], made_unix_seconds: float) -> Outlook:
    notes, largest = [], max(curves.values(), key=lambda curve: curve.sample)
    if largest.sample:
        notes.append(
            f"The estimate uses {largest.sample:,} of the gallery's images ({largest.sampled or _LIMITED}). The whole "
            "gallery scores lower, because more images compete."
        )
    if plan.traffic:
        notes.append("The estimate ignores `plan.traffic` for the held-out pairs: these have no traffic.")
    return Outlook(curves, tuple(notes), made_unix_seconds)


def distribution_shift_of(config: Config, run: Run, plan: Plan) -> DistributionShift | None:
    """The shift between held-out pairs and probe set, in old embeddings and in errors; None without a probe set."""
    probe = probe_set.gather(config.probe, config.encoders, run, plan)
    if probe is None:
        return None
    pairs = held_out(config, run)
    sides = (pairs.fold.pairs.new - pairs.served, probe.targets(config.gallery.metric) - probe.transformed)
    mine, gallery = (np.square(side).sum(axis=1, dtype=np.float64) for side in sides)
    return distribution_shift(pairs.fold.pairs.old, probe.old, config.seed, (mine, gallery))


def _selected_shapes(
    run: Run, order: SimulatedOrder, traffic: bool, labelled: bool
) -> tuple[tuple[str, ...], Float64] | None:
    """The metrics and curves, (F, P, M), that the selection measured; None unless it simulated this very order."""
    selection = read_selection(run)
    if selection is None or selection.measured_on != "pairs" or selection.chosen.policy != order.policy:
        return None
    if order.group_boost or order.first or traffic or not (labelled or "recall10" in selection.curves):
        return None
    names = tuple(selection.curves)
    return names, np.stack([np.array(selection.curves[name]) for name in names], axis=2)


def curves_by_fold(
    pairs: HeldOut, order: SimulatedOrder, gallery: GallerySettings, seed: int, labelled: bool = True
) -> tuple[tuple[str, ...], Float64]:
    """The metrics, and per fold of the pairs their curves, (F, P, M) float64 in per cent; by labels if it can be."""
    priority = priorities(pairs, order.policy, gallery, seed, order.group_boost)
    num_folds = FOLDS if len(priority) >= _LEAST_FOLDED else 1
    places = fold_places(len(priority), num_folds)
    some = [np.flatnonzero(places == number) for number in range(num_folds)]
    folds = [pairs.fold.take(rows) for rows in some]
    if not labelled or any(fold.labels() is None for fold in folds):
        folds = [fold.unlabelled() for fold in folds]
    curves: list[Float64] = []
    names: tuple[str, ...] = ()
    for rows, fold in zip(some, folds, strict=True):
        orders = {order.policy: [_after_pairs(order_by(priority[rows], seed), order.first)]}
        simulated = SimulatedGallery(
            pairs.served[rows], fold.pairs.new, fold.labels(), gallery.metric, pairs.calibration
        )
        names, found = curves_of(simulated, orders, FINAL)
        curves.append(found[order.policy])
    return names, np.stack(curves)


def _after_pairs(order: Int64, share: float) -> Int64:
    """The order with a share of its rows, drawn by a hash, moved to the front: like a gallery's pairs of the fit."""
    known = np.isin(order, by_chance(len(order), round(share * len(order))))
    return np.concatenate([order[known], order[~known]])


def _queries(probe: ProbeSet) -> Int64 | None:
    """Rows of the probe images with a label, (Q,) int64; None if quality cannot be measured by these."""
    rows = np.flatnonzero(probe.labels >= 0)
    return None if len(rows) < _LEAST_LABELLED or len(np.unique(probe.labels[rows])) == len(rows) else rows


def _ends_by_agreement(probe: ProbeSet, metric: str) -> dict[str, CurveEnds]:
    """recall10 among the probe images: of the transformed vectors, and 100 % of the new embeddings."""
    rows = np.arange(len(probe.ids))
    exact = nearest_rows(probe.new, probe.new, rows, metric)
    first = recall(nearest_rows(probe.new, probe.transformed, rows, metric), exact)
    error = 100 * np.sqrt(first / 100 * (1 - first / 100) / len(rows))
    return {"recall10": CurveEnds(first, 100.0, float(error), 0.0, start_queries=len(rows))}


def _gallery_of(
    run: Run, plan: Plan, probe: ProbeSet, rows: Int64, max_images: int
) -> tuple[Labelled, tuple[int, str]]:
    """The transformed gallery, or a sample of it; then the size of the sample and its reason, or 0 and ""."""
    alone = probe_set.stands_alone(run, plan, probe)  # as snapshots are measured
    room = 0 if alone else max(0, max_images - len(rows))
    table, total = labelled_sample(plan.laid_out(run), plan.num_parts, plan.num_gallery, room, probe.ids)
    codes, names = codes_of(table["label"])
    known = {name: code for code, name in enumerate(probe.label_names)}
    labels = np.array([known.get(name, -1) for name in names], np.int64)[codes]  # -1: a label of no query
    gallery = Labelled(
        np.concatenate([probe.ids[rows], table["id"].to_numpy()]),
        np.concatenate([probe.transformed[rows], vectors_from_arrow(table["vector"])]),
        np.concatenate([probe.labels[rows], labels]),
    )
    limited, labelled = table.num_rows < total, len(rows) + total
    why = _LIMITED if limited else ""
    if alone:
        why = "the labelled images of probe.manifest"
    elif labelled < plan.num_gallery:
        why = f"{_LIMITED}, of the {labelled:,} that have labels" if limited else "only these have labels"
    return gallery, (len(gallery.ids) if why else 0, why)


def _own(run: Run, plan: Plan, probe: Labelled, transformed: Float32, metric: str) -> dict[str, Float64]:
    """The simulated backfill of the labelled probe images in the plan's order, query by query; see `queries_of`."""
    rows = by_chance(len(probe.ids), _MOST_OWN)
    ids, parts = probe.ids[rows], range(plan.num_parts)
    tables = parallel.each(_priorities, (plan.laid_out(run), ids), parts, plan.num_gallery)
    table = pa.concat_tables(tables).sort_by("id")
    order = order_by_priority(table["priority"].to_numpy(), ids, plan.seed)
    order = _after_pairs(order, plan.num_from_pairs / plan.num_gallery)
    sides = (transformed[rows], probe.vectors[rows], probe.labels[rows])
    gallery = SimulatedGallery(*sides, metric, read_calibration(run))
    return queries_of(gallery, order, SimulationDetail(FINAL.points, len(rows)))


def _priorities(run: Run, ids: Int64, part: int) -> pa.Table:
    rows = parquet.read_parquet(run.transformed_part(part), ["id", "priority"])
    return rows.filter(pa.array(np.isin(rows["id"].to_numpy(), ids)))


@dataclass(frozen=True, slots=True)
class Labelled:
    """N images: ids (N,) int64, vectors (N, d) float32, labels (N,) int64."""

    ids: Int64
    vectors: Float32
    labels: Int64


def ends_of(probe: Labelled, transformed: Float32, gallery: Labelled, metric: str) -> dict[str, CurveEnds]:
    """The quality at both ends, by top1, top5 and map: of the transformed gallery, and after the whole backfill.

    `probe` are Q of its images with their new embeddings, `transformed` (Q, d) float32 the same as they are served.
    """
    whole = evaluate(
        probe.vectors,
        gallery.vectors,
        probe.labels,
        gallery.labels,
        EvaluateOptions(metric=metric, query_ids=probe.ids, gallery_ids=gallery.ids),
    )
    before, after = (
        evaluate(probe.vectors, side, probe.labels, probe.labels, EvaluateOptions(metric=metric, self_match=True))
        for side in (transformed, probe.vectors)
    )
    return {name: _end(name, whole, before, after) for name in METRICS}


def _end(name: str, whole: Metrics, before: Metrics, after: Metrics) -> CurveEnds:
    """Means and standard errors over the queries. The end is start + rise; their correlation is accounted for."""
    start, rise = _per_query(name, whole), _per_query(name, after) - _per_query(name, before)
    total = start + rise

    def error(values: Float64) -> float:
        return float(np.nanstd(values, ddof=1) / np.sqrt(np.isfinite(values).sum()))

    both = np.isfinite(total)
    spread = np.std([start[both], total[both]], axis=1)
    correlation = float(np.corrcoef(start[both], total[both])[0, 1]) if spread.all() else 0.0
    end = float(np.clip(np.nanmean(start) + np.nanmean(rise), 0, 100))
    counts = [int(np.isfinite(values).sum()) for values in (start, total)]
    return CurveEnds(float(np.nanmean(start)), end, error(start), error(total), correlation, *counts)


def _per_query(name: str, found: Metrics) -> Float64:
    """A metric of each query in per cent, (Q,); NaN if it has no match."""
    if name == "map":
        return 100 * found.average_precision
    limit = {"top1": 1, "top5": 5}[name]
    return np.where(found.first_rank > 0, 100.0 * (found.first_rank <= limit), np.nan)
