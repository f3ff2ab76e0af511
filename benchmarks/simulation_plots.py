"""The two plots of `benchmarks.simulate`, as SVG without dates, so that the same points give the same file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from benchmarks.simulate import Line


def draw(by_gpus: dict[str, Line], by_losses: dict[str, Line], folder: Path) -> None:
    """Write `rate-against-gpus.svg` and `lost-work.svg`, each where there are points for it."""
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
    from benchmarks.simulate import lost_share

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
