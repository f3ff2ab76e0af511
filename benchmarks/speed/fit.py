"""How long the fit takes to the quality of the published recipe: plain PyTorch against `fastfill fit`.

The reference is the paper's recipe (arXiv 2303.04766) as a plain loop over tensors in memory: one process, float32,
80 epochs, inner width 2048, torch's defaults. Ours is all of `fastfill fit` with the settings below: Ray's start, the
pairs read, split and cached, the workers' start, the epochs, the figures on held-out pairs. Both get the same
embeddings (neither embeds an image), the same 45,000 training pairs and loss, and all cores. Quality is the area of
the gallery's backfilling curve: images that neither has seen. Figures are collected in `--folder`, so each part can
be run by itself, and the reference goes on from the point at which `--seconds` stopped it.

    python -m benchmarks.speed.fit                                   # all parts, half an hour
    python -m benchmarks.speed.fit --parts reference --seconds 200   # a slice, not counting the measuring
    python -m benchmarks.speed.fit --parts fit --seeds 0 1 2
    python -m benchmarks.speed.fit --parts report
    python -m benchmarks.speed.fit --short                           # a tenth of the pairs, two minutes: a trial
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.cached_run import Embedded, cache_embeddings, configure, prepare, started_ray
from benchmarks.measure import Spread, header, ratio, table
from benchmarks.small_run import CONFIG, part_of_cifar
from pipeline.arrays import vectors_from_arrow
from pipeline.config.load import load_config
from pipeline.config.tree import Config
from pipeline.evaluation.metrics import METRICS
from pipeline.evaluation.simulated_curve import (
    CurveInputs,
    CurveOptions,
    Simulation,
    order_by_priority,
    random_order,
    simulate_curve,
)
from pipeline.models.encoder_backends import load_tensors
from pipeline.models.networks import Transformation, TransformationNetwork
from pipeline.models.transformation import APPLY_BATCH, apply, load_transformation
from pipeline.run import Run
from pipeline.storage import objects, parquet
from training.fit import fit
from training.fitting.learner import Epoch

BATCH, EPOCHS, WARMUP_EPOCHS, INNER_WIDTH, LR, WEIGHT_DECAY = 1024, 80, 5, 2048, 5e-4, 2.0**-15
RECOMMENDED = {"inner_width": 2048, "epochs": 40, "weight_decay": 2.0**-15, "precision": "auto"}  # docs/decisions/0003
MEASURED_EPOCHS = (20, 40, 50, 60, 70, 80)
TIMED_EPOCHS, RATE_EPOCHS = 2, 6
PARTS = ("reference", "fit", "workers", "report")
WORKERS = {"1 worker, 2 threads": (1, 2), "2 workers, 1 thread each": (2, 2), "1 worker, 1 thread": (1, 1)}

_RANDOM_ORDERS = 5

Areas = dict[str, dict[str, float]]


class Reference:
    """The published recipe as a plain loop; kept in a file, so that it can be run in slices.

    Only the network is the project's: its parameter counts are tested against the published ones.

    Attributes:
        seconds: of each epoch so far.
    """

    def __init__(self, state: Path, seed: int, rows: dict[str, Tensor], classifier: dict[str, Tensor]) -> None:
        """`rows` has old (N, d_old), new (N, d_new) float32 and label (N,) int64; `classifier` weight and bias."""
        torch.manual_seed(seed)
        self._state, self._rows, self._classifier = state, rows, classifier
        self.network = TransformationNetwork(rows["old"].shape[1], rows["new"].shape[1], INNER_WIDTH)
        self._optimizer = torch.optim.Adam(self.network.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
        self.seconds: list[float] = []
        if state.exists():
            kept = torch.load(state, weights_only=True)
            self.network.load_state_dict(kept["network"])
            self._optimizer.load_state_dict(kept["optimizer"])
            torch.set_rng_state(kept["rng"])
            self.seconds = kept["seconds"]

    def save(self) -> None:
        """Save everything that the next epoch depends on."""
        kept = {"network": self.network.state_dict(), "optimizer": self._optimizer.state_dict()}
        torch.save(kept | {"rng": torch.get_rng_state(), "seconds": self.seconds}, self._state)

    def run_epoch(self) -> None:
        """One pass, whole batches only; its time goes to `seconds`."""
        start, epoch = time.perf_counter(), len(self.seconds)
        cosine = 0.5 * (1 + math.cos(math.pi * (epoch - WARMUP_EPOCHS) / (EPOCHS - WARMUP_EPOCHS)))
        for group in self._optimizer.param_groups:
            group["lr"] = LR * ((epoch + 1) / WARMUP_EPOCHS if epoch < WARMUP_EPOCHS else cosine)
        self.network.train()
        for module in self.network.modules():
            if isinstance(module, nn.BatchNorm1d) and epoch >= EPOCHS / 2:
                module.eval()
        for rows in torch.randperm(len(self._rows["old"])).split(BATCH):
            if len(rows) == BATCH:
                self._step({name: tensor[rows] for name, tensor in self._rows.items()})
        self.seconds.append(time.perf_counter() - start)

    def _step(self, batch: dict[str, Tensor]) -> None:
        z, s = self.network(batch["old"])
        logits = functional.linear(z, self._classifier["weight"], self._classifier["bias"])
        discriminative = functional.cross_entropy(logits, batch["label"], reduction="none", label_smoothing=0.1)
        loss = (batch["new"] - z).square().mean(dim=1) + discriminative
        self._optimizer.zero_grad()
        (0.5 * torch.exp(-s) * loss + 0.5 * s).mean().backward()
        self._optimizer.step()


def fit_ours(config: Config) -> tuple[Transformation, dict[str, float]]:
    """`fastfill fit` in this process, with a Ray of its own; the network and the stages' wall seconds."""
    epochs: list[tuple[float, Epoch]] = []
    times = [time.monotonic()]
    with started_ray():
        times.append(time.monotonic())
        run, data = prepare(config)
        times.append(time.monotonic())
        fit(config, run, data, lambda epoch: epochs.append((time.monotonic(), epoch)))
        times.append(time.monotonic())
    images = data.num_train // config.fit.batch_size * config.fit.batch_size
    inside = [images / epoch["images_per_second"] for _, epoch in epochs]
    first, last = epochs[0][0], epochs[-1][0]
    stages = {
        "Ray's start": times[1] - times[0],
        "checks, pairs cached": times[2] - times[1],
        "workers' start": first - inside[0] - times[2],
        "epochs": sum(inside),
        "checkpoints, reports": last - first - sum(inside[1:]),
        "end, held-out figures": times[3] - last,
    }
    return load_transformation(run, torch.device("cpu"))[0], stages


