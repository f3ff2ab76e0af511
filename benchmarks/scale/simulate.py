"""The simulated backfill on 16 to 1,024 GPUs: rate against GPUs, lost work against the loss of nodes.

`benchmarks.scale.simulation` is the model. `rates.json` says for each of its figures whether it was measured here (and
where), documented by others, or assumed. No GPU was measured: its rate is a parameter of 1,000. Writes two plots and a
page of results; the short form takes a minute.

    python -m benchmarks.scale.simulate --short
    python -m benchmarks.scale.simulate --only rates --results benchmarks/results/DATE-simulation-rates.md --plots docs
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.scale.scenario import Cluster, Faults, Job, Outcome, Seconds
from benchmarks.scale.simulation import Simulation
from pipeline.embedding.actor_pool import LOAD_CPUS
from pipeline.manifest.normalised import PARTITION_ROWS
from pipeline.planning.plan import UNITS_PER_FILE
from pipeline.storage.objects import PARALLEL_READS
from pipeline.storage.settings import FetchSettings

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
GPUS = (16, 32, 64, 128, 256, 512, 1024)
GPUS_PER_NODE = 8
CONCURRENCY = FetchSettings().concurrency
TABLES = ("rates", "losses", "whole")
GALLERY = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Scenario:
    """One point: everything that the plots vary.

    Attributes:
        gpu_rate: images per second of one GPU.
        prefixes: of the images; inf is a store without a limit.
        requests_image: 1 for an object per image; less for tars.
        seconds, units: so many images as would keep the GPUs busy for so long, at most so many units, without
            sealing; or
        whole: all images of the gallery, with sealing.
        today: with what grows with the number of parts, as the code is; else each cell is read once.
    """

    gpus: int
    gpu_rate: float = 1_000.0
    unit_images: int = 2_048
    waves: int = 100
    prefixes: float = math.inf
    requests_image: float = 1.0
    losses: float = 0.0
    replace_seconds: float | None = None
    slow_share: float = 0.0
    slow_factor: float = 1.0
    sigma: float | None = None
    seconds: float = 1_200.0
    units: int = 120_000
    whole: bool = False
    today: bool = True

    @property
    def images(self) -> int:
        """That are simulated."""
        most = self.units * self.unit_images
        return GALLERY if self.whole else min(most, int(self.gpus * self.gpu_rate * self.seconds))


Line = list[tuple[Scenario, list[Outcome]]]


def rates() -> dict[str, float]:
    """The value of each figure of `rates.json`; the measured ones come from the files of the measurements."""
    return {name: _value(entry) for name, entry in json.loads((HERE / "rates.json").read_text()).items()}


def _value(entry: dict[str, str | float]) -> float:
    if "figure" not in entry:
        return float(entry["value"])
    return float(json.loads((RESULTS / str(entry["file"])).read_text())["figures"][entry["figure"]]["value"])


def simulate(point: Scenario, found: dict[str, float], seed: int = 0) -> Outcome:
    """Run one point with the rates that were found."""
    nodes = max(1, point.gpus // GPUS_PER_NODE)
    actors = point.gpus // nodes
    cores = actors * found["cores_per_gpu"]
    fetch = found["request_seconds"] + found["image_bytes"] / found["connection_bytes_per_second"]
    latency = found["request_seconds"]
    cells = -(-GALLERY // PARTITION_ROWS) if point.today else 1  # row groups, each behind a footer of its own file
    cell = found["transformed_cell_seconds"] + latency * found["transformed_cell_requests"] / PARALLEL_READS
    part = found["log_read_seconds"] + latency * found["log_read_requests"] / PARALLEL_READS
    seconds = Seconds(
        load_image=found["decode_seconds"] + found["fetch_cpu_seconds"] * point.requests_image,
        load_unit=found["units_open_seconds"] * UNITS_PER_FILE,
        fetch_unit=latency * found["units_read_requests"],
        fetch_image=fetch * point.requests_image / CONCURRENCY,
        embed_image=1 / point.gpu_rate,
        write_unit=found["log_write_seconds"] + latency * found["log_write_requests"],
        dispatch=found["ray_driver_cpu_seconds"],
        ack=found["ack_seconds"],
        seal=cells * cell if point.whole else 0.0,
        seal_part=part if point.whole and point.today else 0.0,
        seal_image=found["segment_build_seconds"] if point.whole else 0.0,
    )
    cluster = Cluster(nodes, actors, cores, int(cores / LOAD_CPUS), found["model_seconds"])
    faults = Faults(
        losses=point.losses,
        detect_seconds=found["detect_seconds"],
        replace_seconds=found["replace_seconds"] if point.replace_seconds is None else point.replace_seconds,
        sigma=found["sigma"] if point.sigma is None else point.sigma,
        slow_share=point.slow_share,
        slow_factor=point.slow_factor,
        requests_image=point.requests_image,
        requests_per_second=point.prefixes * found["gets_per_second_per_prefix"],
    )
    return Simulation(Job(point.images, point.unit_images, point.waves), cluster, seconds, faults, seed).run()


def bounds(point: Scenario, found: dict[str, float]) -> dict[str, float]:
    """Images per second that each stage alone could do: the least of them is the rate without faults."""
    load = found["decode_seconds"] + found["fetch_cpu_seconds"] * point.requests_image
    return {
        "GPUs": point.gpus * point.gpu_rate,
        "CPUs": point.gpus * found["cores_per_gpu"] / load,
        "driver": point.unit_images / (found["ray_driver_cpu_seconds"] + found["ack_seconds"]),
        "store": point.prefixes * found["gets_per_second_per_prefix"] / point.requests_image,
    }


def rate_lines(gpus: tuple[int, ...]) -> dict[str, list[Scenario]]:
    """The lines of the first plot, by label."""
    lines = {
        "256 images a unit (the default at 224 pixels)": Scenario(0, unit_images=256),
        "2,048 images a unit": Scenario(0),
        "8,192 images a unit": Scenario(0, unit_images=8_192),
        "2,048, one object per image, 10 prefixes": Scenario(0, prefixes=10),
        "2,048, 1 node of 8 is 3 times slower": Scenario(0, slow_share=0.125, slow_factor=3.0),
        "2,048, 1 loss per node-hour": Scenario(0, losses=1.0),
    }
    return {name: [replace(line, gpus=count) for count in gpus] for name, line in lines.items()}


def loss_lines(losses: tuple[float, ...], seconds: float) -> dict[str, list[Scenario]]:
    """The lines of the second plot."""
    lines = {
        f"{size:,} images a unit, a node back after {after:.0f} s": Scenario(
            64, unit_images=size, replace_seconds=after, seconds=seconds
        )
        for size, after in ((2_048, 180.0), (2_048, 600.0), (8_192, 180.0))
    }
    return {name: [replace(line, losses=rate) for rate in losses] for name, line in lines.items()}


def main() -> None:
    """Simulate, print the tables, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="fewer points, no file written unless asked for")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--units", type=int, default=120_000, help="of a point, at most: a second or so")
    parser.add_argument("--results", type=Path, help="a Markdown file to write the tables to")
    parser.add_argument("--plots", type=Path, help="a folder to write the plots to")
    arguments = parser.parse_args()
    found, start, seeds = rates(), time.perf_counter(), 1 if arguments.short else arguments.seeds
    gpus = (16, 64, 256) if arguments.short else GPUS
    losses, seconds = ((0.5, 2.0), 1_800.0) if arguments.short else ((0.5, 1.0, 2.0, 4.0), 3_600.0)
    text, lost = list(heading()), loss_lines(losses, seconds)

    def run(points: list[Scenario]) -> Line:
        cut = [replace(point, units=arguments.units) for point in points]
        return [(point, [simulate(point, found, seed) for seed in range(seeds)]) for point in cut]

    by_gpus = {name: run(points) for name, points in rate_lines(gpus).items()} if "rates" in arguments.only else {}
    by_losses = {name: run(points) for name, points in lost.items()} if "losses" in arguments.only else {}
    text += rate_table(by_gpus) if by_gpus else []
    text += loss_table(by_losses) if by_losses else []
    text += whole_table(whole_points(arguments.short), found) if "whole" in arguments.only else []
    text.append(f"\nSimulated in {time.perf_counter() - start:.0f} s.")
    print("\n".join(text))
    if arguments.results:
        arguments.results.write_text("\n".join(text) + "\n")
    if arguments.plots:
        draw(by_gpus, by_losses, arguments.plots)


