"""The dashboards are those that the script makes, and every query of theirs names metrics that there are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.grafana.dashboards import DASHBOARDS, FOLDER, build
from pipeline.embedding import worker_metrics
from pipeline.reporting import telemetry
from tests.infra.metrics import RAYS, metrics_of, ours_and_rays, queries_of

PROMETHEUS = Path(__file__).resolve().parents[2] / "infra" / "prometheus"


def panels(name: str) -> list[dict[str, Any]]:
    found = json.loads((FOLDER / f"{name}.json").read_text())["panels"]
    return [panel for panel in found if panel["type"] != "row"]


def records() -> set[str]:
    (group,) = yaml.safe_load((PROMETHEUS / "rules.yml").read_text())["groups"]
    return {rule["record"] for rule in group["rules"]}


def test_the_committed_dashboards_are_those_of_the_script_and_no_others() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == set(DASHBOARDS)
    for name in DASHBOARDS:
        assert (FOLDER / f"{name}.json").read_text() == build(name), "run python infra/grafana/dashboards.py"


@pytest.mark.parametrize("name", DASHBOARDS)
def test_every_query_names_existing_metrics(name: str) -> None:
    known = ours_and_rays() | records()
    for panel in panels(name):
        assert panel["targets"], panel["title"]
    for title, query in queries_of(name):
        assert metrics_of(query), (title, query)
        assert metrics_of(query) <= known, (title, query)


def test_every_metric_of_ours_is_on_a_dashboard_or_in_a_rule() -> None:
    text = "".join((FOLDER / f"{name}.json").read_text() for name in DASHBOARDS)
    text += (PROMETHEUS / "rules.yml").read_text() + (PROMETHEUS / "alerts.yml").read_text()
    ours = [family.name for family in telemetry.REGISTRY.collect()]
    ours += [f"ray_{name}" for name, *_ in worker_metrics.COUNTERS.values()]
    by_rules_instead = {"fastfill_images_per_second", "fastfill_eta_seconds"}  # which fall when a driver stalls
    assert {name for name in ours if name not in text} == by_rules_instead


def test_every_known_metric_of_ray_is_used() -> None:
    used = {metric for name in DASHBOARDS for _, query in queries_of(name) for metric in metrics_of(query)}
    assert used >= RAYS


@pytest.mark.parametrize("name", DASHBOARDS)
def test_panels_do_not_overlap_and_say_what_they_show(name: str) -> None:
    cells: set[tuple[int, int]] = set()
    for panel in panels(name):
        place = panel["gridPos"]
        mine = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not mine & cells, panel["title"]
        cells |= mine
        assert place["x"] + place["w"] <= 24
        assert panel["title"]
        assert all(target["expr"] for target in panel["targets"])
        assert panel["datasource"]["uid"] == "${source}"
