"""A labelled sample of a synthetic gallery, for tests of what is made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.method import ProbeSettings
from pipeline.config.tree import Config


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
