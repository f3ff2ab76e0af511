"""The expected curve of a planned gallery, from its held-out pairs and its probe set; kept as `reports/expected.json`.

After the plan, before the first image. Guarantee: it reads what the run has, and asks for no image. The arithmetic is
`pipeline.expected`'s.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import probe_set, storage
from pipeline.agreement import among
from pipeline.config import Config
from pipeline.evaluate import METRICS, Metrics, evaluate, recall
from pipeline.expected import Ends, Expected, expect, expected_uri
from pipeline.gallery import codes_of, transformed_table
from pipeline.plan import Plan
from pipeline.policy import load_policy
from pipeline.probe_set import ProbeSet
from pipeline.ranking import Float64
from pipeline.run import Run
from pipeline.schema import Float32, Int64, splitmix64, vectors_from_arrow
from pipeline.selection import read_selection, resolve_policy
from pipeline.shift import same_side
from training.held_out import SALT, HeldOut, held_out
from training.select import FINAL, curves_of, order_by

_FOLDS = 4
_LEAST_FOLDED = 1000  # pairs; with fewer, what a fold says of the band is noise, and some labels are there once
_LEAST_LABELLED = 100
Curves = dict[str, Expected]


def expected_curve(config: Config, run: Run, plan: Plan) -> Curves | None:
    """By metric: top1, top5 and map with labels, else recall10; computed once.

    A gallery above `evaluate.max_images` is represented by a sample of so many images, and the figures are those of a
    gallery of that size.

    Returns:
        None where the run has no probe set, or the gallery and the pairs do not both have labels, or both none.
    """
    uri = expected_uri(run)
    stored = storage.read_versioned(uri)
    if stored is not None:
        return {name: Expected.from_json(item) for name, item in json.loads(stored[0]).items()}
    probe = probe_set.gather(config, run, plan)
    if probe is None:
        return None
    names, curves = _shapes(config, run)
    ends = _ends(config, run, plan, probe)
    if any(name not in ends for name in names):
        return None
    fractions = np.linspace(0, 1, FINAL.points)
    found = {name: expect(curves[:, :, column], fractions, ends[name]) for column, name in enumerate(names)}
    storage.put(uri, json.dumps({name: item.to_json() for name, item in found.items()}, allow_nan=False).encode())
    return found


def likeness(config: Config, run: Run, plan: Plan) -> float | None:
    """`shift.same_side` of the held-out pairs and the probe set; None without a probe set."""
    probe = probe_set.gather(config, run, plan)
    if probe is None:
        return None
    parts = storage.list_files(run.path("pairs", "held_out"), ".parquet")
    old = np.concatenate([vectors_from_arrow(storage.read_parquet(uri, ["old"])["old"]) for uri in parts])
    return same_side(old, probe.old, config.seed)


def _shapes(config: Config, run: Run) -> tuple[tuple[str, ...], Float64]:
    """The metrics, and per fold of held-out pairs their curves under the run's order, (F, P, M)."""
    policy = resolve_policy(run, config.plan.policy)
    selection = read_selection(run)
    if selection is not None and selection.chosen.policy == policy:  # of pairs that the policy knows nothing of
        names = tuple(selection.curves)
        return names, np.stack([np.array(selection.curves[name]) for name in names], axis=2)
    return curves_by_fold(config, held_out(config, run), policy)


def curves_by_fold(config: Config, pairs: HeldOut, policy: str) -> tuple[tuple[str, ...], Float64]:
    """The metrics, and per fold of the pairs their curves under a policy, (F, P, M) float64 in per cent.

    Args:
        config: `gallery.metric` and `seed` count.
        pairs: with what the policy knows.
        policy: by its name.
    """
    priority = load_policy(policy, config.seed, pairs.reference)(pairs.fold.scored())
    num_folds = _FOLDS if len(priority) >= _LEAST_FOLDED else 1
    places = (splitmix64(np.arange(len(priority)), SALT) % np.uint64(num_folds)).astype(np.int64)
    curves: list[Float64] = []
    names: tuple[str, ...] = ()
    for number in range(num_folds):
        rows = np.flatnonzero(places == number)
        orders = {policy: [order_by(priority[rows], config.seed)]}
        names, found = curves_of(config, pairs.served[rows], pairs.fold.take(rows), orders, FINAL)
        curves.append(found[policy])
    return names, np.stack(curves)


def _ends(config: Config, run: Run, plan: Plan, probe: ProbeSet) -> dict[str, Ends]:
    """What the probe set says of the gallery before and after; labels of the gallery where it has them."""
    metric, rows = config.gallery.metric, np.flatnonzero(probe.labels >= 0)
    if len(rows) < _LEAST_LABELLED or len(np.unique(probe.labels[rows])) == len(rows):
        rows = np.arange(len(probe.ids))
        exact = among(probe.new, probe.new, rows, metric)
        first = recall(among(probe.new, probe.transformed, rows, metric), exact)
        error = 100 * np.sqrt(first / 100 * (1 - first / 100) / len(rows))
        return {"recall10": Ends(first, 100.0, float(error), 0.0)}
    table = transformed_table(run, ["id", "label", "vector"])
    table = table.filter(pc.is_valid(table["label"]))
    ids: Int64 = table["id"].to_numpy()
    if len(ids) > config.evaluate.max_images:
        chance = splitmix64(ids, SALT)
        limit = np.partition(chance, config.evaluate.max_images)[config.evaluate.max_images]
        wanted = (chance <= limit) | np.isin(ids, probe.ids)
        table, ids = table.filter(pa.array(wanted)), ids[wanted]
    codes, names = codes_of(table["label"])
    places = np.searchsorted(np.array(names), np.array(probe.label_names))[probe.labels[rows]]
    gallery = Labelled(ids, vectors_from_arrow(table["vector"]), codes)
    return ends_of(Labelled(probe.ids[rows], probe.new[rows], places), probe.transformed[rows], gallery, metric)


@dataclass(frozen=True, slots=True)
class Labelled:
    """N images: ids (N,) int64, vectors (N, d) float32, labels (N,) int64."""

    ids: Int64
    vectors: Float32
    labels: Int64


def ends_of(probe: Labelled, transformed: Float32, gallery: Labelled, metric: str) -> dict[str, Ends]:
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
        metric=metric,
        query_ids=probe.ids,
        gallery_ids=gallery.ids,
    )
    before, after = (
        evaluate(probe.vectors, side, probe.labels, probe.labels, metric=metric, self_match=True)
        for side in (transformed, probe.vectors)
    )
    return {name: _end(name, whole, before, after) for name in METRICS}


def _end(name: str, whole: Metrics, before: Metrics, after: Metrics) -> Ends:
    """Standard errors over the probe's queries; of the end that of the sum, whose parts share their queries."""
    start, rise = _per_query(name, whole), _per_query(name, after) - _per_query(name, before)
    total = start + rise

    def error(values: Float64) -> float:
        return float(np.nanstd(values, ddof=1) / np.sqrt(np.isfinite(values).sum()))

    end = float(np.clip(np.nanmean(start) + np.nanmean(rise), 0, 100))
    return Ends(float(np.nanmean(start)), end, error(start), error(total))


def _per_query(name: str, found: Metrics) -> Float64:
    """A metric of each query in per cent, (Q,); NaN where it has no match."""
    if name == "map":
        return 100 * found.average_precision
    limit = {"top1": 1, "top5": 5}[name]
    return np.where(found.first_rank > 0, 100.0 * (found.first_rank <= limit), np.nan)
