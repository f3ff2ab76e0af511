"""The index in segments against one FAISS index: building, searching, bytes written, moving to the next snapshot.

The run is real except its embeddings: clusters with noise as transformed and, with other noise, as embedded. The
planner lays them out in 20 waves and 8 shards. The publisher trains the codebook, seals and commits all 21 snapshots
from the plan and the vector log, over Ray. FAISS has one thread in this process unless a row says otherwise.

    seal      segments, in memory       all 160 built from arrays and serialised; over one add_with_ids, one thread
              sealed, from and to disk  `Sealer.transformed`: tasks of Ray on all CPUs read the plan's parts, build,
                                        hash and write segments and sidecars; over one add_with_ids from memory with as
                                        many threads, alone and with the write_index that makes it a file
    search    the snapshot with half of the waves embedded: `Searcher.search` with its defaults, and with the segments
              as mapped files, over `search` of one index with the same vectors, codebook and nprobe. The run has a
              calibration that changes no distance, so that the answers are those of one index
    bytes     all that the 20 waves added under index/, over the shards as 8 files, rewritten 20 times
    move      `Searcher.refresh` after `prod` has moved by one commit: open and check 8 segments, gather 160

    python -m benchmarks.speed.index --short
    python -m benchmarks.speed.index --what seal
    python -m benchmarks.speed.index --what search bytes move
"""

from __future__ import annotations

import argparse
import functools
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import faiss
import numpy as np
import pyarrow as pa

from benchmarks.measure import Spread, header, interleave, memory, ratio, table
from jobs.shell.ray_session import start_ray
from pipeline.arrays import Float32, Int64, vectors_from_arrow, vectors_to_arrow
from pipeline.backfill.driver import open_publisher
from pipeline.config.load import validate
from pipeline.config.tree import Config
from pipeline.embedding import vector_log
from pipeline.embedding.vector_log import EmbeddedUnit
from pipeline.hashing import shard_of
from pipeline.index import commits, tags
from pipeline.index.codebook import set_threads
from pipeline.index.seal import Sealer
from pipeline.index.segment import build_segment
from pipeline.models import calibration
from pipeline.models.calibration import Calibration
from pipeline.models.transformation import TransformationInfo, save_transformation
from pipeline.planning import build
from pipeline.planning.plan import Plan, read_transformed
from pipeline.run import Run
from pipeline.schema import transformed_schema
from pipeline.serving.searcher import Searcher
from pipeline.storage import objects, parquet

PART_ROWS = 131_072
CLUSTERS = 5000
K = 10
IDENTITY = Calibration((0.0, 1.0), (0.0, 1.0))
WHAT = ("seal", "search", "bytes", "move")


@dataclass(frozen=True)
class Gallery:
    """Row i is the image with id i.

    Attributes:
        transformed: (N, d) float32.
        embedded: (N, d) float32.
        queries: (Q, d) float32.
    """

    transformed: Float32
    embedded: Float32
    queries: Float32

    @classmethod
    def make(cls, num: int, dim: int) -> Gallery:
        random = np.random.default_rng(0)
        centres = random.standard_normal((CLUSTERS, dim), dtype=np.float32)
        embedded = centres[random.integers(0, CLUSTERS, num)]
        embedded += random.standard_normal((num, dim), dtype=np.float32) * np.float32(0.5)
        transformed = embedded + random.standard_normal((num, dim), dtype=np.float32) * np.float32(0.3)
        queries = embedded[random.choice(num, 2000)] + np.float32(0.05)
        return cls(transformed, embedded, queries)


def settings(folder: str, dim: int, lists: int) -> Config:
    columns = {"id": "id", "uri": "uri", "old_embedding": "old_embedding"}
    tree: dict[str, object] = {
        "run": f"{folder}/run",
        "device": "cpu",
        "encoders": {"new": {"function": "user:encoder", "dim": dim, "preprocess": {"size": 8}}},
        "gallery": {"manifest": f"{folder}/none", "columns": columns},
        "pairs": {"manifest": f"{folder}/none", "columns": columns},
        "index": {"factory": f"IVF{lists},Flat", "train_vectors": 10 * lists},
        "publish": {"promote": "manual"},
    }
    return validate(tree, where="benchmark")


