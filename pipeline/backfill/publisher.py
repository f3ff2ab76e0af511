"""Publish waves while the stream goes on: seal, commit, move `prod`; one at a time, strictly in order.

Guarantee: commit n holds the waves up to n embedded and all others transformed, whatever order images were
embedded in. A wave that is committed is never committed again. It does not know how images are read.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import Self

from pipeline.backfill.promotion import Promotion
from pipeline.backfill.stop import Stop
from pipeline.config.identity import fix_settings, stage_settings
from pipeline.config.tree import Config
from pipeline.errors import GateRefused
from pipeline.index import commits, disk_reserve
from pipeline.index.commits import Commit, SegmentCounts
from pipeline.index.seal import Sealer
from pipeline.index.segment_files import SegmentRef
from pipeline.index.train import train_for_run, write_codebook
from pipeline.index.writer import Writer
from pipeline.models.calibration import read_calibration
from pipeline.planning.plan import Plan
from pipeline.reporting import telemetry
from pipeline.run import Run
from pipeline.schema import UnitAck

_CHECK_SECONDS = 10.0
"""How long a driver that was taken over may go on embedding before it looks; each look is one small GET."""


class Publisher:
    """The run's one writer of snapshots, and the thread it works in."""

    def __init__(self, config: Config, run: Run, plan: Plan, stop: Stop | None = None) -> None:
        """Takes the run over from whoever wrote to it before; `stop` says when to leave waves unpublished."""
        self._config, self._run, self._plan = config, run, plan
        self._writer = Writer.acquire(run)
        disk_reserve.keep(run)
        self._commit = commits.read_commit(run, latest) if (latest := self._writer.latest) is not None else None
        if self._commit is not None:
            telemetry.observe_commit(self._commit)
        self._sealer = self._make_sealer()
        self._calibration = read_calibration(run) if self._commit is None else self._commit.calibration
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._futures: list[Future[None]] = []
        self._promotion = Promotion(config, run, plan, stop or Stop(), self._writer.check)
        self._acknowledged: dict[int, dict[int, str]] = {}
        self._over = False
        self._checked = time.monotonic()

    @property
    def published(self) -> int:
        """The last wave that is published; -1 before the first commit."""
        return self._commit.number if self._commit else -1

    @property
    def waiting(self) -> int:
        """Waves that were submitted and are not published yet."""
        return sum(not future.done() for future in self._futures)

    @property
    def stopped(self) -> str | None:
        """Which condition to stop is met, with the figures; None while none is."""
        return self._promotion.stopped

    def expect(self, ack: UnitAck) -> None:
        """Seal a unit's wave only if its part is still the one that was acknowledged."""
        if ack.part_digest and ack.wave > self.published:
            self._acknowledged.setdefault(ack.wave, {})[ack.unit] = ack.part_digest

    def submit(self, wave: int) -> Future[None]:
        """Publish a wave (0: everything as transformed, but for the pairs) after those submitted before it.

        Of a run that goes on, wave 0 stands for its last commit, which is judged anew: the limits may be others.
        """
        self._futures.append(self._pool.submit(self._publish, wave))
        return self._futures[-1]

    def submit_all(self, waves: Iterable[int]) -> None:
        """Publish some waves, in order."""
        for wave in waves:
            self.submit(wave)

    def check(self) -> None:
        """Raise what went wrong in the thread, if anything did; and, now and then, that the run is another's.

        Raises:
            SnapshotConflict: another driver took the run over.
            GateRefused: the gate stopped the backfill.
        """
        while self._futures and self._futures[0].done():
            self._futures.pop(0).result()
        if time.monotonic() - self._checked >= _CHECK_SECONDS:
            self._writer.check()
            self._checked = time.monotonic()

    def check_budget(self) -> None:
        """Stop where a budget is spent: waves that are not being published yet are left."""
        reason = self._promotion.stop.by_budget(time.monotonic(), telemetry.spent())
        if reason is not None and self._commit is not None and not self._over:
            self._over = True
            self._promotion.stop_now(self._commit, reason)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stopped = isinstance(error, KeyboardInterrupt)  # a wave that is being sealed may take minutes
        self._pool.shutdown(wait=not stopped, cancel_futures=error is not None)
        if error is None:
            for future in self._futures:
                future.result()
            self._writer.check()  # nobody writes a report of a run that is another driver's
            if self._commit is not None:
                self._promotion.finish(self._commit)

    def _publish(self, wave: int) -> None:
        if self._over or (self._commit is not None and 0 < wave <= self._commit.number):
            return
        try:
            if wave or self._commit is None:
                self._commit = self._seal(wave)
            self._promotion.settle(self._commit)
        except GateRefused:
            self._over = True
            raise
        self._over = self.stopped is not None

    def _seal(self, wave: int) -> Commit:
        start = time.perf_counter()
        digests: tuple[str, ...] = ()
        if self._commit is None:
            segments = self._sealer.transformed([item.wave for item in self._plan.waves if item.wave > wave])
        else:
            segments = [segment for segment in self._commit.segments if segment.wave != wave]
            digests = _padded(self._commit.log_digests, wave - self._plan.first_wave)
        if wave >= self._plan.first_wave:
            embedded, digest = self._sealer.embedded(wave, self._acknowledged.pop(wave, {}))
            segments, digests = segments + embedded, (*digests, digest)
        draft = self._draft(wave, segments, digests)
        sealed = time.perf_counter()
        if wave:
            self._promotion.inspect(draft)
        publishing = time.perf_counter()
        commit = self._writer.publish(draft)
        self._sealer = replace(  # another driver's codebook, if its commit 0 was there
            self._sealer, codebook_path=commit.codebook_path, codebook_sha256=commit.codebook_sha256
        )
        telemetry.STAGE_SECONDS.labels("seal").observe(sealed - start)
        telemetry.STAGE_SECONDS.labels("publish").observe(time.perf_counter() - publishing)
        telemetry.observe_commit(commit)
        return commit

    def _draft(self, wave: int, segments: list[SegmentRef], digests: tuple[str, ...]) -> Commit:
        return Commit(
            number=wave,
            parent=wave - 1 if wave else None,
            codebook_path=self._sealer.codebook_path,
            codebook_sha256=self._sealer.codebook_sha256,
            metric=self._config.gallery.metric,
            nprobe=self._config.index.nprobe,
            dim=self._plan.dim,
            first_wave=self._plan.first_wave,
            num_waves=self._plan.last_wave,
            num_shards=self._plan.num_shards,
            segments=tuple(segments),
            counts=SegmentCounts.of(segments),
            log_digests=digests,
            calibration=self._calibration,
        )

    def _make_sealer(self) -> Sealer:
        if self._commit is not None:
            path, sha256 = self._commit.codebook_path, self._commit.codebook_sha256
        else:
            path, sha256 = self._train_codebook()
        return Sealer(self._run, self._plan, path, sha256)

    def _train_codebook(self) -> tuple[str, str]:
        settings = stage_settings(self._config, "index")
        data = train_for_run(self._config, self._run, self._plan)
        fix_settings(self._run, "index", settings)
        return write_codebook(self._run, data)


def _padded(digests: tuple[str, ...], waves: int) -> tuple[str, ...]:
    """One digest per wave; empty for those that a version without digests sealed."""
    return digests or ("",) * waves