def mean(values: Iterator[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def rate_table(lines: dict[str, Line]) -> list[str]:
    found = rates()
    text = [
        "\n## Rate against GPUs\n",
        "| case | GPUs | images/s | of the GPUs | lowest - highest | GPUs busy | driver busy | least bound | refused |",
    ]
    text.append("|---|---|---|---|---|---|---|---|---|")
    for name, line in lines.items():
        for point, outcomes in line:
            each = [outcome.rate for outcome in outcomes]
            ideal, least = point.gpus * point.gpu_rate, min(bounds(point, found).items(), key=lambda item: item[1])
            text.append(
                f"| {name} | {point.gpus} | {sum(each) / len(each):,.0f} | {sum(each) / len(each) / ideal:.3f} "
                f"| {min(each):,.0f} - {max(each):,.0f} | {mean(one.actors_busy for one in outcomes):.2f} "
                f"| {mean(one.driver_busy for one in outcomes):.2f} | {least[0]} {least[1]:,.0f} "
                f"| {mean(float(one.refused) for one in outcomes):,.0f} |"
            )
    return text


def lost_share(point: Scenario, outcomes: list[Outcome]) -> float:
    """Share of the images that were done again."""
    return mean(outcome.repeated / point.images for outcome in outcomes)


def loss_table(lines: dict[str, Line]) -> list[str]:
    text = [
        "\n## Lost work against losses\n",
        "| case | losses per node-hour | nodes lost | done again | images/s | share of the GPUs |",
    ]
    text.append("|---|---|---|---|---|---|")
    for name, line in lines.items():
        for point, outcomes in line:
            rate, lost = mean(outcome.rate for outcome in outcomes), sum(outcome.losses for outcome in outcomes)
            text.append(
                f"| {name} | {point.losses} | {lost} | {lost_share(point, outcomes):.2%} "
                f"| {rate:,.0f} | {rate / point.gpus / point.gpu_rate:.3f} |"
            )
    return text


def whole_points(short: bool) -> dict[str, Scenario]:
    """A billion images from the first to the last commit."""
    point = Scenario(1_024, whole=True)
    points = {
        "8,192 images a unit, as the code is": replace(point, unit_images=8_192),
        "8,192 images a unit, each cell read once": replace(point, unit_images=8_192, today=False),
    }
    if not short:
        points |= {
            "2,048 images a unit, as the code is": point,
            "2,048 images a unit, each cell read once": replace(point, today=False),
        }
    return points


def whole_table(points: dict[str, Scenario], found: dict[str, float]) -> list[str]:
    text = [
        "\n## A billion images on 1,024 GPUs\n",
        "| case | embedded after, h | last commit after, h | lag p50, h | p95, h | images/s |",
    ]
    text.append("|---|---|---|---|---|---|")
    for name, point in points.items():
        one = simulate(point, found)
        lags = sorted(one.lags)
        middle, late = lags[len(lags) // 2] / 3600, lags[int(0.95 * (len(lags) - 1))] / 3600
        text.append(
            f"| {name} | {one.seconds / 3600:.2f} | {one.published_seconds / 3600:.2f} | {middle:.2f} | {late:.2f} "
            f"| {one.rate:,.0f} |"
        )
    return text


def heading() -> Iterator[str]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    yield "# Simulated: rate against GPUs, lost work against losses\n"
    yield f"`python -m benchmarks.scale.simulate {' '.join(sys.argv[1:])}`, commit {commit.stdout.strip()}, "
    yield f"Python {platform.python_version()}, {os.cpu_count()} CPUs. Nothing here ran on a GPU or a cluster; it is"
    yield "simulated, from these figures:\n"
    yield "| figure | value | unit | where from |"
    yield "|---|---|---|---|"
    for name, entry in json.loads((HERE / "rates.json").read_text()).items():
        if "figure" in entry:
            known = json.loads((RESULTS / entry["file"]).read_text())["figures"][entry["figure"]]
            entry = known | {"kind": "measured", "source": f"results/{entry['file']}: {known['how']}"}
        yield f"| {name} | {entry['value']:g} | {entry['unit']} | {entry['kind']}; {entry['source']} |"


def draw(by_gpus: dict[str, Line], by_losses: dict[str, Line], folder: Path) -> None:
    """Write `rate-against-gpus.svg` and `lost-work.svg`, each if it has points; the same points give the same bytes."""
    if by_gpus:
        _draw_rates(by_gpus, folder / "rate-against-gpus.svg")
    if by_losses:
        _draw_losses(by_losses, folder / "lost-work.svg")


def _draw_rates(by_gpus: dict[str, Line], path: Path) -> None:
    figure, axes = _blank()
    gpus = [point.gpus for point, _ in next(iter(by_gpus.values()))]
    rate = next(iter(by_gpus.values()))[0][0].gpu_rate
    axes.plot(
        gpus,
        [count * rate for count in gpus],
        color="0.6",
        linestyle=":",
        label=f"{rate:,.0f} images/s a GPU (a parameter)",
    )
    for name, line in by_gpus.items():
        values = [[outcome.rate for outcome in outcomes] for _, outcomes in line]
        means = [sum(each) / len(each) for each in values]
        (drawn,) = axes.plot(gpus, means, marker="o", markersize=3, label=name)
        axes.fill_between(gpus, list(map(min, values)), list(map(max, values)), alpha=0.2, color=drawn.get_color())
    axes.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="images per second, simulated")
    axes.set_xticks(gpus, [str(count) for count in gpus], minor=False)
    axes.minorticks_off()
    _finish(figure, axes, path)


def _draw_losses(by_losses: dict[str, Line], path: Path) -> None:
    figure, axes = _blank()
    for name, line in by_losses.items():
        losses = [point.losses for point, _ in line]
        (drawn,) = axes.plot(
            losses, [100 * lost_share(*pair) for pair in line], marker="o", markersize=3, label=f"done again: {name}"
        )
        held = [
            100 * (1 - sum(one.rate for one in outcomes) / len(outcomes) / point.gpus / point.gpu_rate)
            for point, outcomes in line
        ]
        axes.plot(losses, held, linestyle="--", color=drawn.get_color(), label="rate missing, of the GPUs'")
    axes.set(xscale="log", yscale="log", xlabel="losses per node and hour", ylabel="per cent, simulated")
    _finish(figure, axes, path)


def _blank() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.5, 4.5))
    return figure, figure.add_subplot()


def _finish(figure: Figure, axes: Axes, path: Path) -> None:
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    with matplotlib.rc_context({"svg.hashsalt": "fastfill"}):
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
