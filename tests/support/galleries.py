"""Small real galleries for tests: scikit-learn's digits as PNG, and untrained but real encoders.

Quality is not the point here: an untrained encoder gives distinct embeddings, which is all that
equivalence needs.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from tests.support.own_functions import small_encoder

OLD_DIM, NEW_DIM = 12, 20
PREPROCESS = {"channels": 1, "size": 8}


def digits(count: int, first: int = 0) -> tuple[list[bytes], list[int]]:
    """PNG bytes and labels of `count` digits."""
    data = load_digits()
    images = (data.images[first : first + count] * 15).astype(np.uint8)
    return [png(image) for image in images], data.target[first : first + count].tolist()


def png(image: np.ndarray[Any, Any]) -> bytes:
    """A (H, W) uint8 image as PNG."""
    sink = io.BytesIO()
    Image.fromarray(image).save(sink, "png")
    return sink.getvalue()


def export_encoder(path: Path, dim: int, seed: int) -> None:
    """A small convolutional encoder with random weights, as a torch.export archive."""
    encoder = small_encoder(dim, seed)
    batch = torch.export.Dim("batch", min=1, max=65536)
    program = torch.export.export(encoder, (torch.zeros(2, 1, 8, 8),), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)


def write_config(folder: Path, **changes: Any) -> str:
    """A whole small run below `folder`: manifests, encoders and config; gives the config's path.

    Changes are `section__key=value`.
    """
    data = folder / "data"
    if not data.exists():
        data.mkdir(parents=True)
        export_encoders(data)
        write_manifest(data / "gallery.parquet", *digits(300))
        write_manifest(data / "training.parquet", *digits(200, first=300))
    tree: dict[str, Any] = {
        "run": str(folder / "run"),
        "data_root": str(data),
        "device": "cpu",
        "encoders": encoders(),
        "gallery": {
            "manifest": "gallery.parquet",
            "columns": {"id": "name", "image": "image", "label": "digit", "group": "group"},
        },
        "pairs": {
            "manifest": "training.parquet",
            "columns": {"id": "name", "image": "image", "label": "digit"},
        },
        "fit": {"transformation": "linear"},
        "plan": {"waves": 5, "unit_images": 32},
        "backfill": {"batch_size": 16, "max_actors": 1},
        "index": {"factory": "Flat", "shards": 3},
    }
    for name, value in changes.items():
        node = tree
        *parents, last = name.split("__")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def encoders() -> dict[str, Any]:
    """The section of the config that names what `export_encoders` writes."""
    return {
        "old": {"export": "old.pt2", "dim": OLD_DIM, "preprocess": PREPROCESS},
        "new": {"export": "new.pt2", "dim": NEW_DIM, "preprocess": PREPROCESS},
    }


def export_encoders(folder: Path) -> None:
    """Write two small encoders."""
    export_encoder(folder / "old.pt2", OLD_DIM, seed=1)
    export_encoder(folder / "new.pt2", NEW_DIM, seed=2)


def write_manifest(path: Path, images: list[bytes], labels: list[int], **columns: Any) -> None:
    """A manifest with the images inside."""
    count = len(images)
    table = {
        "name": [f"{path.stem}-{row}" for row in range(count)],
        "image": images,
        "digit": labels,
        "group": ["even" if label % 2 == 0 else "odd" for label in labels],
    }
    pq.write_table(pa.table(table | columns), path, row_group_size=100)
