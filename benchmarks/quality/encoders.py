"""Encoders that we train ourselves: small networks on CIFAR-100, in minutes.

    train.parquet -> FOLDER/<name>/encoder.pt2, and classifier.safetensors if the recipe exports one

An encoder is a `torch.export` archive with the input of the given encoders: any number of images, (B, 3, 32, 32)
float32, normalised. A recipe fixes everything, so an existing encoder is not trained again, and interrupted training
goes on from its last epoch and gives the same bytes.

    python -m benchmarks.quality.encoders biased strong-old barely-better no-classifier
    python -m benchmarks.quality.encoders --list
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from benchmarks.small_run import data_folder
from pipeline.arrays import Int64
from pipeline.config.tree import PreprocessSettings
from pipeline.embedding.decode import Limits, decode_image

FOLDER = Path(tempfile.gettempdir()) / "fastfill-encoders"
SCARCE_GROUP = "insects"
"""The superclass of which the biased encoder saw few images: with the given new encoder, and with an encoder that saw
all, it is as hard as the others are in the mean."""

_MEAN, _STD = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)
_SIZE, _PAD, _BATCH = 32, 4, 256
_LR, _DECAY, _MOMENTUM = 0.2, 5e-4, 0.9
_LIMITS = Limits(10**6, 10**6)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How an encoder is made.

    Attributes:
        width: channels of the first of three stages.
        dim: of the embedding.
        epochs: of training.
        kept: the share of SCARCE_GROUP's images that it is trained on.
        prototypes: trained by distances to a prototype per class, with embeddings of either sign; no classifier.
        seed: of the first weights, the shuffles and the augmentation.
    """

    width: int
    dim: int
    epochs: int
    kept: float = 1.0
    prototypes: bool = False
    seed: int = 0


RECIPES = {
    "biased": Recipe(32, 64, 8, kept=0.01),
    "unbiased": Recipe(32, 64, 8),
    "strong-old": Recipe(32, 128, 10),
    "barely-better": Recipe(32, 128, 14, seed=1),
    "no-classifier": Recipe(32, 96, 12, prototypes=True, seed=2),
}


@dataclass(frozen=True, slots=True)
class Trained:
    """An encoder's file, the width of its embeddings, and its classifier if it has one."""

    export: Path
    dim: int
    classifier: Path | None


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(width_in, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width))
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))
        self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, width_in, H, W) to (B, width, H / stride, W / stride)."""
        inside = self.second(functional.relu(self.first(x)))
        return functional.relu(inside + self.shortcut(x))


def network(recipe: Recipe) -> nn.Sequential:
    """(B, 3, 32, 32) to (B, dim): three stages at 16, 8 and 4 pixels."""
    width = recipe.width
    stem = [nn.Conv2d(3, width, 4, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    stages = [Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2)]
    ends = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, recipe.dim)]
    return nn.Sequential(*stem, *stages, *ends, *([] if recipe.prototypes else [nn.ReLU()]))


class Prototypes(nn.Module):
    """Minus the squared distance to one point per class."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.points = nn.Parameter(0.1 * torch.randn(num_classes, dim))

    def forward(self, z_bd: torch.Tensor) -> torch.Tensor:
        """(B, num_classes) logits."""
        return 2 * z_bd @ self.points.T - self.points.square().sum(dim=1) - z_bd.square().sum(dim=1, keepdim=True)


def encoder(name: str, data: Path, folder: Path = FOLDER, short: bool = False) -> Trained:
    """Train the encoder of a recipe, or find it.

    Args:
        name: of RECIPES.
        data: the folder of CIFAR-100.
        folder: where encoders are kept.
        short: one epoch, to see whether it runs; kept apart.
    """
    recipe = replace(RECIPES[name], epochs=1) if short else RECIPES[name]
    kept = folder / f"{name}-short" if short else folder / name
    mark, export = kept / "recipe.txt", kept / "encoder.pt2"
    if not mark.exists() or mark.read_text() != repr(recipe):
        kept.mkdir(parents=True, exist_ok=True)
        _train(recipe, data, kept)
        mark.write_text(repr(recipe))
    return Trained(export, recipe.dim, None if recipe.prototypes else kept / "classifier.safetensors")


def rows_of(recipe: Recipe, groups: list[str]) -> Int64:
    """The rows that a recipe trains on: all, but of SCARCE_GROUP the share that it keeps, ascending."""
    scarce = np.flatnonzero(np.array(groups) == SCARCE_GROUP)
    dropped = np.random.default_rng(0).permutation(scarce)[round(recipe.kept * len(scarce)) :]
    return np.setdiff1d(np.arange(len(groups)), dropped)


