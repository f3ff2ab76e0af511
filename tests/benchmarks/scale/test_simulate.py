"""The simulation against what can be worked out on paper: the least capacity, work in flight, durable work stays."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest

from benchmarks.scale import simulate
from benchmarks.scale.scenario import Cluster, Faults, Job, Outcome, Seconds
from benchmarks.scale.simulation import ACTOR_UNITS, ADMITTED, Simulation

CLUSTER = Cluster(nodes=4, actors=8, cores=64, load_slots=128)
JOB = Job(images=4_000 * 512, unit_images=512, waves=10, shards=8)
EASY = Seconds(load_image=1e-4, embed_image=1e-3)


def run(seconds: Seconds = EASY, faults: Faults | None = None, job: Job = JOB, cluster: Cluster = CLUSTER) -> Outcome:
    return Simulation(job, cluster, seconds, faults).run()


@pytest.mark.parametrize(
    ("seconds", "faults", "capacity"),
    [
        pytest.param(EASY, Faults(), 32 / 1e-3, id="the actors"),
        pytest.param(replace(EASY, load_image=0.02), Faults(), 256 / 0.02, id="the cores"),
        pytest.param(replace(EASY, fetch_image=0.02), Faults(), 256 / 0.02, id="the load slots in admission"),
        pytest.param(replace(EASY, dispatch=0.05, ack=0.014), Faults(), 512 / 0.064, id="the driver"),
        pytest.param(EASY, Faults(requests_image=0.5, requests_per_second=5_500), 11_000, id="the store"),
    ],
)
def test_without_faults_the_rate_is_the_least_capacity(seconds: Seconds, faults: Faults, capacity: float) -> None:
    assert run(seconds, faults).rate == pytest.approx(capacity, rel=0.03)


def test_two_stages_that_are_equally_fast_do_not_wait_for_each_other_without_scatter() -> None:
    assert run(replace(EASY, load_image=256 / 32 * 1e-3)).rate == pytest.approx(32_000, rel=0.05)


IN_FLIGHT = (ACTOR_UNITS + ADMITTED) * CLUSTER.actors * JOB.unit_images


@pytest.fixture(scope="module")
def with_losses() -> list[Outcome]:
    job, faults = replace(JOB, images=20_000 * 512), Faults(losses=20.0, detect_seconds=1.0, replace_seconds=1.0)
    return [Simulation(job, CLUSTER, EASY, faults, seed).run() for seed in range(5)]


def test_a_lost_node_loses_what_is_in_flight_on_it_and_nothing_that_is_durable(with_losses: list[Outcome]) -> None:
    losses = sum(outcome.losses for outcome in with_losses)
    assert losses > 20
    assert sum(outcome.repeated for outcome in with_losses) / losses == pytest.approx(IN_FLIGHT, rel=0.15)


def test_the_share_of_lost_work_is_losses_times_what_is_in_flight_over_the_rate(with_losses: list[Outcome]) -> None:
    expected = 20.0 / 3600 * IN_FLIGHT / (CLUSTER.actors / EASY.embed_image)  # of one node's work
    share = sum(outcome.repeated for outcome in with_losses) / (5 * 20_000 * 512)
    assert share == pytest.approx(expected, rel=0.25)


def test_every_unit_is_done_although_nodes_are_lost_all_the_time() -> None:
    outcome = run(faults=Faults(losses=100.0, replace_seconds=5.0, sigma=0.3, slow_share=0.25, slow_factor=2.0))
    assert len(outcome.lags) == 10
    assert outcome.seconds > run().seconds


def test_a_slow_node_takes_less_work_and_does_not_hold_the_others_up() -> None:
    slow = run(faults=Faults(slow_share=0.25, slow_factor=3.0))
    assert slow.rate == pytest.approx(32_000 * (0.75 + 0.25 / 3), rel=0.03)


def test_waves_are_sealed_in_order_while_later_ones_go_on() -> None:
    seal = replace(EASY, seal=1.0, seal_part=1e-3, seal_image=1e-5)
    outcome = run(seal)
    assert outcome.seconds == pytest.approx(run().seconds)
    last_units, last_images = JOB.images // 512 * 10 // 55, JOB.images * 10 / 55
    assert outcome.lags[-1] == pytest.approx(1.0 + 1e-3 * last_units + 1e-5 * last_images / JOB.shards, rel=0.02)
    drowning = run(replace(EASY, seal=100.0))
    assert drowning.published_seconds == pytest.approx(10 * 100.0, rel=0.05)


def test_a_store_that_is_asked_too_fast_refuses_and_is_asked_later() -> None:
    assert run(faults=Faults(requests_per_second=2_000.0)).refused > 0
    assert run(faults=Faults(requests_per_second=1e6)).refused == 0


def test_the_same_seed_gives_the_same_run() -> None:
    faults = Faults(losses=50.0, sigma=0.3)
    assert run(faults=faults) == run(faults=faults)


def test_rates_say_where_they_come_from_and_measured_ones_are_in_the_results() -> None:
    entries = json.loads((simulate.HERE / "rates.json").read_text())
    found = simulate.rates()
    for name, entry in entries.items():
        assert math.isfinite(found[name]), name
        assert found[name] > 0, name
        assert "figure" in entry or entry["kind"] in ("measured", "documented", "assumed", "parameter"), name
        assert "figure" in entry or entry["source"], name
        if entry.get("kind") == "measured":
            (file,) = re.findall(r"results/[\w-]+\.md", entry["source"])
            assert (simulate.RESULTS.parent / file).exists(), name


def test_a_point_that_the_gpus_bound_comes_to_their_rate_and_is_below_every_bound() -> None:
    found = simulate.rates()
    point = simulate.Scenario(16, gpu_rate=300.0, unit_images=2_048)
    outcome = simulate.simulate(point, found)
    least = min(simulate.bounds(point, found).values())
    assert 0.9 * least < outcome.rate <= 1.02 * least
