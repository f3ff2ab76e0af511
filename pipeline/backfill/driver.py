"""The backfill: embed the units that are not in the vector log yet, and publish each wave once it is whole.

Read this first. The plan lists all units, the vector log those that are done. The difference is embedded, in one
stream over all waves. A thread of the driver seals and publishes waves, in order, while later waves are embedded.
A driver that was killed at any point is started again and goes on from what is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from pipeline.backfill.promotion import Promotion
from pipeline.backfill.publisher import Publisher
from pipeline.backfill.stop import Stop
from pipeline.config.tree import Config
from pipeline.embedding.stream import StreamSettings, Work, embed_stream
from pipeline.index import commits, disk_reserve
from pipeline.index.commits import Commit, SegmentCounts
from pipeline.index.seal import Sealer
from pipeline.index.train_codebook import make_codebook
from pipeline.index.writer import Writer
from pipeline.models.calibration import read_calibration
from pipeline.planning import log_pairs
from pipeline.planning.plan import Plan
from pipeline.reporting import telemetry
from pipeline.reporting.progress import Progress, Tracker
from pipeline.run import Run
from pipeline.schema import UnitAck
from pipeline.storage import objects


def backfill(
    config: Config,
    run: Run,
    plan: Plan,
    on_progress: Callable[[Progress], None],
    stop: Stop | None = None,
) -> Progress:
    """Embed and publish what is left, up to the last wave; safe to run again at any time.

    Args:
        run: the run, with its transformation in place.
        stop: when to stop early. Finished units are kept; units that are being embedded then are embedded again later.

    Returns:
        the progress at the end, with the condition that stopped it.

    Raises:
        DataError: a wave has more rejects than `max_reject_fraction`; it is not published.
        SnapshotConflict: another driver took the run over.
        GateRefused: a snapshot is not promoted; `prod` keeps serving the one before it.
    """
    log, before = plan.log(run), objects.counts()
    from_pairs = log_pairs.write(run, plan)  # images of the pairs are not embedded again
    tracker, counted = Tracker(plan, log, config.backfill.max_reject_fraction, config.backfill.reject_allowance), before

    def report(ended: bool = False) -> Progress:
        nonlocal counted
        asked = objects.counts()
        telemetry.observe_driver(asked - counted)
        counted = asked
        progress = replace(tracker.progress(publisher.published, ended), stopped=publisher.stopped)
        progress = replace(progress, reading=progress.reading.with_driver(objects.retries(before)))
        telemetry.observe_progress(progress, publisher.waiting)
        on_progress(progress)
        return progress

    with open_publisher(config, run, plan, stop) as publisher:
        for ack in from_pairs:
            publisher.expect(ack)
        publisher.initial_commit()  # the whole gallery is served in the new space before another image is read
        report()
        publisher.submit_all(tracker.whole_waves())
        units = tracker.pending(run) if publisher.stopped is None else []
        for ack in _embed(StreamSettings.of(config), Work(config.encoders.new, log, units)):
            tracker.add(ack)
            publisher.expect(ack)
            publisher.submit_all(tracker.whole_waves())
            publisher.check()
            publisher.check_budget()
            report()
            if publisher.stopped is not None:
                break
    return report(ended=True)


def open_publisher(config: Config, run: Run, plan: Plan, stop: Stop | None = None) -> Publisher:
    """Take the run over from any other driver, and train its codebook unless a commit has one.

    Raises:
        SnapshotConflict: other drivers kept taking the run over.
        IncompatibleRun: another driver has trained the codebook with other settings.
    """
    writer = Writer.acquire(run)
    disk_reserve.keep(run)
    last = None if writer.latest is None else commits.read_commit(run, writer.latest)
    if last is None:
        codebook = make_codebook(config, run, plan)
        calibration = read_calibration(run)
    else:
        telemetry.observe_commit(last)
        codebook, calibration = (last.codebook_path, last.codebook_sha256), last.calibration
    empty = Commit(
        number=0,
        parent=None,
        codebook_path=codebook[0],
        codebook_sha256=codebook[1],
        metric=config.gallery.metric,
        nprobe=config.index.nprobe,
        dim=plan.dim,
        first_wave=plan.first_wave,
        num_waves=plan.last_wave,
        num_shards=plan.num_shards,
        segments=(),
        counts=SegmentCounts.of(()),
        calibration=calibration,
    )
    promotion = Promotion(config, run, plan, stop or Stop(), writer.check)
    return Publisher(writer, Sealer(run, plan, *codebook), promotion, empty, last)


def _embed(settings: StreamSettings, work: Work) -> Iterator[UnitAck]:
    with telemetry.RUNNING.track_inprogress():
        for _, ack in embed_stream([work], settings):
            telemetry.observe_unit(ack)
            yield ack
