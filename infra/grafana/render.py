"""Draw the dashboards with matplotlib from what a Prometheus has recorded; for reports, where there is no Grafana.

    python infra/grafana/render.py --prometheus http://127.0.0.1:9090 --minutes 10 --out docs/dashboards

The panels, their queries and their places are those of `panels.py`; how they look is not Grafana's.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it runs as a script

from infra.grafana.panels import DASHBOARDS, Panel, Query

Series = tuple[str, list[float], list[float]]
"""Its legend, minutes since the start, and values."""

_POINTS = 300
_COLUMNS = 3
_MOST_LEGENDS = 8


def render(prometheus: str, name: str, start: float, end: float, out: Path, run: str = ".*") -> None:
    """Draw one dashboard.

    Args:
        prometheus: its address.
        name: of the dashboard.
        start: Unix seconds.
        end: Unix seconds.
        out: the PNG.
        run: a regular expression, as the dashboard's variable would be.
    """
    title, rows = DASHBOARDS[name]
    panels = [panel for row in rows.values() for panel in row]
    height = math.ceil(len(panels) / _COLUMNS)
    figure = Figure(figsize=(5.2 * _COLUMNS, 2.6 * height), layout="constrained")
    figure.suptitle(f"fastfill: {title} (drawn with matplotlib from the recorded data)")
    axes = figure.subplots(height, _COLUMNS, squeeze=False).flatten()
    for panel, place in zip(panels, axes, strict=False):
        series = [item for query in panel.queries for item in _series(prometheus, query, start, end, run)]
        _draw(place, panel, series)
    for place in axes[len(panels) :]:
        place.set_axis_off()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=70)


def _series(prometheus: str, query: Query, start: float, end: float, run: str) -> list[Series]:
    legend, expression = query
    expression = expression.replace("$run", run).replace("$__rate_interval", "1m")
    words = {"query": expression, "start": start, "end": end, "step": max(1.0, (end - start) / _POINTS)}
    with urlopen(f"{prometheus}/api/v1/query_range?{urlencode(words)}", timeout=60) as answer:
        found = json.load(answer)["data"]["result"]
    return [_one(item, legend, start) for item in found]


def _one(item: dict[str, Any], legend: str, start: float) -> Series:
    labels = item["metric"]
    name = re.sub(r"{{(\w+)}}", lambda label: labels.get(label[1], ""), legend) or labels.get("wave", "")
    minutes = [(float(seconds) - start) / 60 for seconds, _ in item["values"]]
    return name, minutes, [float(value) for _, value in item["values"]]


def _draw(place: Axes, panel: Panel, series: list[Series]) -> None:
    place.set_title(f"{panel.title} [{panel.unit}]", fontsize=9)
    place.tick_params(labelsize=7)
    if not series:
        place.text(0.5, 0.5, "no data", ha="center", va="center", transform=place.transAxes)
        return
    last = {name: values[-1] for name, _, values in series}
    if panel.kind == "stat":
        text = "\n".join(f"{value:,.4g}" for value in last.values())
        place.text(0.5, 0.5, text, ha="center", va="center", fontsize=20, transform=place.transAxes)
        place.set_axis_off()
    elif panel.kind == "bars":
        waves = sorted(last, key=int)
        place.bar(waves, [last[wave] for wave in waves])
    elif panel.kind == "levels":
        place.barh(list(last), list(last.values()))
    else:
        for name, minutes, values in series:
            place.plot(minutes, values, linewidth=1, label=name[:40])
        place.set_xlabel("minutes", fontsize=7)
        if len(series) <= _MOST_LEGENDS:
            place.legend(fontsize=6)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    now = time.time()
    for dashboard in DASHBOARDS:
        render(options.prometheus, dashboard, now - 60 * options.minutes, now, options.out / f"{dashboard}.png")
