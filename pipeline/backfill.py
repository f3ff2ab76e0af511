"""The backfill: stream the units that are not durable yet, and publish each wave once it is whole.

Read this first. The vector log says what is done, the plan says what there is; the difference is
embedded, in one stream over all waves. Waves are sealed and published by a thread of the driver while
later waves are already being embedded, strictly in order. Killed anywhere, it goes on from storage.

Where the run learns on the way, the stream ends with a wave of `plan.relearn_after`, so that no image of a later wave
is embedded or in flight; what is left is planned anew, that wave is published with it, and another stream begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from pipeline import storage, telemetry
from pipeline.config import Config
from pipeline.plan import Plan
from pipeline.progress import Progress, Tracker
from pipeline.publish import Publisher
from pipeline.run import Run
from pipeline.schema import UnitAck
from pipeline.stop import Stop
from pipeline.stream import Work, embed_stream


def backfill(
    config: Config,
    run: Run,
    plan: Plan,
    on_progress: Callable[[Progress], None],
    stop: Stop | None = None,
    relearn: Callable[[int], None] | None = None,
) -> Progress:
    """Do everything that is not done yet, up to the last wave; safe to run again at any time.

    Args:
        config: the run's config.
        run: the run, with its transformation in place.
        plan: the run's plan.
        on_progress: told the figures after every unit.
        stop: when to stop before that; what is durable then is kept, and units in flight are embedded again.
        relearn: plans anew what is left after a wave, or finds that this is done; for a plan with `relearn_after`.

    Returns:
        the figures at the end, and which condition has stopped it.

    Raises:
        DataError: a wave has more rejects than `max_reject_fraction`; it is not published.
        SnapshotConflict: another driver took the run over.
        GateRefused: a snapshot is not promoted; what is published before it is served on.
    """
    log, before = plan.log(run), storage.counts()
    tracker, counted = Tracker(plan, log, config.backfill.max_reject_fraction, config.backfill.reject_allowance), before

    def report(ended: bool = False) -> Progress:
        nonlocal counted
        asked = storage.counts()
        telemetry.observe_driver(asked - counted)
        counted = asked
        progress = replace(tracker.progress(publisher.published, ended), stopped=publisher.stopped)
        progress = replace(progress, reading=progress.reading.with_driver(storage.retries(before)))
        telemetry.observe_progress(progress, publisher.waiting)
        on_progress(progress)
        return progress

    with Publisher(config, run, plan, stop) as publisher:
        publisher.submit(0).result()  # the whole gallery is served in the new space before an image is read
        report()
        for last in plan.stages:
            if publisher.stopped is not None:
                break
            held = last - 1 if last in plan.relearn_after else last  # that wave is published by what is learnt from it
            publisher.submit_all(tracker.whole_waves(held))
            for ack in _embed(config, Work(config.encoders.new, log, tracker.pending(run, last))):
                tracker.add(ack)
                publisher.expect(ack)
                publisher.submit_all(tracker.whole_waves(held))
                publisher.check()
                publisher.check_budget()
                report()
                if publisher.stopped is not None:
                    break
            if held < last and publisher.may_go_on():
                _learn(relearn or _cannot_learn, tracker, publisher, last)
    return report(ended=True)


def _embed(config: Config, work: Work) -> Iterator[UnitAck]:
    with telemetry.RUNNING.track_inprogress():
        for _, ack in embed_stream([work], config):
            telemetry.observe_unit(ack)
            yield ack


def _learn(relearn: Callable[[int], None], tracker: Tracker, publisher: Publisher, wave: int) -> None:
    ready = tracker.whole_waves(wave)  # which refuses a wave with too many rejects, before it is learnt from
    relearn(wave)
    publisher.submit_all(ready)


def _cannot_learn(wave: int) -> None:
    raise ValueError(f"the plan says that the run learns after wave {wave}, and nobody has said how")
