"""Make the golden runs: small runs that later versions have to read, resume, audit and repair.

    python -m tests.data.make_golden_runs NAME

writes `tests/data/NAME-finished.tar.xz` and `tests/data/NAME-half.tar.xz`: `run/` is the folder of the run, `run.yaml`
its config. The half-finished run has published its first waves, and some units of the next one are durable. All runs
share the images and encoders of `tests/data/data.tar.xz`, which is made if it is missing.

A plan names its images by absolute paths. So the data lie in `DATA` on every machine, with the times they have here.
The report pages are left out: they are large, and are made again by any backfill.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from PIL import Image

from tests.support.galleries import NEW_DIM, OLD_DIM, PREPROCESS, digits, export_encoder
from tests.support.own_functions import small_encoder

HERE = Path(__file__).parent
DATA = Path("/tmp/fastfill-golden")
ARCHIVE = HERE / "data.tar.xz"
GALLERY, PAIRS, BROKEN = 120, 100, (17, 88)
MODIFIED = 1_700_000_000  # whole seconds: an archive keeps them exactly
FACTORIES = {"finished": "Flat", "half": "IVF4,SQ8"}


def make_data(folder: Path) -> None:
    """The encoders, a gallery of which two images are broken, and the pairs."""
    folder.mkdir(parents=True, exist_ok=True)
    export_encoder(folder / "old.pt2", OLD_DIM, seed=1)
    export_encoder(folder / "new.pt2", NEW_DIM, seed=2)
    images, labels = digits(GALLERY)
    old = _old_embeddings(images)
    for row in BROKEN:
        images[row] = images[row][:40]
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(old.ravel()), OLD_DIM)
    pq.write_table(_table("gallery", images, labels).append_column("old", vectors), folder / "gallery.parquet")
    pq.write_table(_table("pair", *digits(PAIRS, first=GALLERY)), folder / "pairs.parquet")
    for path in folder.iterdir():
        os.utime(path, (MODIFIED, MODIFIED))


def _old_embeddings(images: list[bytes]) -> np.ndarray[Any, Any]:
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(data)), np.float32) / 255 for data in images])
    with torch.inference_mode():
        found: np.ndarray[Any, Any] = small_encoder(OLD_DIM, seed=1)(torch.from_numpy(pixels[:, None])).numpy()
    return found


def _table(name: str, images: list[bytes], labels: list[int]) -> pa.Table:
    groups = ["even" if label % 2 == 0 else "odd" for label in labels]
    ids = [f"{name} {row}" for row in range(len(images))]
    return pa.table({"name": ids, "image": images, "digit": labels, "group": groups})


def config(factory: str) -> dict[str, Any]:
    """The config, of which `run` starts at the working directory."""
    columns = {"id": "name", "image": "image", "label": "digit"}
    return {
        "run": "run",
        "data_root": str(DATA),
        "device": "cpu",
        "encoders": {
            "old": {"export": "old.pt2", "dim": OLD_DIM, "preprocess": PREPROCESS},
            "new": {"export": "new.pt2", "dim": NEW_DIM, "preprocess": PREPROCESS},
        },
        "gallery": {
            "manifest": "gallery.parquet",
            "columns": {**columns, "group": "group", "old_embedding": "old"},
        },
        "pairs": {"manifest": "pairs.parquet", "columns": columns},
        "fit": {
            "transformation": "fastfill",
            "loss": "alignment+uncertainty",
            "inner_width": 16,
            "epochs": 8,
            "batch_size": 32,
            "lr": 5e-3,
        },
        "plan": {"waves": 4, "unit_images": 12},
        "gate": {"min_slot_share": None, "max_slot_share": None, "max_fall": 100},
        "backfill": {"batch_size": 6, "max_actors": 1, "max_reject_fraction": 0.2},
        "index": {"factory": factory, "shards": 2},
    }


def make_run(folder: Path, factory: str, half: bool) -> None:
    """A run by the commands that a user types, below `folder`."""
    (folder / "run.yaml").write_text(yaml.safe_dump(config(factory)))
    stop = ["--stop-when", "fraction>=0.2"] if half else []
    command = [sys.executable, "-m", "jobs.cli", "backfill", "--config", "run.yaml", *stop]
    done = subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(HERE.parents[1])})
    if done.returncode not in (0, 3):  # 3: the gate refused the last snapshot of the half-finished run
        sys.exit(f"the backfill failed with exit code {done.returncode}")
    if half:
        _leave_half_a_wave(folder / "run")


def _leave_half_a_wave(run: Path) -> None:
    """As after a power cut: of the first wave that is not published only some units are durable."""
    published = len(list((run / "index/commits").iterdir())) - 1
    wave = run / "embedded" / f"wave-{published + 1:03d}"
    parts = sorted(wave.glob("*.parquet"))
    if len(parts) < 2:
        sys.exit(f"of wave {published + 1} only {len(parts)} units are durable: try again")
    for part in parts[len(parts) // 2 :]:
        part.unlink()
        for rejects in (run / "rejects" / wave.name).glob(f"{part.stem}-*"):
            rejects.unlink()
    for later in (run / "embedded").iterdir():
        if later.name > wave.name:
            shutil.rmtree(later)


def main() -> None:
    """Make the archives that are missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="of the version or commit that writes them")
    name = parser.parse_args().name
    extract_data()
    for kind, factory in FACTORIES.items():
        if (HERE / f"{name}-{kind}.tar.xz").exists():
            continue
        with tempfile.TemporaryDirectory() as place:
            make_run(Path(place), factory, half=kind == "half")
            (Path(place) / "run/reports/report.html").unlink()
            _pack(f"{name}-{kind}", {item: Path(place) / item for item in ("run.yaml", "run")})


def extract_data() -> None:
    """Put the images and encoders where the plans of all golden runs look for them."""
    if not ARCHIVE.exists():
        shutil.rmtree(DATA, ignore_errors=True)
        make_data(DATA)
        _pack("data", {"data": DATA})
    with tarfile.open(ARCHIVE) as archive:
        for member in archive.getmembers():
            target = DATA / Path(member.name).name
            if member.isfile() and not (target.exists() and target.stat().st_mtime == member.mtime):
                _extract(archive, member, target)


def _extract(archive: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    """Whole or not at all: tests of several processes may do so at once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    file = archive.extractfile(member)
    assert file is not None
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as temporary:
        temporary.write(file.read())
    os.utime(temporary.name, (member.mtime, member.mtime))
    os.rename(temporary.name, target)


def _pack(name: str, members: dict[str, Path]) -> None:
    with tarfile.open(HERE / f"{name}.tar.xz", "w:xz", format=tarfile.PAX_FORMAT) as archive:
        for member, path in members.items():
            archive.add(path, member)


if __name__ == "__main__":
    main()
