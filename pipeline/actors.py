"""How many embedding actors there are, and what each task of the stream reserves in Ray."""

from __future__ import annotations

from dataclasses import dataclass

import ray

from pipeline.config import Backfill
from pipeline.errors import ConfigError

LOAD_CPUS = 1.0  # as reading the numbers of the units, so that Ray makes one task of the two
WRITE_CPUS = 0.25


@dataclass(frozen=True, slots=True)
class Pool:
    """How many embedding actors there are at least, at first and at most, and what Ray reserves for each."""

    smallest: int
    first: int
    largest: int
    cpus: float
    gpus: float


def actor_pool(backfill: Backfill, device: str) -> Pool:
    """The embedding actors that suit the settings and the cluster as it is now.

    Raises:
        ConfigError: the cluster cannot hold the smallest pool and a task beside it.
    """
    cluster = ray.cluster_resources()
    cpus, threads = cluster.get("CPU", 0.0), backfill.threads_per_actor
    gpus = backfill.gpus_per_actor
    if gpus is None:
        gpus = 1.0 if device != "cpu" and cluster.get("GPU", 0) else 0.0
    reserved = 0.0 if gpus else threads / 4 if backfill.cpus_per_actor is None else backfill.cpus_per_actor
    if reserved == LOAD_CPUS:
        reserved += 0.01  # of equal requests Ray makes one operator: an actor would load its units itself, in turns
    _check_room(cpus, backfill.min_actors, reserved)
    fitting = int(cluster.get("GPU", 0) / gpus) if gpus else int(cpus / threads)
    if reserved:
        fitting = min(fitting, int((cpus - LOAD_CPUS - WRITE_CPUS) / reserved))
    largest = backfill.max_actors or max(backfill.min_actors, fitting)
    first = min(largest, max(backfill.min_actors, fitting))
    return Pool(backfill.min_actors, first, largest, reserved, gpus)


def _check_room(cpus: float, actors: int, reserved: float) -> None:
    """Actors that hold every CPU leave none for the tasks that feed them, and the stream would hang."""
    needed = actors * reserved + LOAD_CPUS + WRITE_CPUS
    if cpus < needed:
        raise ConfigError(
            "the cluster is too small for the embedding stream",
            expected=f"{needed:g} CPUs: {actors * reserved:g} for actors, the rest for tasks",
            found=f"{cpus:g} CPUs",
            where="backfill.min_actors, backfill.cpus_per_actor",
            remedy="start fewer actors, give each less CPU, or add nodes",
        )
