"""The gate: why a snapshot must not be served. Pure decisions on what is stored.

The transformed gallery must not be worse than the old one (METHOD, "Guard"), on held-out pairs and on the probe
set; and a snapshot must not be worse than the one that is served or the best that was, nor beyond the limits of
`config.Gate`. What it looks at was measured before (`quality`); a snapshot that was not measured is judged by the
held-out pairs alone, and not promoted by hand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.arrays import Float64
from pipeline.config.method import GateSettings
from pipeline.evaluation import probe_set, quality
from pipeline.evaluation.quality import Quality, QualityBaseline
from pipeline.index import tags
from pipeline.index.commits import Commit
from pipeline.models.transformation import read_info
from pipeline.run import Run

NOISE = 3.0
"""Standard errors that count as noise: twenty waves of a sound run are looked at, and none of them is to be refused."""

MENDED_NOISE = 2.0
"""The same where the backfill goes on all the same: a wrong guess only keeps `prod` back for a while."""

_CHANCE = 0.001  # of a sound wave to have so few images with their own vector


@dataclass(frozen=True, slots=True)
class Refusal:
    """One check that a snapshot failed.

    Attributes:
        check: its name: `held_out`, `old_old`, `new_old`, `fall`, `own`, or the figure whose limit it is beyond.
        sentence: the figures and the limit.
        mends: the backfill itself mends it, so it is no reason to stop.
    """

    check: str
    sentence: str
    mends: bool = False

    def __str__(self) -> str:
        return self.sentence


@dataclass(frozen=True, slots=True)
class Earlier:
    """What a snapshot is compared with.

    Attributes:
        served: the commit that `prod` serves; None where it serves none or a later one.
        measured: that, the best that it has served, and the one before this snapshot, each once, as far as measured.
    """

    served: int | None = None
    measured: tuple[Quality, ...] = ()


def blockers(run: Run, commit: Commit, limits: GateSettings | None = None, probed: bool = True) -> list[str]:
    """Why this snapshot must not become `prod`, one sentence each; empty where it may.

    Args:
        run: the run.
        commit: the snapshot, which a driver may have published and not measured.
        limits: the gate's.
        probed: whether the config wants a probe set: a snapshot that is not measured on it yet is blocked.
    """
    found = [refusal.sentence for refusal in judge_commit(run, commit, limits or GateSettings())]
    if probed and _measured(run, commit) is None and probe_set.is_used(run):
        found.append("it is not measured on the probe set yet: run `fastfill backfill`, or promote it with --force")
    return found


def judge_commit(run: Run, commit: Commit, limits: GateSettings) -> list[Refusal]:
    """The checks that a snapshot fails, by what is stored of it, of the run, and of the snapshot that is served."""
    waiting = commit.counts.transformed - commit.counts.rejected
    found = _held_out(run, waiting)
    known, measured = quality.read_baseline(run), _measured(run, commit)
    if known is None or measured is None:
        return found
    return found + judge(known, measured, _earlier(run, commit), waiting, limits)


def judge(
    known: QualityBaseline, measured: Quality, earlier: Earlier, waiting: int, limits: GateSettings
) -> list[Refusal]:
    """The checks that a snapshot fails on the probe set.

    Args:
        known: the run's reference.
        measured: the snapshot.
        earlier: what it is compared with.
        waiting: images that are transformed and yet to be embedded.
        limits: the gate's.
    """
    return [
        *_below_old(known, measured, waiting),
        *_fall(known, measured, earlier, waiting, limits.max_fall),
        *mixed_up(measured, limits.min_own),
        *_slot_share(measured, waiting, limits),
        *_negative_flips(known, measured, limits.max_negative_flips),
        *_group_gap(measured, limits.max_group_gap),
    ]


def inspect(measured: Quality, wave: int, limits: GateSettings) -> list[Refusal]:
    """The refusals of a wave that is not committed yet: its images have wrong vectors under their ids.

    Args:
        measured: the draft of the commit that would publish the wave.
        wave: its number.
        limits: the gate's.
    """
    own = tuple(item for item in measured.own if item[0] == wave)
    return mixed_up(replace(measured, own=own), limits.min_own)


def all_mend(refusals: Sequence[Refusal]) -> bool:
    """Whether the backfill mends all of them by going on; also true of none."""
    return all(refusal.mends for refusal in refusals)


def mixed_up(measured: Quality, least: float | None) -> list[Refusal]:
    """The waves whose images have other vectors stored under their ids.

    Args:
        measured: the snapshot, or the draft of one.
        least: `gate.min_own`.
    """
    if least is None:
        return []
    bad = [item for item in measured.own if _at_most(item[1], item[2], least / 100) < _CHANCE]
    together = sum(hits for _, hits, _ in measured.own), sum(images for *_, images in measured.own)
    texts = [f"{hits} of {images} probe images of wave {wave}" for wave, hits, images in bad]
    if not bad and _at_most(*together, least / 100) < _CHANCE:
        texts = [f"{together[0]} of all {together[1]} embedded probe images"]
    return [
        Refusal("own", f"only {text} have their own vector under their id, gate.min_own is {least:g} per cent")
        for text in texts
    ]


def _measured(run: Run, commit: Commit) -> Quality | None:
    found = quality.read_quality(run, commit.number)
    return found if found is not None and found.attempt_id == commit.attempt_id else None


def _earlier(run: Run, commit: Commit) -> Earlier:
    prod = tags.read_tag(run, tags.PROD)
    if prod is None or prod.commit is None or prod.commit >= commit.number:
        return Earlier()
    numbers = dict.fromkeys((prod.commit, quality.read_best(run, prod.commit), commit.number - 1))
    found = (quality.read_quality(run, number) for number in numbers if number is not None)
    return Earlier(prod.commit, tuple(item for item in found if item is not None))


def _held_out(run: Run, waiting: int) -> list[Refusal]:
    """A transformation that is worse than old/old blocks what still serves transformed vectors of images to come."""
    info = read_info(run)
    if info.better_than_old or not waiting:
        return []
    sentence = (
        f"on held-out pairs the transformed gallery is worse than the old one ({_figures(info.held_out)}), "
        f"and {waiting:,} images are still transformed"
    )
    return [Refusal("held_out", sentence, mends=True)]


def _below_old(known: QualityBaseline, measured: Quality, waiting: int) -> list[Refusal]:
    """Below the old model, and whether what is still to be embedded can mend that."""
    found = []
    within = _right(known.within_new), _right(known.within_old)
    new_is_worse = known.labelled and len(within[0]) > 1 and _gain(*within) < 0
    if new_is_worse:
        figures = _text("top-1 among the probe images", *within)
        found.append(Refusal("new_old", f"the new model is worse than the old one: {figures}"))
    name, now, old = _compared(known, (measured.ranks, measured.recalled), (known.old, known.old_recalled))
    mends = waiting > 0 and not new_is_worse
    errors = MENDED_NOISE if mends else NOISE
    if _gain(now, old, errors) < 0:
        left = f"; {waiting:,} images are still transformed" if waiting else ""
        sentence = f"the snapshot is worse than the old model and gallery: {_text(name, now, old, errors)}{left}"
        found.append(Refusal("old_old", sentence, mends))
    return found


def _fall(known: QualityBaseline, measured: Quality, earlier: Earlier, waiting: int, limit: float) -> list[Refusal]:
    """Below the snapshot that is served, the one before, or the best one so far: a little less each time adds up.

    What one wave takes is a fault of that wave. What several take together a sound run may lose on the way, where an
    offset makes the first snapshot better than those in the middle: `prod` stays, and the backfill goes on. What is
    recalled may fall on the way in a sound run, where the transformed vectors are shorter than the embedded
    ones: the two kinds keep apart. It ends at 100 per cent where each image has its own vector, so going on mends it;
    where one has not, `mixed_up` tells.
    """
    found = []
    for item in earlier.measured:
        name, now, before = _compared(known, (measured.ranks, measured.recalled), (item.ranks, item.recalled))
        if _gain(now, before) < -limit:
            just_before = item.commit == measured.commit - 1
            which = "the one before" if just_before else "the best that prod has served"
            which = "which prod serves" if item.commit == earlier.served else which
            sentence = f"the snapshot is worse than commit {item.commit}, {which}: {_text(name, now, before)}"
            mends = waiting > 0 and not (known.labelled and just_before)
            found.append(Refusal("fall", f"{sentence}; gate.max_fall is {limit:g}", mends))
    return sorted(found, key=lambda refusal: refusal.mends)[:1]


def _slot_share(measured: Quality, waiting: int, limits: GateSettings) -> list[Refusal]:
    """One kind of vector crowds out the other, which ends with the last transformed one."""
    share, low, high = measured.figures.get("slot_share"), limits.min_slot_share, limits.max_slot_share
    if share is None:
        return []
    text = f"transformed vectors have {share:.3g} times their share among the 10 nearest"
    found = []
    if low is not None and share < low:
        found.append(Refusal("slot_share", f"{text}; gate.min_slot_share is {low:g}", mends=waiting > 0))
    if high is not None and share > high:
        found.append(Refusal("slot_share", f"{text}; gate.max_slot_share is {high:g}", mends=waiting > 0))
    return found


def _negative_flips(known: QualityBaseline, measured: Quality, limit: float | None) -> list[Refusal]:
    lost, answered = measured.figures.get("negative_flips"), known.old.count(1)
    if lost is None or limit is None or lost - NOISE * _error(lost, answered) <= limit:
        return []
    text = f"{lost:.1f} per cent of the {answered:,} queries that the old model answers are not answered"
    return [Refusal("negative_flips", f"{text}; gate.max_negative_flips is {limit:g}")]


def _group_gap(measured: Quality, limit: float | None) -> list[Refusal]:
    if limit is None or len(measured.groups) < 2:
        return []
    shares = sorted((100 * right / queries, queries, name) for name, right, queries in measured.groups)
    worst, best = shares[0], shares[-1]
    gap, noise = best[0] - worst[0], NOISE * math.hypot(_error(*best[:2]), _error(*worst[:2]))
    if gap - noise <= limit:
        return []
    sides = " and ".join(f"{share:.1f} for {name!r} ({queries:,} queries)" for share, queries, name in (best, worst))
    text = f"groups differ by {gap:.1f} points, of which {noise:.1f} may be noise: top-1 is {sides}"
    return [Refusal("group_gap", f"{text}; gate.max_group_gap is {limit:g}")]


Answers = tuple[Sequence[int], Sequence[int]]  # the ranks, and how many neighbours are recalled


def _compared(known: QualityBaseline, now: Answers, before: Answers) -> tuple[str, Float64, Float64]:
    """By which figure two states are compared, and its value per query, from 0 to 1, in both."""
    if known.labelled:
        return "top-1", _right(now[0]), _right(before[0])
    after, earlier = (np.array(recalled) / known.num_neighbours for _, recalled in (now, before))
    return "recall10", after, earlier


def _right(ranks: Sequence[int]) -> Float64:
    """Which of the queries that have a match are answered, as 0 and 1."""
    found = np.array(ranks)
    answers: Float64 = (found[found >= 0] == 1).astype(np.float64)
    return answers


def _noise(now: Float64, before: Float64, errors: float = NOISE) -> float:
    """How many points of a difference of two means may be noise, from the differences per query."""
    return 100 * errors * float((now - before).std(ddof=1)) / math.sqrt(len(now))


def _gain(now: Float64, before: Float64, errors: float = NOISE) -> float:
    """By how many points the mean rises at best: negative where it falls by more than noise."""
    return 100 * float((now - before).mean()) + _noise(now, before, errors)


def _text(name: str, now: Float64, before: Float64, errors: float = NOISE) -> str:
    means = f"{name} is {100 * now.mean():.1f}, against {100 * before.mean():.1f}"
    return f"{means} (of the difference {_noise(now, before, errors):.1f} points may be noise; {len(now):,} queries)"


def _error(percent: float, queries: int) -> float:
    """The standard error of a share of queries, in points."""
    return math.sqrt(max(0.0, percent * (100 - percent)) / queries)


def _at_most(hits: int, images: int, share: float) -> float:
    """The probability of so few hits where each image is one with probability `share`."""
    if hits >= images or share <= 0:
        return 1.0
    if share >= 1:
        return 0.0
    whole = math.lgamma(images + 1)
    logs = (
        whole
        - math.lgamma(k + 1)
        - math.lgamma(images - k + 1)
        + k * math.log(share)
        + (images - k) * math.log1p(-share)
        for k in range(hits + 1)
    )
    return min(1.0, math.fsum(map(math.exp, logs)))


def _figures(held_out: dict[str, float | dict[str, float]]) -> str:
    texts = []
    for name in ("transformed", "old_old"):
        figures = held_out.get(name)
        if isinstance(figures, dict):
            texts.append(f"{name} " + ", ".join(f"{key} {value:.1f}" for key, value in figures.items()))
    return " against ".join(texts)
