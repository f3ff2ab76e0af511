"""How fast a biased old encoder's gap between subgroups closes, by order: the paper's experiment on CIFAR-100.

The old encoder saw a hundredth of one superclass's images (`benchmarks.quality.encoders`). The new encoder, the given
one, saw all of them, and so did the transformation: its pairs are the new encoder's training set. The gallery is
backfilled in several orders, with 22 points and all 10,000 test images as gallery and queries. The figures, at fraction
0, at about a fifth and at the end, are means over fits:

    gap            top-1 of the other superclasses' queries minus that of the scarce superclass
    gap, mAP       the same by mAP
    best - worst   top-1 of the best superclass minus that of the worst, as the gate's `group_gap`; superclasses differ
                   with any encoder, so it does not end at 0
    left           the gap at a fifth over the gap at fraction 0
    above the end  the same, of the gap minus its end (the new encoder's own gap)
    halved at      the first fraction from which on the gap is at most half of the gap at fraction 0
    boost          `plan.group_boost`

    python -m benchmarks.quality.subgroups [--json] [--plot docs/subgroups.svg]    # two fits: minutes on two cores
    python -m benchmarks.quality.subgroups --short                                 # a few epochs: whether it runs
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from benchmarks.cached_run import configure, prepare, started_ray
from benchmarks.measure import header, table
from benchmarks.quality.backfills import OFFICIAL, Fitted, Images, digest, fitted, images_of
from benchmarks.quality.cases import QUICK, Case, superclasses
from benchmarks.quality.encoders import SCARCE_GROUP
from benchmarks.small_run import data_folder
from pipeline.arrays import Float64, Int64
from pipeline.config.tree import Config
from pipeline.evaluation.metrics import EvaluateOptions, by_group, evaluate
from pipeline.evaluation.simulated_curve import CurveInputs, CurveOptions, random_order, simulate_curve
from pipeline.planning.policies import load_policy
from training.simulation.simulate import order_by

OFFSETS = ("none", "confidence")
POLICIES = ("uncertainty", "least_confidence", "learned")
BOOSTED, BOOSTS = "learned", (1.0, 4.0)
EMBEDDED = 0.2
FIGURES = ("gap", "gap, mAP", "best - worst")
_RANDOM_ORDERS = 3

Curves = dict[str, Float64]


@dataclass(frozen=True, slots=True)
class Row:
    """One offset and order: `curves` (F, P, 3) of F fits, FIGURES in points; `note` names the settings."""

    offset: str
    order: str
    curves: Float64

    def text(self) -> list[str]:
        """The cells of the table."""
        mean, fifth = self.curves.mean(axis=0), fifth_of(self.curves.shape[1])
        cells = [" / ".join(f"{mean[point, column]:.1f}" for point in (0, fifth, -1)) for column in range(len(FIGURES))]
        left = []
        for gaps in (self.curves[..., 0], self.curves[..., 0] - self.curves[:, -1:, 0]):
            shares = gaps[:, fifth] / gaps[:, 0]
            left.append(f"{shares.mean():.2f} ({', '.join(f'{share:.2f}' for share in shares)})")
        return [self.offset, self.order, *cells, *left, f"{halved(mean[:, 0]):.0%}"]


def fifth_of(points: int) -> int:
    """The last point at which at most EMBEDDED of the gallery is embedded."""
    return int(EMBEDDED * (points - 1))


def halved(gaps: Float64) -> float:
    """The first fraction from which on the gaps (P,) stay at or below half of the first."""
    above = np.flatnonzero(gaps > gaps[0] / 2)
    return float(min(above[-1] + 1, len(gaps) - 1) / (len(gaps) - 1)) if len(above) else 0.0


def orders_of(found: Fitted, groups: NDArray[np.object_], seed: int) -> dict[str, list[Int64]]:
    """The gallery's rows by each order."""
    scored = replace(found.gallery.scored(), groups=groups)

    def by(policy: str, boost: float = 0.0) -> list[Int64]:
        return [order_by(load_policy(policy, seed, found.reference, group_boost=boost)(scored), seed)]

    ids = np.arange(len(groups))
    orders = {"random": [random_order(ids, seed + number) for number in range(_RANDOM_ORDERS)]}
    orders |= {policy: by(policy) for policy in POLICIES}
    return orders | {f"{BOOSTED}, boost {boost:g}": by(BOOSTED, boost) for boost in BOOSTS}


def measure_fit(config: Config, images: Images, groups: NDArray[np.object_], seed: int, folder: Path) -> Curves:
    """Per order (P, 3), FIGURES in points."""
    found = fitted(config, images, seed, folder)
    orders, gallery, labels = orders_of(found, groups, seed), images.gallery, images.gallery.labels
    simulation = simulate_curve(
        CurveInputs(found.transformed, gallery.new, gallery.new, labels, labels),
        orders,
        CurveOptions(points=OFFICIAL.points, self_match=True, per_query=True),
    )
    assert simulation.queries is not None
    curves = {}
    for name, (ranks, precision) in simulation.queries.items():
        parts = [gaps(*scores, groups) for scores in zip(ranks, precision, strict=True)]
        curves[name] = np.mean(parts, axis=0)
    return curves


