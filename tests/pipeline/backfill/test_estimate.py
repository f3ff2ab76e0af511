"""The estimate: time and money from measured rates, and what they say to set."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.backfill.estimate import Rates, best_batch, estimate
from pipeline.config.tree import TelemetrySettings

ON_CPU = Rates(
    images=1000,
    bytes_per_image=2_000.0,
    bytes_fetched_per_image=3_000.0,
    requests_per_image=0.5,
    fetch=9_000.0,
    decode=4_500.0,
    forward={64: 90.0, 128: 98.0, 256: 100.0},
    stream=150.0,
    start_seconds=10.0,
    actors=2,
    cpus=2.0,
    gpus=0.0,
    nodes=1,
    gpus_per_actor=0.0,
    device="cpu",
)
ON_GPU = replace(ON_CPU, forward={256: 3_000.0}, stream=5_000.0, actors=4, cpus=16.0, gpus=4.0, gpus_per_actor=1.0)


def test_time_is_the_start_and_the_images_at_the_rate_of_the_whole_stream() -> None:
    found = estimate(ON_CPU, 15_000, 0, 2, TelemetrySettings())
    assert found.seconds == pytest.approx(10 + 15_000 / 150)
    assert found.bytes == 45_000_000
    assert found.node_hours == pytest.approx(found.seconds / 3600)
    assert (found.gpu_hours, found.money) == (0.0, None)


def test_publishing_time_matters_with_few_cores_and_not_with_many() -> None:
    few, many = (
        estimate(replace(ON_CPU, cpus=cpus), 15_000, 20, 2, TelemetrySettings()).seconds for cpus in (2.0, 64.0)
    )
    assert few == pytest.approx(110 + 20 * 0.2)
    assert many < 110.2


def test_cost_is_the_price_of_all_nodes_and_gpus_for_the_time() -> None:
    found = estimate(
        replace(ON_GPU, nodes=2), 5_000 * 3600, 0, 4, TelemetrySettings(node_hour_price=3.0, gpu_hour_price=2.0)
    )
    hours = 1 + 10 / 3600
    assert found.gpu_hours == pytest.approx(4 * hours)
    assert found.money == pytest.approx(2 * hours * 3 + 4 * hours * 2)


def test_the_smallest_batch_that_is_about_as_fast_is_recommended() -> None:
    assert best_batch(ON_CPU.forward) == 128
    assert best_batch({64: 100.0, 128: 99.0}) == 64


def test_the_cores_that_feed_an_actor_are_its_rate_over_that_of_a_core() -> None:
    assert (
        estimate(ON_GPU, 1, 0, 4, TelemetrySettings()).loading_cpus_per_actor == 1.0
    )  # 3,000 over 1 / (1/9,000 + 1/4,500)
    assert estimate(replace(ON_GPU, decode=1_000.0), 1, 0, 4, TelemetrySettings()).loading_cpus_per_actor == 3.4


def test_estimate_of_an_actor_that_decodes_is_slower_and_its_cores_only_read() -> None:
    there = replace(ON_GPU, decode=6_000.0, decodes_on_device=True)
    assert there.actor(256) == pytest.approx(2_000.0)  # 1 / (1/3,000 + 1/6,000)
    assert estimate(replace(there, fetch=1_000.0), 1, 0, 4, TelemetrySettings()).loading_cpus_per_actor == 2.0


@pytest.mark.parametrize(
    ("rates", "bottleneck"),
    [
        (ON_CPU, "forward"),
        (replace(ON_CPU, decode=50.0), "decode"),
        (replace(ON_CPU, fetch=20.0), "fetch"),
        (ON_GPU, "forward"),
        (replace(ON_GPU, decode=500.0), "decode"),
        (replace(ON_GPU, fetch=400.0), "fetch"),
        (replace(ON_GPU, decode=500.0, decodes_on_device=True), "decode"),
        (replace(ON_GPU, decode=9_000.0, decodes_on_device=True), "forward"),
        (replace(ON_GPU, fetch=100.0, decode=9_000.0, decodes_on_device=True), "fetch"),
    ],
)
def test_bottleneck_is_the_resource_that_is_exhausted_first(rates: Rates, bottleneck: str) -> None:
    assert estimate(rates, 1, 0, 1, TelemetrySettings()).bottleneck == bottleneck
