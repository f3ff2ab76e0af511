"""Measure snapshots on the probe set, by what their readers find.

After the neighbours, before the gate. Guarantee: a commit is measured once, and gives the same figures whoever
measures it. It does not judge.

Ranks are those that readers are given, in the whole gallery. Where labels are of the user's sample and not of all the
gallery, an answer without a label is neither right nor wrong: then its labelled images stand for the gallery, and
ranks are among what is stored of them, by exact search.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from pipeline.arrays import Float32, Int64
from pipeline.config.method import ProbeSettings
from pipeline.config.tree import EncodersSettings, Metric
from pipeline.embedding.precompute import embedding_log
from pipeline.embedding.vector_log import VectorLog
from pipeline.evaluation.curve_points import TOP_K
from pipeline.evaluation.probe_search import Found, Neighbours, in_old_gallery, in_snapshot
from pipeline.evaluation.probe_set import ProbeSet, gather, stands_alone
from pipeline.evaluation.quality import (
    MIN_QUERIES,
    ProbeFigures,
    Quality,
    QualityBaseline,
    mean_recall,
    read_baseline,
    read_quality,
    top,
    write_baseline,
    write_quality,
)
from pipeline.index.commits import Commit
from pipeline.index.segment_files import SegmentRef
from pipeline.models.calibration import Calibration, nearest_by_kind
from pipeline.planning.plan import Plan
from pipeline.run import Run

Bools = NDArray[np.bool_]

_OWN = 0.25
"""How far an image's stored vector may be from its own one, over the mean distance of images to their mean.

