"""The embedding actors of any cluster: as many as there is room for, never so many that nothing feeds them."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest
import ray

from pipeline.config.tree import BackfillSettings
from pipeline.embedding import actor_pool as actors
from pipeline.embedding.actor_pool import LOAD_CPUS, WRITE_CPUS, Pool, actor_pool
from pipeline.errors import ConfigError, TransientError


def pool(cpus: float, gpus: float = 0, device: str = "auto", **settings: Any) -> Pool:
    """The pool on this machine alone, with these resources."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setattr(ray, "cluster_resources", lambda: {"CPU": cpus} | ({"GPU": gpus} if gpus else {}))
        return actor_pool(BackfillSettings(**settings), device)


class Autoscaler:
    """A cluster without nodes that brings what a placement group asks for at the second look.

    In Ray's place: a real autoscaler takes seconds, and is what tests/cluster/test_autoscaler.py has.
    """

    def __init__(self, patch: pytest.MonkeyPatch, brings: dict[str, float]) -> None:
        self.resources: dict[str, float] = {}
        self.asked: list[list[dict[str, float]]] = []
        self.looks = self.removed = 0
        self._brings = brings
        patch.setenv("RAY_ADDRESS", "cluster:6379")
        patch.setattr(ray, "cluster_resources", lambda: self.resources)
        patch.setattr(actors, "placement_group", self._ask)
        patch.setattr(actors, "remove_placement_group", self._remove)
        patch.setattr(actors, "_SAY_SECONDS", 0.01)

    def _ask(self, bundles: list[dict[str, float]]) -> Autoscaler:
        self.asked.append(bundles)
        return self

    def _remove(self, group: Autoscaler) -> None:
        self.removed += 1

    def wait(self, seconds: float) -> bool:
        time.sleep(seconds)
        self.looks += 1
        if self._brings and self.looks == 2:
            self.resources = self._brings
        return bool(self.resources)


@pytest.mark.parametrize("cpus", [2, 3, 4, 16, 96])
def test_a_cluster_without_gpus_has_an_actor_per_core_and_room_for_tasks(cpus: int) -> None:
    found = pool(cpus)
    assert found == Pool(smallest=1, first=cpus, largest=cpus, cpus=0.25, gpus=0.0)
    assert found.first * found.cpus + LOAD_CPUS + WRITE_CPUS <= cpus


def test_actors_never_ask_for_what_a_load_task_asks_for() -> None:
    """Ray would fuse the two, and reading would wait for embedding."""
    for settings in ({}, {"cpus_per_actor": LOAD_CPUS}, {"threads_per_actor": 4}, {"cpus_per_actor": 1}):
        assert pool(8, **settings).cpus != LOAD_CPUS


def test_a_single_core_has_one_actor() -> None:
    assert pool(1.5) == Pool(1, 1, 1, cpus=0.25, gpus=0.0)


def test_actors_of_more_threads_are_fewer_and_reserve_more() -> None:
    assert pool(16, threads_per_actor=4) == Pool(1, 4, 4, cpus=1.01, gpus=0.0)


def test_a_cluster_with_gpus_has_an_actor_per_gpu_and_these_reserve_no_core() -> None:
    assert pool(8, gpus=4) == Pool(1, 4, 4, cpus=0.0, gpus=1.0)
    assert pool(8, gpus=4, gpus_per_actor=0.5) == Pool(1, 8, 8, cpus=0.0, gpus=0.5)
    assert pool(8, gpus=4, device="cpu").gpus == 0.0


def test_the_pool_grows_to_the_configured_maximum_with_the_cluster() -> None:
    assert pool(2, max_actors=32) == Pool(1, 2, 32, cpus=0.25, gpus=0.0)
    assert pool(16, max_actors=3) == Pool(1, 3, 3, cpus=0.25, gpus=0.0)
    assert pool(8, gpus=2, gpus_per_actor=1.0, min_actors=2, max_actors=8) == Pool(2, 2, 8, cpus=0.0, gpus=1.0)


@pytest.mark.parametrize(
    ("device", "settings"),
    [
        ("auto", {"min_actors": 4}),
        ("auto", {"cpus_per_actor": 2}),
        ("auto", {"gpus_per_actor": 1}),
        ("cuda", {}),
    ],
)
def test_a_machine_that_holds_no_smallest_pool_with_a_task_beside_it_is_refused(
    device: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="too small"):
        pool(2, device=device, **settings)


def test_a_cluster_without_nodes_is_asked_for_them_and_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = Autoscaler(monkeypatch, brings={"CPU": 8.0, "GPU": 2.0})
    with caplog.at_level(logging.WARNING, "pipeline.embedding.actor_pool"):
        found = actor_pool(BackfillSettings(gpus_per_actor=1, min_actors=2, max_actors=6), "auto")
    assert found == Pool(2, 2, 6, cpus=0.0, gpus=1.0)
    assert cluster.asked == [[{"GPU": 1.0}, {"GPU": 1.0}, {"CPU": LOAD_CPUS}, {"CPU": WRITE_CPUS}]]
    assert cluster.removed == 1
    assert caplog.messages[0].startswith("waiting for nodes: need 1.25 CPUs, 2 GPUs, have 0 CPUs, 0 GPUs")
    assert len(caplog.messages) == 2


def test_a_cluster_that_gets_no_nodes_in_time_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Autoscaler(monkeypatch, brings={})
    with pytest.raises(TransientError, match=r"not enough nodes joined within 0\.05 s"):
        actor_pool(BackfillSettings(wait_seconds=0.05), "auto")
    assert cluster.removed == 1
