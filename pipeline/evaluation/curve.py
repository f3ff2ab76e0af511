"""The curve of a run: quality against the fraction backfilled, simulated and as its commits published it.

It is stored as `reports/curve.json` with the settings that it was computed from, and is not computed twice. Queries
are the new embeddings of all labelled images; an image is no match of itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import numpy as np

from pipeline.arrays import Float64, Int64
from pipeline.config.method import EvaluateSettings
from pipeline.config.tree import Config, Metric
from pipeline.embedding.vector_log import part_files
from pipeline.errors import DataError
from pipeline.evaluation.gallery_arrays import GalleryArrays, check_known, load_gallery, query_rows
from pipeline.evaluation.metrics import METRICS, EvaluateOptions, Metrics, by_group, evaluate, negative_flips
from pipeline.evaluation.ranks import TOP_K, OnProgress
from pipeline.evaluation.simulated_curve import (
    CurveInputs,
    CurveOptions,
    OrderCurve,
    Simulation,
    oracle_order,
    order_by_priority,
    random_order,
    share_of_gap,
    simulate_curve,
)
from pipeline.models.calibration import Calibration, read_calibration
from pipeline.planning.plan import FROM_PAIRS
from pipeline.planning.selection_result import resolve_policy
from pipeline.run import Run
from pipeline.storage import documents, objects

Json = dict[str, object]
CurvePoint = dict[str, int | float]

MIN_GROUP_QUERIES = 10  # below, a group's top-1 moves by more than 10 points with one query
_VERSION = 2  # of the result; a stored one of another version is computed again


@dataclass(frozen=True, slots=True)
class _Settings:
    """The settings that decide a curve; `policy` is never `auto`."""

    evaluate: EvaluateSettings
    policy: str
    metric: Metric
    seed: int


def curve(config: Config, run: Run, *, published: bool = True, on_progress: OnProgress | None = None) -> Json:
    """The whole curve of a run, as `evaluate --curve --json` prints it.

    Args:
        config: the run's; `evaluate`, `plan.policy`, `gallery.metric` and `seed` count.
        run: every image is embedded or rejected; or the run is planned and new embeddings came with its manifest.
        published: measure the run's own commits as well.

    Raises:
        DataError: the gallery has no labels, or images are neither embedded nor rejected yet.
    """
    from pipeline.evaluation.snapshot_metrics import published_points  # here: it takes FAISS

    policy = resolve_policy(run, config.plan.policy)
    settings = _Settings(config.evaluate, policy, config.gallery.metric, config.seed)
    key = _cache_key(settings, run, published)
    stored = _read(run)
    if stored is not None and stored["key"] == key:
        return cast(Json, stored["curve"])
    gallery = load_gallery(run)
    check_known(gallery, run)
    result = _simulate(settings, gallery, read_calibration(run), _portion(on_progress, 0, 0.5 if published else 1))
    if published:
        result["published"] = {"points": published_points(run, gallery, _portion(on_progress, 0.5, 1))}
    objects.put(_uri(run), documents.encode({"key": key, "curve": result}))
    return result


def read_curve(run: Run) -> Json | None:
    """The curve that was computed last, or None."""
    stored = _read(run)
    return None if stored is None else cast(Json, stored["curve"])


def _simulate(
    settings: _Settings, gallery: GalleryArrays, calibration: Calibration | None, on_progress: OnProgress | None
) -> Json:
    rows = query_rows(gallery)
    orders = _orders(settings, gallery)
    chosen, metric = settings.policy, settings.metric
    old = evaluate(
        gallery.old[rows],
        gallery.old,
        gallery.labels[rows],
        gallery.labels,
        EvaluateOptions(metric=metric, query_ids=gallery.ids[rows], gallery_ids=gallery.ids),
    )
    simulation = simulate_curve(
        CurveInputs(
            gallery.transformed,
            gallery.embedded,
            gallery.embedded[rows],
            gallery.labels[rows],
            gallery.labels,
            query_ids=gallery.ids[rows],
            gallery_ids=gallery.ids,
            embeddable=~gallery.rejected,
        ),
        orders,
        CurveOptions(points=settings.evaluate.points, metric=metric, calibration=calibration, detail=chosen),
        progress=on_progress,
    )
    return {
        "old_old": old.as_dict(),
        "new_new": simulation.end.as_dict(),
        "num_queries": old.num_queries,
        "num_unmatched": old.num_unmatched,
        "num_gallery": old.num_gallery,
        "distance": metric,
        "orders": {name: _order(order, simulation.fractions) for name, order in simulation.orders.items()},
        "share_of_gap": {name: _share(order.area, old, simulation.end) for name, order in simulation.orders.items()},
        **_details(chosen, simulation, old),
        "groups": _groups(gallery, rows, chosen, simulation, old),
    }


def _orders(settings: _Settings, gallery: GalleryArrays) -> dict[str, list[Int64]]:
    """The orders to compare. The first one under the policy's name is the run's own, by its stored priorities.

    All begin with the images that were embedded for the fit.
    """
    ids, seed, policy = gallery.ids, settings.seed, settings.policy
    orders = {
        "uncertainty": [order_by_priority(gallery.uncertainty, ids, seed)],
        "random": [random_order(ids, seed + offset) for offset in range(settings.evaluate.random_seeds)],
        "oracle": [oracle_order(gallery.transformed, gallery.embedded)],
    }
    own = [order_by_priority(gallery.priority, ids, seed), *orders.get(policy, [])[1:]]
    orders = {policy: own} | orders | {policy: own}
    known = gallery.wave == FROM_PAIRS
    return {name: [order[np.argsort(~known[order], kind="stable")] for order in some] for name, some in orders.items()}


def _order(order: OrderCurve, fractions: Float64) -> Json:
    values = zip(fractions.tolist(), order.values, strict=True)
    result: Json = {
        "points": [{"fraction": fraction, **_figures(figures)} for fraction, figures in values],
        "area": _figures(order.area),
        "area_trapezoid": _figures(order.area_trapezoid),
    }
    return result | ({"area_std": _figures(order.area_std)} if order.num_permutations > 1 else {})


def _details(chosen: str, simulation: Simulation, old: Metrics) -> Json:
    """What one order costs during the migration: lost answers, and how often transformed vectors are found."""
    assert simulation.detail is not None
    fractions = simulation.fractions.tolist()
    flips = negative_flips(old.first_rank, simulation.detail.first_rank).tolist()
    shares = simulation.detail.slot_share.tolist()
    return {
        "negative_flips": {
            "order": chosen,
            "points": [{"fraction": x, "percent": flip} for x, flip in zip(fractions, flips, strict=True)],
        },
        "slot_share": {
            "order": chosen,
            "slots": TOP_K,
            "points": [{"fraction": x, "share": _number(share)} for x, share in zip(fractions, shares, strict=True)],
        },
    }


def _groups(gallery: GalleryArrays, rows: Int64, chosen: str, simulation: Simulation, old: Metrics) -> Json | None:
    """Each group's figures at both ends, and the gap from best to worst at each point; None without two groups."""
    assert simulation.detail is not None
    groups, num = gallery.groups[rows], len(gallery.group_names)
    counts = np.bincount(groups[(groups >= 0) & (old.first_rank > 0)], minlength=num)
    kept = np.flatnonzero(counts >= MIN_GROUP_QUERIES)
    if len(kept) < 2:
        return None
    values = by_group(simulation.detail.first_rank, simulation.detail.average_precision, groups, num)[kept]
    before = by_group(old.first_rank[None], old.average_precision[None], groups, num)[kept, 0]
    best, worst = values.max(axis=0), values.min(axis=0)
    return {
        "order": chosen,
        "min_queries": MIN_GROUP_QUERIES,
        "old_old": _gap(before.max(axis=0), before.min(axis=0)),
        "points": [
            {"fraction": fraction, **_gap(best[point], worst[point])}
            for point, fraction in enumerate(simulation.fractions.tolist())
        ],
        "members": [
            {
                "group": gallery.group_names[group],
                "queries": int(counts[group]),
                "old_old": _figures(before[row]),
                "start": _figures(values[row, 0]),
                "end": _figures(values[row, -1]),
            }
            for row, group in enumerate(kept)
        ],
    }


