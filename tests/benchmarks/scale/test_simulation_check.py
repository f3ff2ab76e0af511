"""The simulated cluster is what Ray makes of the machine."""

from __future__ import annotations

import pytest
import ray

from benchmarks.scale import simulation_check
from pipeline.config.load import load_config


@pytest.mark.parametrize(("cpus", "actors", "load_slots"), [(2, 2, 1), (4, 4, 3), (8, 8, 6)])
def test_actors_and_load_tasks_are_those_that_fit(
    monkeypatch: pytest.MonkeyPatch, cpus: int, actors: int, load_slots: int
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": float(cpus)})  # of a Ray that is not started
    config = load_config(str(simulation_check.CONFIG))
    found = simulation_check.cluster(config, start_seconds=3.0)
    assert (found.nodes, found.actors, found.cores, found.load_slots) == (1, actors, cpus, load_slots)
