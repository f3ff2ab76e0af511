"""Is the simulation right? A real backfill on this machine, predicted from two smaller ones.

Two backfills of the CIFAR-100 test images, with small and with large units, give the start and the seconds of each
stage per image and per unit (the sums of `fastfill_stage_seconds`). From these alone `benchmarks.scale.simulation`
predicts a backfill of other images (the training set), units and waves, which is then run. Everything is real
(images, encoder, Ray, log, segments, commits) except the transformed vectors, which are noise, so that no fit is
needed.

    python -m benchmarks.scale.simulation_check --repeats 3
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray

from benchmarks.measure import header
from benchmarks.scale.scenario import Cluster, Job, Seconds
from benchmarks.scale.simulation import Simulation
from benchmarks.small_run import CONFIG, DATA
from jobs.shell.ray_session import start_ray
from pipeline.arrays import vectors_to_arrow
from pipeline.backfill.driver import backfill
from pipeline.config.load import load_config
from pipeline.config.tree import Config
from pipeline.embedding.actor_pool import LOAD_CPUS, actor_pool
from pipeline.models.transformation import TransformationInfo, save_transformation
from pipeline.planning import build
from pipeline.planning.plan import Plan, wave_sizes
from pipeline.reporting import telemetry
from pipeline.reporting.progress import Progress
from pipeline.run import Run
from pipeline.schema import transformed_schema
from pipeline.storage import objects, parquet

STAGES = ("load", "embed", "write", "seal", "publish")
SCORED = "scored/benchmark"


@dataclass(frozen=True, slots=True)
class Measured:
    """A real backfill: seconds to the last durable unit and to the last commit, and per stage the sum of all units."""

    job: Job
    units: int
    seconds: float
    published_seconds: float
    first_seconds: float
    stages: dict[str, float]


def make_run(folder: str, images: Path, job: Job) -> tuple[Config, Run, Plan]:
    """A run that is ready for `backfill`: planned by the planner's own tasks, over vectors of noise."""
    overrides = (
        f"run={folder}/run", f"data_root={DATA}", f"plan.unit_images={job.unit_images}", f"plan.waves={job.waves}",
        f"index.shards={job.shards}", "publish.promote=manual", "device=cpu",
    )  # fmt: skip
    config = load_config(str(CONFIG), overrides)
    run, random, dim = Run(config.run), np.random.default_rng(0), config.encoders.new.dim
    noise = random.standard_normal((job.images, dim), dtype=np.float32)
    columns = {
        "id": np.arange(job.images),
        "priority": noise[:, 0],
        "uncertainty": noise[:, 0],
        "uri": pa.repeat(f"{images}#image", job.images),
        "row": np.arange(job.images),
        "vector": vectors_to_arrow(noise),
    }
    schema = pa.schema([field for field in transformed_schema(dim) if field.name not in ("wave", "shard")])
    rows = pa.table({field.name: columns.get(field.name, pa.nulls(job.images, field.type)) for field in schema})
    objects.put(run.part(SCORED, 0), parquet.parquet_bytes(schema, [rows]))
    pairs = pa.table({"new": vectors_to_arrow(noise[:1_000])})
    objects.put(run.path("pairs", "train", "part-00000.parquet"), parquet.parquet_bytes(pairs.schema, [pairs]))
    old_dim = config.encoders.old.dim if config.encoders.old is not None else dim
    info = TransformationInfo(
        old_dim, dim, None, 8, False, config.fit.loss, config.seed, 0, 0, 0, better_than_old=False
    )
    save_transformation(run, info.network(), info)  # untrained: it is there, and nothing is transformed by it
    waves, _ = build.arrange(run, SCORED, [job.images], build.LayoutSettings.of(config))
    plan = Plan(
        config.plan.policy, config.seed, job.images, 1, job.shards, dim, job.unit_images, tuple(waves), "benchmark"
    )
    return config, run, plan


def cluster(config: Config, start_seconds: float) -> Cluster:
    """This machine as Ray has it: the actors that fit, and load tasks in what is left of the CPUs."""
    pool, cpus = actor_pool(config.backfill, "cpu"), int(ray.cluster_resources()["CPU"])
    slots = int((cpus - pool.first * pool.cpus) // LOAD_CPUS)
    return Cluster(1, actors=pool.first, cores=cpus, load_slots=slots, start_seconds=start_seconds)


def measure(images: Path, job: Job) -> Measured:
    """Run a backfill; its log is checked to be whole."""
    with tempfile.TemporaryDirectory() as folder:
        config, run, plan = make_run(folder, images, job)
        print(f"{job}: planned", file=sys.stderr, flush=True)
        before = {stage: _sum(stage) for stage in STAGES}
        moments: list[tuple[float, int]] = []
        start = time.perf_counter()

        def note(progress: Progress) -> None:
            moments.append((time.perf_counter() - start, progress.durable))

        end = backfill(config, run, plan, note)
        published = time.perf_counter() - start
        print(f"{job}: {published:.1f} s", file=sys.stderr, flush=True)
        if end.durable != job.images or end.published != job.images:
            raise RuntimeError(f"the backfill is not whole: {end}")
        embedding = [(seconds, durable) for seconds, durable in moments if durable]
        return Measured(
            job=job,
            units=sum(wave.units for wave in plan.waves),
            seconds=next(seconds for seconds, durable in embedding if durable == job.images),
            published_seconds=published,
            first_seconds=embedding[0][0],
            stages={stage: _sum(stage) - before[stage] for stage in STAGES},
        )


def _sum(stage: str) -> float:
    return telemetry.REGISTRY.get_sample_value("fastfill_stage_seconds_sum", {"stage": stage}) or 0.0


def fitted(small: Measured, large: Measured) -> tuple[Seconds, float]:
    """Seconds per image and per unit by the two sizes of units, and those before the first unit is asked for."""

    def split(stage: str) -> tuple[float, float]:
        matrix = np.array([[run.job.images, run.units] for run in (small, large)])
        per_image, per_unit = np.linalg.solve(matrix, [run.stages[stage] for run in (small, large)])
        if per_unit < 0:  # within the scatter: then all of it is the images'
            per_image, per_unit = sum(run.stages[stage] for run in (small, large)) / matrix[:, 0].sum(), 0.0
        return float(per_image), float(per_unit)

    load, embed = split("load"), split("embed")
    waves = sum(len(wave_sizes(run.job.waves, run.job.images)) + 1 for run in (small, large))
    write = sum(run.stages["write"] for run in (small, large)) / (small.units + large.units)
    starts = [
        run.first_seconds - (load[0] + embed[0]) * run.job.unit_images - load[1] - embed[1] - write
        for run in (small, large)
    ]
    seal = sum(run.stages["seal"] + run.stages["publish"] for run in (small, large)) / waves
    seconds = Seconds(load[0], embed[0], load_unit=load[1], embed_unit=embed[1], write_unit=write, seal=seal)
    return seconds, float(np.mean(starts))


def main() -> None:
    """Print a line per repeat."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=20_000, help="images of the training set in the predicted run")
    arguments = parser.parse_args()
    start_ray()
    train, test = DATA / "train.parquet", DATA / "test.parquet"
    print(f"{header()}\n", flush=True)
    print("| repeat | foretold, s | real, s | foretold / real | published: foretold | real | load, embed ms/image |")
    print("|---|---|---|---|---|---|---|")
    for repeat in range(arguments.repeats):
        small = measure(test, Job(10_000, 250, waves=4, shards=4))
        large = measure(test, Job(10_000, 1_000, waves=4, shards=4))
        seconds, start = fitted(small, large)
        job = Job(arguments.images, 500, waves=10, shards=4)
        told = Simulation(job, cluster(load_config(str(CONFIG), (f"data_root={DATA}",)), start), seconds).run()
        real = measure(train, job)
        text = f"{1000 * seconds.load_image:.3f}, {1000 * seconds.embed_image:.3f}"
        print(
            f"| {repeat} | {told.seconds:.1f} | {real.seconds:.1f} | {told.seconds / real.seconds:.3f} "
            f"| {told.published_seconds:.1f} | {real.published_seconds:.1f} | {text} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
