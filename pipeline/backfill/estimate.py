"""Estimate the time and cost of a backfill, and its settings, from rates measured on a sample. Pure.

An actor embeds; a load task fetches and decodes on a core of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from pipeline.config.tree import TelemetrySettings

WAVE_CPU_SECONDS = 0.4
"""CPU seconds to publish a wave, measured on two cores; they are taken from the stream."""

_WITHIN = 0.97
"""The smallest batch size within this share of the fastest rate is recommended."""


@dataclass(frozen=True, slots=True)
class Rates:
    """The rates that `backfill.profile` measured; `fetch`, `decode`, `forward` and `stream` in images per second."""

    images: int  # of the sample that went through the stream
    bytes_per_image: float  # encoded
    bytes_fetched_per_image: float  # with the gaps between ranges
    requests_per_image: float  # to the store, or reads of files
    fetch: float  # of a load task that only fetches
    decode: float  # of a core that only decodes and preprocesses, or of one actor's device
    forward: Mapping[int, float]  # of one actor alone, by batch size
    stream: float  # of everything together, with `actors`; the estimate is computed from it
    start_seconds: float  # from the start of a stream to its first durable unit, less that unit's own time
    actors: int  # in the stream
    cpus: float  # of the cluster
    gpus: float
    nodes: int
    gpus_per_actor: float  # 0 on CPU
    device: str  # of the actors, as torch names it
    decodes_on_device: bool = False  # else the load tasks decode

    @property
    def load(self) -> float:
        """Images per second of one load task: it fetches, and decodes unless the device does."""
        return self.fetch if self.decodes_on_device else 1 / (1 / self.fetch + 1 / self.decode)

    def actor(self, batch_size: int) -> float:
        """Images per second of one actor; it decodes too if the device does."""
        forward = self.forward[batch_size]
        return 1 / (1 / self.decode + 1 / forward) if self.decodes_on_device else forward


@dataclass(frozen=True, slots=True)
class Estimate:
    """The expected time and cost, and the recommended settings."""

    images: int  # of the plan, without the pairs of the fit
    bytes: int  # to fetch for them
    seconds: float  # from the start of the stream to the last durable image; without Ray's start and snapshot 0
    node_hours: float  # of the whole cluster for that time
    gpu_hours: float
    money: float | None  # in the currency of the configured prices; None without prices
    bottleneck: str  # the slowest of `fetch`, `decode` and `forward`
    batch_size: int  # the smallest that is about as fast as the fastest
    max_actors: int  # that fit on the cluster's GPUs, or else on its cores
    loading_cpus_per_actor: float  # cores that read (and decode, unless the device does) for one actor
    rates: Rates = field(repr=False)
    made_unix_seconds: float = 0.0  # when the rates were measured; 0 in files of earlier versions

    def to_json(self) -> dict[str, object]:
        """The form of `plan --json` and `plan/estimate.json`."""
        return asdict(self)


def estimate(rates: Rates, images: int, waves: int, largest_pool: int, prices: TelemetrySettings) -> Estimate:
    """The time and cost to embed all images of the plan, and the settings to use.

    Args:
        rates: measured on the cluster that runs the backfill.
        images: of the plan, without the pairs of the fit.
        waves: of the plan.
        largest_pool: actors that fit on the cluster, whatever is configured.
        prices: per node and per GPU.
    """
    publishing = waves * WAVE_CPU_SECONDS / max(1.0, rates.cpus)
    seconds = rates.start_seconds + images / rates.stream + publishing
    hours = seconds / 3600
    node_hours, gpu_hours = hours * rates.nodes, hours * rates.gpus
    priced = prices.node_hour_price or prices.gpu_hour_price
    batch_size = best_batch(rates.forward)
    return Estimate(
        images=images,
        bytes=round(images * rates.bytes_fetched_per_image),
        seconds=seconds,
        node_hours=node_hours,
        gpu_hours=gpu_hours,
        money=node_hours * prices.node_hour_price + gpu_hours * prices.gpu_hour_price if priced else None,
        bottleneck=_bottleneck(rates, batch_size),
        batch_size=batch_size,
        max_actors=largest_pool,
        loading_cpus_per_actor=math.ceil(round(10 * rates.actor(batch_size) / rates.load, 6)) / 10,
        rates=rates,
    )


def best_batch(forward: Mapping[int, float]) -> int:
    """The smallest batch size that is about as fast as the fastest."""
    most = max(forward.values())
    return min(size for size, rate in forward.items() if rate >= _WITHIN * most)


def _bottleneck(rates: Rates, batch_size: int) -> str:
    """Actors on GPUs leave the cores to load tasks; actors on CPU share them, so the slower step counts."""
    actors, loads = (rates.actors, rates.cpus) if rates.gpus_per_actor else (1, 1)
    if actors * rates.actor(batch_size) <= loads * rates.load:
        return "decode" if rates.decodes_on_device and rates.decode < rates.forward[batch_size] else "forward"
    return "fetch" if rates.decodes_on_device or rates.fetch < rates.decode else "decode"
