"""What a snapshot is worth, on the probe set: its figures, and the answers per query that they are made of.

After the neighbours, before the gate. Pure but for its files: `probe/reference.json`, made once, is what every
snapshot is compared with; `reports/probe/<commit>.json` is written once a commit is measured, whole or not at all.
It does not judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.commits import Commit, from_json, to_json
from pipeline.config import Config
from pipeline.neighbours import Found, Neighbours, in_old_gallery, in_snapshot, nearest_rows
from pipeline.plan import Plan
from pipeline.points import SLOTS
from pipeline.probe_set import FOLDER, ProbeSet
from pipeline.run import Run
from pipeline.schema import Int64

Bools = NDArray[np.bool_]
Figures = dict[str, float]

MIN_QUERIES = 10
"""Of a group, or of the whole probe set: with fewer, top-1 moves by more than ten points with one query."""

_MIN_EXPECTED = 50.0  # slots: with fewer, the share of the transformed ones is mostly noise


@dataclass(frozen=True, slots=True)
class Reference:
    """What does not change from one snapshot to the next. A rank is that of the first image of the query's label.

    Ranks count from 1; 0 is beyond SLOTS, and -1 stands for a query without a match. One per probe image.

    Attributes:
        old: ranks of the old model, queries and gallery, by exact search over the whole gallery.
        old_recalled: of the nearest probe images under the new model, how many are among the nearest under the old.
        num_neighbours: the nearest that `recall10` looks at: 10, or fewer in a tiny probe set.
        within_old: ranks among the probe images alone, old model.
        within_transformed: the same, new queries and transformed gallery.
        within_new: the same, new model.
    """

    old: tuple[int, ...]
    old_recalled: tuple[int, ...]
    num_neighbours: int
    within_old: tuple[int, ...]
    within_transformed: tuple[int, ...]
    within_new: tuple[int, ...]

    @property
    def labelled(self) -> bool:
        """Whether quality is measured by labels: enough queries have a match."""
        return sum(rank >= 0 for rank in self.old) >= MIN_QUERIES

    @property
    def figures(self) -> Figures:
        """Of the old model."""
        return _ranked(self.old) | {"recall10": _percent(self.old_recalled, self.num_neighbours)}


@dataclass(frozen=True, slots=True)
class Quality:
    """A commit on the probe set.

    Attributes:
        commit: its number.
        attempt_id: of the commit file that was measured.
        figures: in per cent `top1`, `top5` (with labels), `recall10`, `negative_flips` (of the queries that the old
            model answers right, those that this does not), `group_gap` (top-1 of the best group less that of the
            worst), `own` (of the embedded probe images, those that find themselves among the nearest 10); and
            `slot_share`, the transformed vectors' share in the nearest 10 over that in the index. One that cannot
            be told is not there.
        ranks: as in `Reference`, one per probe image.
        recalled: the same as `Reference.old_recalled`, of this snapshot.
        own: per embedded wave, how many of its probe images find themselves, and how many there are.
    """

    commit: int
    attempt_id: str
    figures: Figures
    ranks: tuple[int, ...]
    recalled: tuple[int, ...]
    own: tuple[tuple[int, int, int], ...]


def reference(config: Config, run: Run, plan: Plan, probe: ProbeSet) -> Reference:
    """What snapshots are compared with, measured once and kept."""
    found = read_reference(run)
    if found is not None:
        return found
    nearest, counts = in_old_gallery(config, run, plan, probe)
    matched = probe.labels >= 0
    matched[matched] = counts[probe.labels[matched]] > 1
    metric, k = config.gallery.metric, min(SLOTS, len(probe.ids) - 1)
    new = nearest_rows(probe.new, probe.new, metric, k, own=True)[0]
    old = nearest_rows(probe.old, probe.old, metric, k, own=True)[0]
    transformed = nearest_rows(probe.new, probe.transformed, metric, k, own=True)[0]
    among = np.bincount(probe.labels[probe.labels >= 0], minlength=len(probe.label_names))
    inside = probe.labels >= 0
    inside[inside] = among[probe.labels[inside]] > 1
    made = Reference(
        old=_ranks(nearest.without(probe.ids).labels, probe.labels, matched),
        old_recalled=_recalled(old, new),
        num_neighbours=k,
        within_old=_ranks(probe.labels[old], probe.labels, inside),
        within_transformed=_ranks(probe.labels[transformed], probe.labels, inside),
        within_new=_ranks(probe.labels[new], probe.labels, inside),
    )
    storage.put(_reference_uri(run), to_json(made))
    return made


def measure(run: Run, plan: Plan, probe: ProbeSet, known: Reference, commit: Commit) -> Quality:
    """The quality of a commit, measured now or as it was stored.

    Raises:
        DataError: a segment is missing or damaged.
    """
    stored = read_quality(run, commit.number)
    if stored is not None and stored.attempt_id == commit.attempt_id:
        return stored
    made = assess(probe, known, commit, in_snapshot(run, plan, probe, commit))
    storage.put(_quality_uri(run, commit.number), to_json(made))
    return made


def assess(probe: ProbeSet, known: Reference, commit: Commit, found: Found) -> Quality:
    """The figures of what was found in a commit."""
    nearest = found.nearest.without(probe.ids)
    ranks = _ranks(nearest.labels, probe.labels, np.array(known.old) >= 0)
    gallery = np.where(found.embedded[:, None], probe.new, probe.transformed)
    k = known.num_neighbours
    exact = nearest_rows(probe.new, probe.new, commit.metric, k, own=True)[0]
    recalled = _recalled(nearest_rows(probe.new, gallery, commit.metric, k, own=True)[0], exact)
    own = _own(probe, found) if commit.metric != "ip" else ()  # by inner product an image need not be its nearest
    figures = _ranked(ranks) | {"recall10": _percent(recalled, k)}
    right = np.array(known.old) == 1
    if known.labelled and right.any():
        figures["negative_flips"] = 100 * float((np.array(ranks)[right] != 1).mean())
    figures |= _slot_share(nearest, commit) | _group_gap(probe, np.array(ranks))
    if own:
        figures["own"] = 100 * sum(hits for _, hits, _ in own) / sum(images for *_, images in own)
    return Quality(commit.number, commit.attempt_id, figures, ranks, recalled, own)


def full_estimate(known: Reference, start: Quality) -> Figures:
    """What the full new model is expected to reach on the probe set, in per cent; only what can be told.

    Among the probe images alone labels are rarer than in the gallery, so what the new model reaches there is
    scaled by what snapshot 0 reaches in the whole gallery over what it reaches among them.

    Args:
        known: the run's reference.
        start: the quality of commit 0.
    """
    new, transformed = _ranked(known.within_new), _ranked(known.within_transformed)
    scaled = {
        name: min(100.0, new[name] * start.figures[name] / transformed[name])
        for name in new.keys() & start.figures.keys()
        if transformed[name] > 0
    }
    return scaled | {"recall10": 100.0}


def read_reference(run: Run) -> Reference | None:
    """As `reference` stored it, or None."""
    found = storage.read_versioned(_reference_uri(run))
    return from_json(Reference, found[0], _reference_uri(run)) if found else None


def read_quality(run: Run, commit: int) -> Quality | None:
    """As `measure` stored it, or None where the commit is not measured."""
    uri = _quality_uri(run, commit)
    found = storage.read_versioned(uri)
    return from_json(Quality, found[0], uri) if found else None


def read_all(run: Run) -> list[Quality]:
    """Of all commits that are measured, ascending."""
    uris = storage.list_files(run.path("reports", FOLDER), ".json")
    return [from_json(Quality, storage.read_bytes(uri), uri) for uri in uris]


def _reference_uri(run: Run) -> str:
    return run.path(FOLDER, "reference.json")


def _quality_uri(run: Run, commit: int) -> str:
    return run.path("reports", FOLDER, f"{commit:020d}.json")


def _ranks(neighbours: Int64, labels: Int64, matched: Bools) -> tuple[int, ...]:
    """The rank of the first neighbour with the query's label, from the labels (Q, k) of the nearest."""
    same = neighbours == labels[:, None]
    ranks = np.where(same.any(axis=1), same.argmax(axis=1) + 1, 0)
    return tuple(np.where(matched, ranks, -1).tolist())


