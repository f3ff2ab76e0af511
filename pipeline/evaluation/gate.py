"""The gate: the reasons why a snapshot must not be served.

A snapshot must not be worse than the old model (docs/method.md, "Guard"), than the snapshot that `prod` serves, or than
the best that it has served; and it must keep the limits of the section `gate`. `inspect` and `judge` are pure; the
figures are measured before (`evaluation.probe_metrics`). A snapshot that is not measured is judged by held-out pairs
alone, and `fastfill promote` refuses it.
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
"""Standard errors that count as noise. A sound run of 20 waves is refused about once in 40 runs."""

MENDED_NOISE = 2.0
"""Used when more waves follow: lower, because a false alarm only delays `prod` by a wave."""

_CHANCE = 0.001  # a sound wave has so few intact vectors with this probability


@dataclass(frozen=True, slots=True)
class Refusal:
    """One check that a snapshot failed."""

    check: str  # `held_out`, `old_old`, `new_old`, `fall`, `own`, or the figure that is beyond its limit
    sentence: str  # the figures and the limit
    mends: bool = False  # the waves that follow may mend it, so the backfill goes on

    def __str__(self) -> str:
        return self.sentence


@dataclass(frozen=True, slots=True)
class Earlier:
    """The earlier snapshots that one is compared with."""

    served: int | None = None  # the commit that `prod` serves; None if it serves none or a later one
    measured: tuple[Quality, ...] = ()  # the served, the best served and the one before, each once


def blockers(run: Run, commit: Commit, limits: GateSettings | None = None, probed: bool = True) -> list[str]:
    """The reasons why `fastfill promote` refuses a snapshot, one sentence each; empty if there are none.

    Args:
        commit: the snapshot; its driver may have died before it was measured.
        probed: whether the config has a probe set; then a snapshot that is not measured is refused.
    """
    found = [refusal.sentence for refusal in judge_commit(run, commit, limits or GateSettings())]
    if probed and _measured(run, commit) is None and probe_set.is_used(run):
        found.append("it is not measured on the probe set yet: run `fastfill backfill`, or promote it with --force")
    return found


def judge_commit(run: Run, commit: Commit, limits: GateSettings) -> list[Refusal]:
    """The checks that a snapshot fails, from the quality that is stored of it and of earlier ones."""
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
        known: the baseline of the run.
        measured: the snapshot.
        earlier: what it is compared with.
        waiting: how many images are still to be embedded.
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
    """The refusals of a wave that is not committed yet: wrong vectors are stored under its ids.

    Args:
        measured: the draft of the commit with this wave.
    """
    own = tuple(item for item in measured.own if item[0] == wave)
    return mixed_up(replace(measured, own=own), limits.min_own)


def all_mend(refusals: Sequence[Refusal]) -> bool:
    """Whether the waves that follow may mend all of them; true if there are none."""
    return all(refusal.mends for refusal in refusals)


def mixed_up(measured: Quality, least: float | None) -> list[Refusal]:
    """One refusal per wave with wrong vectors under its ids; `least` is `gate.min_own`, in per cent."""
    if least is None:
        return []
    bad = [item for item in measured.own if _at_most(item[1], item[2], least / 100) < _CHANCE]
    together = sum(hits for _, hits, _ in measured.own), sum(images for *_, images in measured.own)
    texts = [f"wave {wave}: only {hits} of {images} probe images return" for wave, hits, images in bad]
    if not bad and _at_most(*together, least / 100) < _CHANCE:
        texts = [f"only {together[0]} of all {together[1]} embedded probe images return"]
    why = f"their own embedding; gate.min_own asks for {least:g} %. Vectors are probably stored under wrong ids"
    return [Refusal("own", f"{text} {why}") for text in texts]


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
    """A transformation worse than the old model: refused while images are still to be embedded."""
    info = read_info(run)
    if info.better_than_old or not waiting:
        return []
    sentence = (
        f"on held-out pairs the transformed gallery is worse than the old one ({_figures(info.held_out)}), "
        f"and {waiting:,} images are still transformed"
    )
    return [Refusal("held_out", sentence, mends=True)]


def _below_old(known: QualityBaseline, measured: Quality, waiting: int) -> list[Refusal]:
    """Below the old model; embedding the rest may mend it unless the new model itself is worse."""
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
    """Below the snapshot that is served, the one before, or the best that was served: small falls add up.

    A fall of top-1 within one wave is that wave's fault: refuse. A fall over several waves can be normal (an offset
    makes early snapshots look better): keep `prod` where it is and go on. Recall of the full model's neighbours may
    also fall at first, if transformed vectors are shorter than embedded ones. It ends at 100 % if all vectors are
    stored under the right ids, which `mixed_up` checks.
    """
    found = []
    for item in earlier.measured:
        name, now, before = _compared(known, (measured.ranks, measured.recalled), (item.ranks, item.recalled))
        if _gain(now, before) < -limit:
            just_before = item.commit == measured.commit - 1
            which = "the one before" if just_before else "the best that prod has served"
            which = "served by prod" if item.commit == earlier.served else which
            points = 100 * float((before - now).mean())
            sentence = (
                f"{name} fell from {100 * before.mean():.1f} (commit {item.commit}, {which}) "
                f"to {100 * now.mean():.1f}: {points:.1f} points, of which {_noise(now, before):.1f} may be noise "
                f"({len(now):,} queries); gate.max_fall allows {limit:g}"
            )
            mends = waiting > 0 and not (known.labelled and just_before)
            found.append(Refusal("fall", sentence, mends))
    return sorted(found, key=lambda refusal: refusal.mends)[:1]


def _slot_share(measured: Quality, waiting: int, limits: GateSettings) -> list[Refusal]:
    """Transformed images show up too rarely or too often; this ends with the last transformed vector."""
    share, low, high = measured.figures.get("slot_share"), limits.min_slot_share, limits.max_slot_share
    if share is None:
        return []
    text = f"transformed images take {share:.3g} times their share of the 10 nearest"
    found = []
    if low is not None and share < low:
        found.append(Refusal("slot_share", f"{text}; gate.min_slot_share asks for {low:g}", mends=waiting > 0))
    if high is not None and share > high:
        found.append(Refusal("slot_share", f"{text}; gate.max_slot_share allows {high:g}", mends=waiting > 0))
    return found


def _negative_flips(known: QualityBaseline, measured: Quality, limit: float | None) -> list[Refusal]:
    lost, answered = measured.figures.get("negative_flips"), known.old.count(1)
    if lost is None or limit is None or lost - NOISE * _error(lost, answered) <= limit:
        return []
    text = f"{lost:.1f} % of the {answered:,} queries that the old model answers right are answered wrong"
    return [Refusal("negative_flips", f"{text}; gate.max_negative_flips allows {limit:g} %")]


def _group_gap(measured: Quality, limit: float | None) -> list[Refusal]:
    if limit is None or len(measured.groups) < 2:
        return []
    shares = sorted((100 * right / queries, queries, name) for name, right, queries in measured.groups)
    worst, best = shares[0], shares[-1]
    gap, noise = best[0] - worst[0], NOISE * math.hypot(_error(*best[:2]), _error(*worst[:2]))
    if gap - noise <= limit:
        return []
    sides = " and ".join(f"{share:.1f} for {name!r} ({queries:,} queries)" for share, queries, name in (best, worst))
    text = f"top-1 of groups differs by {gap:.1f} points, of which {noise:.1f} may be noise: {sides}"
    return [Refusal("group_gap", f"{text}; gate.max_group_gap allows {limit:g}")]


Answers = tuple[Sequence[int], Sequence[int]]  # per query: the rank, and how many neighbours are recalled


def _compared(known: QualityBaseline, now: Answers, before: Answers) -> tuple[str, Float64, Float64]:
    """The figure that two states are compared by, and its value per query in both, from 0 to 1."""
    if known.labelled:
        return "top-1", _right(now[0]), _right(before[0])
    after, earlier = (np.array(recalled) / known.num_neighbours for _, recalled in (now, before))
    return "full_model_recall10", after, earlier


def _right(ranks: Sequence[int]) -> Float64:
    """1 for each query with a match that is answered at rank 1, else 0."""
    found = np.array(ranks)
    answers: Float64 = (found[found >= 0] == 1).astype(np.float64)
    return answers


def _noise(now: Float64, before: Float64, errors: float = NOISE) -> float:
    """The part of a difference of two means that may be noise, in points, from the differences per query."""
    return 100 * errors * float((now - before).std(ddof=1)) / math.sqrt(len(now))


def _gain(now: Float64, before: Float64, errors: float = NOISE) -> float:
    """The rise of the mean at best, in points: negative if it falls by more than noise."""
    return 100 * float((now - before).mean()) + _noise(now, before, errors)


def _text(name: str, now: Float64, before: Float64, errors: float = NOISE) -> str:
    means = f"{name} is {100 * now.mean():.1f}, against {100 * before.mean():.1f}"
    return f"{means} ({_noise(now, before, errors):.1f} points of the difference may be noise; {len(now):,} queries)"


def _error(percent: float, queries: int) -> float:
    return math.sqrt(max(0.0, percent * (100 - percent)) / queries)


def _at_most(hits: int, images: int, share: float) -> float:
    """The probability of at most so many hits if each image is one with probability `share`."""
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
