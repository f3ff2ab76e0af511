"""A million images, one object each and in tars: listed, indexed, planned; time and peak memory.

    local objects   empty files in 1,000 folders
    local tars      ten WebDataset tars of images of 300 bytes, each with a label of one byte
    s3 tars         the same tars on a real S3 server
    s3 objects      a tenth as many, real, in one flat prefix of the server
    s3 simulated    all of them, in a flat prefix; we make up the server's answers to the listing, without HTTP, XML or
                    a store
    plan            the local manifests together, with old embeddings of 16 numbers: normalised, transformed by an
                    untrained network, scored, cut into 20 waves of 8 shards, laid out

Memory is the proportional set size (shared pages count once) of this process and all below it, with Ray's and without
the S3 server's, sampled four times a second.

    python -m benchmarks.speed.manifest --rows 1000000
"""

from __future__ import annotations

import argparse
import http.client
import io
import os
import tarfile
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from benchmarks.measure import header, memory
from jobs.shell.ray_session import start_ray
from pipeline.arrays import vectors_to_arrow
from pipeline.config import tree as config
from pipeline.config.load import validate
from pipeline.manifest import catalog
from pipeline.manifest.splits import Options
from pipeline.storage import objects as storage
from pipeline.storage import parquet
from pipeline.storage.interface import Stat
from pipeline.storage.retry import COUNTS
from pipeline.storage.retrying_store import Page
from pipeline.storage.s3_client import S3Client
from tests.support.seaweed import SeaweedFS

NUM_TARS = 10
FOLDERS = 1000
IMAGE_BYTES = 300
DIM = 16
PAGE = 1000
OPTIONS = Options(suffixes=(".png",))


@contextmanager
def measured(name: str) -> Iterator[None]:
    before, start = COUNTS.snapshot(), time.perf_counter()
    with memory() as used_memory:
        yield
    seconds, used = time.perf_counter() - start, COUNTS.snapshot() - before
    requests = ", ".join(f"{kind.partition(':')[2]} {count:,}" for kind, count in used.items() if "requests" in kind)
    print(f"| {name} | {seconds:.1f} | {used_memory.peak / 2**20:,.0f} | {requests} |", flush=True)


def make_files(folder: Path, count: int) -> None:
    for first in range(FOLDERS):
        below = folder / f"{first:04d}"
        below.mkdir(parents=True)
        for row in range(first, count, FOLDERS):
            os.close(os.open(below / f"{row:08d}.png", os.O_CREAT | os.O_WRONLY))


def tar_bytes(count: int) -> bytes:
    sink, image = io.BytesIO(), bytes(IMAGE_BYTES)
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for row in range(count):
            for name, data in ((f"{row:08d}.cls", b"7"), (f"{row:08d}.png", image)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return sink.getvalue()


def put_objects(server: SeaweedFS, bucket: str, count: int) -> None:
    """Through the filer, which is four times as fast as through S3; they are S3 objects like any."""

    def put(rows: range) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.ports[2])
        for row in rows:
            connection.request("PUT", f"/buckets/{bucket}/flat/{row:08d}.png?saveInside=true", body=str(row))
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 201, answer.status

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(put, [range(worker, count, 4) for worker in range(4)]))


@contextmanager
def simulated_listing(count: int) -> Iterator[None]:
    """`S3Client.listing` answers from nothing for the prefix `simulated/`."""
    real = S3Client.listing

    def listing(self: S3Client, prefix: str, token: str | None, deep: bool = True) -> Page:
        if "/simulated/" not in prefix:
            return real(self, prefix, token, deep)
        first = int(token or 0)
        rows = range(first, min(first + PAGE, count))
        objects = [(f"{prefix}{row:08d}.png", Stat(300, 0.0, f'"{row:032x}"')) for row in rows]
        return Page(objects, str(rows.stop) if rows.stop < count else None)

    S3Client.listing = listing  # type: ignore[method-assign]
    try:
        yield
    finally:
        S3Client.listing = real  # type: ignore[method-assign]