def make_plan(config: Config, run: Run, gallery: Gallery) -> Plan:
    """Lay the gallery out by random priorities, and write the codebook's training vectors; h is never applied."""
    num, dim = gallery.transformed.shape
    counts = []
    schema = pa.schema([field for field in transformed_schema(dim) if field.name not in ("wave", "shard")])
    for part, first in enumerate(range(0, num, PART_ROWS)):
        ids = np.arange(first, min(first + PART_ROWS, num))
        priority = np.random.default_rng(part).standard_normal(len(ids), dtype=np.float32)
        columns = {"id": ids, "priority": priority, "uncertainty": priority}
        columns |= {"uri": pa.array([f"s3://gallery/{row // 1000}.tar" for row in ids.tolist()])}
        columns |= {"vector": vectors_to_arrow(gallery.transformed[ids])}
        nothing = {field.name: pa.nulls(len(ids), field.type) for field in schema}
        rows = pa.table({**nothing, **columns}).select(schema.names)
        objects.put(run.part("scored", part), parquet.parquet_bytes(schema, [rows]))
        counts.append(len(ids))
    waves, _ = build.arrange(run, "scored", counts, build.LayoutSettings.of(config))
    pairs = pa.table({"new": vectors_to_arrow(gallery.embedded[: config.index.train_vectors])})
    objects.put(run.path("pairs", "train", "part-00000.parquet"), parquet.parquet_bytes(pairs.schema, [pairs]))
    info = TransformationInfo(dim, dim, None, 8, False, "alignment", 0, 1, len(pairs), 0, better_than_old=True)
    save_transformation(run, info.network(), info, {calibration.PART: IDENTITY.to_bytes()})
    shards = config.index.shards
    return Plan("uncertainty", 0, num, len(counts), shards, dim, waves[0].images, tuple(waves), "benchmark")


def write_log(run: Run, plan: Plan, gallery: Gallery) -> None:
    """Embed all units: one part each."""
    for unit in plan.units(run):
        ids: Int64 = parquet.read_parquet(unit.rows_uri, ["id"], [unit.row_group])["id"].to_numpy()
        no_text = pa.array([""] * len(ids))
        embedded = EmbeddedUnit(ids, gallery.embedded[ids], pa.nulls(len(ids), pa.string()), no_text, no_text)
        vector_log.write_unit(plan.log(run), unit, embedded)


def wave_of(run: Run, plan: Plan) -> Int64:
    """The wave of each id."""
    waves = np.zeros(plan.num_gallery, dtype=np.int64)
    for wave in plan.waves:
        waves[read_transformed(run, plan, wave.wave, ["id"])["id"].to_numpy()] = wave.wave
    return waves


def one_index(run: Run, codebook_path: str, ids: Int64, vectors: Float32) -> faiss.Index:
    """FAISS alone on the same codebook and vectors."""
    data = np.frombuffer(objects.read_bytes(run.path(codebook_path)), dtype=np.uint8)
    index = faiss.deserialize_index(data)
    index.add_with_ids(vectors, ids)
    return index


def with_threads(number: int, call: Callable[[], object]) -> None:
    set_threads(number)
    try:
        call()
    finally:
        set_threads(1)


