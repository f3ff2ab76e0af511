"""Metrics that the stream's tasks and actors report to Ray's metrics agent on their node, once per unit.

Prometheus scrapes each node's agent, which adds the prefix `ray_`, and `_total` to counters. Values belong to a
process: to add them up, use `sum without (WorkerId)`. Run totals are in `reporting.telemetry`.
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
"""Ray's name of each metric, its description, and its label."""

UNIT_SECONDS = ("fastfill_stage_unit_seconds", "Seconds a unit spends in a stage of the stream.", "stage")

_REQUESTS, _BYTES = "requests:", {"get": ("bytes:get", "bytes:image"), "put": ("bytes:put",)}


def observe(stage: str, images: int, seconds: float, asked: Counts[str] | None = None) -> None:
    """Count one unit's pass through a stage: `load`, `embed` or `write`.

    `asked` is the difference of two `objects.counts()`, if the stage uses a store.
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


@dataclass(frozen=True, slots=True)
class _Metrics:
    counters: dict[str, Counter]
    unit_seconds: Histogram

    def add(self, name: str, label: str, value: float) -> None:
        if value > 0:  # Ray refuses 0
            self.counters[name].inc(value, {COUNTERS[name][2]: label})


@functools.cache
def _metrics() -> _Metrics:
    counters = {key: Counter(name, text, (label,)) for key, (name, text, label) in COUNTERS.items()}
    name, text, label = UNIT_SECONDS
    return _Metrics(counters, Histogram(name, text, SECONDS, (label,)))
