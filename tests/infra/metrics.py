"""The metrics that queries may name: the driver's, the workers', and those of Ray that we rely on."""

from __future__ import annotations

import json
from typing import Any

import promql_parser

from infra.grafana.dashboards import DASHBOARDS as DASHBOARDS
from infra.grafana.dashboards import FOLDER
from pipeline.embedding import worker_metrics
from pipeline.reporting import telemetry

RAYS = {
    "ray_actors",
    "ray_data_num_alive_actors",
    "ray_data_num_pending_actors",
    "ray_data_num_restarting_actors",
    "ray_data_num_tasks_running",
    "ray_data_operator_queued_blocks",
    "ray_node_cpu_utilization",
    "ray_node_gpus_utilization",
    "ray_node_mem_total_host",
    "ray_node_mem_used_host",
    "ray_node_network_receive_speed",
    "ray_node_network_send_speed",
    "ray_object_store_memory",
    "ray_train_controller_state",
    "ray_train_report_total_blocked_time_s",
}
"""Names of Ray 2.60; tests/cluster/test_prometheus.py sees them, but for those of machines with GPUs."""

_OF_HISTOGRAMS = ("_bucket", "_sum", "_count")


def ours_and_rays() -> set[str]:
    """Every name that a sample of a metric may have."""
    found = set(RAYS)
    for family in telemetry.REGISTRY.collect():
        suffixes = {"counter": ("_total",), "histogram": _OF_HISTOGRAMS}.get(family.type, ("",))
        found |= {family.name + suffix for suffix in suffixes}
    found |= {f"ray_{name}_total" for name, *_ in worker_metrics.COUNTERS.values()}
    return found | {f"ray_{worker_metrics.UNIT_SECONDS[0]}{suffix}" for suffix in _OF_HISTOGRAMS}


def queries_of(dashboard: str) -> list[tuple[str, str]]:
    """(title of the panel, query) of every query of a dashboard, its variables filled in as for all runs."""
    panels = json.loads((FOLDER / f"{dashboard}.json").read_text())["panels"]
    return [
        (panel["title"], target["expr"].replace("$run", ".*").replace("$__rate_interval", "1m"))
        for panel in panels
        for target in panel.get("targets") or []
    ]


def metrics_of(expression: str) -> set[str]:
    """The metrics that a PromQL expression names, wherever in it.

    Raises:
        ValueError: it is no PromQL.
    """
    return {name for node in _nodes(promql_parser.parse(expression)) if (name := getattr(node, "name", None))}


def _nodes(expression: Any) -> list[Any]:  # Any: the parser's classes have no common type
    """The vector selectors below a node."""
    if isinstance(expression, promql_parser.VectorSelector):
        return [expression]
    parts = [getattr(expression, name, None) for name in ("lhs", "rhs", "expr", "vector_selector", "param")]
    parts += list(getattr(expression, "args", None) or [])
    return [node for part in parts if part is not None for node in _nodes(part)]