def measure_seal(run: Run, plan: Plan, sealer: Sealer, repeats: int) -> str:
    """Every repeat writes every file anew."""
    cells = [(wave.wave, shard) for wave in plan.waves for shard in range(plan.num_shards)]
    rows = []
    for wave, shard in cells:
        found = read_transformed(run, plan, wave, ["id", "vector"], range(shard, shard + 1))
        rows.append((found["id"].to_numpy(), vectors_from_arrow(found["vector"])))
    ids, vectors = np.concatenate([item[0] for item in rows]), np.concatenate([item[1] for item in rows])
    codebook, cpus = sealer.codebook(), os.cpu_count() or 1
    add = functools.partial(one_index, run, sealer.codebook_path, ids, vectors)
    path = run.path("one.faiss")

    def seal() -> None:
        objects.delete(run.path("index", "segments"))
        sealer.transformed([wave.wave for wave in plan.waves])

    plain, plain_all, file_all = (
        "one add_with_ids",
        f"the same, {cpus} threads",
        f"the same, {cpus} threads, write_index",
    )
    in_memory, sealed = "segments, in memory", f"sealed, from and to disk, {cpus} CPUs"
    candidates: dict[str, Callable[[], object]] = {
        plain: add,
        in_memory: lambda: [build_segment(codebook, *item) for item in rows],
        plain_all: lambda: with_threads(cpus, add),
        file_all: lambda: with_threads(cpus, lambda: faiss.write_index(add(), path)),
        sealed: seal,
    }
    seconds = interleave(candidates, repeats)
    beside = {in_memory: [plain], sealed: [plain_all, file_all]}
    lines = []
    for name, taken in seconds.items():
        rates = [ratio(seconds[other], taken).text() + f" of '{other}'" for other in beside.get(name, [])]
        lines.append([name, Spread.of(taken).text(), f"{len(ids) / Spread.of(taken).median:,.0f}", ", ".join(rates)])
    return table(("seal", "seconds", "vectors/s", "its rate"), lines)


def measure_search(run: Run, plan: Plan, gallery: Gallery, repeats: int) -> str:
    number = len(plan.waves) // 2
    new = wave_of(run, plan) <= number
    vectors = np.where(new[:, None], gallery.embedded, gallery.transformed)
    ids = np.arange(len(vectors))
    with (
        Searcher(run.uri, commit=number) as searcher,
        Searcher(run.uri, commit=number, in_memory=False) as mapped,
    ):
        commit = searcher.commit
        one = one_index(run, commit.codebook_path, ids, vectors)
        faiss.extract_index_ivf(one).nprobe = commit.nprobe
        queries = gallery.queries
        expected, found = one.search(queries, K), searcher.search(queries, K)
        same = int((expected[1] == found.ids).all(axis=1).sum())
        mapped_found = mapped.search(queries, K)
        assert (mapped_found.ids == found.ids).all()
        assert (mapped_found.distances == found.distances).all()
        ways: dict[str, Callable[[Float32], object]] = {
            "one index": lambda some: one.search(some, K),
            "snapshot": lambda some: searcher.search(some, K),
            "snapshot, mapped files": lambda some: mapped.search(some, K),
        }
        lines = []
        for batch, calls in ((1, 200), (100, 10)):
            candidates = {name: functools.partial(ask, way, queries, batch, calls) for name, way in ways.items()}
            seconds = interleave(candidates, repeats, warm_up=1)
            for name, taken in seconds.items():
                latency = Spread.of(1000 * value / calls for value in taken)
                times = ratio(taken, seconds["one index"]).text()
                lines.append([f"{batch}", name, latency.text(".3f"), times])
    head = table(("queries at once", "search", "ms per call", "times one index"), lines)
    farthest = float(np.abs(expected[0] - found.distances).max())
    return (
        f"{head}\n\nnprobe {commit.nprobe}, k {K}, {len(commit.segments)} segments. Equal ids for {same} of "
        f"{len(queries)} queries, and equal with mapped files for all; distances differ by at most {farthest:.1e}."
    )


def ask(way: Callable[[Float32], object], queries: Float32, batch: int, calls: int) -> None:
    for call in range(calls):
        start = call * batch % (len(queries) - batch)
        way(queries[start : start + batch])


