"""The embedding actors of any cluster: as many as there is room for, never so many that nothing feeds them."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from pipeline.actors import LOAD_CPUS, WRITE_CPUS, Pool, actor_pool
from pipeline.config import Backfill
from pipeline.errors import ConfigError


def pool(cpus: float, gpus: float = 0, device: str = "auto", **settings: Any) -> Pool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "cluster_resources", lambda: {"CPU": cpus} | ({"GPU": gpus} if gpus else {}))
        return actor_pool(Backfill(**settings), device)


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
    assert pool(8, gpus=0, gpus_per_actor=1.0, min_actors=2, max_actors=8) == Pool(2, 2, 8, cpus=0.0, gpus=1.0)


def test_a_cluster_that_holds_the_smallest_pool_but_no_task_is_refused() -> None:
    with pytest.raises(ConfigError, match="too small"):
        pool(2, min_actors=4)
    with pytest.raises(ConfigError, match="too small"):
        pool(2, cpus_per_actor=2)
