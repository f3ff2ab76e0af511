"""Every Prometheus metric of the driver, and the endpoint that serves them.

An image is embedded, then durable (its unit's part is in the vector log), then published (a commit holds its wave).
The driver learns of the first two together, when a unit is acknowledged. Metrics of nodes and processes are in
`embedding.worker_metrics`. Labels are of fixed sets: stages, causes, measures, and the waves of the plan.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter as Counts
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from pipeline.config.tree import TelemetrySettings
from pipeline.embedding.reject_rules import REJECT_REASONS
from pipeline.reporting.progress import Progress
from pipeline.schema import UnitAck
from pipeline.storage import objects
from pipeline.storage.retry import RETRY_CAUSES, count_retries

if TYPE_CHECKING:
    from pipeline.index.commits import Commit

REGISTRY = CollectorRegistry()

IMAGES_EMBEDDED = Counter("fastfill_images_embedded", "Images embedded by this driver.", registry=REGISTRY)
IMAGES_DURABLE = Gauge("fastfill_images_durable", "Images whose new embedding is in the vector log.", registry=REGISTRY)
IMAGES_PUBLISHED = Gauge(
    "fastfill_images_published", "Images whose new embedding is in the latest commit.", registry=REGISTRY
)
IMAGES_REJECTED = Gauge("fastfill_images_rejected", "Images that could not be embedded.", registry=REGISTRY)
GALLERY_IMAGES = Gauge("fastfill_gallery_images", "Images in the gallery.", registry=REGISTRY)
BACKFILLED_FRACTION = Gauge(
    "fastfill_backfilled_fraction", "Share of the gallery whose new embedding is published.", registry=REGISTRY
)
REJECTS = Counter(
    "fastfill_rejects",
    "Images that this driver saw rejected, by stage and reason.",
    ["stage", "reason"],
    registry=REGISTRY,
)
BACKLOG_IMAGES = Gauge(
    "fastfill_backlog_images", "Images that are neither durable nor rejected yet.", registry=REGISTRY
)
BACKLOG_WAVES = Gauge("fastfill_backlog_waves", "Waves that are whole and not published yet.", registry=REGISTRY)
RUNNING = Gauge("fastfill_backfill_running", "1 while the stream of units is open, else 0.", registry=REGISTRY)
UNITS = Counter("fastfill_units", "Units acknowledged to this driver.", registry=REGISTRY)
ACTORS = Gauge(
    "fastfill_embed_actors", "Embedding actors that gave a unit in the last five minutes.", registry=REGISTRY
)
ACTORS_SEEN = Counter(
    "fastfill_embed_actors_seen", "Embedding actors that ever gave this driver a unit.", registry=REGISTRY
)
WAVES = Gauge("fastfill_waves", "Waves in the plan.", registry=REGISTRY)
WAVE_PUBLISHED = Gauge("fastfill_wave_published", "The last wave that is published.", registry=REGISTRY)
PUBLISHED_AT = Gauge(
    "fastfill_snapshot_published_timestamp_seconds", "When the latest commit was published.", registry=REGISTRY
)
GATE_REFUSED = Gauge("fastfill_gate_refused", "1 if the gate refused the latest commit, else 0.", registry=REGISTRY)
INDEX_VECTORS = Gauge("fastfill_index_vectors", "Vectors of the latest commit.", ["kind"], registry=REGISTRY)
INDEX_SEGMENTS = Gauge("fastfill_index_segments", "Segments of the latest commit.", registry=REGISTRY)
INDEX_BYTES = Gauge("fastfill_index_bytes", "Bytes of the segments of the latest commit.", registry=REGISTRY)
WAVE_QUALITY = Gauge(
    "fastfill_wave_quality_ratio",
    "Retrieval quality of the snapshot of a wave, 0 to 1, if it was measured.",
    ["wave", "measure"],
    registry=REGISTRY,
)
PROBE_QUALITY = Gauge(
    "fastfill_probe_quality_ratio",
    "Quality of the latest commit on the probe set, as ratios: top1, top5, recall10 (of the full model's 10), own, "
    "slot_share, negative_flips, group_gap.",
    ["measure"],
    registry=REGISTRY,
)
HELD_OUT_QUALITY = Gauge(
    "fastfill_held_out_quality_ratio",
    "Retrieval quality on held-out pairs, 0 to 1: old/old, transformed, new/new.",
    ["gallery", "measure"],
    registry=REGISTRY,
)
RATE = Gauge("fastfill_images_per_second", "Images made durable per second, over the last minute.", registry=REGISTRY)
ETA = Gauge("fastfill_eta_seconds", "Seconds until the last image is durable, at that rate.", registry=REGISTRY)
LOG_BYTES = Counter("fastfill_vector_log_bytes", "Bytes written to the vector log by this driver.", registry=REGISTRY)
FETCH_REQUESTS = Counter(
    "fastfill_fetch_requests", "Requests for images, to an object store or reads of files.", registry=REGISTRY
)
FETCH_BYTES = Counter("fastfill_fetch_bytes", "Bytes that the requests for images brought.", registry=REGISTRY)
FETCH_BYTES_NEEDED = Counter(
    "fastfill_fetch_bytes_needed", "Bytes of encoded images among those fetched.", registry=REGISTRY
)
RETRIES = Counter(
    "fastfill_retries",
    "Requests of load tasks, write tasks and this driver that were repeated, by cause.",
    ["cause"],
    registry=REGISTRY,
)
DRIVER_REQUESTS = Counter(
    "fastfill_driver_requests", "Requests of this driver to object stores, by kind.", ["kind"], registry=REGISTRY
)
DRIVER_BYTES = Counter(
    "fastfill_driver_bytes",
    "Bytes that this driver read from and wrote to object stores.",
    ["direction"],
    registry=REGISTRY,
)
IMAGES_CHANGED = Counter(
    "fastfill_images_changed", "Images that have changed since the manifest was made.", registry=REGISTRY
)
STAGE_SECONDS = Histogram(
    "fastfill_stage_seconds",
    "Seconds per unit (load, which is fetch and decode; embed; write) or per wave (seal, publish, measure).",
    ["stage"],
    buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
    registry=REGISTRY,
)

FIT_EPOCH = Gauge("fastfill_fit_epoch", "Epochs of the fit that are done.", registry=REGISTRY)
FIT_EPOCHS = Gauge("fastfill_fit_epochs", "Epochs that the fit takes.", registry=REGISTRY)
FIT_LOSS = Gauge("fastfill_fit_loss", "Loss of the last epoch.", registry=REGISTRY)
FIT_ALIGNMENT = Gauge("fastfill_fit_alignment_loss", "Its alignment term.", registry=REGISTRY)
FIT_LR = Gauge("fastfill_fit_learning_rate", "Learning rate of the last epoch.", registry=REGISTRY)
FIT_RATE = Gauge("fastfill_fit_images_per_second", "Pairs fitted per second in the last epoch.", registry=REGISTRY)
NODES = Gauge("fastfill_cluster_nodes", "Nodes of the Ray cluster that are alive.", registry=REGISTRY)
GPUS = Gauge("fastfill_cluster_gpus", "GPUs of these nodes.", registry=REGISTRY)
NODE_SECONDS = Counter("fastfill_node_seconds", "Seconds of nodes, since this driver began.", registry=REGISTRY)
GPU_SECONDS = Counter("fastfill_gpu_seconds", "Seconds of GPUs, since this driver began.", registry=REGISTRY)
COST = Counter(
    "fastfill_cost",
    "Cost of these seconds by telemetry.node_hour_price and gpu_hour_price, in their currency.",
    registry=REGISTRY,
)

_ACTOR_WINDOW_SECONDS = 300.0
_MACHINE_SECONDS = 10.0
_MEASURES = ("top1", "top5", "map", "agreement10", "recall10")
_EVERYWHERE = ("", "0.0.0.0", "::")

logger = logging.getLogger(__name__)


@contextmanager
def serving(settings: TelemetrySettings, run_uri: str) -> Iterator[str]:
    """Serve the endpoint during a run; gives its URL.

    Prometheus finds it through `telemetry.discovery_file`, which is removed after a good end. The endpoint stays for
    `telemetry.linger_seconds`, so that the last figures are scraped. A thread counts nodes and GPUs.
    """
    url = serve(settings)
    stop = threading.Event()
    meter = threading.Thread(target=_count_machines, args=(settings, stop), name="machines", daemon=True)
    meter.start()
    if settings.discovery_file is not None:
        objects.put(settings.discovery_file, json.dumps([_target(url, run_uri)], indent=1).encode())
    try:
        yield url
        time.sleep(settings.linger_seconds)
        if settings.discovery_file is not None:
            objects.delete_files([settings.discovery_file])
    finally:
        stop.set()
        meter.join()


def serve(settings: TelemetrySettings) -> str:
    """Start the endpoint and return its URL; if the port is taken, use a free one and log a warning."""
    try:
        server, _ = start_http_server(settings.port, settings.host, REGISTRY)
    except OSError as error:
        logger.warning("telemetry: port %d is not available (%s); a free one is used", settings.port, error.strerror)
        server, _ = start_http_server(0, settings.host, REGISTRY)
    return f"http://{_address(settings.host)}:{server.server_port}/metrics"


def observe_unit(ack: UnitAck) -> None:
    """Count one acknowledged unit."""
    UNITS.inc()
    IMAGES_EMBEDDED.inc(ack.embedded)
    LOG_BYTES.inc(ack.part_bytes)
    FETCH_REQUESTS.inc(ack.requests)
    FETCH_BYTES.inc(ack.bytes_fetched)
    FETCH_BYTES_NEEDED.inc(ack.bytes_needed)
    IMAGES_CHANGED.inc(ack.changed)
    _count_retries(ack.retry_counts)
    for (stage, reason), count in zip(REJECT_REASONS, ack.reject_counts, strict=False):
        if count:
            REJECTS.labels(stage, reason).inc(count)
    seconds = {"load": ack.load_seconds, "embed": ack.embed_seconds, "write": ack.write_seconds}
    seconds |= {"fetch": ack.fetch_seconds, "decode": max(0.0, ack.load_seconds - ack.fetch_seconds)}
    for stage, value in seconds.items():
        STAGE_SECONDS.labels(stage).observe(value)
    _ACTIVE.see(ack.actor, time.monotonic())


def observe_driver(asked: Counts[str]) -> None:
    """Count the driver's own requests to stores: the difference of two `objects.counts()`."""
    _count_retries(count_retries(asked))
    for name, count in asked.items():
        kind, _, what = name.partition(":")
        if kind == "requests":
            DRIVER_REQUESTS.labels(what).inc(count)
        elif kind == "bytes" and what in ("get", "put"):
            DRIVER_BYTES.labels(what).inc(count)