def _train(recipe: Recipe, data: Path, kept: Path) -> None:
    table = pq.read_table(data / "train.parquet", columns=["image", "label", "coarse_label_name"])
    table = table.take(rows_of(recipe, table["coarse_label_name"].to_pylist()))
    labels = torch.tensor(table["label"].to_numpy().astype(np.int64))
    preprocess = PreprocessSettings(size=_SIZE, pixel_range=255, mean=_MEAN, std=_STD)
    pixels = np.stack([decode_image(image, preprocess, _LIMITS) for image in table["image"].to_pylist()])
    images = functional.pad(torch.from_numpy(pixels), (_PAD,) * 4)
    torch.manual_seed(recipe.seed)
    encode, num_classes = network(recipe), int(labels.max()) + 1
    head = Prototypes(num_classes, recipe.dim) if recipe.prototypes else nn.Linear(recipe.dim, num_classes)
    model = nn.Sequential(encode, head).to(memory_format=torch.channels_last)
    steps = recipe.epochs * (len(labels) // _BATCH)
    optimizer = torch.optim.SGD(model.parameters(), _LR, momentum=_MOMENTUM, weight_decay=_DECAY, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LR, total_steps=steps, cycle_momentum=False)
    state, done = kept / "state.pt", 0
    found: dict[str, Any] = torch.load(state, weights_only=True) if state.exists() else {"recipe": None}
    if found["recipe"] == repr(recipe):
        done = found["epochs"]
        model.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])
        schedule.load_state_dict(found["schedule"])
    for epoch in range(done, recipe.epochs):
        started = time.monotonic()
        right = _epoch(model, optimizer, schedule, images, labels, 1000 * recipe.seed + epoch)
        states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        torch.save({"recipe": repr(recipe), "epochs": epoch + 1} | states, kept / "state.new")
        (kept / "state.new").rename(state)
        say = (
            f"{kept.name}: epoch {epoch + 1} of {recipe.epochs}, {time.monotonic() - started:.0f} s, right {right:.1%}"
        )
        print(say, file=sys.stderr, flush=True)
    _export(encode, head, kept)
    state.unlink()


def _epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    images: torch.Tensor,
    labels: torch.Tensor,
    seed: int,
) -> float:
    """One pass; the share of the images that were classified right on the way."""
    random, right, model = torch.Generator().manual_seed(seed), 0, model.train()
    batches = torch.randperm(len(labels), generator=random).split(_BATCH)
    whole = [rows for rows in batches if len(rows) == _BATCH]
    for rows in whole:
        x = _augment(images, rows, random).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(x)
        loss = functional.cross_entropy(logits.float(), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        right += int((logits.argmax(dim=1) == labels[rows]).sum())
    return right / (_BATCH * len(whole))


def _augment(images: torch.Tensor, rows: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """(B, 3, 32, 32) float32, normalised: of each padded image a random window, and half of them mirrored."""
    down, across = torch.randint(0, 2 * _PAD + 1, (2, len(rows), 1), generator=random)
    mirrored = torch.rand((len(rows), 1), generator=random) < 0.5
    places = torch.arange(_SIZE)
    ys, xs = down + places, across + torch.where(mirrored, places.flip(0), places)
    window = images[rows[:, None, None, None], torch.arange(3)[:, None, None], ys[:, None, :, None], xs[:, None, None]]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (_MEAN, _STD))
    return (window - mean) / std


def _export(encode: nn.Module, head: nn.Module, kept: Path) -> None:
    encode = encode.eval().to(memory_format=torch.contiguous_format)
    batch = torch.export.Dim("batch", min=1, max=65536)
    program = torch.export.export(encode, (torch.zeros(2, 3, _SIZE, _SIZE),), dynamic_shapes=({0: batch},))
    torch.export.save(program, kept / "encoder.pt2")
    if isinstance(head, nn.Linear):
        tensors = {name: tensor.detach().contiguous() for name, tensor in head.state_dict().items()}
        save_file(cast(dict[str, torch.Tensor], tensors), kept / "classifier.safetensors")


def main() -> None:
    """Train the missing ones of the given encoders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*RECIPES, []], help="of the recipes; by default all")
    parser.add_argument("--data", help="the folder of CIFAR-100")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--short", action="store_true", help="one epoch of each")
    parser.add_argument("--list", action="store_true", help="list the encoders, train none")
    arguments = parser.parse_args()
    for name in arguments.names or RECIPES:
        if arguments.list:
            print(f"{name}: {RECIPES[name]}")
        else:
            print(encoder(name, data_folder(arguments.data), arguments.folder, arguments.short).export)


if __name__ == "__main__":
    main()
