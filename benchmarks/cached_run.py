"""A run of CIFAR-100 over embeddings that are computed once and kept, for benchmarks of the fit and of quality.

    images (50,000 pairs, 10,000 of the gallery) -> FOLDER/pairs.parquet, FOLDER/gallery.npz

Images are embedded by a plain loop: other benchmarks measure how fast that is.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from benchmarks.small_run import CONFIG
from jobs.shell.command import console
from jobs.shell.progress_bars import Bars
from jobs.shell.ray_session import start_ray
from jobs.steps.prepare import open_run
from pipeline.arrays import Float32, Int64, vectors_to_arrow
from pipeline.config.load import load_config
from pipeline.config.tree import Config, EncoderSettings, ManifestSettings
from pipeline.embedding.decode import Limits, decode_image
from pipeline.models.encoder import load_encoder
from pipeline.run import Run
from training.fitting.learner import FitData
from training.fitting.pairs import build_pairs, fit_data

_BATCH = 1000
_LIMITS = Limits(10**6, 10**6)


@dataclass(frozen=True, slots=True)
class Embedded:
    """N images: ids (N,) str, labels (N,) int64, old (N, d_old) and new (N, d_new) float32."""

    ids: list[str]
    labels: Int64
    old: Float32
    new: Float32


def cache_embeddings(config: Config, folder: Path) -> tuple[Path, Embedded]:
    """The pairs as a manifest that brings its embeddings, and the gallery; both are computed if they are missing."""
    pairs, gallery = folder / "pairs.parquet", folder / "gallery.npz"
    if not gallery.exists():
        folder.mkdir(parents=True, exist_ok=True)
        assert config.pairs.given is not None
        found = _embed(config, config.pairs.given)
        columns = {"old_embedding": vectors_to_arrow(found.old), "new_embedding": vectors_to_arrow(found.new)}
        pq.write_table(pa.table({"id": found.ids, "label": found.labels, **columns}), pairs)
        rest = _embed(config, config.gallery)
        np.savez(gallery, ids=np.array(rest.ids), labels=rest.labels, old=rest.old, new=rest.new)
    with np.load(gallery) as arrays:
        return pairs, Embedded(arrays["ids"].tolist(), arrays["labels"], arrays["old"], arrays["new"])


def configure(arguments: argparse.Namespace, pairs: Path, run: str, settings: dict[str, object]) -> Config:
    """The shipped config over cached embeddings, with other settings of the fit."""
    items = {
        "data_root": arguments.data_root,
        "run": run,
        "pairs.manifest": str(pairs.resolve()),
        "pairs.columns.id": "id",
        "pairs.columns.image": "null",
        "pairs.columns.old_embedding": "old_embedding",
        "pairs.columns.new_embedding": "new_embedding",
        "fit.transformation": "fastfill",
        "fit.loss": "fastfill",
        **settings,
    }
    return load_config(str(CONFIG), tuple(f"{key}={value}" for key, value in items.items()))


@contextmanager
def started_ray(cpus: int | None = None) -> Iterator[None]:
    """Ray as the commands start it, or with fewer CPUs, until the end of the block."""
    if cpus is not None:
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False)
    start_ray()
    try:
        yield
    finally:
        ray.shutdown()


def prepare(config: Config) -> tuple[Run, FitData]:
    """Everything that `fastfill fit` does before the fit."""
    with Bars(console()) as bars:
        run = open_run(config, bars)
        return run, fit_data(config.fit, run, build_pairs(config, run, bars.images))


def _embed(config: Config, source: ManifestSettings) -> Embedded:
    assert len(source.manifest) == 1
    columns = source.columns
    table = pq.read_table(source.manifest[0], columns=[columns.id, columns.image, columns.label])
    images = table[columns.image]
    assert config.encoders.old is not None
    old, new = (np.concatenate(list(_forward(spec, images))) for spec in (config.encoders.old, config.encoders.new))
    return Embedded(table[columns.id].to_pylist(), table[columns.label].to_numpy().astype(np.int64), old, new)


def _forward(spec: EncoderSettings, images: pa.ChunkedArray) -> Iterator[Float32]:
    model = load_encoder(spec, torch.device("cpu"))
    decode = partial(decode_image, preprocess=spec.preprocess, limits=_LIMITS)
    with torch.inference_mode(), ThreadPoolExecutor(2) as pool:
        for start in range(0, len(images), _BATCH):
            pixels = np.stack(list(pool.map(decode, images.slice(start, _BATCH).to_pylist())))
            yield model(torch.from_numpy(pixels)).numpy()