def observe_progress(progress: Progress, waiting_waves: int = 0) -> None:
    """Set the run-level gauges; `waiting_waves` are whole and not published yet."""
    GALLERY_IMAGES.set(progress.gallery)
    IMAGES_DURABLE.set(progress.durable)
    IMAGES_PUBLISHED.set(progress.published)
    IMAGES_REJECTED.set(progress.rejected)
    BACKFILLED_FRACTION.set(progress.published / progress.gallery)
    BACKLOG_IMAGES.set(progress.left)
    BACKLOG_WAVES.set(waiting_waves)
    WAVES.set(progress.waves)
    WAVE_PUBLISHED.set(progress.wave)
    if progress.images_per_second is not None:
        RATE.set(progress.images_per_second)
    if progress.eta_seconds is not None:
        ETA.set(progress.eta_seconds)


def observe_commit(commit: Commit) -> None:
    """Set the figures of the latest commit."""
    PUBLISHED_AT.set(commit.created_unix_seconds)
    INDEX_VECTORS.labels("transformed").set(commit.counts.transformed)
    INDEX_VECTORS.labels("embedded").set(commit.counts.embedded)
    INDEX_SEGMENTS.set(len(commit.segments))
    INDEX_BYTES.set(sum(segment.bytes for segment in commit.segments))


