"""The report's charts as SVG text.

The same data gives the same bytes. Colours are CSS variables of the page, so a chart follows light and dark mode.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pipeline.arrays import Float64, Int64

Tree = dict[str, Any]  # Any: JSON

# Matplotlib needs colours; these are replaced by the page's CSS variables.
_COLOURS = {
    "#010101": "ink",
    "#020202": "muted",
    "#030303": "grid",
    "#040404": "surface",
    "#050505": "chosen",
    "#060606": "random",
    "#070707": "oracle",
    "#080808": "other",
}
INK, MUTED, GRID, SURFACE, CHOSEN, RANDOM, ORACLE, OTHER = _COLOURS

_SIZE = (4.1, 2.95)
_BEHIND_TEXT: Tree = {"facecolor": SURFACE, "edgecolor": "none", "alpha": 0.7, "pad": 0.5}
_STYLE: dict[str, Any] = {  # Any: matplotlib's settings are of every kind
    "svg.fonttype": "none",
    "svg.hashsalt": "fastfill",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "legend.facecolor": SURFACE,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.75,
    "lines.solid_capstyle": "round",
}


def curve_plot(curve: Tree, metric: str, chosen: str) -> str:
    """One metric against the fraction: a line per order, the published points, the old and the new model."""

    def draw(axes: Axes) -> None:
        for name in sorted(curve["orders"], key=lambda name: name == chosen):
            points = curve["orders"][name]["points"]
            width = 2.2 if name == chosen else 1.5
            area = curve["orders"][name]["area"][metric]
            axes.plot(*_series(points, metric), color=colour_of(name, chosen), lw=width, label=f"{name}  {area:.1f}")
        published = curve.get("published", {}).get("points", [])
        if published:
            style: Tree = {"marker": "o", "ms": 4.5, "mec": SURFACE, "mew": 0.8, "ls": "none"}
            axes.plot(
                *_series(published, metric), color=colour_of(chosen, chosen), label="published", zorder=4, **style
            )
        _level(axes, curve["old_old"][metric], "old model", above=True)
        _level(axes, curve["new_new"][metric], "new model", above=True)
        _fractions(axes)
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(
            handles[::-1], labels[::-1], loc="center right", bbox_to_anchor=(1.0, 0.36), title="average", fontsize=8.5
        )
        low, high = axes.get_ylim()
        axes.set_ylim(low - 0.02 * (high - low), high + 0.06 * (high - low))

    return _svg(draw)


def gap_plot(groups: Tree, metric: str) -> str:
    """The best and the worst group of each point, and the gap between them."""

    def draw(axes: Axes) -> None:
        fractions = [point["fraction"] for point in groups["points"]]
        best, worst = ([point[side][metric] for point in groups["points"]] for side in ("best", "worst"))
        axes.fill_between(fractions, worst, best, color=CHOSEN, alpha=0.13, lw=0)
        for values, name, offset in ((best, "best group", 5), (worst, "worst group", -12)):
            axes.plot(fractions, values, color=CHOSEN, lw=1.8)
            axes.annotate(name, (1.0, values[-1]), (0, offset), textcoords="offset points", ha="right", color=CHOSEN)
        axes.margins(y=0.12)
        for side in ("best", "worst"):
            _level(axes, groups["old_old"][side][metric], f"{side}, old model", above=side == "best")
        _fractions(axes)

    return _svg(draw)


def share_plot(points: Sequence[Tree], key: str, level: float | None = None) -> str:
    """One figure against the fraction, with a dashed line at the neutral value."""

    def draw(axes: Axes) -> None:
        known = [point for point in points if point[key] is not None]
        axes.plot(*_series(known, key), color=CHOSEN, lw=2)
        if level is not None:
            axes.axhline(level, color=MUTED, lw=1, ls=(0, (4, 3)))
        axes.set_ylim(bottom=0)
        _fractions(axes)

    return _svg(draw)


def histogram_plot(edges: Float64, counts: Int64, first_wave: int = 1) -> str:
    """Predicted errors, stacked by wave; `edges` is (B + 1,), `counts` (W, B) of the waves from `first_wave` on."""

    def draw(axes: Axes) -> None:
        waves = len(counts)
        colours = mpl.colormaps["viridis"](np.linspace(0.92, 0.12, waves))
        bottom = np.zeros(counts.shape[1])
        for wave in range(waves):
            axes.stairs(bottom + counts[wave], edges, baseline=bottom, fill=True, color=colours[wave], lw=0)
            bottom += counts[wave]
        for wave in sorted({0, waves // 2, waves - 1}):
            axes.plot(
                [],
                [],
                "s",
                ms=6,
                color=colours[wave],
                label=f"wave {wave + first_wave}" if wave + first_wave else "pairs",
            )
        axes.set_ylim(0, 1.05 * max(bottom.max(), 1))
        axes.legend(loc="upper left", fontsize=8.5, handletextpad=0.1)
        axes.set_xlabel("predicted error s")
        axes.set_ylabel("images")
        axes.yaxis.set_major_formatter("{x:,.0f}")

    return _svg(draw)


def throughput_plot(edges_seconds: Float64, rates: Float64) -> str:
    """Images per second over the time since the first part; `edges_seconds` is (B + 1,), `rates` (B,)."""

    def draw(axes: Axes) -> None:
        unit, name = next(item for item in ((3600, "hours"), (60, "minutes"), (1, "seconds")) if _long(item[0]))
        edges = edges_seconds / unit
        axes.stairs(rates, edges, color=CHOSEN, lw=1.8)
        axes.stairs(rates, edges, color=CHOSEN, fill=True, alpha=0.13, lw=0)
        axes.set_ylim(0, 1.15 * max(rates.max(), 1e-9))
        axes.set_xlim(0, edges[-1])
        axes.set_xlabel(f"{name} since the first file")
        axes.set_ylabel("images per second")
        axes.yaxis.set_major_formatter("{x:,.0f}" if rates.max() >= 10 else "{x:.3g}")

    def _long(unit: int) -> bool:
        return unit == 1 or bool(edges_seconds[-1] >= 3 * unit)

    return _svg(draw)


def colour_of(order: str, chosen: str) -> str:
    """The colour of an order's line; the chosen one stands out."""
    return CHOSEN if order == chosen else {"random": RANDOM, "oracle": ORACLE}.get(order, OTHER)


