"""The expected curve against the real one on CIFAR-100, over several draws of the probe set.

There are two fits: `published`, the paper's recipe at width 2048, and `selected`, the recipe that the selection takes
on these encoders (fastfill with lambda_disc 0.1, width 512, an offset by confidence). The real curve is the backfill
of the gallery in some orders, with all 10,000 test images as queries and 22 points. For each drawn probe set
`training.forecast` makes the curve that `fastfill plan` would show. Columns:

    error      mean absolute error over the points, averaged over the draws
    sampling   the same for the real curve, measured with the probe set's queries alone: the part due to the queries
    cost       the fraction from which on 95 % of the end is kept: of the real curve, the mean of the expected curves,
               how far they are off in points of the gallery, and the share of draws within 15 % of it

    python -m benchmarks.quality.expected [--json]      # a quarter of an hour on two cores
    python -m benchmarks.quality.expected --short       # a fit of three epochs, two draws: whether it runs
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.cached_run import configure, prepare, started_ray
from benchmarks.measure import header, table
from benchmarks.quality.backfills import OFFICIAL, Fitted, fitted, images_of
from benchmarks.quality.cases import PUBLISHED, Case
from benchmarks.small_run import data_folder
from pipeline.arrays import Float64, Int64
from pipeline.config.tree import Config
from pipeline.evaluation.metrics import METRICS
from pipeline.evaluation.simulated_curve import CurveInputs, CurveOptions, order_by_priority, simulate_curve
from pipeline.planning.expected_curve import expect, fraction_for
from pipeline.planning.policies import load_policy
from training.forecast import Labelled, SimulatedOrder, curves_by_fold, ends_of
from training.simulation.held_out import HeldOut
from training.simulation.simulate import SimulatedGallery, order_by, queries_of

ORDERS = ("uncertainty", "learned")
SIZES = (1000, 2000, 5000)
REACHED, WITHIN = 95, 0.15
RECIPES: dict[str, dict[str, object]] = {
    "published": PUBLISHED | {"fit.loss": "fastfill"},
    "selected": {
        "fit.transformation": "fastfill",
        "fit.loss": "fastfill",
        "fit.lambda_disc": 0.1,
        "fit.inner_width": 512,
        "fit.epochs": 40,
        "fit.offset": "confidence",
    },
}


@dataclass(frozen=True, slots=True)
class Real:
    """A real backfill: its curve (P, 3), and METRICS of each query at each point (P, Q, 3), all in per cent."""

    curve: Float64
    queries: Float64


@dataclass(frozen=True, slots=True)
class Guess:
    """The outcome of one probe set: the expected curve, and the real one by its queries alone, both (P, 3)."""

    curve: Float64
    sampled: Float64


def real_curves(found: Fitted, labels: Int64, seed: int) -> dict[str, Real]:
    """The gallery's backfill in each order."""
    new, scored = found.gallery.pairs.new, found.gallery.scored()
    orders = {name: [order_by(load_policy(name, seed, found.reference)(scored), seed)] for name in ORDERS}
    simulation = simulate_curve(
        CurveInputs(found.transformed, new, new, labels, labels),
        orders,
        CurveOptions(points=OFFICIAL.points, self_match=True, per_query=True),
    )
    assert simulation.queries is not None
    return {
        name: Real(
            simulation.orders[name].values,
            100 * np.stack([ranks[0] == 1, ranks[0] <= 5, precision[0]], axis=2),
        )
        for name, (ranks, precision) in simulation.queries.items()
    }


def guesses(
    config: Config, found: Fitted, labels: Int64, real: dict[str, Real], size: int, seed: int
) -> dict[str, Guess]:
    """The curves that `fastfill plan` would show for each order with one probe set."""
    rows = np.sort(np.random.default_rng(seed).permutation(len(labels))[:size])
    probe = Labelled(rows, found.gallery.pairs.new[rows], labels[rows])
    gallery = Labelled(np.arange(len(labels)), found.transformed, labels)
    ends = ends_of(probe, found.transformed[rows], gallery, "l2")
    fractions = np.linspace(0, 1, OFFICIAL.points)
    made, scored = {}, found.gallery.scored()
    for name in ORDERS:
        curves, priority = _bends(config, found, name), load_policy(name, config.seed, found.reference)(scored)
        order = order_by_priority(priority[rows], rows, config.seed)
        own = queries_of(SimulatedGallery(found.transformed[rows], probe.vectors, probe.labels, "l2"), order, OFFICIAL)
        columns = [
            expect(curves[:, :, index], fractions, ends[metric], own=own[metric]).values
            for index, metric in enumerate(METRICS)
        ]
        made[name] = Guess(np.stack(columns, axis=1), real[name].queries[:, rows].mean(axis=1))
    return made


