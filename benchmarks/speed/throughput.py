"""Embedding: images from storage to a durable vector log, through Ray, against a bare loop and Ray's documented recipe.

bare    one process, as many threads as there are cores: read, decode with our decoder, stack a batch, forward,
        np.save at the end; nothing that a long run needs (no order, no rejects, no log, no retries)
ours    pipeline.embedding.stream.embed_stream on a local Ray, as `fastfill backfill` runs it
recipe  from Ray's documentation: read_parquet or read_binary_files, map to decode, map_batches with an actor,
        write_parquet; its one actor may use all cores (Ray's default is one thread)

jpeg    photographs of about 500x375 by a ResNet-18 at 224 with random weights, one file each
cifar   CIFAR-100's training images at 32x32 in a Parquet column, by its trained new encoder

whole   from the call to the last durable vector, the figure to compare: of ours and the recipe on a running Ray,
        with their actors still to start; of the bare loop with the model still to load, its imports not counted
steady  the rate in the middle half of the images: of ours over whole rounds of durable units (one of each actor),
        if there are any; of the bare loop between batches; of the recipe it is unknown

python -m benchmarks.speed.throughput --case cifar --repeats 5
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks import measure
from benchmarks.measure import Spread, ratio
from benchmarks.photographs import photograph
from benchmarks.small_run import DATA, ROOT
from pipeline.config import tree as settings
from pipeline.config.load import validate
from pipeline.config.tree import Config
from pipeline.embedding.decode import Limits, decode_image
from pipeline.schema import UNITS, Unit
from pipeline.storage import objects, parquet

if TYPE_CHECKING:
    import torch

BATCH = {"cifar": 256, "jpeg": 64}
LONG = {"cifar": 50_000, "jpeg": 5_000}
SHORT = {"cifar": 6_000, "jpeg": 300}
BACKFILL: dict[str, Any] = {}
LIMITS = Limits(64_000_000, 64 * 2**20)


@dataclass(frozen=True, slots=True)
class Rate:
    """The rate of one run of a candidate, in images per second."""

    whole: float
    steady: float | None


def steady(moments: list[tuple[float, int]], per_round: int = 1) -> float | None:
    """Images per second in the middle half, from (seconds, images so far); None if that is no whole round.

    Args:
        moments: in order.
        per_round: moments that come at about the same time, since so many actors work side by side.
    """
    total = moments[-1][1]
    first = next(place for place, (_, count) in enumerate(moments) if count >= total / 4)
    last = next(place for place, (_, count) in enumerate(moments) if count >= total * 3 / 4)
    last -= (last - first) % per_round
    if last == first:
        return None
    return (moments[last][1] - moments[first][1]) / (moments[last][0] - moments[first][0])


@dataclass(frozen=True, slots=True)
class Case:
    """A gallery on disk, and the config of its run."""

    folder: Path
    images: int
    config: Config

    @property
    def is_files(self) -> bool:
        """Whether each image is a file."""
        return (self.folder / "jpeg").is_dir()

    @property
    def table(self) -> Path:
        """CIFAR-100's training images, which lie beside the encoder."""
        return Path(str(self.config.encoders.new.export)).parent / "train.parquet"

    def encoded(self) -> Iterator[bytes]:
        """The bytes of each image, read as they are asked for."""
        if self.is_files:
            yield from (Path(path).read_bytes() for path, _ in self.places())
            return
        batches = pq.ParquetFile(self.table).iter_batches(BATCH["cifar"], columns=["image"])
        yield from itertools.islice((image for batch in batches for image in batch["image"].to_pylist()), self.images)

    def places(self) -> Iterator[tuple[str, int | None]]:
        """Where each image lies."""
        if self.is_files:
            yield from ((str(path), None) for path in sorted((self.folder / "jpeg").iterdir())[: self.images])
        else:
            yield from ((f"{self.table}#image", row) for row in range(self.images))

    def units(self) -> list[Unit]:
        """The gallery as units of work, whose places are in a Parquet file."""
        size = self.config.unit_images
        rows = [{"id": number, "uri": uri, "row": row} for number, (uri, row) in enumerate(self.places())]
        pieces = [rows[start : start + size] for start in range(0, len(rows), size)]
        uri = str(self.folder / "units.parquet")
        objects.put(uri, parquet.parquet_bytes(UNITS, [pa.Table.from_pylist(piece, UNITS) for piece in pieces]))
        return [Unit(1, number, uri, number, len(piece)) for number, piece in enumerate(pieces)]


