"""What is done and what is left: units counted against the plan. Pure but for reading the log's listing.

The driver counts acknowledgements, `status` counts what storage holds; both come to the same `Progress`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace

from pipeline.embedding import rejects, vector_log
from pipeline.embedding.vector_log import VectorLog
from pipeline.planning.plan import FROM_PAIRS, Plan
from pipeline.reporting.throughput import SHORTEST_SECONDS, Throughput, throughput
from pipeline.run import Run
from pipeline.schema import Unit, UnitAck

_RATE_WINDOW_SECONDS = 60.0
_LOG_WINDOW_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Reading:
    """What reading the images has cost this driver so far; the sums of its acknowledgements.

    Attributes:
        retries: of its tasks, and of its own requests, by which it publishes.
        seconds: since the first unit was asked for, whatever else took its time meanwhile.
    """

    images: int = 0
    requests: int = 0
    bytes_fetched: int = 0
    bytes_needed: int = 0
    retries: int = 0
    changed: int = 0
    seconds: float = 0.0

    def plus(self, ack: UnitAck, seconds: float) -> Reading:
        """With one more unit."""
        return Reading(
            self.images + ack.embedded + ack.rejected,
            self.requests + ack.requests,
            self.bytes_fetched + ack.bytes_fetched,
            self.bytes_needed + ack.bytes_needed,
            self.retries + ack.retries,
            self.changed + ack.changed,
            seconds,
        )

    def with_driver(self, retries: int) -> Reading:
        """With what the driver itself had to repeat."""
        return replace(self, retries=self.retries + retries)

    def __str__(self) -> str:
        """One line for people."""
        over = self.bytes_fetched / self.bytes_needed if self.bytes_needed else 0.0
        return (
            f"{self.requests / max(1, self.images):.3g} requests per image, {over:.3g} bytes fetched per byte needed, "
            f"{self.requests / max(self.seconds, 1e-6):,.0f} GET/s, {self.retries:,} retries, {self.changed:,} changed"
        )


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a backfill stands.

    Attributes:
        gallery: images in the manifest: those in the plan, and those that the old encoder could not read.
        durable: images whose new embedding is in the vector log.
        rejected: images that could not be embedded, by the new encoder or before the plan by the old one.
        published: images whose new embedding is in the latest commit.
        wave: the last wave that is published, 0 before the first.
        waves: the last wave of the plan.
        images_per_second: over the last minute of work, None for less than two units or five seconds of it.
        reading: what this driver's units took to read.
        stopped: which condition has stopped the backfill, with the figures; None where none has.
        from_pairs: images that were embedded for the fit; they count as durable, and with commit 0 as published.
    """

    gallery: int
    durable: int
    rejected: int
    published: int
    wave: int
    waves: int
    images_per_second: float | None
    reading: Reading = Reading()
    stopped: str | None = None
    from_pairs: int = 0

    @property
    def left(self) -> int:
        """Images that are neither durable nor rejected."""
        return self.gallery - self.durable - self.rejected

    @property
    def eta_seconds(self) -> float | None:
        """Seconds until no image is left, at the present rate; None without a rate."""
        if self.left == 0:
            return 0.0
        return self.left / self.images_per_second if self.images_per_second else None