_KNOWN: dict[str, Float64] = {}


def _bends(config: Config, found: Fitted, policy: str) -> Float64:
    """The curves of held-out pairs; the same for every probe set."""
    if policy not in _KNOWN:
        none = np.full(len(found.served), None, dtype=object)
        pairs = HeldOut(found.held_out, found.served, none, found.reference)
        _KNOWN[policy] = curves_by_fold(pairs, SimulatedOrder(policy), config.gallery, config.seed)[1]
    return _KNOWN[policy]


def describe(order: str, size: int, real: Float64, made: list[Guess]) -> list[dict[str, object]]:
    """A row per metric."""
    fractions, rows = np.linspace(0, 1, len(real)), list[dict[str, object]]()
    for column, metric in enumerate(METRICS):
        off = np.array([guess.curve[:, column] - real[:, column] for guess in made])
        floor = np.array([guess.sampled[:, column] - real[:, column] for guess in made])
        cost = fraction_for(real[:, column], fractions, REACHED)
        costs = np.array([fraction_for(guess.curve[:, column], fractions, REACHED) for guess in made])
        rows.append(
            {
                "order": order,
                "probe": size,
                "metric": metric,
                "error": float(np.abs(off).mean()),
                "worst": float(np.abs(off).mean(axis=1).max()),
                "bias": float(off.mean()),
                "sampling": float(np.abs(floor).mean()),
                "cost": cost,
                "expected_cost": float(costs.mean()),
                "off": float(np.abs(costs - cost).mean()),
                "within": float((np.abs(costs - cost) <= WITHIN * cost).mean()),
            }
        )
    return rows


def measure(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """All rows."""
    case = Case("given", "label", Path(arguments.data), arguments.folder)
    pairs, gallery = case.embedded()
    few: dict[str, object] = {"fit.epochs": 3, "fit.warmup_epochs": 1} if arguments.short else {}
    arguments.data_root, kept = arguments.data, str(case.folder / ("short" if arguments.short else "run"))
    with started_ray():
        config = configure(arguments, pairs, kept, case.settings() | few)
        images = images_of(config, prepare(config)[1], gallery)
    rows = []
    for name, seed in itertools.product(RECIPES, range(arguments.fits)):
        config = configure(arguments, pairs, "none", case.settings() | RECIPES[name] | few)
        _KNOWN.clear()
        found = fitted(config, images, seed, case.folder)
        real = real_curves(found, gallery.labels, seed)
        for size in arguments.sizes:
            draws = range(2 if arguments.short else arguments.draws)
            made = [guesses(config, found, gallery.labels, real, size, draw) for draw in draws]
            for order in ORDERS:
                parts = describe(order, size, real[order].curve, [guess[order] for guess in made])
                rows += [{"recipe": name, "fit": seed} | part for part in parts]
            print(f"{name}, fit {seed}, {size} probe images: done", file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Print the table in Markdown, or as one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="the folder of CIFAR-100")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "fastfill-expected")
    parser.add_argument("--fits", type=int, default=1)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    arguments.data = str(data_folder(arguments.data))
    head = header(["torch"])
    rows = measure(arguments)
    if arguments.json:
        print(json.dumps(rows))
        return
    forms = {"error": ".2f", "worst": ".2f", "bias": "+.2f", "sampling": ".2f"}
    forms |= {"cost": ".1%", "expected_cost": ".1%", "off": ".1%", "within": ".0%"}
    cells = [[f"{value:{forms.get(name, '')}}" for name, value in row.items()] for row in rows]
    print(f"{head}\n\n{table(list(rows[0]), cells)}")


if __name__ == "__main__":
    main()
