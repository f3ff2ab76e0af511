"""Before and after a commit: measure it on the probe set, move `prod` where the gate lets it, say whether to go on.

Guarantee: `prod` never moves to a commit that was not measured, where there is a probe set, or that the gate
refuses; and a wave that is mixed up is not committed, for what is committed cannot be mended. What became of the last
snapshot is kept in `reports/standing.json`. It does not publish.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

from pipeline.backfill.stop import Stop
from pipeline.config.tree import Config
from pipeline.errors import ConfigError, GateRefused
from pipeline.evaluation import gate, probe_metrics, quality
from pipeline.evaluation.gate import Refusal
from pipeline.evaluation.probe_search import Found
from pipeline.evaluation.probe_set import ProbeSet, gather
from pipeline.evaluation.quality import PromotionStatus, Quality, QualityBaseline, write_promotion_status
from pipeline.index import fenced, tags
from pipeline.index.commits import Commit
from pipeline.index.fenced import Check
from pipeline.index.segment_files import SegmentRef
from pipeline.planning.plan import Plan
from pipeline.reporting import telemetry
from pipeline.run import Run

_REMEDY = (
    "see the report, and docs/operations.md for each check. If a limit is wrong, change it in `gate` and run the same "
    "command again: it judges this commit anew; to serve it all the same, `fastfill promote --force`"
)

_GO_ON = "the same command without --stop-when goes on, and may mend it by what it embeds"

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Promotion:
    """What one driver knows of the quality of what it publishes.

    Attributes:
        check: raises SnapshotConflict if another driver owns the run: asked before each write.
        stopped: which condition ends the backfill, with the figures; None while none does.
        refusals: why the last commit was not promoted.
    """

    config: Config
    run: Run
    plan: Plan
    stop: Stop = field(default_factory=Stop)
    check: Check = fenced.anyone
    stopped: str | None = None
    refusals: list[Refusal] = field(default_factory=list)
    _probe: tuple[ProbeSet, QualityBaseline] | None = None
    _opened: bool = False
    _examined: tuple[set[SegmentRef], Quality] | None = None  # the last draft's segments, and what they gave
    _found: dict[str, Found] = field(default_factory=dict)  # what the probe set finds in each wave
    _warned: set[str] = field(default_factory=set)

    def inspect(self, draft: Commit) -> None:
        """Refuse a wave whose images have other vectors under their ids, before it is published.

        Raises:
            GateRefused: it is refused, and `gate.on_refusal` is `stop`.
            DataError: a segment is missing or damaged.
        """
        least = self.config.gate.min_own
        if self.config.gate.on_refusal == "go_on" or least is None or (probe := self._open()) is None:
            return
        with telemetry.STAGE_SECONDS.labels("measure").time():
            measured = probe_metrics.examine(self.run, self.plan, *probe, draft, self._found)
        self._examined = set(draft.segments), measured
        wave = tuple(item for item in measured.own if item[0] == draft.number)
        found = gate.mixed_up(replace(measured, own=wave), least)
        if found:
            self.refusals = found
            self._keep(draft)
            telemetry.GATE_REFUSED.set(1)
            raise self._refused(
                f"wave {draft.number} is not published",
                "see docs/operations.md: find out what mixed it up, move the wave's parts out of the run "
                f"({self.plan.log(self.run).parts_uri}/wave-{draft.number:03d}), and run the same command again: the "
                "wave is embedded again",
            )

    def settle(self, commit: Commit) -> None:
        """Measure and judge a commit, and move `prod` to it where nothing is against it.

        Raises:
            GateRefused: it is refused, and `gate.on_refusal` is `stop`.
            ConfigError: a condition to stop can never be met.
            DataError: a segment is missing or damaged.
            SnapshotConflict: another driver owns the run; nothing is written.
        """
        self.check()
        measured = self._measure(commit)
        automatic = self.config.publish.promote == "auto"
        self.refusals = gate.judge_commit(self.run, commit, self.config.gate) if automatic else []
        self._keep(commit)
        if automatic:
            telemetry.GATE_REFUSED.set(bool(self.refusals))
            self._promote(commit)
            self._warn(commit)
        if self.config.gate.on_refusal == "stop" and not all(refusal.mends for refusal in self.refusals):
            raise self._refused(f"commit {commit.number} is not promoted", _REMEDY)
        if (met := self._met(commit, measured)) is not None:
            self.stop_now(commit, met)

    def stop_now(self, commit: Commit, reason: str) -> None:
        """Keep that the backfill ends here, and why."""
        self.stopped = reason
        self._keep(commit)

    def finish(self, commit: Commit) -> None:
        """Where the backfill ends, after the last wave or as asked: what the gate keeps from `prod` is no success.

        Raises:
            GateRefused: the last commit is refused.
        """
        if not self.refusals:
            return
        if self.stopped is not None:
            what = f"commit {commit.number} is not promoted, and the backfill stopped there, as asked ({self.stopped})"
            mends = all(refusal.mends for refusal in self.refusals)
            raise self._refused(what, f"{_GO_ON}; or {_REMEDY}" if mends else _REMEDY)
        if commit.number == commit.num_waves:
            raise self._refused(f"commit {commit.number} is not promoted", _REMEDY)

    def _promote(self, commit: Commit) -> None:
        tag = tags.read_tag(self.run, tags.PROD)
        reasons = [refusal.sentence for refusal in self.refusals]
        if tags.auto_promote(self.run, commit.number, reasons, self.check):
            before = tag.commit if tag is not None else None
            quality.keep_best(self.run, commit.number, before, check=self.check)

    def _open(self) -> tuple[ProbeSet, QualityBaseline] | None:
        if not self._opened:
            self._opened = True
            probe = gather(self.config, self.run, self.plan)
            self._probe = (
                None if probe is None else (probe, probe_metrics.reference(self.config, self.run, self.plan, probe))
            )
        return self._probe

    def _measure(self, commit: Commit) -> Quality | None:
        probe = self._open()
        if probe is None:
            return None
        segments, examined = self._examined or (set(), None)
        known = examined is not None and examined.commit == commit.number and segments == set(commit.segments)
        with nullcontext() if known else telemetry.STAGE_SECONDS.labels("measure").time():
            measured = probe_metrics.measure_snapshot(
                self.run, self.plan, *probe, commit, self._found, examined if known else None
            )  # another driver's commit may be there instead of the draft
        telemetry.observe_probe(measured.figures)
        return measured

    def _met(self, commit: Commit, measured: Quality | None) -> str | None:
        fraction = (commit.counts.gallery - commit.counts.transformed + commit.counts.rejected) / commit.counts.gallery
        figures = {} if measured is None or self.refusals else measured.figures  # what is refused reaches no quality
        return self.stop.by_quality({"fraction": fraction} | figures, self._full())

    def _full(self) -> dict[str, float]:
        """What the full new model is expected to reach; nothing where nobody asks.

        Raises:
            ConfigError: it is asked for and cannot be told.
        """
        asked = [item for item in self.stop.conditions if item.of_full]
        if not asked:
            return {}
        start = quality.read_quality(self.run, 0)
        left = 1 - self.plan.num_from_pairs / self.plan.num_gallery
        known = {} if self._probe is None or start is None else quality.full_estimate(self._probe[1], start, left)
        for item in asked:
            if item.figure not in known:
                raise ConfigError(
                    f"--stop-when {item.text!r} can never be met: the full new model's {item.figure} cannot be told",
                    expected=f"{quality.MIN_QUERIES} probe images that share a label with another one, and snapshot 0",
                    where=f"probe.images: {self.config.probe.images}",
                    remedy="take recall10, or a number instead of `full`; a run that starts with more probe.images "
                    "can tell it",
                )
        return known

    def _keep(self, commit: Commit) -> None:
        refused = tuple(refusal.sentence for refusal in self.refusals)
        write_promotion_status(self.run, PromotionStatus(commit.number, refused, self.stopped), self.check)

    def _warn(self, commit: Commit) -> None:
        """Once per check: a snapshot that is refused is mostly followed by others that are."""
        checks = {refusal.check for refusal in self.refusals}
        if not checks <= self._warned:
            self._warned |= checks
            text = "; ".join(refusal.sentence for refusal in self.refusals)
            logger.warning("prod is not moved to commit %d: %s", commit.number, text)

    def _refused(self, what: str, remedy: str) -> GateRefused:
        tag = tags.read_tag(self.run, tags.PROD)
        serves = "nothing yet" if tag is None or tag.commit is None else f"commit {tag.commit}"
        return GateRefused(
            f"{what}:\n" + "\n".join(f"  - {refusal.sentence}" for refusal in self.refusals),
            found=f"prod serves {serves}",
            where=self.run.uri,
            remedy=remedy,
        )