def _gap(best: Float64, worst: Float64) -> Json:
    return {"gap": _figures(best - worst), "best": _figures(best), "worst": _figures(worst)}


def _share(area: Float64, old: Metrics, new: Metrics) -> Json:
    ends = zip(METRICS, area.tolist(), old.as_dict().values(), new.as_dict().values(), strict=True)
    return {name: _number(share_of_gap(value, before, after)) for name, value, before, after in ends}


def _figures(values: Float64) -> dict[str, float]:
    return dict(zip(METRICS, values.tolist(), strict=True))


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _cache_key(settings: _Settings, run: Run, published: bool) -> Json:
    from pipeline.index.tags import list_commits

    return {
        "version": _VERSION,
        "commit": max(list_commits(run), default=None) if published else "none asked for",
        "parts": len(part_files(run.path("embedded"))),
        "evaluate": settings.evaluate.model_dump(mode="json"),
        "policy": settings.policy,
        "metric": settings.metric,
        "seed": settings.seed,
    }


def _read(run: Run) -> Json | None:
    found = objects.read_versioned(_uri(run))
    if found is None:
        return None
    tree = documents.decode(found[0], _uri(run), documents.REDO)
    if {"key", "curve"} - tree.keys():
        raise DataError("not a curve", expected="key and curve", where=_uri(run), remedy=documents.REDO)
    return tree


def _uri(run: Run) -> str:
    return run.path("reports", "curve.json")


def _portion(progress: OnProgress | None, start: float, end: float) -> OnProgress | None:
    """The progress of a part of the work, in thousandths of the whole."""
    if progress is None:
        return None
    return lambda done, total: progress(round(1000 * (start + (end - start) * done / total)), 1000)
