"""What a backfill will take, and which settings suit it, from rates measured on a sample; pure.

Legend: an actor embeds; a load task fetches and decodes on a core of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from pipeline.config.tree import TelemetrySettings

WAVE_CPU_SECONDS = 0.4
"""What publishing a wave takes of the cores that the stream has else, on two of them; small where there are many."""

_WITHIN = 0.97
"""A smaller batch is as good as the fastest one if it reaches this share of its rate."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What `tuner` measured.

    Attributes:
        images: in the sample that went through the stream.
        bytes_per_image: encoded, as needed.
        bytes_fetched_per_image: as they came, with the gaps between ranges.
        requests_per_image: to the store, or reads of files.
        fetch: images per second of one load task that only fetches.
        decode: images per second of one core that only decodes and preprocesses; or of one actor's device.
        decodes_on_device: whether the actor decodes; else the load tasks do.
        forward: images per second of one actor alone, by batch size.
        stream: images per second of everything together, with `actors`; what the estimate goes by.
        start_seconds: from the start of a stream to its first durable unit, less that unit's own time.
        actors: in the stream.
        cpus, gpus, nodes: of the cluster, when it was measured.
        gpus_per_actor: 0 on CPU.
        device: where the actors run, as torch names it.
    """

    images: int
    bytes_per_image: float
    bytes_fetched_per_image: float
    requests_per_image: float
    fetch: float
    decode: float
    forward: Mapping[int, float]
    stream: float
    start_seconds: float
    actors: int
    cpus: float
    gpus: float
    nodes: int
    gpus_per_actor: float
    device: str
    decodes_on_device: bool = False

    @property
    def load(self) -> float:
        """Images per second of one load task: it fetches, then decodes what the actor does not."""
        return self.fetch if self.decodes_on_device else 1 / (1 / self.fetch + 1 / self.decode)

    def actor(self, batch_size: int) -> float:
        """Images per second of one actor with all that it does."""
        forward = self.forward[batch_size]
        return 1 / (1 / self.decode + 1 / forward) if self.decodes_on_device else forward


@dataclass(frozen=True, slots=True)
class Estimate:
    """What is to be expected, and what to set.

    Attributes:
        images: of the plan that are to be embedded: all but the pairs of the fit.
        bytes: to be fetched for them.
        seconds: from the start of the stream to the last durable image, on the cluster and with the settings as they
            are; Ray's start and snapshot 0 come before it.
        node_hours, gpu_hours: of the whole cluster for that time.
        money: in the currency of the configured prices, None where none is configured.
        bottleneck: `fetch`, `decode` or `forward`: what is used up first.
        batch_size: the smallest that is about as fast as the fastest.
        max_actors: how many the cluster's GPUs, or else its cores, hold.
        loading_cpus_per_actor: cores that read, and decode unless the device does, what one actor embeds.
        rates: what it was computed from.
        made_unix_seconds: when they were measured; 0 if an earlier version did not say.
    """

    images: int
    bytes: int
    seconds: float
    node_hours: float
    gpu_hours: float
    money: float | None
    bottleneck: str
    batch_size: int
    max_actors: int
    loading_cpus_per_actor: float
    rates: Rates = field(repr=False)
    made_unix_seconds: float = 0.0

    def to_json(self) -> dict[str, object]:
        """As `plan --json` and `plan/estimate.json` have it."""
        return asdict(self)


def estimate(rates: Rates, images: int, waves: int, largest_pool: int, prices: TelemetrySettings) -> Estimate:
    """The time and money of embedding `images`, and the settings that suit.

    Args:
        rates: measured on the cluster that it will run on.
        images: of the whole plan but for the pairs of the fit, whatever else is embedded already.
        waves: in which they are published.
        largest_pool: actors that the cluster has room for, whatever is configured.
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
    """The smallest batch size whose rate is about that of the fastest."""
    most = max(forward.values())
    return min(size for size, rate in forward.items() if rate >= _WITHIN * most)


def _bottleneck(rates: Rates, batch_size: int) -> str:
    """Actors on GPUs have the cores for loading; actors on CPU share them, so the dearer step is what counts."""
    actors, loads = (rates.actors, rates.cpus) if rates.gpus_per_actor else (1, 1)
    if actors * rates.actor(batch_size) <= loads * rates.load:
        return "decode" if rates.decodes_on_device and rates.decode < rates.forward[batch_size] else "forward"
    return "fetch" if rates.decodes_on_device or rates.fetch < rates.decode else "decode"
