"""Every Prometheus metric of the driver, declared once, and the endpoint that shows them.

Three stages everywhere: an image is embedded, then durable (its unit's part is in the log), then
published (a commit holds its wave). The driver learns of the first two together, from a unit's
acknowledgement. The same figures come from storage alone through `fastfill status`.
"""

from __future__ import annotations

import logging

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from pipeline.config import Telemetry
from pipeline.progress import Progress
from pipeline.schema import UnitAck

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
WAVES = Gauge("fastfill_waves", "Waves in the plan.", registry=REGISTRY)
WAVE_PUBLISHED = Gauge("fastfill_wave_published", "The last wave that is published.", registry=REGISTRY)
PUBLISHED_AT = Gauge(
    "fastfill_snapshot_published_timestamp_seconds", "When the latest commit was published.", registry=REGISTRY
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
    "fastfill_retries", "Requests of load tasks, write tasks and this driver that were repeated.", registry=REGISTRY
)
IMAGES_CHANGED = Counter(
    "fastfill_images_changed", "Images that are others than when the manifest was made.", registry=REGISTRY
)
STAGE_SECONDS = Histogram(
    "fastfill_stage_seconds",
    "Seconds a unit or a wave spends in a stage: load, embed, write, seal, publish.",
    ["stage"],
    buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
    registry=REGISTRY,
)

logger = logging.getLogger(__name__)


def serve(settings: Telemetry) -> str:
    """Start the endpoint and return its URL; a port that is taken is replaced by a free one, with a warning."""
    try:
        server, _ = start_http_server(settings.port, settings.host, REGISTRY)
    except OSError as error:
        logger.warning("telemetry: port %d cannot be had (%s), using a free one", settings.port, error.strerror)
        server, _ = start_http_server(0, settings.host, REGISTRY)
    return f"http://{settings.host}:{server.server_port}/metrics"


def observe_unit(ack: UnitAck) -> None:
    """Count one acknowledged unit."""
    IMAGES_EMBEDDED.inc(ack.embedded)
    LOG_BYTES.inc(ack.part_bytes)
    FETCH_REQUESTS.inc(ack.requests)
    FETCH_BYTES.inc(ack.bytes_fetched)
    FETCH_BYTES_NEEDED.inc(ack.bytes_needed)
    RETRIES.inc(ack.retries)
    IMAGES_CHANGED.inc(ack.changed)
    STAGE_SECONDS.labels("load").observe(ack.load_seconds)
    STAGE_SECONDS.labels("embed").observe(ack.embed_seconds)
    STAGE_SECONDS.labels("write").observe(ack.write_seconds)


def observe_driver(retries: int) -> None:
    """Count requests of the driver itself, which publishes, that failed and were repeated."""
    RETRIES.inc(retries)


def observe_progress(progress: Progress) -> None:
    """Set the run-level gauges."""
    GALLERY_IMAGES.set(progress.gallery)
    IMAGES_DURABLE.set(progress.durable)
    IMAGES_PUBLISHED.set(progress.published)
    IMAGES_REJECTED.set(progress.rejected)
    BACKFILLED_FRACTION.set(progress.published / progress.gallery)
    WAVES.set(progress.waves)
    WAVE_PUBLISHED.set(progress.wave)
    if progress.images_per_second is not None:
        RATE.set(progress.images_per_second)
    if progress.eta_seconds is not None:
        ETA.set(progress.eta_seconds)
