"""The expected curve of a planned gallery, from its held-out pairs and its probe set; kept as `reports/expected.json`.

After the plan, before the first image. Guarantee: it reads what the run has, and asks for no image. The arithmetic is
`pipeline.planning.expected_curve`'s.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline import parallel
from pipeline.arrays import Float32, Float64, Int64, vectors_from_arrow
from pipeline.config.tree import Config
from pipeline.evaluation import probe_set
from pipeline.evaluation.gallery_arrays import codes_of, labelled_sample
from pipeline.evaluation.metrics import METRICS, EvaluateOptions, Metrics, evaluate, nearest_rows, recall
from pipeline.evaluation.probe_set import ProbeSet
from pipeline.evaluation.simulated_curve import order_by_priority
from pipeline.models.calibration import read_calibration
from pipeline.planning.distribution_shift import DistributionShift, distribution_shift
from pipeline.planning.expected_curve import CurveEnds, Expected, expect, expected_uri, read_expected
from pipeline.planning.plan import Plan
from pipeline.planning.selection import read_selection, resolve_policy
from pipeline.run import Run
from pipeline.storage import documents, objects, parquet
from training.simulation.folds import by_chance
from training.simulation.held_out import FOLDS, HeldOut, fold_places, held_out, priorities
from training.simulation.simulate import FINAL, SimulationDetail, curves_of, order_by, queries_of

_LEAST_FOLDED = 1000  # pairs; with fewer, what a fold says of the band is noise, and some labels are there once
_LEAST_LABELLED = 100
_MOST_OWN = 10_000  # images of the probe set that are backfilled by themselves, which is quadratic
_LIMITED = "evaluate.max_images"


@dataclass(frozen=True, slots=True)
class Outlook:
    """The expected curves by metric, top1, top5 and map or recall10; none where `notes` says why.

    `notes` are sentences on what the curves do not tell; `made_unix_seconds` is when the curves were computed.
    """

    curves: dict[str, Expected]
    notes: tuple[str, ...]
    made_unix_seconds: float | None = None


def expected_curve(config: Config, run: Run, plan: Plan) -> Outlook:
    """What is expected of the plan's order: by labels where the probe set has some, else by recall10; kept.

    Where the pairs have none, the bend is that of the probe set's own backfill alone.

    A gallery above `evaluate.max_images` is represented by a sample of so many images, and one of which some have no
    label by the others, or by the user's own sample; the figures are those of a gallery of that size. Nothing of the
    rest comes here.
    """
    uri = expected_uri(run)
    stored = objects.read_versioned(uri)
    if stored is not None:
        return _outlook(config, read_expected(stored[0], uri), objects.stat(uri).modified_seconds)
    probe = probe_set.gather(config.probe, config.encoders, run, plan)
    if probe is None:
        why = "no two of its images have all embeddings" if config.probe.images else "probe.images is 0"
        return Outlook({}, (f"No quality is expected: the run has no probe set to measure the gallery by ({why}).",))
    rows = _queries(probe)
    first = plan.num_from_pairs / plan.num_gallery
    names, curves = _shapes(config, run, rows is not None, first)
    sample, own = (0, ""), dict[str, Float64]()
    if rows is None:
        ends = _ends_by_agreement(config, probe)
    else:
        ends, sample = _ends_by_labels(config, run, plan, probe, rows)
        own = _own(config, run, plan, probe, rows)
    held = {name: curves[:, :, column] for column, name in enumerate(names)}
    fractions = np.linspace(0, 1, FINAL.points)
    found = {name: expect(held.get(name), fractions, end, *sample, own.get(name)) for name, end in ends.items()}
    objects.put(uri, documents.encode({name: item.to_json() for name, item in found.items()}))
    return _outlook(config, found, objects.stat(uri).modified_seconds)


def _outlook(config: Config, curves: dict[str, Expected], made_unix_seconds: float) -> Outlook:
    notes, largest = [], max(curves.values(), key=lambda curve: curve.sample)
    if largest.sample:
        notes.append(
            f"The gallery is represented by {largest.sample:,} of its images ({largest.sampled or _LIMITED}): the "
            "figures are those of a gallery of that size, and lower in the whole, where more images compete."
        )
    if config.plan.traffic:
        notes.append("The order goes by traffic too, which pairs do not have: their part of the curve is without it.")
    return Outlook(curves, tuple(notes), made_unix_seconds)


def distribution_shift_of(config: Config, run: Run, plan: Plan) -> DistributionShift | None:
    """Whether the held-out pairs look like the probe set, and are served as near; None without a probe set."""
    probe = probe_set.gather(config.probe, config.encoders, run, plan)
    if probe is None:
        return None
    pairs = held_out(config, run)
    sides = (pairs.fold.pairs.new - pairs.served, probe.targets(config.gallery.metric) - probe.transformed)
    mine, gallery = (np.square(side).sum(axis=1, dtype=np.float64) for side in sides)
    return distribution_shift(pairs.fold.pairs.old, probe.old, config.seed, (mine, gallery))


def _shapes(config: Config, run: Run, labelled: bool, first: float) -> tuple[tuple[str, ...], Float64]:
    """The metrics, and per fold of held-out pairs their curves under the run's order, (F, P, M).

    `first` is the share of the gallery that was embedded for the fit.

    A selection's curves are of pairs that its policy knows nothing of, but of the policy alone. Those that it measured
    on the probe set are left aside: the probe set has its say by `_own`.
    """
    policy = resolve_policy(run, config.plan.policy)
    boost, selection = config.plan.group_boost, read_selection(run)
    plain = not boost and not config.plan.traffic and not first
    as_selected = selection is not None and selection.chosen.policy == policy and selection.measured_on == "pairs"
    if selection is not None and as_selected and plain and (labelled or "recall10" in selection.curves):
        names = tuple(selection.curves)
        return names, np.stack([np.array(selection.curves[name]) for name in names], axis=2)
    return curves_by_fold(config, held_out(config, run), policy, boost, labelled, first)


def curves_by_fold(
    config: Config, pairs: HeldOut, policy: str, boost: float = 0.0, labelled: bool = True, first: float = 0.0
) -> tuple[tuple[str, ...], Float64]:
    """The metrics, and per fold of the pairs their curves under a policy, (F, P, M) float64 in per cent.

    Args:
        config: `gallery` and `seed` count.
        pairs: with what the policy knows; `learned` is learnt again without the pairs that it ranks.
        policy: by its name.
        boost: `group_boost`.
        labelled: whether to measure by labels, where each fold has some that can be.
        first: the share that comes before all others, whatever the policy says.
    """
    priority = priorities(config, pairs, policy, boost)
    num_folds = FOLDS if len(priority) >= _LEAST_FOLDED else 1
    places = fold_places(len(priority), num_folds)
    some = [np.flatnonzero(places == number) for number in range(num_folds)]
    folds = [pairs.fold.take(rows) for rows in some]
    if not labelled or any(fold.labels() is None for fold in folds):
        folds = [fold.unlabelled() for fold in folds]
    curves: list[Float64] = []
    names: tuple[str, ...] = ()
    for rows, fold in zip(some, folds, strict=True):
        orders = {policy: [_after_pairs(order_by(priority[rows], config.seed), first)]}
        names, found = curves_of(config, pairs.served[rows], fold, orders, FINAL, pairs.calibration)
        curves.append(found[policy])
    return names, np.stack(curves)


def _after_pairs(order: Int64, share: float) -> Int64:
    """An order of all rows in which a share of them, drawn by chance, comes first, as the pairs of the gallery do."""
    known = np.isin(order, by_chance(len(order), round(share * len(order))))
    return np.concatenate([order[known], order[~known]])


def _queries(probe: ProbeSet) -> Int64 | None:
    """The probe images with a label, (Q,) int64; None where quality cannot be measured by these."""
    rows = np.flatnonzero(probe.labels >= 0)
    return None if len(rows) < _LEAST_LABELLED or len(np.unique(probe.labels[rows])) == len(rows) else rows


def _ends_by_agreement(config: Config, probe: ProbeSet) -> dict[str, CurveEnds]:
    """Among the probe images alone; in the end each query finds what it finds."""
    rows, metric = np.arange(len(probe.ids)), config.gallery.metric
    exact = nearest_rows(probe.new, probe.new, rows, metric)
    first = recall(nearest_rows(probe.new, probe.transformed, rows, metric), exact)
    error = 100 * np.sqrt(first / 100 * (1 - first / 100) / len(rows))
    return {"recall10": CurveEnds(first, 100.0, float(error), 0.0, start_queries=len(rows))}


def _ends_by_labels(
    config: Config, run: Run, plan: Plan, probe: ProbeSet, rows: Int64
) -> tuple[dict[str, CurveEnds], tuple[int, str]]:
    """What the queries say of the gallery before and after; and how large a sample of it was searched and why, or 0."""
    queries = Labelled(probe.ids[rows], probe.new[rows], probe.labels[rows])
    alone = probe_set.stands_alone(run, plan, probe)  # as snapshots are measured
    room = 0 if alone else max(0, config.evaluate.max_images - len(rows))
    table, total = labelled_sample(plan.laid_out(run), plan.num_parts, plan.num_gallery, room, probe.ids)
    codes, names = codes_of(table["label"])
    known = {name: code for code, name in enumerate(probe.label_names)}
    labels = np.array([known.get(name, -1) for name in names], np.int64)[codes]  # -1: no query's, whichever it is
    gallery = Labelled(
        np.concatenate([queries.ids, table["id"].to_numpy()]),
        np.concatenate([probe.transformed[rows], vectors_from_arrow(table["vector"])]),
        np.concatenate([queries.labels, labels]),
    )
    limited, labelled = table.num_rows < total, len(rows) + total
    why = _LIMITED if limited else ""
    if alone:
        why = "the labelled ones of probe.manifest"
    elif labelled < plan.num_gallery:
        why = f"{_LIMITED}, of the {labelled:,} that have labels" if limited else "only these have labels"
    ends = ends_of(queries, probe.transformed[rows], gallery, config.gallery.metric)
    return ends, (len(gallery.ids) if why else 0, why)


def _own(config: Config, run: Run, plan: Plan, probe: ProbeSet, rows: Int64) -> dict[str, Float64]:
    """`queries_of` of the labelled probe images, in the plan's order."""
    rows = rows[by_chance(len(rows), _MOST_OWN)]
    ids, parts = probe.ids[rows], range(plan.num_parts)
    table = pa.concat_tables(parallel.each(_priorities, (plan.laid_out(run), ids), parts, plan.num_gallery)).sort_by(
        "id"
    )
    order = order_by_priority(table["priority"].to_numpy(), ids, plan.seed)
    order = _after_pairs(order, plan.num_from_pairs / plan.num_gallery)
    sides, metric = (probe.transformed[rows], probe.new[rows], probe.labels[rows]), config.gallery.metric
    return queries_of(*sides, order, metric, SimulationDetail(FINAL.points, len(rows)), read_calibration(run))


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
    """By top1, top5 and map: the gallery as it is served at first, and as it is expected to be in the end.

    Args:
        probe: images of the gallery by their new embeddings.
        transformed: (Q, d) float32, the same images as they are served.
        gallery: as it is served.
        metric: l2, ip or cosine.
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
    """Standard errors over the probe's queries; of the end that of the sum, whose parts share their queries."""
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
    """A metric of each query in per cent, (Q,); NaN where it has no match."""
    if name == "map":
        return 100 * found.average_precision
    limit = {"top1": 1, "top5": 5}[name]
    return np.where(found.first_rank > 0, 100.0 * (found.first_rank <= limit), np.nan)
