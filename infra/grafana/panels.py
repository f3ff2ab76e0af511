"""What the dashboards show: rows of panels, each with its queries. `dashboards.py` makes Grafana's JSON of it.

A panel that shows a run is filtered by the variable `run`; what Ray tells of nodes knows no run, and is of the whole
cluster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from grafana_foundation_sdk.models import units

RUN = '{run=~"$run"}'
RATE = "[$__rate_interval]"

Query = tuple[str, str]
"""Its legend and its PromQL."""


@dataclass(frozen=True, slots=True)
class Panel:
    """`bars` has one bar per wave, `levels` one per series; `span` is of the 24 columns of a dashboard."""

    title: str
    unit: str
    queries: tuple[Query, ...]
    text: str
    kind: Literal["stat", "lines", "bars", "levels"] = "lines"
    span: int = 12


Rows = dict[str, list[Panel]]


def lines(title: str, unit: str, *queries: Query | str, text: str = "") -> Panel:
    """A plot over time; a query without a legend is one of runs."""
    pairs = tuple(("{{run}}", query) if isinstance(query, str) else query for query in queries)
    return Panel(title, unit, pairs, text)


def number(title: str, unit: str, query: str, text: str = "") -> Panel:
    """The present value."""
    return Panel(title, unit, (("{{run}}", query),), text, "stat", span=4)


def newest(metric: str) -> str:
    """A gauge or a sum of the driver's; of a run that was started again the largest."""
    return f"max by (run) (fastfill_{metric}{RUN})"


def record(name: str) -> str:
    """What a recording rule has computed."""
    return f"fastfill:{name}{RUN}"


def rate(metric: str, by: str = "run") -> str:
    """A counter of the driver's, per second."""
    return f"sum by ({by}) (rate(fastfill_{metric}_total{RUN}{RATE}))"


def of_processes(metric: str, by: str) -> str:
    """A counter of the tasks and actors, per second, over all nodes and runs."""
    return f"sum by ({by}) (rate(ray_fastfill_{metric}_total{RATE}))"


def ratio(above: str, below: str) -> str:
    """Nothing where there is nothing below."""
    return f"{above} / ({below} > 0)"


def quantiles(stages: str) -> tuple[Query, ...]:
    """The median and the 90th percentile of stages, over the runs that are chosen."""
    buckets = f'fastfill_stage_seconds_bucket{{run=~"$run", stage=~"{stages}"}}'
    found = f"sum by (stage, le) (rate({buckets}{RATE}))"
    return tuple((f"{{{{stage}}}} p{100 * q:.0f}", f"histogram_quantile({q}, {found})") for q in (0.5, 0.9))


HELD_OUT = "max by (gallery, measure) (fastfill_held_out_quality_ratio" + RUN + ")"
BY_WAVE = 'sum by (wave) (fastfill_wave_quality_ratio{run=~"$run", measure="map"})'
NODE_SECONDS = f"sum by (NodeAddress, stage, le) (rate(ray_fastfill_stage_unit_seconds_bucket{RATE}))"

OVERVIEW: Rows = {
    "Where it stands": [
        number("Published", units.PercentUnit, newest("backfilled_fraction")),
        number("Time left", units.Seconds, record("eta_seconds"), "At the rate of the last five minutes."),
        number("Images per second", units.Short, record("images_per_second")),
        number("Cost so far", units.Short, newest("cost_total"), "Of this driver, by the prices in `telemetry`."),
        number("Age of the snapshot", units.Seconds, record("snapshot_age_seconds")),
        number("Kept back by the gate", units.Short, newest("gate_refused"), "1: prod does not follow."),
    ],
    "Progress": [
        lines(
            "Images",
            units.Short,
            ("gallery", newest("gallery_images")),
            ("durable", newest("images_durable")),
            ("published", newest("images_published")),
            ("rejected", newest("images_rejected")),
        ),
        lines("Expected end", units.DateTimeFromNow, "1000 * " + record("finish_timestamp_seconds")),
    ],
    "Quality": [
        Panel(
            "mAP by wave",
            units.PercentUnit,
            (("", BY_WAVE),),
            "The curve as published: wave 0 is all transformed. Choose one run. It is there once it was measured.",
            "bars",
        ),
        lines(
            "Latest snapshot on the probe set",
            units.PercentUnit,
            ("{{measure}}", f"max by (measure) (fastfill_probe_quality_ratio{RUN})"),
        ),
        Panel(
            "On held-out pairs",
            units.PercentUnit,
            (("{{gallery}} {{measure}}", HELD_OUT),),
            "Before an image is embedded: the old gallery, the transformed one, and the new one.",
            "levels",
        ),
    ],
    "Cost": [
        lines("Cost", units.Short, newest("cost_total")),
        lines("Cost of a million images", units.Short, ratio("1e6 * " + rate("cost"), rate("images_embedded"))),
        lines(
            "Machines",
            units.Short,
            ("nodes", newest("cluster_nodes")),
            ("GPUs", newest("cluster_gpus")),
            ("embedding actors", newest("embed_actors")),
        ),
        lines(
            "Machine hours",
            units.Short,
            ("nodes", newest("node_seconds_total") + " / 3600"),
            ("GPUs", newest("gpu_seconds_total") + " / 3600"),
        ),
    ],
}

