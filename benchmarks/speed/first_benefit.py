"""From `backfill` to snapshot 0 visible, as a share of a full re-embedding of the same gallery.

    python -m benchmarks.speed.first_benefit [--short] [--repeats 5] [--data FOLDER]

Measured on CIFAR-100 with its two encoders and the example config, from the command's start to the files that each
stage leaves. The plain alternative is the bare loop of `benchmarks.speed.throughput`: it reads, decodes and embeds as
many images with the same encoder in one process, and saves. Both take turns. The gallery has 10,000 images of 32x32,
so fixed costs (Ray, embedding 50,000 training pairs by both encoders, the fit) are nearly all of it.

Figures for larger galleries and costlier encoders are computed from measured parts, and marked so: fixed costs; the
time per image of plan and snapshot 0, from two runs of 10,000 and 60,000 images with given old embeddings, as in a
real gallery (here noise, and a fit that is cut short: only the time matters); and the steady rate of the bare loop,
with the CIFAR encoder and with ResNet-18 at 224 on photographs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.measure import Spread, header, interleave, table
from benchmarks.small_run import STAGES, VISIBLE, Job, data_folder, part_of_cifar
from benchmarks.speed import throughput
from pipeline.arrays import vectors_to_arrow

TARGET_PERCENT = 5
SIZES = (10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)
OLD_DIM = 64
SMALL = "`new.pt2` at 32x32, PNG"
LARGE = "ResNet-18 at 224, JPEG of 500x375"


@dataclass(frozen=True, slots=True)
class Costs:
    """The measured inputs of the arithmetic.

    Attributes:
        fixed: seconds to snapshot 0 that do not depend on the gallery: of the whole command.
        fixed_given: the same without the steps before the fit, if embeddings are given.
        per_image: seconds of plan and snapshot 0.
    """

    fixed: float
    fixed_given: float
    per_image: float

    def share(self, images: int, rate: float, given: bool) -> float:
        """Per cent of `images / rate`."""
        until = (self.fixed_given if given else self.fixed) + images * self.per_image
        return 100 * until * rate / images


class Loops:
    """The bare loop's rates, one more of each case at every call."""

    def __init__(self, folder: Path, data: Path, short: bool) -> None:
        folder.mkdir()
        self._cases = {
            SMALL: throughput.make_case("cifar", folder / "cifar", 2000 if short else 10_000, {}, data),
            LARGE: throughput.make_case("jpeg", folder / "jpeg", 128 if short else 512, {}),
        }
        self.found: dict[str, list[throughput.Rate]] = {name: [] for name in self._cases}

    def __call__(self) -> None:
        for name, case in self._cases.items():
            self.found[name].append(throughput.bare(case))

    def whole(self, name: str) -> Spread:
        """Images per second with all costs of one run."""
        return Spread.of(rate.whole for rate in self.found[name])

    def steady(self, name: str) -> Spread:
        """Images per second of a long run."""
        return Spread.of(rate.steady or rate.whole for rate in self.found[name])


def given_embeddings(folder: Path, data: Path, images: int) -> float:
    """Seconds of plan and snapshot 0, up to where the gate looks at it, for so many images of CIFAR-100."""
    settings = part_of_cifar(folder, data, num_gallery=1, num_pairs=5000)
    rows = pa.concat_tables([pq.read_table(data / f"{name}.parquet") for name in ("train", "test")]).slice(0, images)
    noise = np.random.default_rng(0).standard_normal((images, OLD_DIM), np.float32)
    pq.write_table(rows.append_column("old_embedding", vectors_to_arrow(noise)), folder / "gallery.parquet")
    gallery = (f"gallery.manifest={folder / 'gallery.parquet'}", "gallery.columns.old_embedding=old_embedding")
    seconds = Job(folder / "run", data, (*settings[1:], *gallery)).backfill(until=STAGES["snapshot 0 measured"])
    return seconds["snapshot 0 measured"] - seconds["fitted"]


