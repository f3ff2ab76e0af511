"""The embeddings that the fit is measured on: CIFAR-100 through the old and the new encoder, computed once and kept.

    images (50,000 pairs, 10,000 of the gallery) -> FOLDER/pairs.parquet, FOLDER/gallery.npz

By a plain loop: how fast images are embedded is another question's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.arrays import Float32, Int64, vectors_to_arrow
from pipeline.config.tree import Config, EncoderSettings, ManifestSettings
from pipeline.embedding.decode import Limits, decode_image
from pipeline.evaluation.simulated_curve import Simulation, order_by_priority, random_order, simulate_curve
from pipeline.models.encoder import load_encoder
from pipeline.models.networks import Transformation
from pipeline.models.transformation import apply

_BATCH = 1000
_LIMITS = Limits(10**6, 10**6)
_APPLY_BATCH = 8192
_RANDOM_ORDERS = 5


@dataclass(frozen=True, slots=True)
class Embedded:
    """N images: ids (N,) str, labels (N,) int64, old (N, d_old) and new (N, d_new) float32."""

    ids: list[str]
    labels: Int64
    old: Float32
    new: Float32


def cache_embeddings(config: Config, folder: Path) -> tuple[Path, Embedded]:
    """The pairs as a manifest that brings its embeddings, and the gallery; both are computed where they are missing."""
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


def simulate(network: Transformation, gallery: Embedded, seed: int) -> Simulation:
    """The curves by uncertainty and at random by the official protocol: all images are gallery and queries."""
    cpu = torch.device("cpu")
    transformed, uncertainty = apply(network.eval(), gallery.old, None, cpu, _APPLY_BATCH)
    rows = np.arange(len(gallery.ids))
    orders = {
        "uncertainty": [order_by_priority(uncertainty, rows, seed)],
        "random": [random_order(rows, number) for number in range(_RANDOM_ORDERS)],
    }
    labels = gallery.labels
    return simulate_curve(transformed, gallery.new, gallery.new, labels, labels, orders, self_match=True)


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
