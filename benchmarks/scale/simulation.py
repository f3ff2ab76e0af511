"""A discrete-event model of the embedding stream on a cluster: the work of `pipeline.embedding.stream`, per unit.
unit.

    pending units -> load task (a CPU slot; fetch and decode overlap) -> actor (4 units in flight each, one at a time)
    -> write task -> acknowledgement to the one driver; whole waves are sealed one after the other while others go on

Faults: nodes die as a Poisson process and come back empty after a delay. Their work in flight is done again, their
acknowledged work is not. Some nodes are slow, and every duration scatters. A store answers a limited number of GET/s
per prefix, refuses requests that come a second too early, and is then left alone for a while, as by
`storage.rate_limit`.

The model knows seconds and counts, not where they come from: `benchmarks.scale.simulate` has the measured ones. It is a
heap and a few deques, because a day of 1,024 GPUs is millions of units: simpy 4.1.2 does 26,000 a second, this 170,000.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush

from benchmarks.scale.scenario import Cluster, Faults, Job, Outcome, Seconds
from pipeline.planning.plan import wave_sizes

ACTOR_UNITS = 4  # `max_tasks_in_flight_per_actor` of the stream
ADMITTED = 2 * ACTOR_UNITS  # loading or loaded, per actor: Ray's downstream_capacity_backpressure_ratio
REFUSED_AFTER_SECONDS = 1.0  # how far a prefix may be asked ahead of its rate
MIDDLE = (4, 6)  # tenths of the units between which the rate is taken: neither filling nor draining
FIRST_PAUSE_SECONDS, MOST_PAUSE_SECONDS = 0.5, 10.0  # of `pace` and `storage.max_pause_seconds`


@dataclass(slots=True)
class _Node:
    speed: float
    slots: int
    life: int = 0
    busy: int = 0
    loading: int = 0
    admitted: int = 0
    held: set[int] = field(default_factory=set)  # all units that are lost with it
    queue: deque[int] = field(default_factory=deque)


class Simulation:
    """One run; the same seed gives the same one."""

    def __init__(
        self, job: Job, cluster: Cluster, seconds: Seconds, faults: Faults | None = None, seed: int = 0
    ) -> None:
        self._job, self._cluster, self._seconds, self._faults = job, cluster, seconds, faults or Faults()
        self._random = random.Random(seed)
        sizes = wave_sizes(job.waves, job.images)
        self._wave_units = [-(-size // job.unit_images) for size in sizes]
        self._wave_images = sizes
        self._wave = [wave for wave, units in enumerate(self._wave_units) for _ in range(units)]
        self._images = [
            min(job.unit_images, size - start) for size in sizes for start in range(0, size, job.unit_images)
        ]
        slow = round(self._faults.slow_share * cluster.nodes)
        factors = [self._faults.slow_factor] * slow + [1.0] * (cluster.nodes - slow)
        self._nodes = [_Node(factor, cluster.load_slots) for factor in factors]
        self._pending, self._ready = deque(range(len(self._wave))), deque[tuple[int, int, int]]()
        self._idle, self._room = deque(range(cluster.nodes)), set[int]()
        self._admitted, self._live = 0, cluster.nodes
        self._left, self._next_wave, self._durable = self._wave_units.copy(), 0, 0
        self._whole: list[float] = [0.0] * len(sizes)
        self._lags: list[float] = []
        self._heap: list[tuple[float, int, Callable[[int, int, int], None], int, int, int]] = []
        self._order = itertools.count()
        self._now = self._driver_free = cluster.start_seconds
        self._driver_busy = self._actors_busy = self._store_free = self._sealed = 0.0
        self._middle = [0.0, 0.0]
        self._losses = self._repeated = self._refused = self._events = 0

    def run(self) -> Outcome:
        """Until every unit is acknowledged."""
        for node in range(len(self._nodes)):
            self._at(self._now + self._cluster.model_seconds, self._actors_up, -1, node)
            self._expect_loss(node)
        self._start_loads()
        while self._durable < len(self._wave):
            self._now, _, handle, unit, node, life = heappop(self._heap)
            self._events += 1
            handle(unit, node, life)
        seconds, (first, last) = self._driver_free, self._middle
        begin, end = (share * len(self._wave) // 10 for share in MIDDLE)
        middle = sum(self._images) / len(self._wave) * (end - begin)
        return Outcome(
            seconds=seconds,
            published_seconds=self._sealed,
            rate=middle / (last - first) if last > first else sum(self._images) / seconds,
            actors_busy=self._actors_busy / (seconds * self._cluster.nodes * self._cluster.actors),
            driver_busy=self._driver_busy / seconds,
            losses=self._losses,
            repeated=self._repeated,
            refused=self._refused,
            lags=self._lags,
            events=self._events,
        )

    def _at(self, time: float, handle: Callable[[int, int, int], None], unit: int, node: int) -> None:
        heappush(self._heap, (time, next(self._order), handle, unit, node, self._nodes[node].life))

    def _scatter(self) -> float:
        sigma = self._faults.sigma
        return math.exp(self._random.gauss(-sigma * sigma / 2, sigma)) if sigma else 1.0

    def _driver(self, seconds: float) -> float:
        """The time at which the driver, which does one thing at a time, will be done with this."""
        self._driver_free = max(self._now, self._driver_free) + seconds
        self._driver_busy += seconds
        return self._driver_free

    def _start_loads(self) -> None:
        while self._pending and self._idle and self._admitted < ADMITTED * self._live * self._cluster.actors:
            number = self._idle.popleft()
            node = self._nodes[number]
            if node.slots <= 0:
                continue
            node.slots -= 1
            if node.slots:
                self._idle.append(number)
            unit = self._pending.popleft()
            self._admitted += 1
            node.admitted += 1
            node.held.add(unit)
            self._at(self._driver(self._seconds.dispatch), self._load, unit, number)

    def _load(self, unit: int, number: int, life: int, refusals: int = 0) -> None:
        node, faults = self._nodes[number], self._faults
        if node.life != life:
            return
        wait = max(0.0, self._store_free - self._now)
        if wait > REFUSED_AFTER_SECONDS:
            self._refused += 1
            pause = min(MOST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2**refusals) * self._random.uniform(0.5, 1.0)
            again = lambda unit, number, life: self._load(unit, number, life, refusals + 1)  # noqa: E731
            self._at(self._now + pause, again, unit, number)
            return
        images = self._images[unit]
        self._store_free = max(self._store_free, self._now)
        self._store_free += images * faults.requests_image / faults.requests_per_second
        node.loading += 1
        sealing = self._job.shards / len(self._nodes) if self._now < self._sealed else 0.0
        crowd = max(1.0, node.loading / max(1.0, self._cluster.cores - sealing))
        work = (images * self._seconds.load_image + self._seconds.load_unit) * crowd
        taken = max(work, images * self._seconds.fetch_image) + self._seconds.fetch_unit
        taken *= self._scatter() * node.speed
        self._at(self._now + wait + taken, self._loaded, unit, number)

    def _loaded(self, unit: int, number: int, life: int) -> None:
        node = self._nodes[number]
        if node.life != life:
            return
        node.loading -= 1
        node.slots += 1
        if node.slots == 1:
            self._idle.append(number)
        if number in self._room:
            self._assign(unit, number, number)
        elif self._room:
            self._assign(unit, number, next(iter(self._room)))
        else:
            self._ready.append((unit, number, life))
        self._start_loads()

    def _assign(self, unit: int, source: int, number: int) -> None:
        node = self._nodes[number]
        self._admitted -= 1
        self._nodes[source].admitted -= 1
        self._nodes[source].held.discard(unit)
        node.held.add(unit)
        node.queue.append(unit)
        self._embed(number)
        if node.busy + len(node.queue) >= ACTOR_UNITS * self._cluster.actors:
            self._room.discard(number)

    def _embed(self, number: int) -> None:
        node = self._nodes[number]
        while node.queue and node.busy < self._cluster.actors:
            unit = node.queue.popleft()
            node.busy += 1
            taken = self._images[unit] * self._seconds.embed_image + self._seconds.embed_unit
            taken *= self._scatter() * node.speed
            self._actors_busy += taken
            self._at(self._now + taken, self._embedded, unit, number)

    def _embedded(self, unit: int, number: int, life: int) -> None:
        node = self._nodes[number]
        if node.life != life:
            return
        node.busy -= 1
        self._at(self._now + self._seconds.write_unit, self._written, unit, number)
        self._room.add(number)
        self._feed(number)
        self._embed(number)

    def _feed(self, number: int) -> None:
        """Give loaded units to a node's actors while there is room."""
        while self._ready and number in self._room:
            unit, source, life = self._ready.popleft()
            if self._nodes[source].life == life:
                self._assign(unit, source, number)
        self._start_loads()

    def _written(self, unit: int, number: int, life: int) -> None:
        if self._nodes[number].life != life:
            return
        self._nodes[number].held.discard(unit)
        time = self._driver(self._seconds.ack)
        self._durable += 1
        for place, share in enumerate(MIDDLE):
            if self._durable == share * len(self._wave) // 10:
                self._middle[place] = time
        wave = self._wave[unit]
        self._left[wave] -= 1
        self._whole[wave] = time
        while self._next_wave < len(self._left) and not self._left[self._next_wave]:
            self._seal(self._next_wave, time)
            self._next_wave += 1

    def _seal(self, wave: int, time: float) -> None:
        tasks, cores = self._job.shards, self._cluster.cores * self._live
        one = self._seconds.seal_part * self._wave_units[wave]
        one += self._seconds.seal_image * self._wave_images[wave] / tasks + self._seconds.seal
        taken = one * max(1.0, tasks / max(1.0, cores))  # each is a sum over thousands of reads: no scatter
        self._sealed = max(self._sealed, time) + taken
        self._lags.append(self._sealed - self._whole[wave])

    def _expect_loss(self, number: int) -> None:
        if self._faults.losses:
            self._at(self._now + 3600 * self._random.expovariate(self._faults.losses), self._lose, -1, number)

    def _lose(self, _: int, number: int, life: int) -> None:
        node = self._nodes[number]
        if node.life != life:
            return
        self._losses += 1
        lost = sorted(node.held)
        self._repeated += sum(self._images[unit] for unit in lost)
        self._admitted -= node.admitted
        self._live -= 1
        self._room.discard(number)
        self._nodes[number] = _Node(node.speed, slots=0, life=life + 1)
        again = lambda *_: self._ask_again(lost)  # noqa: E731
        self._at(self._now + self._faults.detect_seconds, again, -1, number)
        self._at(self._now + self._faults.replace_seconds, self._replace, -1, number)

    def _ask_again(self, units: list[int]) -> None:
        self._pending.extendleft(reversed(units))
        self._start_loads()

    def _replace(self, _: int, number: int, life: int) -> None:
        self._nodes[number].slots = self._cluster.load_slots
        self._idle.append(number)
        self._live += 1
        self._expect_loss(number)
        self._at(self._now + self._cluster.model_seconds, self._actors_up, -1, number)
        self._start_loads()

    def _actors_up(self, _: int, number: int, life: int) -> None:
        if self._nodes[number].life == life:
            self._room.add(number)
            self._feed(number)
