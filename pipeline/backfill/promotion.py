"""Judge each commit on the probe set, move `prod` if the gate allows it, and say whether the backfill goes on.

`prod` never moves to a commit that the gate refuses or, if there is a probe set, to one that is not measured. A wave
whose vectors are stored under wrong ids is not committed at all: a commit cannot be mended. The result for the last
commit is in `reports/standing.json`. This module does not publish commits.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

from pipeline.backfill.stop import Stop
from pipeline.config.tree import Config
from pipeline.errors import ConfigError, GateRefused
from pipeline.evaluation import gate, quality
from pipeline.evaluation.gate import Refusal
from pipeline.evaluation.probe_metrics import ProbeMeter
from pipeline.evaluation.quality import PromotionStatus, Quality, write_promotion_status
from pipeline.index import fenced, tags
from pipeline.index.commits import Commit
from pipeline.index.fenced import Check
from pipeline.planning.plan import Plan
from pipeline.reporting import telemetry
from pipeline.run import Run

_REMEDY = (
    "to change a limit: edit `gate` in the config and run the same command; this commit is checked again. To serve it "
    "anyway: `fastfill promote --force`. The report shows the figures, docs/operations.md explains each check"
)
_GO_ON = "run the same command without --stop-when: the waves that follow may mend it"

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Promotion:
    """Moves `prod` of one run, and keeps what is known of its last commit."""

    config: Config
    run: Run
    plan: Plan
    stop: Stop = field(default_factory=Stop)
    check: Check = fenced.anyone  # raises SnapshotConflict if another driver owns the run; called before each write
    stopped: str | None = None  # the condition that ends the backfill, with its figures; None if there is none
    refusals: list[Refusal] = field(default_factory=list)  # why the last commit is not promoted
    _meter: ProbeMeter | None = None
    _opened: bool = False
    _warned: set[str] = field(default_factory=set)

    def inspect(self, draft: Commit) -> None:
        """Refuse a wave whose images have wrong vectors under their ids, before it is committed.

        Raises:
            GateRefused: it is refused, and `gate.on_refusal` is `stop`.
            DataError: a segment is missing or damaged.
        """
        limits = self.config.gate
        if limits.on_refusal == "go_on" or limits.min_own is None or (meter := self._open()) is None:
            return
        with telemetry.STAGE_SECONDS.labels("measure").time():
            measured = meter.examine(draft)
        if refusals := gate.inspect(measured, draft.number, limits):
            self.refusals = refusals
            self._write_status(draft)
            telemetry.GATE_REFUSED.set(1)
            raise self._refused(
                f"wave {draft.number} is not published",
                "find out what stored these vectors under wrong ids (see docs/operations.md). Then move the parts of "
                f"the wave out of the run ({self.plan.log(self.run).parts_uri}/wave-{draft.number:03d}) and run the "
                "same command again: the wave is embedded again",
            )

    def settle(self, commit: Commit) -> None:
        """Measure and judge a commit, and move `prod` to it unless the gate refuses it.

        Raises:
            GateRefused: it is refused, and `gate.on_refusal` is `stop`.
            ConfigError: a condition of `--stop-when` can never be met.
            DataError: a segment is missing or damaged.
            SnapshotConflict: another driver owns the run; nothing is written.
        """
        self.check()
        measured = self._measure(commit)
        automatic = self.config.publish.promote == "auto"
        self.refusals = gate.judge_commit(self.run, commit, self.config.gate) if automatic else []
        self._write_status(commit)
        if automatic:
            self._move_prod(commit)
        if self.config.gate.on_refusal == "stop" and not gate.all_mend(self.refusals):
            raise self._refused(f"commit {commit.number} is not promoted", _REMEDY)
        if (met := settle(commit, measured, self.refusals, self.stop, self._full())) is not None:
            self.stop_now(commit, met)

    def stop_now(self, commit: Commit, reason: str) -> None:
        """Record that the backfill ends here, and why."""
        self.stopped = reason
        self._write_status(commit)

    def finish(self, commit: Commit) -> None:
        """Fail if the backfill ends, after the last wave or as asked, with a commit that the gate refuses.

        Raises:
            GateRefused: the last commit is refused.
        """
        if not self.refusals:
            return
        if self.stopped is not None:
            what = f"commit {commit.number} is not promoted, and the backfill stopped there, as asked ({self.stopped})"
            raise self._refused(what, f"{_GO_ON}; or {_REMEDY}" if gate.all_mend(self.refusals) else _REMEDY)
        if commit.number == commit.num_waves:
            raise self._refused(f"commit {commit.number} is not promoted", _REMEDY)

    def _move_prod(self, commit: Commit) -> None:
        """Move `prod` unless there are refusals; of these each check is logged once."""
        telemetry.GATE_REFUSED.set(bool(self.refusals))
        sentences = [refusal.sentence for refusal in self.refusals]
        before = tags.read_tag(self.run, tags.PROD)
        if tags.auto_promote(self.run, commit.number, sentences, self.check):
            quality.keep_best(self.run, commit.number, before.commit if before else None, check=self.check)
        checks = {refusal.check for refusal in self.refusals}
        if not checks <= self._warned:
            self._warned |= checks
            logger.warning("prod is not moved to commit %d: %s", commit.number, "; ".join(sentences))

    def _open(self) -> ProbeMeter | None:
        if not self._opened:
            self._opened = True
            config = self.config
            self._meter = ProbeMeter.open(config.probe, config.encoders, config.gallery.metric, self.run, self.plan)
        return self._meter

    def _measure(self, commit: Commit) -> Quality | None:
        meter = self._open()
        if meter is None:
            return None
        with nullcontext() if meter.is_examined(commit) else telemetry.STAGE_SECONDS.labels("measure").time():
            measured = meter.measure(commit)
        telemetry.observe_probe(measured.figures)
        return measured

    def _full(self) -> dict[str, float]:
        """The expected figures of the full new model; empty if no condition asks for them.

        Raises:
            ConfigError: a condition asks for a figure that cannot be estimated.
        """
        asked = [item for item in self.stop.conditions if item.of_full]
        if not asked:
            return {}
        start, meter = quality.read_quality(self.run, 0), self._meter
        left = 1 - self.plan.num_from_pairs / self.plan.num_gallery
        known = {} if meter is None or start is None else quality.full_estimate(meter.baseline, start, left)
        for item in asked:
            if item.figure not in known:
                raise ConfigError(
                    f"--stop-when {item.text!r} needs an estimate of the new model's {item.figure}, and there is none",
                    expected=f"snapshot 0, and {quality.MIN_QUERIES} probe images that share a label with another one",
                    where=f"probe.images: {self.config.probe.images}",
                    remedy="use recall10, or write a number instead of `full`, or start a new run with a larger "
                    "probe.images",
                )
        return known

    def _write_status(self, commit: Commit) -> None:
        refused = tuple(refusal.sentence for refusal in self.refusals)
        write_promotion_status(self.run, PromotionStatus(commit.number, refused, self.stopped), self.check)

    def _refused(self, what: str, remedy: str) -> GateRefused:
        tag = tags.read_tag(self.run, tags.PROD)
        serves = "nothing yet" if tag is None or tag.commit is None else f"commit {tag.commit}"
        return GateRefused(
            f"{what}:\n" + "\n".join(f"  - {refusal.sentence}" for refusal in self.refusals),
            found=f"prod serves {serves}",
            where=self.run.uri,
            remedy=remedy,
        )


def settle(
    commit: Commit, measured: Quality | None, refusals: Sequence[Refusal], stop: Stop, full: Mapping[str, float]
) -> str | None:
    """The condition of `--stop-when` that a commit meets, with its figures; None if it meets none. Pure.

    Args:
        commit: it is published and judged.
        measured: its quality, if there is a probe set.
        refusals: a refused commit meets no condition on quality.
        stop: the conditions.
        full: the expected figures of the full new model, in per cent.
    """
    counts = commit.counts
    fraction = (counts.gallery - counts.transformed + counts.rejected) / counts.gallery
    figures = {} if measured is None or refusals else measured.figures
    return stop.by_quality({"fraction": fraction} | figures, full)
