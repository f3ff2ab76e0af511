"""The plan, from scored parts to units: time, memory, cost per row, and Ray's own sort for comparison.

The priorities are made up: half of them are one of three values, the others are normal. So some cuts fall inside a
tie of a sixth of the gallery, in which the ids decide. Parts have 131,072 images, each an object of its own; 20
waves, 8 shards. Tasks of Ray write the scored parts before the clock starts; everything after is the code of a real
run.

    vectors "random"     nothing compresses: as large on disk as in memory
    vectors "repeated"   64 different ones per part, over and over: as large in memory, next to nothing on disk, for
                         galleries that the disk cannot hold twice

    plan         all steps after the scores: the exact cut points, over passes of the parts; lay out, all columns and
                 vectors, rewritten by (wave, shard); units, each wave in the order of its objects
    cut          its first step alone
    keys         Ray: read_parquet(id, priority), the tie-breaking hash as a column, Dataset.sort, materialize
    whole        Ray: read_parquet, the hash, Dataset.sort, write_parquet: all columns and vectors, in the plan's order

`whole` over `plan` is equal work, except for units and waves, which Ray's sort does not cut. `keys` over `cut` is not:
`cut` finds 19 thresholds, while Ray puts every key in its place, which the plan does not need.

Memory is that of all processes with Ray's own and its object store's pages, which stay once they were touched. If Ray's
sort ran before in the same process, our figure includes its pages.

    python -m benchmarks.speed.plan --short
    python -m benchmarks.speed.plan --rows 1000000
    python -m benchmarks.speed.plan --rows 10000000 --what plan
    python -m benchmarks.speed.plan --rows 10000000 --what cut keys
    python -m benchmarks.speed.plan --vectors repeated --rows 1000000 --what plan
    python -m benchmarks.speed.plan --vectors repeated --rows 100000000 --what plan --repeats 1 --warm-up 0 --folder DIR
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
import ray.data

from benchmarks.measure import Spread, header, interleave, memory, ratio, table
from jobs.shell.ray_session import start_ray
from pipeline.arrays import Float32, Int64, vectors_to_arrow
from pipeline.config.load import validate
from pipeline.config.tree import Config
from pipeline.hashing import splitmix64
from pipeline.planning import build
from pipeline.planning.plan import wave_sizes
from pipeline.run import Run
from pipeline.schema import transformed_schema
from pipeline.storage import objects, parquet

PART_ROWS = 131_072
DISTINCT = 64
SCORED = "scored"
WHAT = ("plan", "cut", "keys", "whole")
BESIDE = {"keys": "cut", "whole": "plan"}
SEED = 0


def settings(folder: str, dim: int) -> Config:
    """A config with the defaults of everything that the plan looks at."""
    columns = {"id": "id", "uri": "uri", "old_embedding": "old_embedding"}
    tree: dict[str, object] = {
        "run": f"{folder}/run",
        "seed": SEED,
        "encoders": {"new": {"function": "user:encoder", "dim": dim, "preprocess": {"size": 8}}},
        "gallery": {"manifest": f"{folder}/none", "columns": columns},
        "pairs": {"manifest": f"{folder}/none", "columns": columns},
    }
    return validate(tree, where="benchmark")


def make_parts(run: Run, num_rows: int, dim: int, vectors: str) -> list[int]:
    """Write the scored parts; images of each."""
    task = ray.remote(num_cpus=0.5)(make_part)
    firsts = range(0, num_rows, PART_ROWS)
    rows = [min(PART_ROWS, num_rows - first) for first in firsts]
    ray.get([task.remote(run, part, part * PART_ROWS, count, dim, vectors) for part, count in enumerate(rows)])
    return rows


def make_part(run: Run, part: int, first: int, count: int, dim: int, vectors: str) -> None:
    if objects.exists(run.part(SCORED, part)):
        return
    random = np.random.default_rng(part)
    rows = np.arange(first, first + count)
    priority = random.standard_normal(count, dtype=np.float32)
    tied = random.random(count) < 0.5
    priority[tied] = random.integers(-1, 2, int(tied.sum()))
    columns = {
        "id": splitmix64(rows, seed=1).astype(np.int64) & np.int64(2**62 - 1),
        "priority": priority,
        "uncertainty": priority,
        "uri": pa.array([f"s3://gallery/images/{row:010d}.jpg" for row in rows.tolist()]),
        "vector": vectors_to_arrow(make_vectors(random, count, dim, vectors)),
    }
    schema = pa.schema([field for field in transformed_schema(dim) if field.name not in ("wave", "shard")])
    nothing = {field.name: pa.nulls(count, field.type) for field in schema}
    rows_table = pa.table({**nothing, **columns}).select(schema.names)
    objects.put(run.part(SCORED, part), parquet.parquet_bytes(schema, [rows_table]))


def make_vectors(random: np.random.Generator, count: int, dim: int, vectors: str) -> Float32:
    if vectors == "random":
        return random.standard_normal((count, dim), dtype=np.float32)
    return np.resize(random.standard_normal((DISTINCT, dim), dtype=np.float32), (count, dim))


def plan(config: Config, run: Run, counts: list[int], steps: dict[str, list[float]]) -> None:
    """The plan from its scored parts; the seconds of each step are added to `steps`."""
    marks: list[tuple[str, float]] = []
    settings = build.LayoutSettings.of(config)
    build.arrange(run, SCORED, counts, settings, lambda step: marks.append((step, time.perf_counter())))
    ends = [*(mark for _, mark in marks[1:]), time.perf_counter()]
    for (step, start), end in zip(marks, ends, strict=True):
        steps.setdefault(f"plan: {step}", []).append(end - start)


def cut(config: Config, run: Run, counts: list[int]) -> None:
    ranks = np.cumsum(wave_sizes(config.plan.waves, sum(counts)))[:-1]
    build.find_cuts(ranks, lambda search: build.count_parts(run, SCORED, len(counts), search.levels, SEED))


def with_hash(batch: pa.Table) -> pa.Table:
    ids: Int64 = batch["id"].to_numpy()
    hashes = (splitmix64(ids, SEED) ^ np.uint64(1 << 63)).view(np.int64)  # as signed numbers, in the same order
    return batch.append_column("hash", pa.array(hashes))


def ray_sort(run: Run, columns: list[str] | None, to: Path | None) -> None:
    """The same with Ray Data alone."""
    rows = ray.data.read_parquet(run.path(SCORED))
    chosen = rows.select_columns(columns) if columns else rows
    ordered = chosen.map_batches(with_hash, batch_format="pyarrow", batch_size=None).sort(
        ["priority", "hash"], descending=[True, False]
    )
    if to is None:
        ordered.materialize()
    else:
        shutil.rmtree(to, ignore_errors=True)
        ordered.write_parquet(str(to))


class Watched:
    """Calls something, and keeps the most memory that any call took, in bytes."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call, self.peak = call, 0

    def __call__(self) -> None:
        with memory() as used:
            self._call()
        self.peak = max(self.peak, used.peak)