def measure_bytes(run: Run, plan: Plan, gallery: Gallery, before: int) -> str:
    """Against the shards with all embedded vectors, written once and counted 20 times."""
    added = index_bytes(run) - before
    codebook = commits.read_commit(run, 0).codebook_path
    ids = np.arange(plan.num_gallery)
    shards, rewritten = shard_of(ids, plan.num_shards), 0
    for shard in range(plan.num_shards):
        some = ids[shards == shard]
        rewritten += len(faiss.serialize_index(one_index(run, codebook, some, gallery.embedded[some])))
    waves = len(plan.waves)
    lines = [
        ["by the waves", f"{added / 1e6:,.1f}", f"{waves * rewritten / 1e6:,.1f}", f"{added / waves / rewritten:.4f}"],
        [
            "and by snapshot 0",
            f"{(added + before) / 1e6:,.1f}",
            f"{(waves + 1) * rewritten / 1e6:,.1f}",
            f"{(added + before) / (waves + 1) / rewritten:.4f}",
        ],
    ]
    return table(("bytes written", "MB", f"MB, {plan.num_shards} shards each time", "share"), lines)


def index_bytes(run: Run) -> int:
    """All files under index/: segments, sidecars, commits, tags, the codebook."""
    return sum(stat.size_bytes for _, stat in objects.list_stats(run.path("index")))


def measure_move(run: Run, plan: Plan) -> str:
    tags.promote(run, 0, blockers=[])
    lines = []
    seconds: dict[str, list[float]] = {"default": [], "mapped files": []}
    with memory() as used, Searcher(run.uri) as searcher, Searcher(run.uri, in_memory=False) as mapped:
        for number in range(1, len(plan.waves) + 1):
            tags.promote(run, number, blockers=[])
            for name, reader in (("default", searcher), ("mapped files", mapped)):
                start = time.perf_counter()
                assert reader.refresh()
                seconds[name].append(time.perf_counter() - start)
    for name, taken in seconds.items():
        lines.append([name, Spread.of(taken).text(".3f"), f"{np.percentile(taken, 95):.3f}"])
    head = table(("move to the next snapshot", "seconds", "p95"), lines)
    return f"{head}\n\n{used.peak / 2**20:,.0f} MiB at most."


def main() -> None:
    arguments = parse()
    num, dim, lists = arguments.rows, arguments.dim, arguments.lists
    print(
        f"{header()}\n\n{num:,} vectors of {dim} float32, IVF{lists},Flat; {arguments.repeats} repeats.\n", flush=True
    )
    start_ray()
    set_threads(1)
    gallery = Gallery.make(num, dim)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        config = settings(folder, dim, lists)
        run = Run(config.run)
        plan = make_plan(config, run, gallery)
        publisher = open_publisher(config, run, plan)
        publisher.initial_commit()
        commit = commits.read_commit(run, 0)
        before = index_bytes(run)
        if "seal" in arguments.what:
            sealer = Sealer(run, plan, commit.codebook_path, commit.codebook_sha256)
            print(measure_seal(run, plan, sealer, arguments.repeats), flush=True)
        if set(arguments.what) - {"seal"}:
            write_log(run, plan, gallery)
            for wave in plan.waves:
                publisher.submit(wave.wave).result()
        if "search" in arguments.what:
            print(f"\n{measure_search(run, plan, gallery, arguments.repeats)}", flush=True)
        if "bytes" in arguments.what:
            print(f"\n{measure_bytes(run, plan, gallery, before)}", flush=True)
        if "move" in arguments.what:
            print(f"\n{measure_move(run, plan)}", flush=True)
    print(f"\nLoad average at the end {os.getloadavg()[0]:.1f}.")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--lists", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--what", nargs="+", choices=WHAT, default=WHAT)
    parser.add_argument("--short", action="store_true", help="a minute or two: 200,000 vectors in 1,024 lists")
    arguments = parser.parse_args()
    if arguments.short:
        arguments.rows, arguments.lists = 200_000, 1024
    return arguments


if __name__ == "__main__":
    main()
