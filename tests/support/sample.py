"""A labelled sample of a synthetic gallery, and the images that a run draws, for tests of what is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.method import ProbeSettings
from pipeline.config.tree import Config
from pipeline.manifest.normalised import Manifest
from pipeline.run import Run
from pipeline.sampling import pair_sample, probe_draw


def put_sample(
    config: Config, folder: Path, images: int = 1000, columns: dict[str, str] | None = None, **table: Any
) -> Config:
    """Write a sample's columns below a folder; gives the config that names it, and ids in the gallery."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "sample.parquet"
    pq.write_table(pa.table(table), path)
    probe = ProbeSettings.model_validate({"images": images, "manifest": str(path), "columns": columns or {}})
    named = config.gallery.columns.model_copy(update={"id": "id"})
    return config.model_copy(update={"probe": probe, "gallery": config.gallery.model_copy(update={"columns": named})})


def draw_probe(config: Config, run: Run) -> Manifest | None:
    """The probe set of a config."""
    return probe_draw.draw(run, config.gallery, config.pairs, config.probe)


def draw_pairs(config: Config, run: Run) -> Manifest | None:
    """The gallery's pairs of a config."""
    return pair_sample.draw(run, config.gallery, config.pairs, config.probe)
