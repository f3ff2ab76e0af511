"""The worth of each loss, each order, the offset and the selection: areas of backfilling curves on CIFAR-100.

The official protocol (docs/method.md): all 10,000 test images are gallery and queries, 22 points, l2, means over fits
with different seeds. The rows of the table:

    fit     the four losses of the paper at its inner width of 2048 (40 epochs in bfloat16 instead of its 80 in float32,
            the same within 0.1: results/2026-11-27-fit.md; on 45,000 of the 50,000 pairs, the rest is held out), and
            the recipe that the selection chose, with its offset
    order   a policy, `selected` (the chosen policy), or an oracle: by the true distance to the new embedding, or by the
            new classifier's cross-entropy of z against the true label

The selection sees the training pairs alone; no figure of the gallery goes into it. Each row has the area of top-1,
top-5 and mAP (mean and sample deviation over the fits), the share of the gap between old/old and new/new, the state
before anything is embedded, and the fractions from which on 95 and 99 % of new/new are kept.

    python -m benchmarks.quality.recipes [--json]      # three fits of each: three quarters of an hour on two cores
    python -m benchmarks.quality.recipes --encoders strong --labels coarse --fits 1          # another case (cases.py)
    python -m benchmarks.quality.recipes --encoders no-classifier --labels none --fits 1
    python -m benchmarks.quality.recipes --short       # one fit of a few epochs: whether it runs

The other cases have 12 points, 2,500 queries, fits of 20 epochs and width 512. Their rows are the recipes that the
selection chooses between, and its choice, made with 2,500 pairs of each fold. If the pairs have no labels, judge by
`recall10`: the selection cannot see the figures by label.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import cast

import numpy as np

from benchmarks.cached_run import configure, prepare, started_ray
from benchmarks.measure import header, table
from benchmarks.quality.backfills import OFFICIAL, Curves, Images, digest, images_of, simulate
from benchmarks.quality.cases import ENCODERS, LABELS, PUBLISHED, QUICK, Case
from benchmarks.small_run import data_folder
from pipeline.arrays import Float64
from pipeline.config.method import LossMode, SelectSettings
from pipeline.config.tree import Config
from pipeline.evaluation.metrics import METRICS, EvaluateOptions, Metrics, evaluate
from pipeline.evaluation.simulated_curve import share_of_gap
from pipeline.planning.expected_curve import REACHED, fraction_for
from pipeline.planning.selection_result import Selection
from pipeline.run import Run
from training.fitting.learner import FitData
from training.fitting.losses import needs_labels
from training.select import select
from training.simulation.simulate import SimulationDetail
from training.simulation.trials import settings_of

LOSSES = ("alignment", "alignment+uncertainty", "alignment+discriminative", "fastfill")
_NO_LIMIT = 1e6  # minutes: every recipe is tried
COARSE = SimulationDetail(12, 2500)
"""With other encoders than the given ones: few epochs, points and queries, as many tables are to be made."""

COLUMNS = (*METRICS, "recall10")
Row = dict[str, object]


def describe(fit: str, order: str, fits: list[Float64], old: Metrics) -> Row:
    """A row of the table, from the curve of each fit; its columns are COLUMNS, or the first of them."""
    stack = np.stack(fits)
    areas, mean, names = stack.mean(axis=1), stack.mean(axis=0), COLUMNS[: stack.shape[2]]
    fractions = np.linspace(0, 1, len(mean))
    row: Row = {"fit": fit, "order": order, **dict(zip(names, areas.mean(axis=0).tolist(), strict=True))}
    deviation = areas.std(axis=0, ddof=1) if len(fits) > 1 else np.zeros(len(names))
    row["std"] = dict(zip(names, deviation.tolist(), strict=True))
    row["start"] = dict(zip(names, mean[0].tolist(), strict=True))
    row["share_of_gap"] = {
        name: share_of_gap(float(areas.mean(axis=0)[names.index(name)]), before, float(mean[-1, names.index(name)]))
        for name, before in old.as_dict().items()
    }
    for percent in REACHED:
        row[f"fraction{percent}"] = {
            name: fraction_for(mean[:, column], fractions, percent) for column, name in enumerate(names)
        }
    return row | {"fits": len(fits)}


def measure(arguments: argparse.Namespace) -> tuple[list[Row], Selection]:
    """All rows, and the selection."""
    few: dict[str, object] = {"fit.epochs": 3, "fit.warmup_epochs": 1} if arguments.short else {}
    case = Case(arguments.encoders, arguments.labels, Path(arguments.data), arguments.folder)
    pairs, gallery = case.embedded()
    arguments.data_root, settings = arguments.data, case.settings() | ({} if case.given else QUICK) | few
    kept = arguments.folder / ("short" if arguments.short else f"whole{'' if case.given else '-' + case.labels}")
    with started_ray():
        config = configure(arguments, pairs, str(kept / "run"), settings)
        run, data = prepare(config)
        images = images_of(config, data, gallery)
        fit = config.fit.model_copy(update={"transformation": "auto", "loss": "auto"})
        choice = SelectSettings(minutes=_NO_LIMIT, max_measured=5000 if case.given else 2500)
        selecting = config.model_copy(update={"fit": fit, "select": choice})
        selection = _selected(selecting, run, data, kept / f"selection-{digest(selecting.fit.model_dump(mode='json'))}")
    chosen = config.model_copy(update={"fit": settings_of(selection, config.fit)})
    old = evaluate(gallery.old, gallery.old, gallery.labels, gallery.labels, EvaluateOptions(self_match=True))
    rows: list[Row] = []
    for name, others in {**single_choices(case), f"selected: {_name(selection)}": None}.items():
        setting = chosen if others is None else configure(arguments, pairs, "none", settings | others | few)
        started = time.monotonic()
        fits = [_kept(arguments.folder, setting, images, seed, case) for seed in range(arguments.fits)]
        _say(f"{name}: {time.monotonic() - started:.0f} s")
        rows += [describe(name, order, [curves[order] for curves in fits], old) for order in fits[0]]
        if others is None:
            order = selection.chosen.policy
            rows.append(describe(name, "selected", [curves[order] for curves in fits], old))
    return rows, selection


def single_choices(case: Case) -> dict[str, dict[str, object]]:
    """The settings that a user could choose without measuring, by name.

    On the given encoders the paper's four losses as published. On others the recipes of the selection, in few
    epochs, each served as it is and with an offset.
    """
    if case.given:
        return {loss: PUBLISHED | {"fit.loss": loss} for loss in LOSSES}
    losses: list[tuple[LossMode, float]] = [("alignment", 1.0), ("alignment+uncertainty", 1.0)]
    losses += [] if case.labels == "none" else [("fastfill", 0.1), ("fastfill", 1.0)]
    offset = "uncertainty" if case.labels == "none" else "confidence"
    found: dict[str, dict[str, object]] = {}
    for loss, weight in losses:
        fit: dict[str, object] = {"fit.loss": loss, "fit.lambda_disc": weight}
        name = f"{loss} {weight:g}" if needs_labels(loss) else loss
        found |= {name: fit, f"{name}, offset {offset} 0.5": fit | {"fit.offset": offset}}
    return found


def lost(rows: list[Row], selection: Selection) -> str:
    """How far the selected row is behind the best single choice, in the mean of the metrics that count."""

    def score(row: Row) -> float:
        return float(np.mean([cast(float, row[metric]) for metric in selection.metrics]))

    mine = next(row for row in rows if row["order"] == "selected")
    best = max((row for row in rows if not str(row["order"]).startswith("oracle")), key=score)
    return (
        f"By area in {' and '.join(selection.metrics)}: the selected row has {score(mine):.2f}, the best single choice "
        f"{score(best):.2f} ({best['fit']}, by {best['order']}), {score(best) - score(mine):.2f} more."
    )


def _kept(folder: Path, config: Config, images: Images, seed: int, case: Case) -> Curves:
    """`simulate`, or its result from an interrupted run of this script."""
    decides = [config.fit.model_dump(mode="json"), seed, images.data.num_train]
    file = folder / f"curves-{digest(decides if case.given else [*decides, case.labels])}.npz"
    if not file.exists():
        found = simulate(config, images, seed, folder, OFFICIAL if case.given else COARSE)
        np.savez(file, **found)  # type: ignore[arg-type]  # none is called allow_pickle
    with np.load(file) as arrays:
        return dict(arrays)


def _selected(config: Config, run: Run, data: FitData, file: Path) -> Selection:
    """The selection, or its result from an interrupted run of this script; until then its fits are kept."""
    if not file.exists():
        started = time.monotonic()
        found = select(config, run, data, lambda what, done, total: _say(f"{what}: {done} of {total}"))
        _say(f"selected in {time.monotonic() - started:.0f} s: {found.chosen}")
        file.write_text(found.to_json())
    return Selection.from_json(file.read_text())


def _name(selection: Selection) -> str:
    chosen = selection.chosen
    weight = f" {chosen.lambda_disc:g}" if needs_labels(chosen.loss) else ""
    offset = "no offset" if chosen.offset == "none" else f"offset {chosen.offset} {chosen.offset_strength:g}"
    return f"{chosen.loss}{weight}, {chosen.inner_width}, {offset}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _text(row: Row) -> list[str]:
    def figures(name: str, form: str = "{:.1f}") -> str:
        values = row if name == "area" else row[name]
        assert isinstance(values, dict)
        return " / ".join(form.format(values[metric]) for metric in COLUMNS if metric in values)

    cells = [str(row["fit"]), str(row["order"]), figures("area", "{:.2f}"), figures("std", "{:.2f}"), figures("start")]
    return [*cells, figures("share_of_gap", "{:.2f}"), figures("fraction95", "{:.0%}"), figures("fraction99", "{:.0%}")]


def main() -> None:
    """Print the table in Markdown, or as one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="the folder of CIFAR-100")
    parser.add_argument("--encoders", default="given", choices=ENCODERS)
    parser.add_argument("--labels", default="label", choices=LABELS, help="of the pairs; for coarse of the gallery too")
    parser.add_argument("--folder", type=Path, help="by default one for each pair of encoders")
    parser.add_argument("--fits", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="one fit of three epochs")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    arguments.data = str(data_folder(arguments.data))
    arguments.fits = 1 if arguments.short else arguments.fits
    apart = "" if (arguments.encoders, arguments.labels) == ("given", "label") else f"-{arguments.encoders}"
    arguments.folder = arguments.folder or Path(tempfile.gettempdir()) / f"fastfill-quality{apart}"
    head = header(["torch", "ray"])
    rows, selection = measure(arguments)
    if arguments.json:
        chosen = json.loads(selection.to_json())["chosen"]
        print(json.dumps({"rows": rows, "selected": chosen, "lost": lost(rows, selection)}))
        return
    print(head, end="\n\n")
    titles = [
        "fit",
        "order",
        "area, top-1 / top-5 / mAP" + (" / recall10" if arguments.labels == "none" else ""),
        "deviation",
        "fraction 0",
        "share of the gap",
        "to 95 %",
        "to 99 %",
    ]
    print(table(titles, [_text(row) for row in rows]))
    print(f"\n{lost(rows, selection)}")


if __name__ == "__main__":
    main()
