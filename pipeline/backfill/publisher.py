"""Publish waves while later ones are embedded: seal, check, commit, judge; one at a time, in order.

Commit n serves the waves up to n by their new embeddings and all others by transformed vectors, whatever order the
images were embedded in. A wave is committed once. This module does not read images and does not train anything.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import Self

from pipeline.backfill.promotion import Promotion
from pipeline.errors import GateRefused
from pipeline.index.commits import Commit, SegmentCounts
from pipeline.index.seal import Sealer
from pipeline.index.segment_files import SegmentRef
from pipeline.index.writer import Writer
from pipeline.reporting import telemetry
from pipeline.schema import UnitAck

_CHECK_SECONDS = 10.0
"""How often a driver asks whether another one has taken the run over; each time is one small GET."""


class Publisher:
    """Publishes the commits of a run, in a thread of its own."""

    def __init__(
        self, writer: Writer, sealer: Sealer, promotion: Promotion, empty: Commit, last: Commit | None
    ) -> None:
        """Make a publisher; nothing is published yet.

        Args:
            writer: of this run, acquired.
            sealer: of this run, with the codebook of `empty`.
            promotion: judges each commit and moves `prod`.
            empty: a commit without segments: the codebook, the metric and the numbers that all commits share.
            last: the last commit that is published.
        """
        self._writer, self._sealer, self._promotion = writer, sealer, promotion
        self._empty, self._commit = empty, last
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._futures: list[Future[None]] = []
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
        """The condition of `--stop-when` that is met, with its figures; None if none is."""
        return self._promotion.stopped

    def expect(self, ack: UnitAck) -> None:
        """Seal a unit's wave only if its part is still the one that was acknowledged."""
        if ack.part_digest and ack.wave > self.published:
            self._acknowledged.setdefault(ack.wave, {})[ack.unit] = ack.part_digest

    def initial_commit(self) -> None:
        """Publish and judge commit 0; if the run has commits, judge the last one again by the limits of now.

        Raises:
            GateRefused: the gate stopped the backfill.
            SnapshotConflict: another driver took the run over.
        """
        if self._commit is None:
            start = time.perf_counter()
            self._publish_commit(self._seal_initial(), time.perf_counter() - start)
        self._settle()

    def submit(self, wave: int) -> Future[None]:
        """Publish a wave after those that were submitted before it; a published one is left as it is."""
        self._futures.append(self._pool.submit(self._publish, wave))
        return self._futures[-1]

    def submit_all(self, waves: Iterable[int]) -> None:
        """Publish some waves, in order."""
        for wave in waves:
            self.submit(wave)

    def check(self) -> None:
        """Raise the error of the publishing thread, if there is one; every ten seconds, check who owns the run.

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
        """Stop if a budget is spent: waves that are not being published yet are left."""
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
            self._writer.check()  # the report of a run is written by the driver that owns it
            if self._commit is not None:
                self._promotion.finish(self._commit)

    def _publish(self, wave: int) -> None:
        """Publish and judge one wave, in the thread."""
        if self._over or wave <= self.published:
            return
        try:
            self._commit_wave(wave)
            self._settle()
        except GateRefused:
            self._over = True
            raise

    def _settle(self) -> None:
        assert self._commit is not None
        self._promotion.settle(self._commit)
        self._over = self.stopped is not None

    def _commit_wave(self, wave: int) -> None:
        """Seal a wave, check it, and publish the commit that serves it."""
        start = time.perf_counter()
        draft = self._seal_wave(wave)
        seconds = time.perf_counter() - start
        self._promotion.inspect(draft)
        self._publish_commit(draft, seconds)

    def _seal_initial(self) -> Commit:
        """Draft commit 0: all waves as transformed, except a wave 0, whose images were embedded for the fit."""
        plan = self._sealer.plan
        segments = self._sealer.transformed([item.wave for item in plan.waves if item.wave > 0])
        if plan.first_wave > 0:
            return self._draft(0, segments, ())
        embedded, digest = self._sealer.embedded(0, self._acknowledged.pop(0, {}))
        return self._draft(0, segments + embedded, (digest,))

    def _seal_wave(self, wave: int) -> Commit:
        """Draft the commit in which a wave's embedded vectors replace its transformed ones."""
        assert self._commit is not None
        embedded, digest = self._sealer.embedded(wave, self._acknowledged.pop(wave, {}))
        segments = [segment for segment in self._commit.segments if segment.wave != wave] + embedded
        sealed = wave - self._sealer.plan.first_wave
        digests = self._commit.log_digests or ("",) * sealed  # earlier versions kept none
        return self._draft(wave, segments, (*digests, digest))

    def _draft(self, number: int, segments: list[SegmentRef], digests: tuple[str, ...]) -> Commit:
        return replace(
            self._empty,
            number=number,
            parent=number - 1 if number else None,
            segments=tuple(segments),
            counts=SegmentCounts.of(segments),
            log_digests=digests,
        )

    def _publish_commit(self, draft: Commit, seal_seconds: float) -> None:
        start = time.perf_counter()
        commit = self._commit = self._writer.publish(draft)
        # Commit 0 may be that of another driver, with its codebook.
        path, sha256 = commit.codebook_path, commit.codebook_sha256
        self._sealer = replace(self._sealer, codebook_path=path, codebook_sha256=sha256)
        self._empty = replace(self._empty, codebook_path=path, codebook_sha256=sha256)
        telemetry.STAGE_SECONDS.labels("seal").observe(seal_seconds)
        telemetry.STAGE_SECONDS.labels("publish").observe(time.perf_counter() - start)
        telemetry.observe_commit(commit)