def make_case(name: str, folder: Path, images: int, backfill: dict[str, str], data: Path = DATA) -> Case:
    """A case with its files; `backfill` changes settings of that section, `data` is where CIFAR-100 lies."""
    folder.mkdir()
    if name == "cifar":
        preprocess = {"size": 32, "pixel_range": 255, "mean": [125.3, 123.0, 113.9], "std": [63.0, 62.1, 66.7]}
        encoder: dict[str, Any] = {"export": str(data / "new.pt2"), "dim": 128, "preprocess": preprocess}
    else:
        (folder / "jpeg").mkdir()
        for number in range(images):
            (folder / "jpeg" / f"{number:06d}.jpg").write_bytes(photograph(number))
        encoder = {"function": "benchmarks.speed.throughput:resnet18", "dim": 512}
        encoder["preprocess"] = {"resize": 256, "center_crop": 224}
    source = {"manifest": "none", "columns": {"id": "id", "image": "image"}}
    tree: dict[str, object] = {
        "run": str(folder / "run"),
        "device": "cpu",
        "encoders": {"new": encoder},
        "gallery": source,
    }
    tree |= {"pairs": source, "backfill": BACKFILL | {"batch_size": BATCH[name]} | backfill}
    return Case(folder, images, validate(tree, where="benchmark"))


def resnet18() -> torch.nn.Module:
    """A ResNet-18 that gives its 512 pooled numbers, with random weights."""
    import torch
    import torchvision

    torch.manual_seed(0)
    network: torch.nn.Module = torchvision.models.resnet18(weights=None)
    network.fc = torch.nn.Identity()
    return network