With weights in bfloat16 it is at most 0.02; the nearest other image is farther than 0.25 for 98 of 100 (m: 1,500 of
CIFAR-100's test images)."""
_MIN_EXPECTED = 50.0  # slots: with fewer, the share of the transformed ones is mostly noise


@dataclass(slots=True)
class ProbeMeter:
    """Measures the snapshots of a run on its probe set. Waves that it has searched are not searched again.

    Attributes:
        baseline: what snapshots are compared with.
    """

    run: Run
    plan: Plan
    probe: ProbeSet
    baseline: QualityBaseline
    _waves: dict[str, Found] = field(default_factory=dict)  # see `probe_search.in_snapshot`
    _examined: tuple[set[SegmentRef], Quality] | None = None  # the segments of the last draft, and its quality

    @classmethod
    def open(
        cls, probe: ProbeSettings, encoders: EncodersSettings, metric: Metric, run: Run, plan: Plan
    ) -> Self | None:
        """The meter of a run; None if it has no probe set."""
        found = gather(probe, encoders, run, plan)
        return None if found is None else cls(run, plan, found, baseline_of(encoders, metric, run, plan, found))

    def examine(self, draft: Commit) -> Quality:
        """Measure a commit that is not published yet; nothing is stored but what the search of its waves found.

        Raises:
            DataError: a segment is missing or damaged.
        """
        measured = self._search(draft)
        self._examined = set(draft.segments), measured
        return measured

    def is_examined(self, commit: Commit) -> bool:
        """Whether the last draft is this commit; it is not if another driver has published another one."""
        return self._examined is not None and (commit.number, set(commit.segments)) == (
            self._examined[1].commit,
            self._examined[0],
        )

    def measure(self, commit: Commit) -> Quality:
        """The quality of a published commit: as stored, or measured now and stored.

        Raises:
            DataError: a segment is missing or damaged.
        """
        stored = read_quality(self.run, commit.number)
        if stored is not None and stored.attempt_id == commit.attempt_id:
            return stored
        made = self._examined[1] if self._examined is not None and self.is_examined(commit) else self._search(commit)
        made = replace(made, attempt_id=commit.attempt_id)
        write_quality(self.run, made)
        return made

    def _search(self, commit: Commit) -> Quality:
        found = in_snapshot(self.run, self.plan, self.probe, commit, self._waves)
        return measure_probe(self.probe, self.baseline, commit, found)


def baseline_of(encoders: EncodersSettings, metric: Metric, run: Run, plan: Plan, probe: ProbeSet) -> QualityBaseline:
    """What snapshots are compared with; measured once and stored."""
    found = read_baseline(run)
    if found is not None:
        return found
    alone = stands_alone(run, plan, probe)
    new, old, transformed = (
        _within(probe, *sides, metric, alone)
        for sides in ((probe.new, probe.new), (probe.old, probe.old), (probe.new, probe.transformed))
    )
    log = embedding_log(encoders, run, "gallery", "old")
    made = QualityBaseline(
        old=old.ranks if alone else _in_old(metric, run, plan, probe, log),
        old_recalled=_recalled(old.nearest, new.nearest),
        num_neighbours=new.nearest.shape[1],
        within_old=old.ranks,
        within_transformed=transformed.ranks,
        within_new=new.ranks,
        alone=alone,
    )
    write_baseline(run, made)
    return made


def measure_probe(probe: ProbeSet, known: QualityBaseline, commit: Commit, found: Found) -> Quality:
    """The figures of what was found in a commit."""
    others = found.nearest.without(probe.ids)
    kept, gallery = probe.new.copy(), probe.transformed.copy()  # of an image that the index dropped these stay
    kept[found.rows], gallery[found.rows] = found.kept, found.stored
    exact = _within(probe, probe.new, kept, commit.metric, known.alone)
    by_kind = (~found.embedded, commit.calibration)
    mixed = _within(probe, probe.new, gallery, commit.metric, known.alone, *by_kind)
    recalled = _recalled(mixed.nearest, exact.nearest)
    ranks = mixed.ranks if known.alone else _ranks(others.labels, probe.labels, np.array(known.old) >= 0)
    own = _own(probe, found.embedded, gallery, kept)
    figures = top(ranks) | mean_recall(recalled, known.num_neighbours)
    answered = np.array(known.old) == 1
    if known.labelled and answered.any():
        figures["negative_flips"] = 100 * float((np.array(ranks)[answered] != 1).mean())
    figures |= _slot_share(others, commit)
    groups = _groups(probe, np.array(ranks))
    if len(groups) > 1:
        shares = [100 * right / queries for _, right, queries in groups]
        figures["group_gap"] = max(shares) - min(shares)
    if own:
        figures["own"] = 100 * sum(hits for _, hits, _ in own) / sum(images for *_, images in own)
    return Quality(commit.number, commit.attempt_id, figures, ranks, recalled, own, groups)


@dataclass(frozen=True, slots=True)
class _Within:
    """What each probe image finds among the others: `nearest` (Q, k) int64, rows of the probe set, and its rank."""

    nearest: Int64
    ranks: tuple[int, ...]


def _within(
    probe: ProbeSet,
    queries: Float32,
    side: Float32,
    metric: str,
    alone: bool,
    transformed: Bools | None = None,
    calibration: Calibration | None = None,
) -> _Within:
    """By exact search. For ranks the labelled images compete alone where these stand for the gallery, else all do.

    The calibration maps the keys of the rows of `side` that are `transformed`.
    """
    own = np.arange(len(probe.ids))
    kinds = np.zeros(len(own), np.bool_) if transformed is None else transformed
    found = nearest_by_kind(queries, side, min(TOP_K, len(own) - 1), own, metric, kinds, calibration)[1]
    labelled = np.flatnonzero(probe.labels >= 0)
    matched = _matched(probe.labels, np.bincount(probe.labels[labelled], minlength=len(probe.label_names)))
    if not alone or len(labelled) == len(own):
        return _Within(found, _ranks(probe.labels[found], probe.labels, matched))
    if len(labelled) < 2:
        return _Within(found, (-1,) * len(own))
    places = np.full(len(own), -1)
    places[labelled] = np.arange(len(labelled))
    slots = min(TOP_K, len(labelled) - 1)
    few = nearest_by_kind(queries, side[labelled], slots, places, metric, kinds[labelled], calibration)[1]
    return _Within(found, _ranks(probe.labels[labelled[few]], probe.labels, matched))


def _in_old(metric: Metric, run: Run, plan: Plan, probe: ProbeSet, log: VectorLog) -> tuple[int, ...]:
    """The ranks of the old model in the whole gallery."""
    found, counts = in_old_gallery(metric, run, plan, probe, log)
    return _ranks(found.without(probe.ids).labels, probe.labels, _matched(probe.labels, counts))


def _matched(labels: Int64, counts: Int64) -> Bools:
    """Which labels (Q,) another image has too, from how many images have each of them."""
    matched: Bools = np.append(counts, 0)[labels] > 1  # -1, for none, is the last
    return matched


def _ranks(neighbours: Int64, labels: Int64, matched: Bools) -> tuple[int, ...]:
    """The rank of the first neighbour with the query's label, from the labels (Q, k) of the nearest."""
    same = neighbours == labels[:, None]
    ranks = np.where(same.any(axis=1), same.argmax(axis=1) + 1, 0)
    return tuple(np.where(matched, ranks, -1).tolist())


def _recalled(found: Int64, exact: Int64) -> tuple[int, ...]:
    """How many of each row of `exact` (Q, k) are in that of `found` (Q, k)."""
    return tuple((exact[:, :, None] == found[:, None, :]).any(axis=2).sum(axis=1).tolist())


def _own(probe: ProbeSet, embedded: Bools, stored: Float32, kept: Float32) -> tuple[tuple[int, int, int], ...]:
    """See `Quality.own`: by what is stored under the id, not by what a search finds.

    So it holds for any metric, and for an image with many duplicates; and the error of a codec is in both sides.
    """
    spread = float(np.linalg.norm(kept - kept.mean(axis=0), axis=1).mean())
    hit = np.linalg.norm(stored - kept, axis=1) <= _OWN * spread
    waves = np.unique(probe.wave[embedded]).tolist()
    members = {wave: embedded & (probe.wave == wave) for wave in waves}
    return tuple((wave, int(hit[rows].sum()), int(rows.sum())) for wave, rows in members.items())


def _slot_share(nearest: Neighbours, commit: Commit) -> ProbeFigures:
    slots = nearest.ids >= 0
    share = commit.counts.transformed / max(1, commit.counts.vectors)
    if share * slots.sum() < _MIN_EXPECTED:
        return {}
    return {"slot_share": float(nearest.transformed[slots].mean()) / share}


def _groups(probe: ProbeSet, ranks: Int64) -> tuple[tuple[str, int, int], ...]:
    members = [ranks[(probe.groups == group) & (ranks >= 0)] for group in range(len(probe.group_names))]
    return tuple(
        (name, int((mine == 1).sum()), len(mine))
        for name, mine in zip(probe.group_names, members, strict=True)
        if len(mine) >= MIN_QUERIES
    )
