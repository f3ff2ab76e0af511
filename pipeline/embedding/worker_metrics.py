"""What the stream's tasks and actors tell Ray's metrics agent of their node: one call per unit, none per image.

Prometheus finds each node's agent (`ray_` is put before the names there, `_total` behind those of counters).
The figures are of a process: a sum over them needs `sum without (WorkerId)`, and a process that has ended stays
in it. Beside `telemetry`, which has the figures of the run; nothing here knows a run, a wave or an id.
"""

from __future__ import annotations

import functools
from collections import Counter as Counts
from dataclasses import dataclass

from ray.util.metrics import Counter, Histogram

from pipeline.storage.retry import RETRY_CAUSES, count_retries

SECONDS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0]

COUNTERS = {
    "images": ("fastfill_stage_images", "Images that a process has put through a stage.", "stage"),
    "busy": ("fastfill_stage_busy_seconds", "Seconds in which a process was busy with a stage.", "stage"),
    "requests": ("fastfill_storage_requests", "Requests of a process to object stores, by kind.", "kind"),
    "bytes": ("fastfill_storage_bytes", "Bytes that a process read from and wrote to object stores.", "direction"),
    "retries": ("fastfill_storage_retries", "Requests that a process repeated, by cause.", "cause"),
}
"""Name in Ray's terms, what it is, and its label."""

UNIT_SECONDS = ("fastfill_stage_unit_seconds", "Seconds a unit spends in a stage of the stream.", "stage")

_REQUESTS, _BYTES = "requests:", {"get": ("bytes:get", "bytes:image"), "put": ("bytes:put",)}


@dataclass(frozen=True, slots=True)
class _Metrics:
    counters: dict[str, Counter]
    unit_seconds: Histogram

    def add(self, name: str, label: str, value: float) -> None:
        if value > 0:  # Ray refuses 0
            self.counters[name].inc(value, {COUNTERS[name][2]: label})


@functools.cache
def _metrics() -> _Metrics:
    """One of each in a process, made when the first unit comes."""
    counters = {key: Counter(name, text, (label,)) for key, (name, text, label) in COUNTERS.items()}
    name, text, label = UNIT_SECONDS
    return _Metrics(counters, Histogram(name, text, SECONDS, (label,)))


def observe(stage: str, images: int, seconds: float, asked: Counts[str] | None = None) -> None:
    """Count one unit's way through a stage.

    Args:
        stage: `load`, `embed` or `write`.
        images: of the unit.
        seconds: that the process was busy with it.
        asked: the difference of two `storage.counts()`, where the stage talks to a store.
    """
    metrics = _metrics()
    metrics.add("images", stage, images)
    metrics.add("busy", stage, seconds)
    metrics.unit_seconds.observe(seconds, {"stage": stage})
    if not asked:
        return
    for name, count in asked.items():
        if name.startswith(_REQUESTS):
            metrics.add("requests", name.removeprefix(_REQUESTS), count)
    for direction, names in _BYTES.items():
        metrics.add("bytes", direction, sum(asked[name] for name in names))
    for cause, count in zip(RETRY_CAUSES, count_retries(asked), strict=True):
        metrics.add("retries", cause, count)
