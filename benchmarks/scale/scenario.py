"""Input and output of `benchmarks.scale.simulation`, as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Job:
    """The work: a gallery, cut as the plan cuts it."""

    images: int
    unit_images: int
    waves: int | tuple[float, ...] = 100
    shards: int = 64


@dataclass(frozen=True, slots=True)
class Cluster:
    """Equal nodes. `load_slots` load tasks run on a node at once, and share its `cores`.

    Attributes:
        model_seconds: from a node being there to its actors taking units.
        start_seconds: before the first unit is asked for.
    """

    nodes: int
    actors: int = 8
    cores: float = 96.0
    load_slots: int = 96
    model_seconds: float = 0.0
    start_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Seconds:
    """How long each step takes if it never waits for another.

    Attributes:
        load_image: CPU, per image, to fetch and decode.
        load_unit: CPU, per unit.
        fetch_unit: of a load task waiting for the row group that names its images.
        fetch_image: of a load task waiting for its requests, per image; overlaps with the CPU's work.
        embed_image: of an actor, per image.
        embed_unit: of an actor, per unit.
        write_unit: from embedded to durable.
        dispatch: of the driver, per unit, before its load task starts.
        ack: of the driver, per unit.
        seal: per wave, whatever its size.
        seal_part: of one sealing task, per unit of the wave.
        seal_image: of one sealing task, per image of its (shard, wave).
    """

    load_image: float
    embed_image: float
    load_unit: float = 0.0
    fetch_unit: float = 0.0
    fetch_image: float = 0.0
    embed_unit: float = 0.0
    write_unit: float = 0.0
    dispatch: float = 0.0
    ack: float = 0.0
    seal: float = 0.0
    seal_part: float = 0.0
    seal_image: float = 0.0


@dataclass(frozen=True, slots=True)
class Faults:
    """The faults. `sigma` is of the lognormal factor, of mean 1, on every unit's load and embedding.

    Attributes:
        losses: per node and hour, without notice.
        detect_seconds: until the units of a lost node are asked for again.
        replace_seconds: until another node is there.
        slow_share, slow_factor: so many nodes take so many times as long.
        requests_image, requests_per_second: GETs of the images, and what the store answers; inf is no limit.
    """

    losses: float = 0.0
    detect_seconds: float = 17.0
    replace_seconds: float = 180.0
    sigma: float = 0.0
    slow_share: float = 0.0
    slow_factor: float = 1.0
    requests_image: float = 1.0
    requests_per_second: float = math.inf


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a simulated run.

    Attributes:
        seconds: to the last acknowledgement, and `published_seconds` to the last commit.
        rate: images per second in the middle of the run, so without start and end.
        actors_busy, driver_busy: shares of the time; an actor's with what was lost.
        losses: nodes lost; `repeated` images were in flight on them and were loaded again.
        refused: load tasks that the store told to wait, each as often as it did.
        lags: per wave, from its last acknowledgement to its commit.
        events: of the simulation.
    """

    seconds: float
    published_seconds: float
    rate: float
    actors_busy: float
    driver_busy: float
    losses: int
    repeated: int
    refused: int
    lags: list[float]
    events: int
