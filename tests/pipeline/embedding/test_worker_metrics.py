"""What a process tells Ray's agent of one unit; tests/cluster shows that Prometheus gets it."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Iterator
from typing import Any

import pytest

from pipeline.embedding import worker_metrics

Told = list[tuple[str, str, float]]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[Told]:
    """Every (metric, label, value) that is told; a list stands in for Ray's agent, which cannot be asked."""
    found: Told = []

    class Recorder:
        def __init__(self, name: str, _: str, *rest: Any) -> None:
            self._name, self._label = name, rest[-1]

        def inc(self, value: float, tags: dict[str, str]) -> None:
            assert value > 0, "Ray refuses it"
            assert (*tags,) == self._label
            found.append((self._name, *tags.values(), value))

        observe = inc

    monkeypatch.setattr(worker_metrics, "Counter", Recorder)
    monkeypatch.setattr(worker_metrics, "Histogram", Recorder)
    worker_metrics._metrics.cache_clear()
    yield found
    worker_metrics._metrics.cache_clear()


def test_a_unit_costs_a_few_calls_whatever_its_images(told: Told) -> None:
    worker_metrics.observe("embed", 2048, 1.5)
    assert told == [
        ("fastfill_stage_images", "embed", 2048),
        ("fastfill_stage_busy_seconds", "embed", 1.5),
        ("fastfill_stage_unit_seconds", "embed", 1.5),
    ]


def test_worker_metrics_count_requests_by_kind_direction_and_cause(told: Told) -> None:
    asked = {"requests:get": 2, "requests:image": 9, "bytes:get": 10, "bytes:image": 90, "retries:SlowDown": 1}
    worker_metrics.observe("load", 9, 0.5, Counts(asked | {"bytes:needed": 80, "microseconds:image": 7}))
    assert told[3:] == [
        ("fastfill_storage_requests", "get", 2),
        ("fastfill_storage_requests", "image", 9),
        ("fastfill_storage_bytes", "get", 100),
        ("fastfill_storage_retries", "slow_down", 1),
    ]


def test_metrics_are_named_as_those_of_the_driver_are() -> None:
    names = [name for name, *_ in (*worker_metrics.COUNTERS.values(), worker_metrics.UNIT_SECONDS)]
    assert len(set(names)) == len(names)
    assert all(name.startswith("fastfill_") and not name.endswith("_total") for name in names)
