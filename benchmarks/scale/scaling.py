"""The cost of one row, one unit and one segment in bytes, seconds and memory: the constants of docs/scaling.md.

The pipeline's own functions write and read everything, at small scale on this machine's disk; the document multiplies.
The output is one JSON document: each figure with its value, its unit, and how it was measured. `simulate` reads it.

    python -m benchmarks.scale.scaling --into benchmarks/results/DATE-scaling.json
    python -m benchmarks.scale.scaling --into benchmarks/results/DATE-scaling.json --only ray
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.arrays import Float32, vectors_to_arrow
from pipeline.config.tree import IndexSettings, PreprocessSettings
from pipeline.embedding import vector_log
from pipeline.embedding.decode import Limits, decode_image
from pipeline.embedding.vector_log import EmbeddedUnit, VectorLog
from pipeline.index import codebook as codebooks
from pipeline.index import segment_files, train_codebook
from pipeline.index.codebook import Codebook
from pipeline.index.commits import Commit, SegmentCounts, check_commit
from pipeline.index.segment import build_segment
from pipeline.index.segment_files import SegmentRef
from pipeline.manifest.normalised import PARTITION_ROWS
from pipeline.planning import plan as plans
from pipeline.planning.plan import Plan, Wave
from pipeline.reporting import telemetry
from pipeline.reporting.progress import Tracker
from pipeline.run import Run
from pipeline.schema import UNITS, Unit, UnitAck, transformed_schema
from pipeline.storage import documents, objects, parquet

DIM = 128
SHARDS, WAVES = 64, 100
FACTORY = "OPQ32_128,IVF4096_HNSW32,PQ32"  # `auto` at 1 billion is the same with 32,768 lists, which train for long
RANDOM = np.random.default_rng(0)

Figures = dict[str, dict[str, object]]


def figure(value: float, unit: str, how: str) -> dict[str, object]:
    return {"value": float(f"{value:.4g}"), "unit": unit, "how": how}


def seconds_of(call: Callable[[], object], repeats: int = 5, clock: Callable[[], float] = time.perf_counter) -> float:
    """The median of some calls, after one that is not counted."""
    taken = []
    for _ in range(repeats + 1):
        start = clock()
        call()
        taken.append(clock() - start)
    return statistics.median(taken[1:])


def slope(sizes: Iterable[float], values: Iterable[float]) -> float:
    """The least-squares slope."""
    return float(np.polyfit(list(sizes), list(values), 1)[0])


def vectors(count: int) -> Float32:
    return RANDOM.standard_normal((count, DIM), dtype=np.float32)


def location(count: int) -> dict[str, pa.Array]:
    """Images in tars on S3, as a manifest of ours has them: random gaps, an etag per tar."""
    offsets = np.cumsum(RANDOM.integers(20_000, 200_000, count))
    uris = [f"s3://a-bucket/images/shard-{row * 8 // count:06d}.tar" for row in range(count)]
    etags = [f'"{row * 8 // count:032x}"' for row in range(count)]
    return {
        "uri": pa.array(uris),
        "offset": pa.array(offsets),
        "length": pa.array(RANDOM.integers(20_000, 200_000, count)),
        "row": pa.nulls(count, pa.int64()),
        "etag": pa.array(etags),
    }


def units_files(folder: str) -> Figures:
    """A units file: the cost of its footer for a reader of one unit."""
    counts, footers, reads = (100, 1_000, 4_000), [], []
    for count in counts:
        unit = pa.table({"id": np.arange(64)} | location(64))
        uri = f"{folder}/units-{count}.parquet"
        objects.put(uri, parquet.parquet_bytes(UNITS, (unit for _ in range(count))))
        with parquet.open_parquet(uri) as file:
            footers.append(file.metadata.serialized_size)
        reads.append(seconds_of(partial(parquet.read_parquet, uri, UNITS.names, [count // 2])))
    rows = pa.table({"id": RANDOM.integers(0, 10**9, 20_480)} | location(20_480))
    data = parquet.parquet_bytes(UNITS, (rows.slice(start, 256) for start in range(0, 20_480, 256)))
    footer = slope(counts, footers)
    return {
        "units_footer_bytes": figure(footer, "B/unit", f"slope of the footer over {counts} row groups"),
        "units_open_seconds": figure(slope(counts, reads), "s/unit of the file", "slope of reading one row group"),
        "units_row_bytes": figure((len(data) - 80 * footer) / 20_480, "B/image", "units of 256, without the footer"),
    }


def transformed_part(folder: str) -> Figures:
    """A part of `transformed/` as `lay_out_part` writes it: one row group per (wave, shard)."""
    found: Figures = {}
    count = PARTITION_ROWS
    rows = pa.table(
        {"id": np.arange(count), "wave": np.zeros(count, np.int32), "shard": np.zeros(count, np.int32)}
        | {"priority": vectors(count)[:, 0], "uncertainty": vectors(count)[:, 0]}
        | location(count)
        | {"label": pa.nulls(count, pa.string()), "group": pa.nulls(count, pa.string())}
        | {"vector": vectors_to_arrow(vectors(count))}
    )
    for name, groups in (("", WAVES * SHARDS), ("_of_160_groups", 160)):
        ends = np.linspace(0, count, groups + 1).astype(int)
        uri = f"{folder}/transformed{name}.parquet"
        slices = (rows.slice(start, end - start) for start, end in itertools.pairwise(ends))
        start = time.perf_counter()
        objects.put(uri, parquet.parquet_bytes(transformed_schema(DIM), slices))
        wrote = time.perf_counter() - start
        with parquet.open_parquet(uri) as file:
            footer = file.metadata.serialized_size
        size = objects.stat(uri).size_bytes
        cell = seconds_of(partial(parquet.read_parquet, uri, ["id", "uncertainty", "group", "vector"], [7]))
        how = f"{count} rows, {groups} row groups, {DIM}-d"
        found |= {
            f"transformed_row_bytes{name}": figure((size - footer) / count, "B/image", how + ", without the footer"),
            f"transformed_footer_bytes{name}": figure(footer, "B/part", how),
            f"transformed_cell_seconds{name}": figure(cell, "s/(part, wave, shard)", how + ", one row group read"),
            f"transformed_write_seconds{name}": figure(wrote, "s/part", how),
        }
    return found


def log_parts(folder: str) -> Figures:
    """Parts of the vector log: bytes, and the cost of each for a sealing task."""
    found: Figures = {}
    for images in (256, 2048):
        for shards in (8, SHARDS):
            log = VectorLog(f"{folder}/log-{images}-{shards}", f"{folder}/rejects", DIM, shards)
            ids = RANDOM.integers(0, 10**9, images)
            texts = pa.array([""] * images)
            etags = pa.array([f'"{row * 8 // images:032x}"' for row in range(images)])
            embedded = EmbeddedUnit(ids, vectors(images), etags, texts, texts)
            parts, start = 40, time.perf_counter()
            sizes = [vector_log.write_unit(log, Unit(1, unit, "", 0, images), embedded)[0] for unit in range(parts)]
            wrote = (time.perf_counter() - start) / parts
            read = seconds_of(partial(vector_log.read_wave, log, 1, range(3, 4))) / parts
            name, how = f"_{images}_{shards}", f"units of {images}, {shards} shards, {DIM}-d"
            found |= {
                f"log_row_bytes{name}": figure(sizes[0] / images, "B/image", how),
                f"log_write_seconds{name}": figure(wrote, "s/unit", how + ", to a local disk"),
                f"log_read_seconds{name}": figure(read, "s/(part, shard)", how + ", from a local disk"),
            }
    return found


def index_files() -> Figures:
    """Segments, sidecars and a commit."""
    count = 20_000
    data = train_codebook.train_codebook(
        vectors(8 * 4096), IndexSettings(factory=FACTORY), "l2", 10**9, device="cpu", seed=0
    )
    codebook = Codebook(data)
    codebooks.set_threads(1)
    ids, rows = np.arange(count, dtype=np.int64), vectors(count)
    one, two = (len(build_segment(codebook, ids[:size], rows[:size])) for size in (count // 2, count))
    seconds = seconds_of(lambda: build_segment(codebook, ids, rows), repeats=3)
    sidecar = segment_files.sidecar_bytes(
        RANDOM.permutation(10**7)[:count], np.full(count, "embedded"), rows[:, 0].copy(), pa.nulls(count, pa.string())
    )
    refs = tuple(
        SegmentRef(shard, wave, "transformed", f"index/segments/{wave * SHARDS + shard:064x}.faiss", "0" * 64,
                   6_250_000, 156_250, f"index/segments/{shard:064x}.parquet", "0" * 64)
        for wave in range(1, WAVES + 1) for shard in range(SHARDS)
    )  # fmt: skip
    commit = Commit(
        0, None, "index/codebook.faiss", "0" * 64, "l2", 16, DIM, WAVES, SHARDS, refs, SegmentCounts.of(refs)
    )
    text = documents.encode(commit)

    def read() -> None:
        check_commit(documents.parse(Commit, text, "commit", must_be_checked=True), "commit")

    return {
        "segment_vector_bytes": figure((two - one) / (count // 2), "B/vector", f"{FACTORY}, slope"),
        "segment_fixed_bytes": figure(2 * one - two, "B/segment", f"{FACTORY}, intercept: PQ tables and list sizes"),
        "segment_build_seconds": figure(seconds / count, "CPU s/vector", f"{FACTORY}, {count} vectors, one thread"),
        "sidecar_row_bytes": figure(len(sidecar) / count, "B/vector", f"{count} rows"),
        "commit_segment_bytes": figure(len(text) / len(refs), "B/segment", f"{len(refs)} segments"),
        "commit_write_seconds": figure(
            seconds_of(lambda: documents.encode(commit)), "s", f"JSON of {len(refs)} segments"
        ),
        "commit_read_seconds": figure(seconds_of(read), "s", f"JSON and checks of {len(refs)} segments"),
    }


def a_plan(units: int, unit_images: int = 256, waves: int = WAVES) -> Plan:
    sizes = plans.wave_sizes(waves, units * unit_images)
    cut = tuple(Wave(wave + 1, size, -(-size // unit_images)) for wave, size in enumerate(sizes))
    return Plan("uncertainty", 0, sum(sizes), 1, SHARDS, DIM, unit_images, cut, "")


def ack(wave: int, unit: int) -> UnitAck:
    return UnitAck(wave, unit, 256, 0, 150_000, 1.0, 0.3, 0.1, 256, 10**7, 10**7, 0, 0)


def driver() -> Figures:
    """The driver's memory per unit and time per acknowledgement, without Ray's own part."""
    from pipeline.embedding.stream import Work, _units_table

    units = 50_000
    plan = a_plan(units)
    log = plan.log(Run("/nowhere"))
    tracemalloc.start()
    tracker = Tracker(plan, log, 0.05)
    before = tracemalloc.get_traced_memory()[0]
    pending = tracker.pending(Run("s3://a-bucket/runs/a-run"))
    held = tracemalloc.get_traced_memory()[0] - before
    table = _units_table([Work(None, log, pending)])  # type: ignore[arg-type]  # the encoder is not looked at
    before = tracemalloc.get_traced_memory()[0]
    for unit in pending:
        tracker._done[unit.wave].add(unit.unit)
    done = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    found = {
        "driver_unit_bytes": figure(held / units, "B/unit", f"the list of {units} pending units"),
        "driver_done_bytes": figure(done / units, "B/unit", "the sets of units that are done"),
        "units_table_bytes": figure(table.nbytes / units, "B/unit", "the Arrow table that every node gets"),
    }
    windows, taken = (100, 1_000, 10_000, 40_000), []
    for window in windows:
        tracker = Tracker(plan, log, 0.05)
        acks = [ack(unit.wave, unit.unit) for unit in pending]
        for item in acks[:window]:
            tracker.add(item)
        start, repeats = time.perf_counter(), 200
        for item in acks[-repeats:]:
            telemetry.observe_unit(item)
            tracker.add(item)
            tracker.whole_waves()
            telemetry.observe_progress(tracker.progress(0))
        taken.append((time.perf_counter() - start) / repeats)
    found |= {
        f"driver_ack_seconds_window_{window}": figure(value, "s/ack", f"with {window} acks in the last minute")
        for window, value in zip(windows, taken, strict=True)
    }
    found["driver_ack_seconds_per_window"] = figure(slope(windows, taken), "s/ack/ack of the last minute", "slope")
    return found


def requests() -> Figures:
    """The number of S3 requests for the run's own files, without the images."""
    from tests.support.seaweed import SeaweedFS

    found: Figures = {}

    def count(name: str, unit: str, how: str, call: Callable[[], object]) -> None:
        call()  # opens connections
        before = objects.counts()
        call()
        spent = objects.counts() - before
        kinds = {key: number for key, number in sorted(spent.items()) if key.startswith("requests:")}
        text = ", ".join(f"{key.partition(':')[2]} {number}" for key, number in kinds.items())
        found[name] = figure(sum(kinds.values()) - kinds.get("requests:list", 0), unit, f"{how}: {text}")

    with tempfile.TemporaryDirectory() as folder, SeaweedFS(Path(folder)) as server:
        os.environ.update(server.environment())
        server.make_bucket("scaling")
        root = "s3://scaling"
        unit = pa.table({"id": np.arange(64)} | location(64))
        objects.put(f"{root}/units.parquet", parquet.parquet_bytes(UNITS, [unit] * plans.UNITS_PER_FILE))
        read = lambda: parquet.read_parquet(f"{root}/units.parquet", UNITS.names, [50])  # noqa: E731
        count("units_read_requests", "requests/unit", f"a unit of a file of {plans.UNITS_PER_FILE}", read)
        log = VectorLog(f"{root}/log", f"{root}/rejects", DIM, SHARDS)
        texts, numbers = pa.array([""] * 256), iter(range(2))

        def write() -> None:
            embedded = EmbeddedUnit(np.arange(256), vectors(256), texts, texts, texts)
            vector_log.write_unit(log, Unit(1, next(numbers), "", 0, 256), embedded)

        count("log_write_requests", "requests/unit", "a part of 256 images", write)
        objects.delete_files([log.part(1, 1)])
        read_shard = lambda: vector_log.read_wave(log, 1, range(3, 4))  # noqa: E731
        count(
            "log_read_requests", "requests/(part, shard)", "a part; the listing is once per wave and shard", read_shard
        )
        rows = pa.table(
            {
                "id": np.arange(PARTITION_ROWS),
                "wave": np.zeros(PARTITION_ROWS, np.int32),
                "shard": np.zeros(PARTITION_ROWS, np.int32),
            }
            | {"priority": vectors(PARTITION_ROWS)[:, 0], "uncertainty": vectors(PARTITION_ROWS)[:, 0]}
            | location(PARTITION_ROWS)
            | {name: pa.nulls(PARTITION_ROWS, pa.string()) for name in ("label", "group")}
            | {"vector": vectors_to_arrow(vectors(PARTITION_ROWS))}
        )
        slices = (rows.slice(start, 20) for start in range(0, 20 * WAVES * SHARDS, 20))
        objects.put(f"{root}/part.parquet", parquet.parquet_bytes(transformed_schema(DIM), slices))
        columns = ["id", "uncertainty", "group", "vector"]
        cell = lambda: parquet.read_parquet(f"{root}/part.parquet", columns, [7])  # noqa: E731
        count("transformed_cell_requests", "requests/(part, wave, shard)", "of a part of 6,400 row groups", cell)
        found["transformed_cell_s3_seconds"] = figure(
            seconds_of(cell), "s/(part, wave, shard)", "as above, from a server on this machine: no network in between"
        )
    return found


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def ray_costs() -> Figures:
    """The driver's CPU, and the wall time on this machine, per unit of the real stream with next to no work in it."""
    import ray
    import ray.data

    from jobs.shell.ray_session import start_ray
    from pipeline.config.load import load_config
    from pipeline.embedding.stream import StreamSettings, Work, embed_stream
    from tests.support.galleries import NEW_DIM, digits, write_config

    start_ray()
    counts, wall, cpu = (50, 250, 450), [], []
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(write_config(Path(folder)))
        image = Path(folder) / "one.png"
        image.write_bytes(digits(1)[0][0])
        nothing = pa.nulls(1, pa.int64())
        row = pa.table([[0], [str(image)], nothing, nothing, nothing, pa.nulls(1, pa.string())], schema=UNITS)
        for turn, count in enumerate((20, *counts)):  # the first one starts the processes
            uri = f"{folder}/units-{turn}.parquet"
            objects.put(uri, parquet.parquet_bytes(UNITS, [row] * count))
            log = VectorLog(f"{folder}/log-{turn}", f"{folder}/rejects", NEW_DIM, 2)
            work = Work(config.encoders.new, log, [Unit(1, number, uri, number, 1) for number in range(count)])
            start, used = time.perf_counter(), time.process_time()
            assert sum(1 for _ in embed_stream([work], StreamSettings.of(config))) == count
            wall.append(time.perf_counter() - start)
            cpu.append(time.process_time() - used)
    sizes, setup, memory = (200, 2_000, 8_000), [], []
    for size in sizes:
        held, start = resident(), time.perf_counter()
        stream = iter(ray.data.range(size, override_num_blocks=size).iter_batches(batch_size=None))
        next(stream)
        setup.append(time.perf_counter() - start)
        memory.append(resident() - held)
        del stream
    ray.shutdown()
    how = f"the stream over {counts} units of one image"
    return {
        "ray_driver_cpu_seconds": figure(slope(counts, cpu[1:]), "CPU s/unit", f"driver process, {how}"),
        "ray_wall_seconds": figure(slope(counts, wall[1:]), "s/unit", f"{how}, 2 CPUs in all"),
        "ray_start_seconds": figure(wall[1] - counts[0] * slope(counts, wall[1:]), "s", f"intercept, {how}"),
        "ray_block_setup_seconds": figure(
            slope(sizes, setup), "s/block", f"slope, to the first of {sizes} range blocks"
        ),
        "ray_block_memory_bytes": figure(slope(sizes, memory), "B/block", f"slope of the driver's RSS, {sizes} blocks"),
    }