def recommended(arguments: argparse.Namespace, **others: object) -> dict[str, object]:
    """The settings of ours, with `--set` and others over them."""
    settings = {f"fit.{key}": value for key, value in (RECOMMENDED | others).items()}
    return settings | dict(item.split("=", 1) for item in arguments.set)


def ours(arguments: argparse.Namespace, pairs: Path, gallery: Embedded) -> None:
    """Fit with the recommended settings, once per seed, and time epochs of the reference right after each fit."""
    settings = recommended(arguments)
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            config = configure(arguments, pairs, f"{folder}/run", settings | {"seed": seed})
            network, stages = fit_ours(config)
            beside = start_reference(config, Path(folder, "reference.pt"))
        for _ in range(TIMED_EPOCHS):
            beside.run_epoch()
        found = {"seed": seed, "settings": settings, "stages": stages, "reference_epochs": beside.seconds}
        add(arguments.folder / "fit.jsonl", found | {"areas": areas(network, gallery, seed)})


def workers(arguments: argparse.Namespace, pairs: Path) -> None:
    """Seconds per epoch by workers and threads, without the first epoch; Ray with one CPU gives one thread."""
    for name, (num_workers, cpus) in WORKERS.items():
        settings = recommended(arguments, epochs=RATE_EPOCHS, num_workers=num_workers)
        found: list[Epoch] = []
        with tempfile.TemporaryDirectory() as folder, started_ray(cpus):
            config = configure(arguments, pairs, f"{folder}/run", settings)
            run, data = prepare(config)
            fit(config, run, data, found.append)
        used = data.num_train // config.fit.batch_size * config.fit.batch_size
        seconds = [used / epoch["images_per_second"] for epoch in found[1:]]
        add(arguments.folder / "workers.jsonl", {"name": name, "settings": settings, "seconds": seconds})


def reference(arguments: argparse.Namespace, pairs: Path, gallery: Embedded) -> None:
    """Go on with the reference until it is done or `--seconds` of training are over; measure it on the way."""
    with tempfile.TemporaryDirectory() as folder:
        config = configure(arguments, pairs, f"{folder}/run", {})
        with started_ray():
            prepare(config)
        fitted = start_reference(config, arguments.folder / "reference.pt")
    first = len(fitted.seconds)
    while len(fitted.seconds) < EPOCHS and sum(fitted.seconds[first:]) < arguments.seconds:
        fitted.run_epoch()
        print(f"reference: epoch {len(fitted.seconds)}, {fitted.seconds[-1]:.1f} s", file=sys.stderr)
        if len(fitted.seconds) in MEASURED_EPOCHS:
            found = {"seconds": fitted.seconds, "areas": areas(fitted.network, gallery, config.seed)}
            add(arguments.folder / "reference.jsonl", found)
    fitted.save()


def start_reference(config: Config, state: Path) -> Reference:
    """The reference on the training pairs of this config's run, from its saved state if there is one."""
    parts = objects.list_files(Run(config.run).path("pairs", "train"), ".parquet")
    pairs = pa.concat_tables([parquet.read_parquet(uri) for uri in parts])
    rows = {name: torch.tensor(vectors_from_arrow(pairs[name])) for name in ("old", "new")}
    rows["label"] = torch.tensor(pairs["label"].to_numpy().astype(np.int64))
    assert config.fit.classifier is not None
    return Reference(state, config.seed, rows, load_tensors(config.fit.classifier.path))