def measure(folder: str, num_rows: int, arguments: argparse.Namespace) -> list[list[str]]:
    """The lines of one size."""
    config = settings(folder, arguments.dim)
    run = Run(config.run)
    counts = make_parts(run, num_rows, arguments.dim, arguments.vectors)
    steps: dict[str, list[float]] = {}
    calls: dict[str, Callable[[], object]] = {
        "plan": functools.partial(plan, config, run, counts, steps),
        "cut": functools.partial(cut, config, run, counts),
        "keys": functools.partial(ray_sort, run, ["id", "priority"], None),
        "whole": functools.partial(ray_sort, run, None, Path(folder) / "sorted"),
    }
    watched = {name: Watched(calls[name]) for name in arguments.what}
    seconds = interleave(watched, arguments.repeats, arguments.warm_up)
    seconds |= {step: taken[arguments.warm_up :] for step, taken in steps.items()}
    lines = []
    for name in sorted(seconds, key=lambda name: (WHAT.index(name.partition(":")[0]), ":" in name)):
        beside = BESIDE.get(name)
        times = f"{ratio(seconds[name], seconds[beside]).text('.1f')} x {beside}" if beside in seconds else ""
        peak = f"{watched[name].peak / 2**20:,.0f}" if name in watched else ""
        micros = Spread.of(value / num_rows * 1e6 for value in seconds[name])
        lines.append([f"{num_rows:,}", name, Spread.of(seconds[name]).text(), micros.text(), peak, times])
    return lines


def main() -> None:
    arguments = parse()
    print(
        f"{header()}\n\n{arguments.dim}-d float32 vectors, {arguments.vectors}; {arguments.repeats} repeat(s), ", end=""
    )
    print(f"{arguments.warm_up} warm-up; {disk_free_gb():.0f} GB of disk free.\n", flush=True)
    start_ray()
    lines: list[list[str]] = []
    for num_rows in arguments.rows:
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
            lines += measure(arguments.folder or folder, num_rows, arguments)
    print(table(("rows", "what", "seconds", "microseconds per row", "MiB at most", "times ours"), lines))
    print(f"Load average at the end {os.getloadavg()[0]:.1f}.")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--vectors", choices=("random", "repeated"), default="random")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--what", nargs="+", choices=WHAT, default=WHAT)
    parser.add_argument("--folder", help="where the scored parts lie, or are written and stay; for one size")
    parser.add_argument("--short", action="store_true", help="a minute or two: a quarter of a million rows")
    arguments = parser.parse_args()
    if arguments.short:
        arguments.rows, arguments.repeats, arguments.what = [250_000], 3, WHAT
    return arguments


def disk_free_gb() -> float:
    return shutil.disk_usage(os.environ.get("TMPDIR", "/tmp")).free / 1e9


if __name__ == "__main__":
    main()