def decoding() -> Figures:
    """The CPU of one decoded image of photograph size; without the fetch."""
    preprocess = PreprocessSettings(resize=256, center_crop=224)
    coarse = Image.fromarray(RANDOM.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize(
        (500, 375), Image.Resampling.BICUBIC
    )
    noisy = np.clip(np.asarray(coarse) + RANDOM.normal(0, 8, (375, 500, 3)), 0, 255).astype(np.uint8)
    sink = io.BytesIO()
    Image.fromarray(noisy).save(sink, "jpeg", quality=90)
    data, limits = sink.getvalue(), Limits(64_000_000, 2**26)
    images = 50
    seconds = seconds_of(
        lambda: [decode_image(data, preprocess, limits) for _ in range(images)], 9, clock=time.process_time
    )
    how = f"JPEG, 500x375, {len(data)} bytes, a made-up picture with noise; resize 256, crop 224; one thread"
    return {"decode_seconds": figure(seconds / images, "CPU s/image", how)}


def files() -> Figures:
    """Everything in Parquet."""
    with tempfile.TemporaryDirectory() as folder:
        return units_files(folder) | transformed_part(folder) | log_parts(folder)


def versions() -> dict[str, object]:
    import faiss
    import ray

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    return {
        "command": f"python -m benchmarks.scale.scaling {' '.join(sys.argv[1:])}".strip(),
        "commit": commit.stdout.strip(),
        "machine": f"{os.cpu_count()} CPUs, {platform.machine()}, load {os.getloadavg()[0]:.1f}",
        "versions": {"python": platform.python_version(), "pyarrow": pa.__version__, "numpy": np.__version__}
        | {"faiss": faiss.__version__, "ray": ray.__version__},
    }


MEASURES: dict[str, Callable[[], Figures]] = {
    "files": files,
    "index": index_files,
    "driver": driver,
    "decode": decoding,
    "requests": requests,  # starts an S3 server
    "ray": ray_costs,  # starts Ray
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, help="a file of such a document, whose other figures stay")
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=list(MEASURES))
    arguments = parser.parse_args()
    document = json.loads(arguments.into.read_text()) if arguments.into and arguments.into.exists() else {}
    figures = document.pop("figures", {})
    runs = document.pop("runs", [])  # each took figures; the last one that took a figure counts
    for name in arguments.only:
        figures |= MEASURES[name]()
    printed = json.dumps({"runs": [*runs, versions()], "figures": figures}, indent=1)
    if arguments.into:
        arguments.into.write_text(printed + "\n")
    else:
        print(printed)


if __name__ == "__main__":
    main()