def measured(seconds: list[dict[str, float]], images: int, loop: Spread) -> str:
    """The stages of the same run `len(seconds)` times, and snapshot 0 against both full re-embeddings."""
    rows = [[name, stage(name, seconds)] for name in STAGES]
    served = [taken for taken in seconds if VISIBLE in taken]
    text = (
        f"## Measured: {images:,} images, {len(seconds)} runs\n\n"
        f"{table(['from the start of `fastfill backfill` to', 'seconds'], rows)}\n\n"
    )
    if not served:
        return f"{text}Snapshot 0 was refused by the gate in every run, so there is no share."
    visible = [taken[VISIBLE] for taken in served]
    ours = [taken["last wave published"] - taken[VISIBLE] for taken in served]
    of_ours = Spread.of(100 * before / after for before, after in zip(visible, ours, strict=True))
    of_loop = Spread.of(100 * before * loop.median / images for before in visible)
    return (
        f"{text}Snapshot 0 is visible after {of_ours.text(',.0f')} % of the {Spread.of(ours).text('.1f')} s that "
        f"embedding and publishing all waves took from there, and after {of_loop.text(',.0f')} % of the "
        f"{images / loop.median:.1f} s of the bare loop. Target: below {TARGET_PERCENT} %."
    )


def stage(name: str, seconds: list[dict[str, float]]) -> str:
    """The time at which a stage was reached, and in how many runs it was not."""
    reached = [taken[name] for taken in seconds if name in taken]
    why = "refused by the gate" if name == VISIBLE else "not reached"
    missing = f"{why} in {len(seconds) - len(reached)} of {len(seconds)} runs" if len(reached) < len(seconds) else ""
    return "; ".join(filter(None, [Spread.of(reached).text(".1f") if reached else "", missing]))


def computed(seconds: list[dict[str, float]], after_fit: dict[int, float], loops: dict[str, Spread]) -> str:
    """The share for larger galleries, from measured parts; `after_fit` is `given_embeddings` of two sizes."""
    served = [taken for taken in seconds if VISIBLE in taken]
    if not served:
        return "Nothing computed for larger galleries: snapshot 0 was refused by the gate in every run."
    first = {name: statistics.median(taken[name] for taken in served) for name in STAGES}
    (few, quick), (many, slow) = sorted(after_fit.items())
    per_image = (slow - quick) / (many - few)
    embedding = first["pairs embedded"] - first["first unit embedded"]
    costs = Costs(first[VISIBLE], first[VISIBLE] - embedding, per_image)
    rows = []
    for name, rate in loops.items():
        for given in (False, True):
            what = f"{name}; {'pairs already embedded' if given else 'pairs embedded first'}"
            rows.append([what, *(f"{costs.share(size, rate.median, given):.3g} %" for size in SIZES)])
    return (
        "## Computed, not measured: larger galleries\n\n"
        f"Fixed {costs.fixed:.0f} s, or {costs.fixed_given:.0f} s where the pairs' embeddings are given. Plan and "
        f"snapshot 0, old embeddings given, took {quick:.1f} s for {few:,} images and {slow:.1f} s for {many:,}: "
        f"{1e6 * per_image:.0f} µs per image. A full re-embedding is taken as images / rate of the bare loop on "
        f"this machine.\n\n"
        f"{table(['gallery of', *(f'{size:,}' for size in SIZES)], rows)}\n\n"
        f"Below {TARGET_PERCENT} % for any gallery only where the encoder does less than "
        f"{TARGET_PERCENT / 100 / per_image:,.0f} images/s on the same machine."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="one run on 2,000 images, nothing computed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--data", help="the folder of CIFAR-100")
    arguments = parser.parse_args()
    data = data_folder(arguments.data)
    print(f"{header(['torchvision', 'simplejpeg'])} Median (lowest - highest).\n", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = part_of_cifar(folder / "part", data, 2000, 5000) if arguments.short else ()
        images, repeats = (2000, 1) if arguments.short else (10_000, arguments.repeats)
        loops, seconds = Loops(folder / "loops", data, arguments.short), list[dict[str, float]]()

        def ours() -> None:
            job = Job(folder / f"run-{len(seconds)}", data, settings)
            seconds.append(job.backfill(until=STAGES["last wave published"]))

        interleave({"loops": loops, "ours": ours}, repeats)
        rows = [[name, loops.whole(name).text(",.0f"), loops.steady(name).text(",.0f")] for name in loops.found]
        print(table(["bare loop, images/s", "whole", "steady"], rows) + "\n", flush=True)
        print(measured(seconds, images, loops.whole(SMALL)), flush=True)
        if not arguments.short:
            after = {size: given_embeddings(folder / f"of-{size}", data, size) for size in (10_000, 60_000)}
            rates = {name: loops.steady(name) for name in loops.found}
            print("\n" + computed(seconds, after, rates), flush=True)


if __name__ == "__main__":
    main()
