"""A run of 48 images in three waves, and the command that backfills it, with Ray's stages in this process."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from rich.console import Console

from jobs.shell.progress_bars import Bars
from jobs.steps.prepare import RunSteps, open_run
from pipeline.arrays import vectors_to_arrow
from pipeline.backfill.driver import backfill
from pipeline.config.identity import fix_settings, stage_settings
from pipeline.config.load import load_config
from pipeline.config.tree import Config
from pipeline.models.networks import TransformationNetwork
from pipeline.models.transformation import TransformationInfo, save_transformation
from pipeline.reporting.progress import Progress
from pipeline.run import Run
from tests.support.galleries import NEW_DIM, OLD_DIM, PREPROCESS, digits
from training.fitting.pairs import build_pairs

IMAGES, PAIRS, WAVES = 48, 40, 3
FROM_GALLERY = 10  # pairs, which are embedded before the fit: two units of wave 0
BROKEN = (5, 10)  # these images cannot be read: rejects, of the probe set and of the pairs


def write_home(home: Path) -> Config:
    """Images, manifests and the config; and in `home`/run pairs and a transformation, which a driver would fit."""
    (home / "data" / "images").mkdir(parents=True)
    images, labels = digits(IMAGES)
    for row in BROKEN:
        images[row] = b"no image"
    for row, image in enumerate(images):
        (home / "data" / "images" / f"{row:02d}.png").write_bytes(image)
    rng = np.random.default_rng(0)
    old = rng.normal(size=(IMAGES + PAIRS, OLD_DIM)).astype(np.float32)
    names = [f"images/{row:02d}.png" for row in range(IMAGES)]
    gallery = {"id": np.arange(IMAGES), "uri": names, "digit": labels, "old": vectors_to_arrow(old[:IMAGES])}
    new = np.tile(old, 2)[IMAGES:, :NEW_DIM]
    pairs = {"id": np.arange(PAIRS), "old": vectors_to_arrow(old[IMAGES:]), "new": vectors_to_arrow(new)}
    pq.write_table(pa.table(gallery), home / "data" / "gallery.parquet")
    pq.write_table(pa.table(pairs), home / "data" / "pairs.parquet")
    (home / "run.yaml").write_text(yaml.safe_dump(_tree(home)))
    _fit(load(home))
    return load(home)


def load(home: Path, run: str | None = None) -> Config:
    """The config, for the run in `home` or another one."""
    return load_config(str(home / "run.yaml"), () if run is None else (f"run={run}",))


def drive(config: Config, on_start: Callable[[], None] = lambda: None) -> Progress:
    """What `fastfill backfill` does, but for its report page, as a driver that has just started.

    Args:
        config: of the run.
        on_start: called when all is prepared and the backfill itself starts.
    """
    with Bars(Console(file=io.StringIO())) as bars:
        run = open_run(config, bars)
        steps = RunSteps(config, run, bars)
        steps.embed()
        steps.fit()
        plan = steps.plan()
        on_start()
        return backfill(config, run, plan, lambda _: None)


def _fit(config: Config) -> None:
    """A network that was never fitted: it is as deterministic, and takes no time."""
    run = Run(config.run)
    with Bars(Console(file=io.StringIO())) as bars:
        open_run(config, bars)
        build_pairs(config, run, bars.images)
    for path in Path(config.run).iterdir():
        if path.name != "pairs":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    torch.manual_seed(0)
    network = TransformationNetwork(OLD_DIM, NEW_DIM, 16).eval()
    info = TransformationInfo(OLD_DIM, NEW_DIM, None, 16, False, "alignment", 0, 1, PAIRS, 0, True)
    fix_settings(run, "fit", stage_settings(config, "fit"))
    save_transformation(run, network, info)


def _tree(home: Path) -> dict[str, Any]:
    columns = {"id": "id", "old_embedding": "old"}
    sampled = {"from_gallery": FROM_GALLERY}
    encoder = {"function": "tests.support.own_functions:new_encoder", "dim": NEW_DIM, "preprocess": PREPROCESS}
    return {
        "run": str(home / "run"),
        "data_root": str(home / "data"),
        "device": "cpu",
        "encoders": {"new": encoder},
        "gallery": {"manifest": "gallery.parquet", "columns": {**columns, "uri": "uri", "label": "digit"}},
        "pairs": {"manifest": "pairs.parquet", "columns": {**columns, "new_embedding": "new"}} | sampled,
        "fit": {"transformation": "linear"},
        "plan": {"waves": [1 / WAVES] * WAVES, "unit_images": 8},
        "backfill": {"batch_size": 8, "max_actors": 1},
        "index": {"factory": "Flat", "shards": 2},
        "gate": {"on_refusal": "go_on"},
        "probe": {"images": 8},
    }
