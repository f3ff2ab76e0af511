"""The galleries that quality is measured on: which encoders, and what counts as a match.

A case is a pair of encoders and labels. The encoders are the given ones, or some of `benchmarks.quality.encoders`. The
labels are the hundred classes, the twenty superclasses, or none for the pairs. With superclasses, or if the new encoder
comes without a classifier, the config names no classifier: one is fitted if a loss or an order needs it. Without labels
there is no classifier, and no order that needs one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.cached_run import Embedded, cache_embeddings
from benchmarks.quality.encoders import encoder
from benchmarks.small_run import CONFIG
from pipeline.config.load import load_config

ENCODERS: dict[str, tuple[str | None, str | None]] = {
    "given": (None, None),
    "biased": ("biased", None),
    "strong": ("strong-old", "barely-better"),
    "no-classifier": (None, "no-classifier"),
}
"""The old and the new one by the name of their recipe; None is the given one."""

LABELS = ("label", "coarse", "none")

PUBLISHED: dict[str, object] = {
    "fit.transformation": "fastfill",
    "fit.inner_width": 2048,
    "fit.weight_decay": 2.0**-15,
    "fit.precision": "auto",
    "fit.epochs": 40,
}
QUICK: dict[str, object] = {
    "fit.transformation": "fastfill",
    "fit.inner_width": 512,
    "fit.epochs": 20,
    "fit.precision": "auto",
}


@dataclass(frozen=True, slots=True)
class Case:
    """One case: encoders and labels.

    Attributes:
        encoders: of ENCODERS.
        labels: of LABELS.
        data: the folder of CIFAR-100.
        folder: where embeddings are kept.
    """

    encoders: str
    labels: str
    data: Path
    folder: Path

    @property
    def given(self) -> bool:
        """Whether it is the shipped example."""
        return (self.encoders, self.labels) == ("given", "label")

    def settings(self) -> dict[str, object]:
        """The differences from the shipped config, without the pairs; missing encoders are trained."""
        found: dict[str, object] = {"data_root": self.data}
        for role, name in zip(("old", "new"), ENCODERS[self.encoders], strict=True):
            if name is not None:
                made = encoder(name, self.data)
                found |= {f"encoders.{role}.export": made.export, f"encoders.{role}.dim": made.dim}
        if self.labels != "label" or ENCODERS[self.encoders][1] is not None:
            found["fit.classifier"] = "null"
        none = {"pairs.columns.label": "null", "fit.loss": "alignment+uncertainty"}
        return found | (none if self.labels == "none" else {})

    def embedded(self) -> tuple[Path, Embedded]:
        """The pairs as a manifest, and the gallery, both with this case's labels."""
        items = [f"{key}={value}" for key, value in self.settings().items() if not key.startswith("pairs.")]
        pairs, gallery = cache_embeddings(load_config(str(CONFIG), tuple(items)), self.folder)
        if self.labels != "coarse":
            return pairs, gallery
        coarse = self.folder / "pairs-coarse.parquet"
        if not coarse.exists():
            rows = pq.read_table(pairs)
            codes = _codes(superclasses(self.data / "train.parquet", rows["id"].to_pylist()))
            pq.write_table(rows.set_column(rows.schema.get_field_index("label"), "label", pa.array(codes)), coarse)
        return coarse, replace(gallery, labels=_codes(superclasses(self.data / "test.parquet", gallery.ids)))

    def grouped(self) -> tuple[Path, Embedded]:
        """`embedded` with the superclass of each pair in the column `group`."""
        pairs, gallery = self.embedded()
        grouped = self.folder / "pairs-groups.parquet"
        if not grouped.exists():
            rows = pq.read_table(pairs)
            groups = superclasses(self.data / "train.parquet", rows["id"].to_pylist())
            pq.write_table(rows.append_column("group", pa.array(groups)), grouped)
        return grouped, gallery


def superclasses(images: Path, ids: list[str]) -> NDArray[np.object_]:
    """The superclass of each image, (N,) str."""
    table = pq.read_table(images, columns=["path", "coarse_label_name"])
    names = dict(zip(table["path"].to_pylist(), table["coarse_label_name"].to_pylist(), strict=True))
    return np.array([names[item] for item in ids], dtype=object)


def _codes(groups: NDArray[np.object_]) -> NDArray[np.int64]:
    return np.unique(groups.astype(str), return_inverse=True)[1].astype(np.int64)