def bare(case: Case) -> Rate:
    """In a process of its own."""
    words = ["--bare", str(case.folder), "--images", str(case.images)]
    command = [sys.executable, "-m", "benchmarks.speed.throughput", *words]
    text = case.config.model_dump_json()
    done = subprocess.run(command, input=text, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    return Rate(**json.loads(done.stdout))


def bare_loop(case: Case) -> Rate:
    """In this process."""
    import torch
    import torchvision  # noqa: F401 (its import is not counted)

    from pipeline.models.encoder import load_encoder

    torch.set_num_threads(os.cpu_count() or 1)
    start, moments, found, count = time.perf_counter(), [], [], 0
    encoder, batch_size = case.config.encoders.new, case.config.backfill.batch_size
    model = load_encoder(encoder, torch.device("cpu"))
    images = case.encoded()
    with torch.inference_mode():
        while some := list(itertools.islice(images, batch_size)):
            pixels = np.stack([decode_image(data, encoder.preprocess, LIMITS) for data in some])
            found.append(model(torch.from_numpy(pixels)).numpy())
            count += len(some)
            moments.append((time.perf_counter(), count))
    np.save(case.folder / "bare.npy", np.concatenate(found))
    return Rate(case.images / (time.perf_counter() - start), steady(moments))


def ours(case: Case) -> Rate:
    """Through Ray, into a vector log."""
    from pipeline.embedding.stream import StreamSettings, Work, embed_stream
    from pipeline.embedding.vector_log import VectorLog

    shutil.rmtree(case.folder / "run", ignore_errors=True)
    run = str(case.folder / "run")
    log = VectorLog(f"{run}/embedded", f"{run}/rejects", case.config.encoders.new.dim, 8)
    units = case.units()
    start, moments, count, actors = time.perf_counter(), [], 0, set()
    work, settings = Work(case.config.encoders.new, log, units), StreamSettings.of(case.config)
    for _, ack in embed_stream([work], settings):
        assert not ack.rejected, "an image was rejected"
        count += ack.embedded
        actors.add(ack.actor)
        moments.append((time.perf_counter(), count))
    seconds = time.perf_counter() - start
    assert count == case.images
    return Rate(case.images / seconds, steady(moments, len(actors)))


class Predictor:
    """The recipe's actor."""

    def __init__(self, encoder: settings.EncoderSettings) -> None:
        import torch

        from pipeline.models.encoder import load_encoder

        torch.set_num_threads(os.cpu_count() or 1)
        self._model = load_encoder(encoder, torch.device("cpu"))

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        import torch

        with torch.inference_mode():
            return {"embedding": self._model(torch.from_numpy(np.stack(list(batch["pixels"])))).numpy()}


def recipe(case: Case) -> Rate:
    """Ray's documented way of offline inference."""
    import ray.data

    encoder = case.config.encoders.new

    def decode(row: dict[str, Any]) -> dict[str, Any]:
        return {"pixels": decode_image(row["bytes"], encoder.preprocess, LIMITS)}

    shutil.rmtree(case.folder / "recipe", ignore_errors=True)
    ray.data.DataContext.get_current().target_max_block_size = 128 * 2**20  # as it comes; ours sets it to None
    start = time.perf_counter()
    if case.is_files:
        images = ray.data.read_binary_files(str(case.folder / "jpeg"))
    else:
        images = ray.data.read_parquet(str(case.table)).select_columns(["image"]).limit(case.images)
        images = images.rename_columns({"image": "bytes"})
    images.map(decode).map_batches(
        Predictor,
        fn_constructor_args=(encoder,),
        batch_size=case.config.backfill.batch_size,
        compute=ray.data.ActorPoolStrategy(size=1),
    ).write_parquet(str(case.folder / "recipe"))
    seconds = time.perf_counter() - start
    assert pq.ParquetDataset(case.folder / "recipe").read(["embedding"]).num_rows == case.images
    return Rate(case.images / seconds, None)


def compare(case: Case, repeats: int, only: list[str]) -> dict[str, list[Rate]]:
    """Each candidate `repeats` times, in turns."""
    rates: dict[str, list[Rate]] = {name: [] for name in only}
    candidates = {name: lambda name=name: rates[name].append(CANDIDATES[name](case)) for name in only}
    measure.interleave(candidates, repeats)
    return rates


CANDIDATES: dict[str, Callable[[Case], Rate]] = {"bare": bare, "ours": ours, "recipe": recipe}


def show(name: str, case: Case, rates: dict[str, list[Rate]]) -> None:
    """Rates, and ratios within each repeat, as tables."""
    print(f"\n{name}: {case.images:,} images, batches of {case.config.backfill.batch_size}\n")
    rows = []
    for candidate, found in rates.items():
        parts = [rate.steady for rate in found if rate.steady is not None]
        rows.append((candidate, *(Spread.of(v).text(".0f") if v else "" for v in ([r.whole for r in found], parts))))
    print(measure.table(["images/s", "whole", "steady"], rows))
    if "ours" in rates:
        others = [item for item in rates if item != "ours"]
        lines = [(f"ours / {item}", *ratios(rates["ours"], rates[item])) for item in others]
        print("\n" + measure.table(["ratio", "whole", "steady"], lines), flush=True)


def ratios(ours: list[Rate], others: list[Rate]) -> tuple[str, str]:
    """Of the whole, and of the steady rates of those repeats in which both have one."""
    steady = [(mine.steady, other.steady) for mine, other in zip(ours, others, strict=True)]
    both = [(mine, other) for mine, other in steady if mine is not None and other is not None]
    whole = ratio([rate.whole for rate in ours], [rate.whole for rate in others]).text()
    return whole, ratio(*zip(*both, strict=True)).text() if both else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=["jpeg", "cifar", "both"], default="both")
    parser.add_argument("--images", type=int, help="how many (default 5,000 photographs, 50,000 of CIFAR-100)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--short", action="store_true", help="fewer images, one repeat: whether it runs")
    parser.add_argument("--only", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of `backfill`")
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.bare is not None:
        print(
            json.dumps(asdict(bare_loop(Case(given.bare, given.images, Config.model_validate_json(sys.stdin.read())))))
        )
        return
    from jobs.shell.ray_session import start_ray

    print(measure.header(["torchvision", "pillow"]))
    start_ray()
    names = ["jpeg", "cifar"] if given.case == "both" else [given.case]
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            if name == "cifar" and not DATA.is_dir():
                print("\ncifar: needs ../shared/data")
                continue
            images = given.images or (SHORT if given.short else LONG)[name]
            case = make_case(name, Path(folder) / name, images, dict(item.split("=") for item in given.set))
            show(name, case, compare(case, 1 if given.short else given.repeats, given.only))


if __name__ == "__main__":
    main()