def add_embeddings(folders: list[str], to: str) -> None:
    """The manifests with a column of old embeddings, as a user has them whose old embeddings are known."""
    random = np.random.default_rng(0)
    for number, uri in enumerate(part for folder in folders for part in storage.expand(folder, ".parquet")):
        rows = parquet.read_parquet(uri)
        vectors = random.standard_normal((rows.num_rows, DIM), dtype=np.float32)
        rows = rows.append_column("old_embedding", vectors_to_arrow(vectors))
        storage.put(f"{to}/part-{number:05d}.parquet", parquet.parquet_bytes(rows.schema, [rows]))


def settings(run: str, source: str) -> config.Config:
    encoder = {"function": "user:encoder", "dim": DIM, "preprocess": {"size": 8, "channels": 1}}
    columns = {name: name for name in ("uri", "offset", "length", "etag", "label", "old_embedding")} | {"id": "key"}
    tree: dict[str, object] = {
        "run": run,
        "device": "cpu",
        "encoders": {"new": encoder},
        "gallery": {"manifest": source, "columns": columns},
        "pairs": {"manifest": source, "columns": columns},
    }
    return validate(tree, where="benchmark")


def plan(folder: str, source: str) -> int:
    """The rows that were planned."""
    import torch  # and all below here: the steps before are measured without it, as the command runs

    from pipeline.manifest import normalised
    from pipeline.models.transformation import TransformationInfo, save_transformation
    from pipeline.planning.build import make_plan
    from pipeline.run import Run

    found = settings(f"{folder}/run", source)
    run = Run(found.run)
    with measured("plan: normalise, ids from keys"):
        start_ray()
        normalised.normalise(run, "gallery", found.gallery, {}, found.unit_images)
    info = TransformationInfo(DIM, DIM, None, 64, False, "alignment+uncertainty", 0, 1, 1, 1, True)
    torch.manual_seed(0)
    save_transformation(run, info.network().eval(), info)
    with measured("plan: score, cut, lay out"):
        return make_plan(found, run).num_gallery


def build(to: str, *sources: str) -> catalog.Catalog:
    return catalog.build_manifest(to, sources, OPTIONS, start_ray=start_ray)[0]


def local_steps(folder: Path, rows: int) -> None:
    """A million files and a million members of tars: listed, indexed, planned together."""
    with measured(f"{rows:,} local objects"):
        assert build(f"{folder}/of-images", f"{folder}/images").images == rows
    with measured(f"{rows:,} images in local tars"):
        assert build(f"{folder}/of-tars", f"{folder}/tars/shard-*.tar").images == rows
    add_embeddings([f"{folder}/of-images", f"{folder}/of-tars"], f"{folder}/embedded")
    assert plan(str(folder), f"{folder}/embedded") == 2 * rows


def s3_steps(folder: Path, rows: int) -> None:
    """The same tars, a tenth as many objects, and a listing that is made up, on a real server."""
    with SeaweedFS(folder / "weed") as server:
        os.environ.update(server.environment())
        server.make_bucket("bench")
        for number in range(NUM_TARS):
            name = f"shard-{number}.tar"
            storage.put(f"s3://bench/tars/{name}", storage.read_bytes(f"{folder}/tars/{name}"))
        put_objects(server, "bench", rows // 10)
        with measured(f"{rows:,} images in s3 tars"):
            assert build("s3://bench/of-tars", "s3://bench/tars/shard-*.tar").images == rows
        with measured(f"{rows // 10:,} s3 objects"):
            assert build("s3://bench/of-images", "s3://bench/flat").images == rows // 10
        with measured(f"{rows:,} s3 objects, listing simulated"), simulated_listing(rows):
            assert build("s3://bench/of-simulated", "s3://bench/simulated").images == rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--short", action="store_true", help="20,000 rows")
    parser.add_argument("--local", action="store_true", help="without S3")
    given = parser.parse_args()
    rows = 20_000 if given.short else given.rows
    print(header(["s3fs"]) + "\n")
    print("| step | seconds | MiB at most | requests of this process |\n|---|---:|---:|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_files(folder / "images", rows)
        data = tar_bytes(rows // NUM_TARS)
        for number in range(NUM_TARS):
            storage.put(f"{folder}/tars/shard-{number}.tar", data)
        if not given.local:
            s3_steps(folder, rows)
        local_steps(folder, rows)


if __name__ == "__main__":
    main()
