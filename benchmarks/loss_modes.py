"""What each loss mode is worth on the gallery of a finished run: the area of its backfilling curve, by order.

The pairs, the gallery's old and new embeddings and the config are those of the run; only the transformation is fitted
anew, once per mode, into a temporary run. No image is read.

    fastfill backfill --config jobs/configs/cifar100.yaml
    python -m benchmarks.loss_modes --config jobs/configs/cifar100.yaml
    python -m benchmarks.loss_modes --config jobs/configs/cifar100.yaml --modes fastfill \\
        --set fit.inner_width=2048 --set fit.precision=bfloat16 --set fit.weight_decay=3.0517578125e-5
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from typing import get_args

import torch

from jobs.shell.ray_session import start_ray
from pipeline.config.load import load_config
from pipeline.config.method import LossMode
from pipeline.config.tree import Config
from pipeline.evaluation.gallery_arrays import GalleryArrays, load_gallery
from pipeline.evaluation.simulated_curve import (
    Simulation,
    oracle_order,
    order_by_priority,
    random_order,
    simulate_curve,
)
from pipeline.models.transformation import apply, load_transformation
from pipeline.run import Run
from pipeline.storage import objects
from training.fit import fit
from training.fitting.pairs import build_pairs, fit_data

APPLY_BATCH = 8192


def simulate(config: Config, gallery: GalleryArrays, run: Run) -> Simulation:
    """The curves of the run's transformation on the gallery."""
    network, _ = load_transformation(run, torch.device("cpu"))
    transformed, uncertainty = apply(network, gallery.old, None, torch.device("cpu"), APPLY_BATCH)
    orders = {
        "uncertainty": [order_by_priority(uncertainty, gallery.ids, config.seed)],
        "random": [random_order(gallery.ids, config.seed + offset) for offset in range(config.evaluate.random_seeds)],
        "oracle": [oracle_order(transformed, gallery.embedded)],
    }
    labels = gallery.labels
    return simulate_curve(
        transformed, gallery.embedded, gallery.embedded, labels, labels, orders,
        points=config.evaluate.points, metric=config.gallery.metric, self_match=True,
    )  # fmt: skip


def measure(config: Config, gallery: GalleryArrays, source: Run) -> tuple[Simulation, float]:
    """Fit in a run of its own that has the pairs of `source`; the curves, and the seconds that the fit took."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(folder)
        for uri in objects.list_files(source.path("pairs")):
            objects.put(run.uri + uri.removeprefix(source.uri), objects.read_bytes(uri))
        start = time.monotonic()
        fit(config, run, fit_data(config, run, build_pairs(config, run)))
        return simulate(config, gallery, run), time.monotonic() - start


def main() -> None:
    """Print a table in Markdown, or one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--modes", nargs="+", choices=get_args(LossMode), default=get_args(LossMode))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    config = load_config(arguments.config, tuple(arguments.overrides))
    source = Run(config.run)
    gallery = load_gallery(source)
    assert gallery.embedded_mask.all(), "the run has to be finished, without rejects"
    start_ray()
    rows: list[dict[str, object]] = []
    for mode in arguments.modes:
        chosen = config.model_copy(update={"fit": config.fit.model_copy(update={"loss": mode})})
        simulation, seconds = measure(chosen, gallery, source)
        for order, curve in simulation.orders.items():
            areas = dict(zip(("top1", "top5", "map"), curve.area.tolist(), strict=True))
            rows.append({"fit": mode, "order": order, **areas, "fraction0": simulation.start.as_dict()})
            if not arguments.json:
                text = " | ".join(f"{area:.1f}" for area in areas.values())
                start = " / ".join(f"{value:.1f}" for value in simulation.start.as_dict().values())
                print(f"| {mode} | {order} | {text} | {start} | {seconds:.0f} s |", flush=True)
    if arguments.json:
        print(json.dumps({"rows": rows, "inner_width": config.fit.inner_width, "epochs": config.fit.epochs}))


if __name__ == "__main__":
    main()
