"""The golden runs of `tests/data`: small runs that earlier versions wrote, each to be copied before it is used."""

from __future__ import annotations

import tarfile
from pathlib import Path

import yaml

from tests.data.make_golden_runs import HERE, extract_data

FINISHED = sorted(path.name.removesuffix(".tar.xz") for path in HERE.glob("*-finished.tar.xz"))
HALF = sorted(path.name.removesuffix(".tar.xz") for path in HERE.glob("*-half.tar.xz"))


def copy_run(name: str, folder: Path) -> str:
    """A golden run below `folder`, and the images and encoders where it looks for them; gives the config's path."""
    extract_data()
    with tarfile.open(HERE / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    path = folder / "run.yaml"
    config = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(config | {"run": str(folder / "run")}))
    return str(path)