def observe_quality(wave: int, figures: Mapping[str, float]) -> None:
    """Set the quality of the snapshot of a wave, from figures in per cent; unknown names are ignored."""
    for measure in _MEASURES:
        if measure in figures:
            WAVE_QUALITY.labels(str(wave), measure).set(figures[measure] / 100)


def observe_probe(figures: Mapping[str, float]) -> None:
    """Set the quality of the latest commit from `Quality.figures`, and drop that of earlier ones."""
    PROBE_QUALITY.clear()
    for measure, value in figures.items():
        PROBE_QUALITY.labels(measure).set(value if measure == "slot_share" else value / 100)


def spent() -> float:
    """The cost of this driver's machines so far, by the prices of the config."""
    return REGISTRY.get_sample_value("fastfill_cost_total") or 0.0


def observe_curve(curve: Mapping[str, Any]) -> None:  # Any: the document of `evaluate --curve --json`
    """Set the quality of every snapshot of the run's curve."""
    for point in curve["published"]["points"]:
        observe_quality(point["commit"], point)


def observe_held_out(held_out: Mapping[str, float | Mapping[str, float]]) -> None:
    """Set the quality on held-out pairs from `TransformationInfo.held_out`."""
    for gallery in ("old_old", "transformed", "new_new"):
        figures = held_out.get(gallery)
        if isinstance(figures, Mapping):
            for measure in set(_MEASURES) & set(figures):
                HELD_OUT_QUALITY.labels(gallery, measure).set(figures[measure] / 100)


