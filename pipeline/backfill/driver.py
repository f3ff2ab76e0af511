"""The backfill: stream the units that are not durable yet, and publish each wave once it is whole.

Read this first. The vector log says what is done, the plan says what there is; the difference is
embedded, in one stream over all waves. Waves are sealed and published by a thread of the driver while
later waves are already being embedded, strictly in order. Killed anywhere, it goes on from storage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from pipeline.backfill.publisher import Publisher
from pipeline.backfill.stop import Stop
from pipeline.config.tree import Config
from pipeline.embedding.stream import Work, embed_stream
from pipeline.planning import first_wave
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
    """Do everything that is not done yet, up to the last wave; safe to run again at any time.

    Args:
        config: the run's config.
        run: the run, with its transformation in place.
        plan: the run's plan.
        on_progress: told the figures after every unit.
        stop: when to stop before that; what is durable then is kept, and units in flight are embedded again.

    Returns:
        the figures at the end, and which condition has stopped it.

    Raises:
        DataError: a wave has more rejects than `max_reject_fraction`; it is not published.
        SnapshotConflict: another driver took the run over.
        GateRefused: a snapshot is not promoted; what is published before it is served on.
    """
    log, before = plan.log(run), objects.counts()
    from_pairs = first_wave.write(run, plan)  # what was embedded for the fit is not embedded again
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

    with Publisher(config, run, plan, stop) as publisher:
        for ack in from_pairs:
            publisher.expect(ack)
        publisher.submit(0).result()  # the whole gallery is served in the new space before another image is read
        report()
        publisher.submit_all(tracker.whole_waves())
        units = tracker.pending(run) if publisher.stopped is None else []
        for ack in _embed(config, Work(config.encoders.new, log, units)):
            tracker.add(ack)
            publisher.expect(ack)
            publisher.submit_all(tracker.whole_waves())
            publisher.check()
            publisher.check_budget()
            report()
            if publisher.stopped is not None:
                break
    return report(ended=True)


def _embed(config: Config, work: Work) -> Iterator[UnitAck]:
    with telemetry.RUNNING.track_inprogress():
        for _, ack in embed_stream([work], config):
            telemetry.observe_unit(ack)
            yield ack
