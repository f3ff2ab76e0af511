"""What each loss, each order, the offset and the selection are worth: areas of backfilling curves on CIFAR-100.

The official protocol (METHOD): all 10,000 test images are gallery and queries, 22 points, l2, means over fits with
other seeds. `fit` is how the transformation was fitted: the four losses of METHOD at the published inner width of 2048,
and what the selection chose, with its offset. `order` is a policy, `selected` (the chosen one), or an oracle: by the
true distance to the new embedding, and by the new classifier's cross-entropy of z against the true label. The selection
sees the training pairs alone; no figure of the gallery goes into it.

Each row has the area of top-1, top-5 and mAP (mean and sample deviation over the fits), the share of the gap between
old/old and new/new, the state before anything is embedded, and the fraction from which on 95 and 99 % of new/new are
kept.

    python -m benchmarks.quality [--json]            # three fits of each: three quarters of an hour on two cores
    python -m benchmarks.quality --short             # one fit of a few epochs: whether it runs
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from benchmarks.fit import configure, prepare, started_ray
from benchmarks.fit_data import Embedded, cache_embeddings
from benchmarks.measure import header, table
from benchmarks.small_run import data_folder
from pipeline import offset as offsets
from pipeline import storage
from pipeline.config import Config, Select
from pipeline.config_file import load_config
from pipeline.evaluate import METRICS, Metrics, evaluate, oracle_order, random_order, share_of_gap, simulate_curve
from pipeline.expected import REACHED, fraction_for
from pipeline.policy import POLICIES, load_policy
from pipeline.ranking import Float64
from pipeline.run import Run
from pipeline.schema import Float32, Int64
from pipeline.selection import Selection
from training.candidates import settings_of
from training.knowledge import reference_of
from training.learner import FitData, Job, PairArrays, make_arrays
from training.losses import needs_labels
from training.select import Fold, fit_alone, order_by, select

CONFIG = str(Path(__file__).resolve().parents[1] / "jobs" / "configs" / "cifar100.yaml")
LOSSES = ("alignment", "alignment+uncertainty", "alignment+discriminative", "fastfill")
PUBLISHED: dict[str, object] = {
    "fit.inner_width": 2048,
    "fit.weight_decay": 2.0**-15,
    "fit.precision": "auto",
    "fit.epochs": 40,
}
_RANDOM_ORDERS = 5

Curves = dict[str, Float64]
Row = dict[str, object]


@dataclass(frozen=True, slots=True)
class Images:
    """What is fitted on, what is held out (with its rows as they are stored), and the gallery."""

    data: FitData
    train: PairArrays
    held_out: PairArrays
    table: pa.Table
    gallery: Embedded


def simulate(config: Config, images: Images, seed: int) -> Curves:
    """Fit once and backfill the gallery in every order: per order (P, 3), METRICS in per cent."""
    gallery, held_out = images.gallery, images.held_out
    fit = config.fit if config.fit.offset != "none" else config.fit.model_copy(update={"offset": "confidence"})
    job = Job(fit, images.data, seed, False, 0, 0)  # with its classifier, which some orders look at
    old, new = (np.concatenate(pair) for pair in ((held_out.old, gallery.old), (held_out.new, gallery.new)))
    found = fit_alone(job, images.train, PairArrays(old, new, None, None), seed, torch.device("cpu"))
    count = len(held_out.old)
    known = Fold(held_out, found.z[:count], found.s[:count], found.classifier)
    mine = Fold(PairArrays(gallery.old, gallery.new, None, None), found.z[count:], found.s[count:], found.classifier)
    served, transformed = known.z, mine.z
    if config.fit.offset != "none":
        kind, strength = config.fit.offset, config.fit.offset_strength
        offset = offsets.fit_offset(kind, strength, known.z, known.s, held_out.new, known.classifier, "l2")
        served, transformed = offset.apply(known.z, known.s), offset.apply(mine.z, mine.s)
    reference = reference_of(config, images.table, held_out, known.z, known.s, served, known.classifier, None)
    orders = {
        "random": [random_order(np.arange(len(mine.z)), seed + number) for number in range(_RANDOM_ORDERS)],
        **{
            name: [order_by(load_policy(name, seed, reference)(mine.scored()), seed)]
            for name, policy in POLICIES.items()
            if name != "random" and "gallery_labels" not in policy.needs
        },
        "oracle: distance": [oracle_order(transformed, gallery.new)],
        "oracle: cross-entropy": [order_by(_cross_entropy(mine, gallery.labels), seed)],
    }
    labels = gallery.labels
    simulation = simulate_curve(transformed, gallery.new, gallery.new, labels, labels, orders, self_match=True)
    return {name: curve.values for name, curve in simulation.orders.items()}


def _cross_entropy(fold: Fold, labels: Int64) -> Float32:
    assert fold.classifier is not None, "CIFAR-100 comes with one"
    shares = fold.classifier.probabilities(fold.z)[np.arange(len(labels)), labels]
    return -np.log(np.maximum(shares, np.finfo(np.float32).tiny))


def describe(fit: str, order: str, fits: list[Float64], old: Metrics) -> Row:
    """A row of the table, from the curve of each fit."""
    stack = np.stack(fits)
    areas, mean = stack.mean(axis=1), stack.mean(axis=0)
    fractions = np.linspace(0, 1, len(mean))
    row: Row = {"fit": fit, "order": order, **dict(zip(METRICS, areas.mean(axis=0).tolist(), strict=True))}
    deviation = areas.std(axis=0, ddof=1) if len(fits) > 1 else np.zeros(len(METRICS))
    row["std"] = dict(zip(METRICS, deviation.tolist(), strict=True))
    row["start"] = dict(zip(METRICS, mean[0].tolist(), strict=True))
    before = old.as_dict()
    row["share_of_gap"] = {
        name: share_of_gap(float(areas.mean(axis=0)[column]), before[name], float(mean[-1, column]))
        for column, name in enumerate(METRICS)
    }
    for percent in REACHED:
        row[f"fraction{percent}"] = {
            name: fraction_for(mean[:, column], fractions, percent) for column, name in enumerate(METRICS)
        }
    return row | {"fits": len(fits)}


def measure(arguments: argparse.Namespace) -> tuple[list[Row], Selection]:
    """All rows, and what was selected."""
    few: dict[str, object] = {"fit.epochs": 3, "fit.warmup_epochs": 1} if arguments.short else {}
    _, gallery = cache_embeddings(load_config(CONFIG, (f"data_root={arguments.data}",)), arguments.folder)
    arguments.data_root = arguments.data
    pairs, kept = arguments.folder / "pairs.parquet", arguments.folder / ("short" if arguments.short else "whole")
    with started_ray():
        config = configure(arguments, pairs, str(kept / "run"), few)
        run, data = prepare(config)
        tables = [
            pa.concat_tables(map(storage.read_parquet, parts)) for parts in (data.train_parts, data.held_out_parts)
        ]
        job = Job(config.fit, data, config.seed, False, 0, 0)
        images = Images(data, make_arrays(tables[0], job), make_arrays(tables[1], job), tables[1], gallery)
        published = {loss: configure(arguments, pairs, "none", PUBLISHED | few | {"fit.loss": loss}) for loss in LOSSES}
        selecting = config.model_copy(update={"select": Select()})
        selection = _selected(
            selecting, run, data, kept / f"selection-{_digest(selecting.fit.model_dump(mode='json'))}"
        )
    chosen = config.model_copy(update={"fit": settings_of(selection, config.fit)})
    old = evaluate(gallery.old, gallery.old, gallery.labels, gallery.labels, self_match=True)
    rows: list[Row] = []
    for name, setting in {**published, _name(selection): chosen}.items():
        started = time.monotonic()
        fits = [_kept(arguments.folder, setting, images, seed) for seed in range(arguments.fits)]
        _say(f"{name}: {time.monotonic() - started:.0f} s")
        rows += [describe(name, order, [curves[order] for curves in fits], old) for order in fits[0]]
        if setting is chosen:
            order = selection.chosen.policy
            rows.append(describe(name, "selected", [curves[order] for curves in fits], old))
    return rows, selection


def _kept(folder: Path, config: Config, images: Images, seed: int) -> Curves:
    """`simulate`, or what it gave when this script was stopped after it."""
    decides = [config.fit.model_dump(mode="json"), seed, images.data.num_train]
    file = folder / f"curves-{_digest(decides)}.npz"
    if not file.exists():
        np.savez(file, **simulate(config, images, seed))  # type: ignore[arg-type]  # none is called allow_pickle
    with np.load(file) as arrays:
        return dict(arrays)


def _selected(config: Config, run: Run, data: FitData, file: Path) -> Selection:
    """The selection, or what it was when this script was stopped after it; fits that it made are kept until then."""
    if not file.exists():
        started = time.monotonic()
        found = select(config, run, data, lambda what, done, total: _say(f"{what}: {done} of {total}"))
        _say(f"selected in {time.monotonic() - started:.0f} s: {found.chosen}")
        file.write_text(found.to_json())
    return Selection.from_json(file.read_text())


def _digest(decides: object) -> str:
    """Names a result by its settings and the code that it came from."""
    code = subprocess.run(["git", "rev-parse", "HEAD:training", "HEAD:pipeline"], capture_output=True, check=True)
    return hashlib.sha256(json.dumps(decides).encode() + code.stdout).hexdigest()[:16]


def _name(selection: Selection) -> str:
    chosen = selection.chosen
    weight = f" {chosen.lambda_disc:g}" if needs_labels(chosen.loss) else ""
    offset = "no offset" if chosen.offset == "none" else f"offset {chosen.offset} {chosen.offset_strength:g}"
    return f"selected: {chosen.loss}{weight}, {chosen.inner_width}, {offset}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _text(row: Row) -> list[str]:
    def figures(name: str, form: str = "{:.1f}") -> str:
        values = row if name == "area" else row[name]
        assert isinstance(values, dict)
        return " / ".join(form.format(values[metric]) for metric in METRICS)

    cells = [str(row["fit"]), str(row["order"]), figures("area", "{:.2f}"), figures("std", "{:.2f}"), figures("start")]
    return [*cells, figures("share_of_gap", "{:.2f}"), figures("fraction95", "{:.0%}"), figures("fraction99", "{:.0%}")]


def main() -> None:
    """Print the table in Markdown, or as one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="the folder of CIFAR-100")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "fastfill-quality")
    parser.add_argument("--fits", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="one fit of three epochs")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    arguments.data = str(data_folder(arguments.data))
    arguments.fits = 1 if arguments.short else arguments.fits
    head = header(["torch", "ray"])
    rows, selection = measure(arguments)
    if arguments.json:
        print(json.dumps({"rows": rows, "selected": json.loads(selection.to_json())["chosen"]}))
        return
    print(head, end="\n\n")
    titles = [
        "fit",
        "order",
        "area, top-1 / top-5 / mAP",
        "deviation",
        "fraction 0",
        "share of the gap",
        "to 95 %",
        "to 99 %",
    ]
    print(table(titles, [_text(row) for row in rows]))


if __name__ == "__main__":
    main()