def gaps(first_rank: NDArray[np.int32], precision: Float64, groups: NDArray[np.object_]) -> Float64:
    """FIGURES at each point, (P, 3), from scores per query as in `evaluate.Detail`."""
    names, codes = np.unique(groups.astype(str), return_inverse=True)
    scarce, others = by_group(first_rank, precision, (groups != SCARCE_GROUP).astype(np.int64), 2)
    every = by_group(first_rank, precision, codes, len(names))[..., 0]
    return np.stack([*(others - scarce)[:, [0, 2]].T, np.ptp(every, axis=0)], axis=1)


def measure(arguments: argparse.Namespace) -> list[Row]:
    """All rows; measured ones are kept in the folder."""
    case = Case("biased", "label", Path(arguments.data), arguments.folder)
    pairs, gallery = case.grouped()
    few: dict[str, object] = {"fit.epochs": 3, "fit.warmup_epochs": 1} if arguments.short else {}
    settings = case.settings() | QUICK | few | {"pairs.columns.group": "group", "fit.loss": arguments.loss}
    arguments.data_root = arguments.data
    groups = superclasses(case.data / "test.parquet", gallery.ids)
    with started_ray():
        config = configure(arguments, pairs, str(case.folder / ("short" if arguments.short else "run")), settings)
        images = images_of(config, prepare(config)[1], gallery)
    old = evaluate(gallery.old, gallery.old, gallery.labels, gallery.labels, EvaluateOptions(self_match=True))
    before = gaps(old.first_rank[None], old.average_precision[None], groups)[0]
    print(f"old/old: {dict(zip(FIGURES, before.round(1).tolist(), strict=True))}", file=sys.stderr, flush=True)
    rows = []
    for offset in OFFSETS:
        setting = config.model_copy(update={"fit": config.fit.model_copy(update={"offset": offset})})
        fits = [_kept(setting, images, groups, seed, case.folder) for seed in range(arguments.fits)]
        rows += [Row(offset, order, np.stack([curves[order] for curves in fits])) for order in fits[0]]
    return rows


def _kept(config: Config, images: Images, groups: NDArray[np.object_], seed: int, folder: Path) -> Curves:
    """`measure_fit`, or its result from an interrupted run of this script."""
    decides = [config.fit.model_dump(mode="json"), seed, images.data.num_train, POLICIES, BOOSTS]
    file = folder / f"gaps-{digest(decides)}.npz"
    if not file.exists():
        np.savez(file, **measure_fit(config, images, groups, seed, folder))  # type: ignore[arg-type]
    with np.load(file) as arrays:
        return dict(arrays)


def draw(rows: list[Row], caption: str, path: Path) -> None:
    """The gap against the fraction, of each order with the last of the offsets."""
    figure = Figure(figsize=(8, 4))
    axes = figure.subplots()
    for row in rows:
        if row.offset == OFFSETS[-1]:
            mean = row.curves.mean(axis=0)[:, 0]
            axes.plot(np.linspace(0, 100, len(mean)), mean, label=row.order)
    axes.axvline(100 * EMBEDDED, color="0.7", linestyle=":")
    axes.set(xlabel="per cent of the gallery embedded", ylabel=f"top-1, others less {SCARCE_GROUP}, points")
    axes.legend(fontsize=8, frameon=False)
    axes.grid(alpha=0.3)
    figure.text(0.01, 0.01, caption, fontsize=6, color="0.4")
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    with matplotlib.rc_context({"svg.hashsalt": "fastfill"}):
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Print the table in Markdown, or as one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="the folder of CIFAR-100")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "fastfill-subgroups")
    parser.add_argument("--fits", type=int, default=2)
    parser.add_argument("--loss", default="alignment+uncertainty")
    parser.add_argument("--short", action="store_true", help="one fit of three epochs")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    arguments.data = str(data_folder(arguments.data))
    arguments.fits = 1 if arguments.short else arguments.fits
    head = header(["torch"])
    rows = measure(arguments)
    if arguments.plot:
        draw(rows, head.replace("`", ""), arguments.plot)
    if arguments.json:
        print(json.dumps([{"offset": row.offset, "order": row.order, "curves": row.curves.tolist()} for row in rows]))
        return
    titles = ["offset", "order", *(f"{name}: 0 / 20 % / end" for name in FIGURES), "left", "above the end", "halved at"]
    print(f"{head}\n\n{table(titles, [row.text() for row in rows])}")


if __name__ == "__main__":
    main()