class Tracker:
    """Which units are durable, and which waves have become whole."""

    def __init__(
        self,
        plan: Plan,
        log: VectorLog,
        max_reject_fraction: float,
        allowance: int = 0,
        parts: Iterable[tuple[int, int]] | None = None,
    ) -> None:
        """Takes what the log holds as done.

        Args:
            plan: the plan.
            log: the log.
            max_reject_fraction: of a wave.
            allowance: so many rejects of a wave are borne whatever their fraction.
            parts: the (wave, unit) of the log's parts, where it has been listed already.
        """
        self._plan = plan
        self._max_reject_fraction, self._allowance = max_reject_fraction, allowance
        self._log = log
        self._done: dict[int, set[int]] = {wave.wave: set() for wave in plan.waves}
        for wave, unit in vector_log.part_times(log) if parts is None else parts:
            if wave in self._done:
                self._done[wave].add(unit)
        counts = vector_log.count_log_rejects(log)
        self._rejected = {wave.wave: counts.get(wave.wave, 0) for wave in plan.waves}
        self._next_wave = 1
        self._recent: deque[tuple[float, int]] = deque()
        self._recent_images = 0  # their sum: adding thousands up again for every unit would hold the driver up
        self._reading = Reading()
        self._start_seconds = time.monotonic()

    def pending(self, run: Run) -> list[Unit]:
        """The units that are not durable, in plan order; from now on they are asked for."""
        self._start_seconds = time.monotonic()
        return [unit for unit in self._plan.units(run) if unit.unit not in self._done[unit.wave]]

    def add(self, ack: UnitAck) -> None:
        """Count a unit, once however often it is acknowledged.

        Raises:
            DataError: its wave has too many rejects.
        """
        self._reading = self._reading.plus(ack, time.monotonic() - self._start_seconds)
        if ack.unit in self._done[ack.wave]:
            return
        self._done[ack.wave].add(ack.unit)
        self._rejected[ack.wave] += ack.rejected
        self._recent.append((time.monotonic(), ack.embedded + ack.rejected))
        self._recent_images += ack.embedded + ack.rejected
        self._check_rejects(ack.wave)

    def whole_waves(self) -> list[int]:
        """The waves that have become whole since the last call, in order and without gaps.

        Raises:
            DataError: one of them has too many rejects.
        """
        found = []
        while self._next_wave <= self._plan.last_wave:
            wave = self._plan.wave(self._next_wave)
            if len(self._done[wave.wave]) < wave.units:
                break
            self._check_rejects(wave.wave)
            found.append(wave.wave)
            self._next_wave += 1
        return found

    def progress(self, published_wave: int, ended: bool = False) -> Progress:
        """The figures of now.

        Args:
            published_wave: the last commit; -1 before the first.
            ended: with the rate that `status` shows.
        """
        rejected = sum(self._rejected.values())
        accounted = sum(self._accounted(wave.wave) for wave in self._plan.waves)
        published = [wave for wave in self._plan.waves if wave.wave <= published_wave]
        return Progress(
            gallery=self._plan.num_gallery + self._plan.num_rejected,
            durable=accounted - rejected,
            rejected=rejected + self._plan.num_rejected,
            published=sum(wave.images - self._rejected[wave.wave] for wave in published),
            wave=max(0, published_wave),
            waves=self._plan.last_wave,
            images_per_second=recent_rate(self._plan, vector_log.part_times(self._log)) if ended else self._rate(),
            reading=self._reading,
            from_pairs=self._plan.num_from_pairs,
        )

    def _accounted(self, number: int) -> int:
        wave = self._plan.wave(number)
        full, last = len(self._done[number]), wave.units - 1
        short = wave.units * self._plan.unit_images - wave.images if last in self._done[number] else 0
        return full * self._plan.unit_images - short

    def _rate(self) -> float | None:
        now = time.monotonic()
        while self._recent and now - self._recent[0][0] > _RATE_WINDOW_SECONDS:
            self._recent_images -= self._recent.popleft()[1]
        if len(self._recent) < 2 or now - self._recent[0][0] < SHORTEST_SECONDS:
            return None
        first_seconds, first_images = self._recent[0]
        return Throughput(self._recent_images - first_images, now - first_seconds).per_second

    def _check_rejects(self, number: int) -> None:
        wave = self._plan.wave(number)
        summary = f"too many images of wave {number} cannot be embedded; the wave is not published"
        fraction, where = self._max_reject_fraction, self._log.rejects_uri
        rejects.check(self._rejected[number], wave.images, fraction, self._allowance, summary, where)


def recent_rate(plan: Plan, parts: dict[tuple[int, int], float]) -> float | None:
    """Images per second over the last ten minutes of a log, or all of it if it is shorter.

    From the times its parts (wave, unit) were written, but for those that were only copied; None for less than five
    seconds of work.
    """
    embedded = ((seconds, plan.unit_size(*unit)) for unit, seconds in parts.items() if unit[0] != FROM_PAIRS)
    found = throughput(embedded, _LOG_WINDOW_SECONDS)
    return None if found is None else found.per_second