PIPELINE: Rows = {
    "Where the bottleneck is": [
        lines(
            "Busy processes by stage",
            units.Short,
            ("{{stage}}", f"sum by (stage) ({record('stage_busy_processes')})"),
            text="How many processes each stage keeps busy; load is fetch and decode together.",
        ),
        lines(
            "Share of their time in which embedding actors embed",
            units.PercentUnit,
            record("embed_busy_ratio"),
            text="Near 1 the encoder is the bottleneck; low, it waits for images.",
        ),
        lines(
            "Queued blocks by operator",
            units.Short,
            ("{{operator}}", "sum by (operator) (ray_data_operator_queued_blocks)"),
            text="A block is a unit. Where they pile up, that operator is the slowest.",
        ),
        lines(
            "Running tasks by operator",
            units.Short,
            ("{{operator}}", "sum by (operator) (ray_data_num_tasks_running)"),
        ),
    ],
    "Rates": [
        lines("Images per second", units.Short, record("images_per_second")),
        lines("Images per second and actor", units.Short, record("images_per_second_per_actor")),
        lines("Images per second by stage", units.Short, ("{{stage}}", of_processes("stage_images", "stage"))),
        lines(
            "Busy processes by node and stage",
            units.Short,
            ("{{NodeAddress}} {{stage}}", of_processes("stage_busy_seconds", "NodeAddress, stage")),
        ),
        lines("Images left", units.Short, newest("backlog_images")),
        lines("Units per second", units.Short, rate("units")),
    ],
    "Times of a unit": [
        lines("Load", units.Seconds, *quantiles("load|fetch|decode")),
        lines("Embed and write", units.Seconds, *quantiles("embed|write")),
        lines(
            "90th percentile by node",
            units.Seconds,
            ("{{NodeAddress}} {{stage}}", f"histogram_quantile(0.9, {NODE_SECONDS})"),
        ),
    ],
    "Actors": [
        lines(
            "Actors of the embedding stage",
            units.Short,
            ("alive", "sum(ray_data_num_alive_actors)"),
            ("pending", "sum(ray_data_num_pending_actors)"),
            ("restarting", "sum(ray_data_num_restarting_actors)"),
            ("that gave a unit", "sum(fastfill_embed_actors" + RUN + ")"),
        ),
        lines("Actors replaced in half an hour", units.Short, record("embed_actors_replaced_30m")),
        lines("Actors of the cluster by state", units.Short, ("{{State}}", "sum by (State) (ray_actors)")),
    ],
    "Nodes": [
        lines("CPU", units.Percent, ("{{instance}}", "max by (instance) (ray_node_cpu_utilization)")),
        lines(
            "GPU",
            units.Percent,
            ("{{instance}} {{GpuIndex}}", "max by (instance, GpuIndex) (ray_node_gpus_utilization)"),
        ),
        lines(
            "Memory",
            units.PercentUnit,
            (
                "{{instance}}",
                "sum by (instance) (ray_node_mem_used_host) / sum by (instance) (ray_node_mem_total_host)",
            ),
        ),
        lines("Object store", units.BytesIEC, ("{{Location}}", "sum by (Location) (ray_object_store_memory)")),
    ],
}

