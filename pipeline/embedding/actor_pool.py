"""Size the pool of embedding actors; if the cluster is too small, ask its autoscaler for nodes and wait for them."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from pipeline.config.tree import BackfillSettings
from pipeline.errors import ConfigError, TransientError

LOAD_CPUS = 1.0  # the same as for reading unit numbers, so that Ray fuses both into one task
WRITE_CPUS = 0.25

_LOG = logging.getLogger(__name__)
_SAY_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Pool:
    """The number of embedding actors at least, at first and at most, and what Ray reserves for each."""

    smallest: int
    first: int
    largest: int
    cpus: float
    gpus: float


def actor_pool(backfill: BackfillSettings, device: str) -> Pool:
    """Size the pool by the settings and the cluster; waits until the cluster has room for the smallest pool.

    Raises:
        ConfigError: this machine, without a cluster, is too small for the smallest pool and one task beside it.
        TransientError: the cluster is too small, and no node came within `backfill.wait_seconds`.
    """
    threads, gpus = backfill.threads_per_actor, _gpus_per_actor(backfill, device)
    reserved = 0.0 if gpus else threads / 4 if backfill.cpus_per_actor is None else backfill.cpus_per_actor
    if reserved == LOAD_CPUS:
        reserved += 0.01  # Ray fuses operators with equal requests: the actor would then load its own units
    actor = {"CPU": reserved, "GPU": gpus}
    _wait_for_room([*[actor] * backfill.min_actors, {"CPU": LOAD_CPUS}, {"CPU": WRITE_CPUS}], backfill.wait_seconds)
    cluster = ray.cluster_resources()
    cpus = cluster.get("CPU", 0.0)
    fitting = int(cluster.get("GPU", 0) / gpus) if gpus else int(cpus / threads)
    if reserved:
        fitting = min(fitting, int((cpus - LOAD_CPUS - WRITE_CPUS) / reserved))
    largest = backfill.max_actors or max(backfill.min_actors, fitting)
    first = min(largest, max(backfill.min_actors, fitting))
    return Pool(backfill.min_actors, first, largest, reserved, gpus)


def may_grow() -> bool:
    """Whether nodes may join the cluster; one that was started for this command alone cannot grow."""
    return bool(os.environ.get("RAY_ADDRESS"))


def _gpus_per_actor(backfill: BackfillSettings, device: str) -> float:
    """As configured; else one GPU if the device asks for it or the cluster has any."""
    if backfill.gpus_per_actor is not None:
        return backfill.gpus_per_actor
    if device == "auto":
        return 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0
    return 0.0 if device == "cpu" else 1.0


def _wait_for_room(bundles: list[dict[str, float]], seconds: float) -> None:
    """Return once the cluster has these resources; without free CPUs the tasks that feed the actors never start."""
    needed = {name: sum(bundle.get(name, 0.0) for bundle in bundles) for name in ("CPU", "GPU")}
    if _has(needed):
        return
    details = {
        "expected": _say(needed) + ", for backfill.min_actors actors and the tasks that feed them",
        "found": _say(ray.cluster_resources()),
        "where": "backfill.min_actors, backfill.cpus_per_actor, backfill.gpus_per_actor",
    }
    if not may_grow():
        remedy = "start fewer actors, reserve less for each, or add nodes"
        raise ConfigError("the cluster is too small for the embedding stream", **details, remedy=remedy)
    wanted = [{name: count for name, count in bundle.items() if count} for bundle in bundles]
    group = placement_group([bundle for bundle in wanted if bundle])
    try:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            there = _say(ray.cluster_resources())
            _LOG.warning("waiting for nodes: need %s, have %s; waiting up to %.0f s more", _say(needed), there, left)
            if group.wait(min(left, _SAY_SECONDS)):
                return
    finally:
        remove_placement_group(group)
    raise TransientError(
        f"the cluster is too small for the embedding stream, and not enough nodes joined within {seconds:g} s",
        **details,
        remedy="see `ray status`; raise backfill.wait_seconds, lower backfill.min_actors, or add nodes",
    )


def _has(needed: dict[str, float]) -> bool:
    cluster = ray.cluster_resources()
    return all(cluster.get(name, 0.0) >= count for name, count in needed.items())


def _say(resources: dict[str, float]) -> str:
    return f"{resources.get('CPU', 0.0):g} CPUs, {resources.get('GPU', 0.0):g} GPUs"