def simulate(network: Transformation, gallery: Embedded, seed: int) -> Simulation:
    """The curves by uncertainty and at random by the official protocol: all images are gallery and queries."""
    cpu = torch.device("cpu")
    transformed, uncertainty = apply(network.eval(), gallery.old, None, cpu, APPLY_BATCH)
    rows = np.arange(len(gallery.ids))
    orders = {
        "uncertainty": [order_by_priority(uncertainty, rows, seed)],
        "random": [random_order(rows, number) for number in range(_RANDOM_ORDERS)],
    }
    labels = gallery.labels
    inputs = CurveInputs(transformed, gallery.new, gallery.new, labels, labels)
    return simulate_curve(inputs, orders, CurveOptions(self_match=True))


def areas(network: Transformation, gallery: Embedded, seed: int) -> dict[str, dict[str, float]]:
    """The area of each order, and the figures at fraction 0; top1, top5 and map in per cent."""
    simulation = simulate(network, gallery, seed)
    found = {order: dict(zip(METRICS, curve.area.tolist(), strict=True)) for order, curve in simulation.orders.items()}
    return found | {"fraction 0": simulation.start.as_dict()}


def report(folder: Path) -> str:
    """A report of the folder's figures in Markdown; it measures nothing."""
    lines: list[tuple[object, ...]] = [
        (f"reference after {len(item['seconds'])} epochs", f"{sum(item['seconds']):.0f}", "", *figures([item["areas"]]))
        for item in read(folder / "reference.jsonl")
    ]
    fits: dict[str, list[dict[str, Any]]] = {}
    for found in read(folder / "fit.jsonl"):
        fits.setdefault(" ".join(f"{key}={value}" for key, value in found["settings"].items()), []).append(found)
    blocks = []
    for number, (settings, items) in enumerate(fits.items()):
        whole = [sum(item["stages"].values()) for item in items]
        beside = [EPOCHS * statistics.median(item["reference_epochs"]) for item in items]
        measured = figures([item["areas"] for item in items])
        seconds, faster = Spread.of(whole).text(".0f"), ratio(beside, whole).text(".1f")
        lines.append((f"ours {number}, {len(items)} fits", seconds, faster, *measured))
        blocks.append(
            f"Ours {number}: {settings}. Reference beside it: {Spread.of(beside).text('.0f')} s for {EPOCHS} epochs, "
            f"from {TIMED_EPOCHS} after each fit."
        )
        stages = {name: Spread.of(item["stages"][name] for item in items).text(".1f") for name in items[0]["stages"]}
        blocks.append(table(["stage", "seconds"], stages.items()))
    head = ["", "seconds", "faster, times", "uncertainty: top-1 / top-5 / mAP", "random (5 orders)", "fraction 0"]
    rates = [(item["name"], Spread.of(item["seconds"]).text()) for item in read(folder / "workers.jsonl")]
    blocks += [table(["", "seconds per epoch"], rates)] if rates else []
    return "\n\n".join([header(), table(head, lines), *blocks])


def figures(found: list[Areas]) -> list[str]:
    """The columns of a row: each figure's mean over the fits, with the lowest and highest if there are several."""
    columns = []
    for order in ("uncertainty", "random", "fraction 0"):
        spreads = [Spread.of(item[order][name] for item in found) for name in METRICS]
        columns.append(" / ".join(spread.text() if len(found) > 1 else f"{spread.median:.2f}" for spread in spreads))
    return columns


def add(path: Path, found: Mapping[str, object]) -> None:
    """One line of JSON at the end of a file; shown as well."""
    line = json.dumps(found)
    print(line, file=sys.stderr, flush=True)
    with path.open("a") as file:
        file.write(line + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The lines that `add` wrote."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    """Run the parts, and print the report in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", default="../shared/data/cifar100")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-fit"), help="embeddings and figures")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], help="another setting of ours, as of the commands")
    parser.add_argument("--seconds", type=float, default=math.inf, help="of the reference's training, then stop")
    parser.add_argument("--short", action="store_true")
    arguments = parser.parse_args()
    root = f"data_root={arguments.data_root}"
    if not arguments.short:
        return run_parts(arguments, *cache_embeddings(load_config(str(CONFIG), (root,)), arguments.folder))
    with tempfile.TemporaryDirectory() as folder:
        arguments.folder, arguments.seeds, arguments.parts = Path(folder), [0], ["fit", "report"]
        few = part_of_cifar(Path(folder, "data"), Path(arguments.data_root), num_gallery=1000, num_pairs=5000)
        run_parts(arguments, *cache_embeddings(load_config(str(CONFIG), (root, *few)), arguments.folder))


def run_parts(arguments: argparse.Namespace, pairs: Path, gallery: Embedded) -> None:
    """Run the given parts, with figures in the folder."""
    if "reference" in arguments.parts:
        reference(arguments, pairs, gallery)
    if "fit" in arguments.parts:
        ours(arguments, pairs, gallery)
    if "workers" in arguments.parts:
        workers(arguments, pairs)
    if "report" in arguments.parts:
        print(report(arguments.folder))


if __name__ == "__main__":
    main()