def observe_epoch(figures: Mapping[str, float]) -> None:
    """Set the figures of one epoch of the fit."""
    FIT_EPOCH.set(figures["epoch"] + 1)
    FIT_EPOCHS.set(figures["epochs"])
    FIT_LOSS.set(figures["loss"])
    FIT_ALIGNMENT.set(figures["alignment"])
    FIT_LR.set(figures["lr"])
    FIT_RATE.set(figures["images_per_second"])


def observe_machines(settings: TelemetrySettings, nodes: int, gpus: float, seconds: float) -> None:
    """Count the seconds of nodes and GPUs, and their cost."""
    NODES.set(nodes)
    GPUS.set(gpus)
    NODE_SECONDS.inc(nodes * seconds)
    GPU_SECONDS.inc(gpus * seconds)
    COST.inc((nodes * settings.node_hour_price + gpus * settings.gpu_hour_price) * seconds / 3600)


class _Actors:
    """Counts the actors that gave a unit in the last minutes and in all."""

    def __init__(self) -> None:
        self._last_seconds: dict[str, float] = {}

    def see(self, actor: str, now_seconds: float) -> None:
        """Count an actor that gave a unit; an empty name is ignored."""
        if actor and actor not in self._last_seconds:
            ACTORS_SEEN.inc()
        if actor:
            self._last_seconds[actor] = now_seconds
        ACTORS.set(sum(now_seconds - last <= _ACTOR_WINDOW_SECONDS for last in self._last_seconds.values()))


_ACTIVE = _Actors()


def _count_retries(counts: Sequence[int]) -> None:
    for cause, count in zip(RETRY_CAUSES, counts, strict=False):
        RETRIES.labels(cause).inc(count)


def _count_machines(settings: TelemetrySettings, stop: threading.Event) -> None:
    """Count nodes every ten seconds and at the end; there are none while Ray is not connected."""
    last = time.monotonic()
    while True:
        stopped = stop.wait(_MACHINE_SECONDS)
        now = time.monotonic()
        alive = _alive_nodes()
        gpus = sum(node.get("GPU", 0.0) for node in alive)
        observe_machines(settings, len(alive), gpus, now - last)
        last = now
        if stopped:
            return


def _alive_nodes() -> list[dict[str, float]]:
    import ray  # here: it takes a second, and `status` does not need it

    try:
        return [node["Resources"] for node in ray.nodes() if node["Alive"]] if ray.is_initialized() else []
    except ray.exceptions.RayError as error:  # the cluster is going down; the run reports that itself
        logger.warning("telemetry: cannot count the nodes (%s)", error)
        return []


def _address(host: str) -> str:
    """The address of this machine for others: Ray's address of the node if the endpoint listens everywhere."""
    if host not in _EVERYWHERE:
        return host
    import ray.util

    return str(ray.util.get_node_ip_address())


def _target(url: str, run: str) -> dict[str, object]:
    """One entry for Prometheus's file_sd_configs; the label `run` is the last part of the run's URI."""
    name = run.rstrip("/").rpartition("/")[2]
    return {"targets": [url.removeprefix("http://").removesuffix("/metrics")], "labels": {"run": name}}
