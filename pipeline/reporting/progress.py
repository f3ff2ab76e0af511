"""The progress of a backfill: units that are done, counted against the plan.

The driver counts acknowledgements, `status` counts the files of the vector log; both give the same `Progress`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace

from pipeline.embedding import reject_rules, vector_log
from pipeline.embedding.vector_log import VectorLog
from pipeline.planning.plan import FROM_PAIRS, Plan
from pipeline.reporting.throughput import SHORTEST_SECONDS, Throughput, throughput
from pipeline.run import Run
from pipeline.schema import Unit, UnitAck

_RATE_WINDOW_SECONDS = 60.0
_LOG_WINDOW_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Reading:
    """Sums over the units that were acknowledged to this driver.

    `retries` includes those of the driver's own requests; `seconds` is the time since the first unit was asked for.
    """

    images: int = 0
    requests: int = 0
    bytes_fetched: int = 0
    bytes_needed: int = 0
    retries: int = 0
    changed: int = 0
    seconds: float = 0.0

    def plus(self, ack: UnitAck, seconds: float) -> Reading:
        """Add a unit."""
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
        """Add the driver's own retries."""
        return replace(self, retries=self.retries + retries)

    def __str__(self) -> str:
        over = self.bytes_fetched / self.bytes_needed if self.bytes_needed else 0.0
        return (
            f"{self.requests / max(1, self.images):.3g} requests per image, {over:.3g} bytes fetched per byte needed, "
            f"{self.requests / max(self.seconds, 1e-6):,.0f} GET/s, {self.retries:,} retries, {self.changed:,} changed"
        )


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a backfill, in images."""

    gallery: int  # images of the manifest, also those that the old encoder could not read
    durable: int  # those whose new embedding is in the vector log
    rejected: int  # those that one of the encoders could not read
    published: int  # those whose new embedding is in the latest commit
    wave: int  # the last published wave; 0 before the first
    waves: int  # the last wave of the plan
    images_per_second: float | None  # over the last minute; None for less than two units or five seconds
    reading: Reading = Reading()  # of this driver's units
    stopped: str | None = None  # the condition that stopped the backfill, with its figures
    from_pairs: int = 0  # those that were embedded for the fit; they are durable, and published with commit 0

    @property
    def left(self) -> int:
        """Images that are neither durable nor rejected."""
        return self.gallery - self.durable - self.rejected

    @property
    def eta_seconds(self) -> float | None:
        """Seconds until no image is left, at this rate; None without a rate."""
        if self.left == 0:
            return 0.0
        return self.left / self.images_per_second if self.images_per_second else None


class Tracker:
    """Counts the units that are durable, and the waves that are whole."""

    def __init__(
        self,
        plan: Plan,
        log: VectorLog,
        max_reject_fraction: float,
        allowance: int = 0,
        parts: Iterable[tuple[int, int]] | None = None,
    ) -> None:
        """Count the units in the log as done.

        Args:
            max_reject_fraction: of a wave.
            allowance: up to this many rejects of a wave never stop the run (unless the fraction is 0).
            parts: the (wave, unit) of the log's parts, if it is listed already.
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
        self._recent_images = 0  # kept up to date: summing thousands anew for every unit would slow the driver
        self._reading = Reading()
        self._start_seconds = time.monotonic()

    def pending(self, run: Run) -> list[Unit]:
        """The units that are not durable, in plan order; starts the clock of `Reading`."""
        self._start_seconds = time.monotonic()
        return [unit for unit in self._plan.units(run) if unit.unit not in self._done[unit.wave]]

    def add(self, ack: UnitAck) -> None:
        """Count a unit; repeated acknowledgements count once.

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
        """The waves that became whole since the last call, in order and without gaps.

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
        """The progress now.

        Args:
            published_wave: the last commit; -1 before the first.
            ended: take the rate that `status` shows.
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
        reject_rules.check(self._rejected[number], wave.images, fraction, self._allowance, summary, where)


def recent_rate(plan: Plan, parts: dict[tuple[int, int], float]) -> float | None:
    """Images per second over the last ten minutes of a log; None for less than five seconds of work.

    It is measured by the times of the log's parts (wave, unit), without those that were copied from the pairs.
    """
    embedded = ((seconds, plan.unit_size(*unit)) for unit, seconds in parts.items() if unit[0] != FROM_PAIRS)
    found = throughput(embedded, _LOG_WINDOW_SECONDS)
    return None if found is None else found.per_second
