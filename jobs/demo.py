"""`fastfill demo`: a whole backfill of real images on this machine, in minutes.

The images are the 1,797 handwritten digits of scikit-learn. The demo trains an old encoder on the digits 0-4 and a new
one on all ten, writes a config (`_CONFIG`), and runs an ordinary backfill.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import click

from jobs.shell.command import console, with_errors
from jobs.shell.failures import Command
from jobs.shell.open_run import absolute

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

_SEED = 0
_TRAINING_IMAGES = 900
_WRITTEN_BY = "# Written by `fastfill demo`"
_MARKER = ".fastfill-demo"  # its name sorts first, and deletion goes in reverse order: it is removed last
_SAYS = b"Written by `fastfill demo`. The next demo here deletes `run` and writes `data` anew.\n"
_DATA = ("training.parquet", "gallery.parquet", "old.pt2", "new.pt2")
_CONFIG = """\
{written_by}; try: fastfill status --config {folder}/demo.yaml
run: {folder}/run
data_root: {folder}/data
encoders:
  old:
    export: old.pt2
    dim: 16
    preprocess: &digits {{channels: 1, size: 8}}
  new:
    export: new.pt2
    dim: 32
    preprocess: *digits
gallery:
  manifest: gallery.parquet
  columns: {{id: name, image: image, label: digit, group: seen_by_old}}
pairs:
  manifest: training.parquet
  columns: {{id: name, image: image, label: digit}}
plan: {{waves: 8, unit_images: 64}}
index: {{factory: Flat, shards: 2}}
"""


@click.command("demo", Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--folder", default="runs/demo", show_default=True, help="Folder for the demo's data and run.")
@click.option("--json", "as_json", is_flag=True, help="Print the curve as one JSON document on stdout.")
@with_errors
def main(folder: str, as_json: bool) -> None:
    """Backfill 897 real images on this machine, in a few minutes.

    An earlier demo in the same folder is deleted first. Files that no demo wrote are never deleted.
    """
    from jobs.shell.open_run import load
    from jobs.shell.progress_bars import Bars
    from jobs.shell.ray_session import start_ray
    from jobs.steps.run_all import print_result, run_all
    from pipeline.storage import objects

    if "://" in folder:
        raise click.UsageError("--folder must be a folder on this machine, not a URI")
    root = Path(absolute(folder))
    check_ours(root)
    objects.delete(str(root / "run"))
    for name in ("run", "data"):
        objects.put(str(root / name / _MARKER), _SAYS)
    out = console()
    with Bars(out) as bars:
        with bars.step("train two encoders"):
            make_data(root / "data")
        (root / "demo.yaml").write_text(_config(root))
        config = load(str(root / "demo.yaml"), ())
        with bars.step("start Ray"):
            start_ray()
        run_all(config, bars)
    print_result(config.run, as_json)
    if not as_json:
        out.print(f"Next, try: fastfill status --config {root / 'demo.yaml'}", soft_wrap=True)


def check_ours(root: Path) -> None:
    """Refuse a folder with files that no demo wrote, or with symbolic links.

    Raises:
        ConfigError: names these files.
    """
    from pipeline.errors import ConfigError

    data = root / "data"
    links = [
        path for path in (root, root / "run", root / "demo.yaml", data, *map(data.joinpath, _DATA)) if path.is_symlink()
    ]
    strangers = [] if links else _strangers(root)
    if links or strangers:
        found = [f"{path} is a symbolic link" for path in links] + [f"no demo wrote {path}" for path in strangers]
        raise ConfigError(
            "this folder has files that are not the demo's",
            expected="a new or empty folder, or the folder of an earlier demo, unchanged",
            found="; ".join(found),
            where=root,
            remedy="name another --folder, or move these files away",
        )


def _strangers(root: Path) -> list[Path]:
    """Files and folders in the demo's way that no demo wrote: folders without the marker, another config."""
    from pipeline.storage import objects

    if root.exists() and not root.is_dir():
        return [root]
    found = []
    for folder in (root / "run", root / "data"):
        empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
        if not empty and not objects.exists(str(folder / _MARKER)):
            found.append(folder)
    config = root / "demo.yaml"
    written = _config(root).encode()
    if config.exists() and not (config.is_file() and written.startswith(objects.read_bytes(str(config)))):
        found.append(config)  # an interrupted demo may have written only the beginning
    return found


def _config(root: Path) -> str:
    return _CONFIG.format(folder=root, written_by=_WRITTEN_BY)


def make_data(folder: Path) -> None:
    """Write the demo's images as Parquet, and train and export its two encoders.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    import numpy as np
    import torch

    images, digits = _digits()
    order = np.random.default_rng(_SEED).permutation(len(images))
    train, gallery = order[:_TRAINING_IMAGES], order[_TRAINING_IMAGES:]
    folder.mkdir(parents=True, exist_ok=True)
    _write_manifest(folder / "training.parquet", images, digits, train)
    _write_manifest(folder / "gallery.parquet", images, digits, gallery)
    torch.manual_seed(_SEED)
    old = train[digits[train] < 5]
    _export(_train(images[old], digits[old], width=8, dim=16, epochs=15), folder / "old.pt2")
    _export(_train(images[train], digits[train], width=16, dim=32, epochs=25), folder / "new.pt2")


def _digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The 8x8 images as (1797, 8, 8) uint8, and their digits."""
    from pipeline.errors import ConfigError

    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError("the demo's images come with scikit-learn", remedy="pip install 'fastfill[demo]'") from error
    data = load_digits()
    return (data.images * 15).astype("uint8"), data.target.astype("int64")


def _write_manifest(path: Path, images: NDArray[np.uint8], digits: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    def png(image: NDArray[np.uint8]) -> bytes:
        sink = io.BytesIO()
        Image.fromarray(image).save(sink, "png")
        return sink.getvalue()

    table = pa.table(
        {
            "name": [f"digit-{row:04d}" for row in rows],
            "image": [png(images[row]) for row in rows],
            "digit": digits[rows],
            "seen_by_old": ["0-4" if digits[row] < 5 else "5-9" for row in rows],
        }
    )
    pq.write_table(table, path)


def _train(images: NDArray[np.uint8], digits: NDArray[np.int64], width: int, dim: int, epochs: int) -> nn.Module:
    """A small convolutional encoder with a linear classifier on top, which is thrown away."""
    import torch
    from torch import nn
    from torch.nn import functional

    encoder = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * width, dim), nn.ReLU(),
    )  # fmt: skip
    model = nn.Sequential(encoder, nn.Linear(dim, 10))
    pixels = torch.from_numpy(images).unsqueeze(1).float() / 255
    labels = torch.from_numpy(digits)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(pixels)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(pixels[batch]), labels[batch]).backward()
            optimizer.step()
    return encoder.eval()


def _export(encoder: nn.Module, path: Path) -> None:
    import torch

    batch = torch.export.Dim("batch", min=1, max=65536)
    program = torch.export.export(encoder, (torch.zeros(2, 1, 8, 8),), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)


if __name__ == "__main__":
    main()