def css_variable(colour: str) -> str:
    """The name of the CSS variable that a colour stands for."""
    return f"var(--{_COLOURS[colour]})"


def _series(points: Sequence[Tree], key: str) -> tuple[list[float], list[float]]:
    return [point["fraction"] for point in points], [point[key] for point in points]


def _level(axes: Axes, value: float, name: str, above: bool) -> None:
    """A dashed line with its name and value at its left end."""
    axes.axhline(value, color=MUTED, lw=1, ls=(0, (4, 3)))
    place = {"va": "bottom", "xytext": (0, 2)} if above else {"va": "top", "xytext": (0, -2)}
    style: Tree = {"textcoords": "offset points", "color": MUTED, "fontsize": 8.5, "bbox": _BEHIND_TEXT, **place}
    axes.annotate(f"{name}  {value:.1f}", (0.0, value), **style)


def _fractions(axes: Axes) -> None:
    axes.set_xlim(-0.015, 1.015)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("re-embedded")
    axes.yaxis.set_major_locator(MaxNLocator(6))


def _svg(draw: Callable[[Axes], None]) -> str:
    """Draw into a fresh figure, and give it as SVG with CSS variables for colours and no fixed size."""
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]  # the stubs want literal keys
        figure = Figure(figsize=_SIZE, layout="constrained")
        draw(figure.subplots())
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    for colour, name in _COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg
