"""No drain between waves: the rate of a run with 20 waves over that of one wave, and how soon a wave is visible.

A whole backfill (`backfill.driver`) of CIFAR-100's training images, 50,000 as a gallery, on a local Ray; fit and plan
are made before. The rate is from the first durable unit to the last, without the first unit. The delay of a wave is
from the time of its last part in the vector log to the time of its commit, as files: a reader of that commit waits so
long. `prod` follows once the gate has judged the commit.

    python -m benchmarks.speed.waves --repeats 5
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import measure
from benchmarks.measure import Spread, ratio
from benchmarks.small_run import CONFIG, DATA
from pipeline.backfill.driver import backfill
from pipeline.config import tree
from pipeline.config.load import load_config
from pipeline.embedding import vector_log
from pipeline.index import tags
from pipeline.planning.plan import Plan
from pipeline.reporting.progress import Progress
from pipeline.run import Run
from pipeline.storage import objects, parquet

WAVES = (1, 20)
UNIT_IMAGES = 500  # in both: with units of 2,048 an actor that ends first would wait for a twentieth of the run


@dataclass(frozen=True, slots=True)
class Result:
    """One run: images per second, and each wave's delay in seconds."""

    rate: float
    delays: list[float]


def settings(folder: Path, waves: int, images: int) -> tree.Config:
    """CIFAR-100's own settings with its training images as the gallery, and a fit of one epoch."""
    gallery = folder / "gallery.parquet"
    if not gallery.exists():
        rows = parquet.read_parquet(str(DATA / "train.parquet")).slice(0, images)
        objects.put(str(gallery), parquet.parquet_bytes(rows.schema, [rows]))
    changes = {
        "run": folder / f"of-{waves}",
        "data_root": DATA,
        "gallery.manifest": gallery,
        "pairs.manifest": DATA / "test.parquet",
        "fit.transformation": "linear",
        "fit.warmup_epochs": 0,
        "plan.waves": waves,
        "plan.unit_images": UNIT_IMAGES,
        "device": "cpu",
    }
    found = tuple(f"{name}={value}" for name, value in changes.items())
    return load_config(str(CONFIG), found)


def prepare(chosen: tree.Config, like: tree.Config | None) -> tuple[Run, Plan]:
    """A run that has everything but its backfill; files that do not depend on the waves are copied."""
    from jobs.shell.command import console
    from jobs.shell.progress_bars import Bars
    from jobs.steps.prepare import RunSteps, open_run

    if like is not None:
        for name in ("pairs", "transformation", "gallery"):
            shutil.copytree(Path(like.run) / name, Path(chosen.run) / name)
    with Bars(console()) as bars:
        run = open_run(chosen, bars)
        steps = RunSteps(chosen, run, bars)
        steps.embed()
        steps.fit()
        return run, steps.plan()


def measure_run(chosen: tree.Config, run: Run, plan: Plan) -> Result:
    for name in ("embedded", "rejects", "index", "reports", "probe-set/neighbours", "probe-set/reference.json"):
        objects.delete(objects.join(run.uri, name))
    moments: list[tuple[float, int]] = []

    def note(progress: Progress) -> None:
        moments.append((time.perf_counter(), progress.durable))

    backfill(chosen, run, plan, note)
    done = [(moment, durable) for moment, durable in moments if durable]
    last = next(item for item in done if item[1] == done[-1][1])  # what follows is the end of publishing
    rate = (last[1] - done[0][1]) / (last[0] - done[0][0])
    parts: dict[int, float] = {}
    for (wave, _), seconds in vector_log.part_times(plan.log(run)).items():
        parts[wave] = max(parts.get(wave, 0.0), seconds)
    commits = {n: objects.stat(run.commit(n)).modified_seconds for n in tags.list_commits(run)}
    return Result(rate, [commits[wave] - parts[wave] for wave in sorted(parts)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--short", action="store_true", help="5,000 images, one repeat: whether it runs")
    given = parser.parse_args()
    images, repeats = (5_000, 1) if given.short else (given.images, given.repeats)
    from jobs.shell.ray_session import start_ray

    print(measure.header(), flush=True)
    start_ray()
    with tempfile.TemporaryDirectory() as folder:
        runs: dict[int, tuple[tree.Config, Run, Plan]] = {}
        for waves in WAVES:
            chosen = settings(Path(folder), waves, images)
            runs[waves] = (chosen, *prepare(chosen, runs[WAVES[0]][0] if runs else None))
        found: dict[int, list[Result]] = {waves: [] for waves in WAVES}

        def keep(waves: int) -> None:
            found[waves].append(measure_run(*runs[waves]))

        measure.interleave({str(waves): partial(keep, waves) for waves in WAVES}, repeats)
    print(f"\n{images:,} images\n")
    rows = []
    for waves, results in found.items():
        delays = sorted(delay for result in results for delay in result.delays)
        late = delays[min(len(delays) - 1, int(0.95 * len(delays)))]
        rate = Spread.of(result.rate for result in results)
        rows.append((waves, rate.text(".0f"), f"{statistics.median(delays):.2f}", f"{late:.2f}", f"{delays[-1]:.2f}"))
    print(measure.table(["waves", "images/s", "delay p50, s", "p95", "most"], rows))
    one, many = ([result.rate for result in found[waves]] for waves in WAVES)
    print(f"\nrate of {WAVES[1]} waves over {WAVES[0]}: {ratio(many, one).text()}")


if __name__ == "__main__":
    main()
