"""The report of a run: one self-contained HTML page, and the same figures as JSON.

It can be written at any time and changes only `reports/`. A section without data says why. `report.json` is written
last and names the commits that the page shows. The curve is measured by `evaluation.curve`.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass, field
from importlib import resources
from typing import Any

import numpy as np
import pyarrow.compute as pc
import yaml
from jinja2 import Environment

from pipeline.config.tree import Config
from pipeline.embedding import vector_log
from pipeline.embedding.reject_rules import read_all as read_rejects
from pipeline.errors import DataError
from pipeline.evaluation import curve as curves
from pipeline.evaluation import gallery_arrays, quality
from pipeline.evaluation.gallery_arrays import new_embeddings_given
from pipeline.evaluation.quality import read_promotion_status
from pipeline.index import commits, tags
from pipeline.planning.expected_curve import expected_uri, read_expected
from pipeline.planning.plan import FROM_PAIRS, Plan, read_plan, transformed_parts
from pipeline.planning.selection_result import describe, read_selection, recipe_name
from pipeline.readable import duration, moment
from pipeline.reporting import plots
from pipeline.reporting.progress import Progress, Tracker
from pipeline.reporting.throughput import throughput
from pipeline.run import Run
from pipeline.storage import documents, objects, parquet

Tree = dict[str, Any]  # Any: JSON

_BINS = 60
_CANDIDATES = 12
_PARTS_PER_BIN = 4
_PROBE_COLUMNS = [
    ("top1", "top-1"),
    ("top5", "top-5"),
    ("recall10", "recall of the full model's 10"),
    ("own", "stored vectors intact"),
    ("negative_flips", "lost queries"),
    ("group_gap", "gap of groups"),
    ("slot_share", "transformed images found (1 = as expected)"),
]
_COLUMNS = [("top1", "top-1"), ("top5", "top-5"), ("map", "mAP")]


@dataclass(frozen=True, slots=True)
class ReportData:
    """The data of the page, ready for JSON; None for a part that the run does not have yet."""

    run: str
    created: str  # UTC
    policy: str  # the order of the plan
    progress: Tree | None  # the fields of `progress.Progress`
    prod: int | None  # the commit that is served
    commits: list[Tree]  # number, when it was created (UTC), and its counts
    curve: Tree | None  # as `evaluate --curve --json` prints it
    no_curve: str  # why there is none
    uncertainty: Tree | None  # `edges` (B + 1), `counts` (waves x B), and the first wave
    throughput: Tree | None  # `edges_seconds` (B + 1), `rates` (B) in images per second, and `throughput.Throughput`
    rejects: list[Tree]  # stage, reason (up to the colon), images, and an example; the most frequent first
    transformation: Tree | None  # its description with the held-out figures
    config: Tree
    probe: list[Tree] = field(default_factory=list)  # figures of the old model (commit None) and of each commit
    standing: Tree | None = None  # the fields of `quality.PromotionStatus`
    selection: Tree | None = None  # its metrics, folds, number of candidates, and the best ones
    expected: Tree | None = None  # by metric, as `plan --json` prints it
    expected_made: str = ""  # UTC
    pinned: bool = False  # whether a rollback keeps prod there
    estimate: Tree | None = None  # the last `plan`'s rate, seconds, and when it was made


def gather_report(config: Config, run: Run) -> ReportData:
    """Gather the data of the page; the curve is computed if it can be and is not stored.

    Raises:
        DataError: a file of the run is damaged.
    """
    plan = read_plan(run)
    prod = tags.read_tag(run, tags.PROD)
    commits = [_figures(commit) for commit in tags.read_commits(run)]
    progress = _progress(run, plan, max((commit["commit"] for commit in commits), default=-1))
    no_curve = _why_no_curve(config.evaluate.max_images, run, progress)
    curve = None
    if not no_curve:
        try:
            curve = curves.curve(config, run)
        except DataError as error:
            no_curve = f"It cannot be measured: {error.summary}."
    expected = _expected(run)
    where = objects.join(run.transformation, "transformation.json")
    marker = objects.read_versioned(where)
    return ReportData(
        run=run.uri,
        created=moment(time.time()),
        policy=config.plan.policy if plan is None else plan.policy,
        progress=None if progress is None else asdict(progress),
        prod=prod.commit if prod else None,
        commits=commits,
        curve=curve,
        no_curve=no_curve,
        uncertainty=_uncertainty(run, plan),
        throughput=_throughput(run, plan),
        rejects=_rejects(run, plan),
        transformation=documents.decode(marker[0], where) if marker else None,
        config=config.model_dump(mode="json", exclude_none=True),
        probe=_probe(run),
        standing=None if (standing := read_promotion_status(run)) is None else asdict(standing),
        selection=_selection(run) if marker else None,
        expected=expected,
        expected_made=moment(objects.stat(expected_uri(run)).modified_seconds) if expected else "",
        pinned=prod is not None and prod.pinned,
        estimate=_estimate(run),
    )


def render(data: ReportData) -> str:
    """The page as HTML."""
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # fonts are the browser's
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = lambda value: f"{value:,.0f}"
    environment.filters["figure"] = lambda value, digits=1: "-" if value is None else f"{value:.{digits}f}"
    environment.filters["duration"], environment.filters["moment"] = duration, moment
    template = resources.files("pipeline.reporting").joinpath("report.html.jinja").read_text()
    return environment.from_string(template).render(
        data=data,
        columns=_COLUMNS,
        probe_columns=_PROBE_COLUMNS,
        rows=headline(data),
        charts=_charts(data),
        config=yaml.safe_dump(data.config, sort_keys=False, allow_unicode=True),
    )


def write_report(config: Config, run: Run) -> str:
    """Write `reports/report.html`, then `report.json` beside it; gives the URI of the page."""
    data = gather_report(config, run)
    objects.put(page_uri(run), render(data).encode())
    objects.put(_figures_uri(run), json.dumps(asdict(data), indent=1, allow_nan=False).encode())
    return page_uri(run)


def page_uri(run: Run) -> str:
    """The URI of the page."""
    return run.path("reports", "report.html")


def is_current(run: Run) -> bool:
    """Whether the page exists and shows the latest commit."""
    figures = objects.read_versioned(_figures_uri(run))
    if figures is None or not objects.exists(page_uri(run)):
        return False
    try:
        known = max((commit["commit"] for commit in json.loads(figures[0])["commits"]), default=None)
    except (ValueError, KeyError, TypeError):  # of another version, or damaged
        return False
    return bool(known == max(tags.list_commits(run), default=None))


def headline(data: ReportData) -> list[Tree]:
    """The rows of the headline table: old model, start, average per order, new model."""
    if data.curve is None:
        return []
    curve, orders = data.curve, data.curve["orders"]
    start = next(iter(orders.values()))["points"][0]
    rows: list[Tree] = [
        {"title": "old / old", "note": "before the migration", "figures": curve["old_old"]},
        {"title": "start: all transformed", "note": "no image re-embedded", "figures": start},
    ]
    for name in sorted(orders, key=lambda name: (name == "oracle", name == data.policy, name != "random")):
        notes = {"random": "for comparison", "oracle": "best possible: knows the true error"}
        rows.append(
            {
                "title": f"average, {name} order",
                "note": "this run" if name == data.policy else notes.get(name, ""),
                "figures": orders[name]["area"],
                "spread": orders[name].get("area_std"),
                "share": curve["share_of_gap"][name],
                "chosen": name == data.policy,
                "colour": plots.css_variable(plots.colour_of(name, data.policy)),
            }
        )
    return [*rows, {"title": "new / new", "note": "all images re-embedded", "figures": curve["new_new"]}]


def _charts(data: ReportData) -> dict[str, str]:
    charts = {}
    if data.curve is not None:
        for metric, _ in _COLUMNS:
            charts[metric] = plots.curve_plot(data.curve, metric, data.policy)
        flips, slots, groups = (data.curve[name] for name in ("negative_flips", "slot_share", "groups"))
        charts["flips"] = plots.share_plot(flips["points"], "percent")
        served = [point for point in slots["points"] if point["fraction"] < 1]  # at 1 only rejects are left
        charts["slots"] = plots.share_plot(served, "share", level=1.0)
        if groups is not None:
            charts |= {f"gap_{metric}": plots.gap_plot(groups, metric) for metric in ("top1", "map")}
    if data.uncertainty is not None:
        edges, counts = np.array(data.uncertainty["edges"]), np.array(data.uncertainty["counts"])
        charts["uncertainty"] = plots.histogram_plot(edges, counts, data.uncertainty["first_wave"])
    if data.throughput is not None:
        edges, rates = np.array(data.throughput["edges_seconds"]), np.array(data.throughput["rates"])
        charts["throughput"] = plots.throughput_plot(edges, rates)
    return charts


def _selection(run: Run) -> Tree | None:
    """The selection without its curves, with its first candidates and the chosen one."""
    found = read_selection(run)
    if found is None:
        return None
    shown = [item for item in found.candidates if item == found.chosen or item in found.candidates[:_CANDIDATES]]
    rows = [
        asdict(item)
        | {"chosen": item == found.chosen, "name": recipe_name(item.transformation, item.loss, item.lambda_disc)}
        for item in shown
    ]
    return {
        "metrics": found.metrics,
        "folds": found.folds,
        "count": len(found.candidates),
        "sentence": describe(found),
        "candidates": rows,
        "measured_on": found.measured_on,
        "warnings": [] if found.likeness is None else found.likeness.warnings(found.measured_on == "probe"),
    }


def _figures_uri(run: Run) -> str:
    return run.path("reports", "report.json")


def _why_no_curve(max_images: int, run: Run, progress: Progress | None) -> str:
    """The reason why the curve cannot be computed; empty if it can."""
    if progress is None:
        return "The gallery is not planned yet."
    if progress.gallery > max_images:
        return f"The gallery has {progress.gallery:,} images, and evaluate.max_images is {max_images:,}."
    if progress.left and not new_embeddings_given(run):
        done = 1 - progress.left / progress.gallery
        return f"It needs the new embedding of every image; {100 * done:.1f} % are embedded so far."
    if not gallery_arrays.has_labels(run):
        return "The gallery has no labels to measure it with (gallery.columns.label)."
    return ""


def _progress(run: Run, plan: Plan | None, published: int) -> Progress | None:
    if plan is None:
        return None
    return Tracker(plan, plan.log(run), max_reject_fraction=1.0).progress(published)


def _figures(commit: commits.Commit) -> Tree:
    return {"commit": commit.number, "created": moment(commit.created_unix_seconds), **asdict(commit.counts)}


def _probe(run: Run) -> list[Tree]:
    known, measured = quality.read_baseline(run), quality.read_all_quality(run)
    old = [] if known is None else [{"commit": None, "title": "old model", "figures": known.figures}]
    rows = [{"commit": item.commit, "title": f"commit {item.commit}", "figures": item.figures} for item in measured]
    return [*old, *rows] if measured else []


def _uncertainty(run: Run, plan: Plan | None) -> Tree | None:
    """The histogram of s by wave, computed part by part."""
    if plan is None:
        return None
    uris = transformed_parts(run)
    low, high = np.inf, -np.inf
    for uri in uris:
        values = parquet.read_parquet(uri, ["uncertainty"])["uncertainty"].to_numpy()
        low, high = values.min(initial=low), values.max(initial=high)
    edges = np.linspace(low, max(high, low + 1e-6), _BINS + 1)
    counts = np.zeros((len(plan.waves), _BINS), np.int64)
    for uri in uris:
        part = parquet.read_parquet(uri, ["uncertainty", "wave"])
        bins = np.digitize(part["uncertainty"].to_numpy(), edges[1:-1])
        np.add.at(counts, (part["wave"].to_numpy() - plan.first_wave, bins), 1)
    return {"edges": edges.tolist(), "counts": counts.tolist(), "first_wave": plan.first_wave}


def _throughput(run: Run, plan: Plan | None) -> Tree | None:
    """Images per second between the times of the log's parts; None for fewer than two parts or five seconds.

    Parts of the pairs do not count: their images were embedded before.
    """
    if plan is None:
        return None
    written = vector_log.part_times(plan.log(run))
    parts = sorted((seconds, plan.unit_size(*unit)) for unit, seconds in written.items() if unit[0] != FROM_PAIRS)
    found = throughput(parts)
    if found is None:
        return None
    later = [item for item in parts if item[0] > parts[0][0]]
    seconds = np.array([item[0] - parts[0][0] for item in later])
    edges = np.linspace(0, seconds[-1], int(np.clip(len(seconds) // _PARTS_PER_BIN, 1, _BINS)) + 1)
    rates = np.histogram(seconds, edges, weights=[count for _, count in later])[0] / np.diff(edges)
    figures = {"edges_seconds": edges.tolist(), "rates": rates.tolist(), "images_per_second": found.per_second}
    return figures | asdict(found)


def _expected(run: Run) -> Tree | None:
    """The expected curves by metric, also in the format of earlier versions; None if there are none."""
    where = expected_uri(run)
    found = objects.read_versioned(where)
    return {name: item.to_json() for name, item in read_expected(found[0], where).items()} if found else None


def _estimate(run: Run) -> Tree | None:
    found = objects.read_versioned(run.estimate)
    if found is None:
        return None
    where = run.estimate
    tree = documents.decode(found[0], where, documents.REDO)
    made = tree.get("made_unix_seconds") or objects.stat(where).modified_seconds
    try:
        return {"images_per_second": tree["rates"]["stream"], "seconds": tree["seconds"], "made_unix_seconds": made}
    except (KeyError, TypeError) as error:
        raise DataError("not an estimate", found=repr(error), where=where, remedy=documents.REDO) from error


def _rejects(run: Run, plan: Plan | None) -> list[Tree]:
    """Rejects by stage and kind of reason (up to the colon; what follows differs by image)."""
    rejects = read_rejects(run, plan.log(run) if plan else None)
    kinds = pc.replace_substring_regex(rejects["reason"], "(?s):.*", "")
    groups = rejects.append_column("kind", kinds).group_by(["stage", "kind"], use_threads=False)  # "first" has an order
    counts = groups.aggregate([("id", "count"), ("uri", "first"), ("reason", "first")])
    rows = counts.sort_by([("id_count", "descending"), ("stage", "ascending"), ("kind", "ascending")]).to_pylist()
    return [
        {
            "stage": row["stage"],
            "reason": row["kind"],
            "images": row["id_count"],
            "example": {"uri": row["uri_first"], "reason": row["reason_first"]},
        }
        for row in rows
    ]
