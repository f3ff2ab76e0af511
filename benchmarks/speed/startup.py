"""How long a user waits: for `--help`, for `status`, and from `backfill` to the first embedded image.

Whole processes are timed from their start, beside the time that Python alone takes.

    python -m benchmarks.speed.startup [--short] [--repeats 7] [--data FOLDER]

`status` looks at a finished run on a part of CIFAR-100, which is made first, or at the run of `--run`. For the first
image, a new run on the same part is started, and stopped when the first unit of embeddings is durable. The time
includes imports, Ray, both manifests checked and copied, the encoder loaded by an actor, and a unit of images read,
decoded, embedded and written.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import Spread, header, interleave, table
from benchmarks.small_run import FIRST_IMAGE, Job, command, data_folder, part_of_cifar, timed

TARGETS = {"fastfill --help": 0.5, "fastfill status": 2.0, "first image embedded": 20.0}


def commands(finished: Job, repeats: int) -> dict[str, list[float]]:
    """Seconds of each repeat of the commands that need no Ray."""
    return interleave(
        {
            "python -c pass": timed([sys.executable, "-c", "pass"]),
            "fastfill --help": timed(command("--help")),
            "python -c 'import pyarrow.parquet'": timed([sys.executable, "-c", "import pyarrow.parquet"]),
            "fastfill status": timed(command("status", *finished.options)),
            "fastfill status --json": timed(command("status", *finished.options, "--json")),
        },
        repeats,
        warm_up=1,
    )


def first_images(folder: Path, data: Path, settings: tuple[str, ...], starts: int) -> dict[str, list[float]]:
    """Seconds to the first embedded image of `starts` new runs, and of Ray alone."""
    ray = "import ray; ray.init(address='local', num_cpus=2, include_dashboard=False, log_to_driver=False)"
    found: dict[str, list[float]] = {"python -c 'import ray; ray.init()'": [], "first image embedded": []}
    for number in range(starts):
        found["python -c 'import ray; ray.init()'"] += interleave({"": timed([sys.executable, "-c", ray])}, 1)[""]
        job = Job(folder / f"start-{number}", data, settings)
        found["first image embedded"].append(job.backfill(until=FIRST_IMAGE)["first unit embedded"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="5 repeats, no start of Ray: first_benefit has one")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--starts", type=int, help="of Ray: 5, or none with --short")
    parser.add_argument("--run", type=Path, help="a finished run of the example config")
    parser.add_argument("--data", help="the folder of CIFAR-100")
    arguments = parser.parse_args()
    data = data_folder(arguments.data)
    print(header(["pillow", "click"]), "Seconds: median (lowest - highest).\n", flush=True)
    repeats = 5 if arguments.short else arguments.repeats
    starts = arguments.starts if arguments.starts is not None else 0 if arguments.short else 5
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = part_of_cifar(folder / "data", data, num_gallery=2000, num_pairs=2000 if arguments.short else 5000)
        finished = Job(arguments.run or folder / "finished", data, settings)
        if arguments.run is None:
            whole = finished.backfill()["report written, command ended"]
            print(f"The run that `status` looks at (2,000 images, 20 waves) took {whole:.0f} s.\n", flush=True)
        found = commands(finished, repeats) | first_images(folder, data, settings, starts)
    rows = [
        [name, Spread.of(seconds).text(), TARGETS.get(name, ""), len(seconds)]
        for name, seconds in found.items()
        if seconds
    ]
    print(table(["waiting for", "seconds", "target, below", "repeats"], rows))


if __name__ == "__main__":
    main()