STORAGE: Rows = {
    "Reading images": [
        lines("Requests per image", units.Short, ratio(rate("fetch_requests"), rate("images_embedded"))),
        lines("Bytes fetched per byte needed", units.Short, ratio(rate("fetch_bytes"), rate("fetch_bytes_needed"))),
        lines("Fetched", units.BytesPerSecondIEC, rate("fetch_bytes")),
        lines("Images that changed since the manifest was made", units.Short, newest("images_changed_total")),
    ],
    "Requests": [
        lines("Of tasks, by kind", units.RequestsPerSecond, ("{{kind}}", of_processes("storage_requests", "kind"))),
        lines("Of the driver, by kind", units.RequestsPerSecond, ("{{kind}}", rate("driver_requests", "kind"))),
        lines(
            "Bytes of tasks and driver",
            units.BytesPerSecondIEC,
            ("tasks {{direction}}", of_processes("storage_bytes", "direction")),
            ("driver {{direction}}", rate("driver_bytes", "direction")),
        ),
        lines("Vector log", units.BytesPerSecondIEC, rate("vector_log_bytes")),
    ],
    "Trouble": [
        lines("Retries by cause", units.RequestsPerSecond, ("{{cause}}", rate("retries", "cause"))),
        lines("Share of requests that were repeated", units.PercentUnit, record("retry_ratio")),
        lines(
            "Retries by node and cause",
            units.RequestsPerSecond,
            ("{{NodeAddress}} {{cause}}", of_processes("storage_retries", "NodeAddress, cause")),
        ),
        lines(
            "Rejects by reason",
            units.Short,
            ("{{stage}}: {{reason}}", f"sum by (stage, reason) (fastfill_rejects_total{RUN})"),
        ),
        lines("Share of images that are rejected", units.PercentUnit, record("reject_ratio")),
        lines(
            "Network by node",
            units.BytesPerSecondIEC,
            ("{{instance}} in", "max by (instance) (ray_node_network_receive_speed)"),
            ("{{instance}} out", "max by (instance) (ray_node_network_send_speed)"),
        ),
    ],
}

INDEX: Rows = {
    "Snapshots": [
        lines(
            "Waves",
            units.Short,
            ("in the plan", newest("waves")),
            ("published", newest("wave_published")),
            ("whole, and waiting", newest("backlog_waves")),
        ),
        lines("Age of the latest snapshot", units.Seconds, record("snapshot_age_seconds")),
        lines("Seconds of a wave: seal", units.Seconds, *quantiles("seal")),
        lines("Seconds of a wave: publish, measure", units.Seconds, *quantiles("publish|measure")),
        lines("Kept back by the gate", units.Short, newest("gate_refused")),
        lines(
            "Best quality of a snapshot that was measured",
            units.PercentUnit,
            ("{{measure}}", f"max by (measure) (fastfill_wave_quality_ratio{RUN})"),
        ),
    ],
    "Index": [
        lines("Vectors", units.Short, ("{{kind}}", f"sum by (kind) (fastfill_index_vectors{RUN})")),
        lines("Size", units.BytesIEC, newest("index_bytes")),
        lines("Segments", units.Short, newest("index_segments")),
        lines(
            "Bytes of a vector",
            units.BytesIEC,
            ratio(newest("index_bytes"), f"sum by (run) (fastfill_index_vectors{RUN})"),
        ),
    ],
}

TRAINING: Rows = {
    "Fit": [
        lines("Epochs", units.Short, ("done", newest("fit_epoch")), ("in all", newest("fit_epochs"))),
        lines(
            "Loss",
            units.Short,
            ("loss", newest("fit_loss")),
            ("alignment term", newest("fit_alignment_loss")),
        ),
        lines("Learning rate", units.ScientificNotation, newest("fit_learning_rate")),
        lines("Pairs per second", units.Short, newest("fit_images_per_second")),
    ],
    "What came out": [
        Panel(
            "On held-out pairs",
            units.PercentUnit,
            (("{{gallery}} {{measure}}", HELD_OUT),),
            "The fit has to be better than the old gallery, or the gate keeps its snapshots back.",
            "levels",
        ),
    ],
    "Ray Train": [
        lines(
            "State of the controller",
            units.Short,
            (
                "{{ray_train_controller_state}}",
                "sum by (ray_train_controller_state) (ray_train_controller_state)",
            ),
        ),
        lines(
            "Seconds blocked in reporting",
            units.Seconds,
            (
                "rank {{ray_train_worker_world_rank}}",
                "max by (ray_train_worker_world_rank) (ray_train_report_total_blocked_time_s)",
            ),
        ),
    ],
}

DASHBOARDS: dict[str, tuple[str, Rows]] = {
    "overview": ("Overview", OVERVIEW),
    "pipeline": ("Pipeline", PIPELINE),
    "storage": ("Storage", STORAGE),
    "index": ("Index and snapshots", INDEX),
    "training": ("Training", TRAINING),
}
"""File name: title and rows."""