def _recalled(found: Int64, exact: Int64) -> tuple[int, ...]:
    """How many of each row of `exact` (Q, k) are in that of `found` (Q, k)."""
    return tuple((exact[:, :, None] == found[:, None, :]).any(axis=2).sum(axis=1).tolist())


def _ranked(ranks: Sequence[int]) -> Figures:
    """Top-1 and top-5 in per cent over the queries with a match; nothing where these are too few."""
    measured = np.array([rank for rank in ranks if rank >= 0])
    if len(measured) < MIN_QUERIES:
        return {}
    right = measured > 0
    return {f"top{k}": 100 * float((right & (measured <= k)).mean()) for k in (1, 5)}


def _percent(recalled: Sequence[int], k: int) -> float:
    return 100 * float(np.mean(recalled)) / k


def _own(probe: ProbeSet, found: Found) -> tuple[tuple[int, int, int], ...]:
    hit = (found.nearest.ids[:, :SLOTS] == probe.ids[:, None]).any(axis=1)
    waves = np.unique(probe.wave[found.embedded]).tolist()
    members = {wave: found.embedded & (probe.wave == wave) for wave in waves}
    return tuple((wave, int(hit[rows].sum()), int(rows.sum())) for wave, rows in members.items())


def _slot_share(nearest: Neighbours, commit: Commit) -> Figures:
    slots = nearest.ids >= 0
    share = commit.counts.transformed / max(1, commit.counts.vectors)
    if share * slots.sum() < _MIN_EXPECTED:
        return {}
    return {"slot_share": float(nearest.transformed[slots].mean()) / share}


def _group_gap(probe: ProbeSet, ranks: Int64) -> Figures:
    values = []
    for group in range(len(probe.group_names)):
        mine = ranks[(probe.groups == group) & (ranks >= 0)]
        if len(mine) >= MIN_QUERIES:
            values.append(100 * float((mine == 1).mean()))
    return {"group_gap": max(values) - min(values)} if len(values) > 1 else {}
