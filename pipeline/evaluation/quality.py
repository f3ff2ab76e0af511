"""What a snapshot is worth, on the probe set: its figures, and the answers per query that they are made of.

What `assess` measures and the gate looks at. `probe-set/reference.json`, made once, is what every snapshot is compared
with; `reports/probe-set/<commit>.json` is written once a commit is measured, whole or not at all; `reports/best.json`
names the best of those that `prod` has served.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.index import fenced
from pipeline.index.fenced import Check
from pipeline.run import PROBE_SET, Run
from pipeline.storage import documents, objects
from pipeline.storage.documents import from_json, to_json

ProbeFigures = dict[str, float]

"""Where the probe set lies, and its figures below `reports`. A run's `probe` is a store's own, and gc empties it."""

MIN_QUERIES = 10
"""Of a group, or of the whole probe set: with fewer, top-1 moves by more than ten points with one query."""


@dataclass(frozen=True, slots=True)
class QualityBaseline:
    """What does not change from one snapshot to the next. A rank is that of the first image of the query's label.

    Ranks count from 1; 0 is beyond SLOTS, and -1 stands for a query without a match. One per probe image.

    Attributes:
        old: ranks of the old model, queries and gallery, by exact search over the whole gallery, or as `alone` says.
        old_recalled: of the nearest probe images under the new model, how many are among the nearest under the old.
        num_neighbours: the nearest that `recall10` looks at: 10, or fewer in a tiny probe set.
        within_old: ranks among the probe images alone, old model.
        within_transformed: the same, new queries and transformed gallery.
        within_new: the same, new model.
        alone: whether all ranks, also those of snapshots, are among the labelled images of the user's sample alone, by
            exact search in what is stored of them: the gallery has no labels, or not all of it.
    """

    old: tuple[int, ...]
    old_recalled: tuple[int, ...]
    num_neighbours: int
    within_old: tuple[int, ...]
    within_transformed: tuple[int, ...]
    within_new: tuple[int, ...]
    alone: bool = False

    @property
    def labelled(self) -> bool:
        """Whether quality is measured by labels: enough queries have a match."""
        return sum(rank >= 0 for rank in self.old) >= MIN_QUERIES

    @property
    def figures(self) -> ProbeFigures:
        """Of the old model."""
        return top(self.old) | mean_recall(self.old_recalled, self.num_neighbours)


@dataclass(frozen=True, slots=True)
class Quality:
    """A commit on the probe set.

    Attributes:
        commit: its number.
        attempt_id: of the commit file that was measured.
        figures: in per cent `top1`, `top5` (with labels), `recall10`, `negative_flips` (of the queries that the old
            model answers right, those that this does not), `group_gap` (top-1 of the best group less that of the
            worst), `own` (of the embedded probe images, those whose own vector is stored under their id); and
            `slot_share`, the transformed vectors' share in the nearest 10 over that in the index. One that cannot
            be told is not there.
        ranks: as in `QualityBaseline`, one per probe image.
        recalled: of the nearest probe images under the new model, as the index's codec keeps them, how many are among
            the nearest of what the snapshot stores of them: all of them once every image is embedded.
        own: per embedded wave, how many of its probe images have their own vector stored under their id, as near as
            another run of the encoder would give it, and how many there are.
        groups: per group of enough queries, how many of them are answered at rank 1, and how many there are.
    """

    commit: int
    attempt_id: str
    figures: ProbeFigures
    ranks: tuple[int, ...]
    recalled: tuple[int, ...]
    own: tuple[tuple[int, int, int], ...]
    groups: tuple[tuple[str, int, int], ...]


def full_estimate(known: QualityBaseline, start: Quality, left: float = 1.0) -> ProbeFigures:
    """What the full new model is expected to reach on the probe set, in per cent; only what can be told.

    `top1_error` and `top5_error` are their standard errors in points, of the sum, whose parts share their queries;
    `recall10` is 100 by definition.

    Among the probe images alone labels are rarer than in the gallery. So what the new model gains there over the
    transformed vectors is added to what snapshot 0 reaches in the whole gallery, as `expected` does.

    Args:
        known: the run's reference.
        start: the quality of commit 0.
        left: the share of the gallery that is transformed in it, which is what gains.
    """
    new, transformed = top(known.within_new), top(known.within_transformed)
    sums = {
        name: float(np.clip(start.figures[name] + left * (new[name] - transformed[name]), 0, 100))
        for name in new.keys() & start.figures.keys()
    }
    errors = {f"top{k}_error": _error(known, start, left, k) for k in (1, 5) if f"top{k}" in sums}
    return sums | errors | {"recall10": 100.0}


def _error(known: QualityBaseline, start: Quality, left: float, k: int) -> float:
    """Of `top{k}` in `full_estimate`, over the queries with a match in the gallery and among the probe images."""
    ranks = np.array([start.ranks, known.within_new, known.within_transformed])
    ranks = ranks[:, (ranks >= 0).all(axis=0)]
    answers = 100.0 * ((ranks > 0) & (ranks <= k))
    return float((answers[0] + left * (answers[1] - answers[2])).std(ddof=1) / np.sqrt(ranks.shape[1]))


def read_baseline(run: Run) -> QualityBaseline | None:
    """As `assess.reference` stored it, or None."""
    found = objects.read_versioned(_reference_uri(run))
    return from_json(QualityBaseline, found[0], _reference_uri(run)) if found else None


def read_quality(run: Run, commit: int) -> Quality | None:
    """As `assess.measure` stored it, or None where the commit is not measured."""
    uri = _quality_uri(run, commit)
    found = objects.read_versioned(uri)
    return from_json(Quality, found[0], uri) if found else None


def read_all_quality(run: Run) -> list[Quality]:
    """Of all commits that are measured, ascending."""
    return [read_file(uri) for uri in files(run)]


def files(run: Run) -> list[str]:
    """The files of all commits that are measured, sorted."""
    return objects.list_files(run.path("reports", PROBE_SET), ".json")


def read_file(uri: str) -> Quality:
    """One of `files`.

    Raises:
        DataError: it is damaged or of another format.
    """
    return from_json(Quality, objects.read_bytes(uri), uri)


def read_best(run: Run, served: int | None) -> int | None:
    """The best commit that `prod` has served, up to the one that it serves; None where that is not known.

    Args:
        run: the run.
        served: the commit that `prod` points to. After a rollback what was served later is no measure any more.
    """
    found = objects.read_versioned(_best_uri(run))
    if found is None or served is None:
        return None
    best = documents.parse(_Best, found[0], _best_uri(run), documents.REDO).commit
    return best if best <= served else None


def keep_best(run: Run, commit: int, before: int | None, anew: bool = False, check: Check = fenced.anyone) -> None:
    """Keep that `prod` serves a commit now, where that is the best one so far.

    Args:
        run: the run.
        commit: its number.
        before: what `prod` served before.
        anew: whatever was served before, this is what later commits are compared with: somebody has insisted on it.
        check: whether the caller may still write.

    Raises:
        SnapshotConflict: another driver owns the run.
    """
    kept, measured = read_best(run, before), read_quality(run, commit)
    best = before if kept is None else kept  # none is kept after a rollback
    known = read_quality(run, best) if best is not None and not anew else None
    if known is None or (measured is not None and _value(measured) >= _value(known)):
        best = commit
    if best is not None and best != kept:
        fenced.replace(_best_uri(run), documents.encode(_Best(best)), check)


def write_baseline(run: Run, made: QualityBaseline) -> None:
    """Keep what snapshots are compared with."""
    objects.put(_reference_uri(run), to_json(made))


def write_quality(run: Run, made: Quality) -> None:
    """Keep the quality of a commit."""
    objects.put(_quality_uri(run, made.commit), to_json(made))


def top(ranks: Sequence[int]) -> ProbeFigures:
    """`top1` and `top5` in per cent over the queries with a match; nothing where these are too few."""
    measured = np.array([rank for rank in ranks if rank >= 0])
    if len(measured) < MIN_QUERIES:
        return {}
    right = measured > 0
    return {f"top{k}": 100 * float((right & (measured <= k)).mean()) for k in (1, 5)}


def mean_recall(recalled: Sequence[int], num_neighbours: int) -> ProbeFigures:
    """`recall10` in per cent, from how many of so many neighbours are recalled."""
    return {"recall10": 100 * float(np.mean(recalled)) / num_neighbours}


@dataclass(frozen=True, slots=True)
class _Best:
    """`reports/best.json`: the best commit that `prod` has served."""

    commit: int


def _value(measured: Quality) -> float:
    """What the gate compares by."""
    return measured.figures.get("top1", measured.figures["recall10"])


def _best_uri(run: Run) -> str:
    return run.path("reports", "best.json")


def _reference_uri(run: Run) -> str:
    return run.path(PROBE_SET, "reference.json")


def _quality_uri(run: Run, commit: int) -> str:
    return run.path("reports", PROBE_SET, f"{commit:020d}.json")


@dataclass(frozen=True, slots=True)
class PromotionStatus:
    """`reports/standing.json`.

    Attributes:
        commit: the number of the last commit that was judged.
        refused: why it is not promoted.
        stopped: which condition of `--stop-when` ended the backfill here.
    """

    commit: int
    refused: tuple[str, ...] = ()
    stopped: str | None = None


def write_promotion_status(run: Run, standing: PromotionStatus, check: Check) -> None:
    """Keep what became of the last commit; raises as `fenced.replace`."""
    fenced.replace(_uri(run), documents.encode(standing), check)


def read_promotion_status(run: Run) -> PromotionStatus | None:
    """What became of the last commit that was judged, or None.

    Raises:
        DataError: the file is damaged or of another format.
    """
    found = objects.read_versioned(_uri(run))
    return None if found is None else documents.parse(PromotionStatus, found[0], _uri(run), documents.REDO)


def _uri(run: Run) -> str:
    return run.path("reports", "standing.json")
