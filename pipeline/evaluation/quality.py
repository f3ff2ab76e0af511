"""The quality of a snapshot on the probe set, as it is stored: figures, and the answer to each query.

`evaluation.probe_metrics` measures it, `evaluation.gate` judges it. Files of a run:

    probe-set/reference.json          the baseline that every snapshot is compared with; written once
    reports/probe-set/<commit>.json   the quality of a commit; written once
    reports/best.json                 the best commit that `prod` has served
    reports/standing.json             the result of the gate for the last commit
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.index import fenced
from pipeline.index.fenced import Check
from pipeline.run import PROBE_SET, Run
from pipeline.storage import documents, objects

ProbeFigures = dict[str, float]
"""Figures by name. `recall10` is full_model_recall10: of the full new model's 10 nearest, the per cent found."""

MIN_QUERIES = 10
"""Of a group or of the whole probe set; with fewer, one query moves top-1 by more than ten points."""


@dataclass(frozen=True, slots=True)
class QualityBaseline:
    """The figures that all snapshots of a run are compared with.

    A rank is that of the first image with the query's label, from 1; 0 is beyond the 10 nearest, -1 is a query without
    a match. There is one per probe image.
    """

    old: tuple[int, ...]  # of the old model by exact search, in the whole gallery or as `alone` says
    old_recalled: tuple[int, ...]  # of the new model's nearest probe images, how many the old model finds
    num_neighbours: int  # of `full_model_recall10`: 10, or fewer in a tiny probe set
    within_old: tuple[int, ...]  # of the old model among the probe images alone
    within_transformed: tuple[int, ...]  # the same, new queries and transformed gallery
    within_new: tuple[int, ...]  # the same, new model
    alone: bool = False  # all ranks are among the labelled images of the user's sample: the gallery lacks labels

    @property
    def labelled(self) -> bool:
        """Whether enough queries have a match to measure quality by labels."""
        return sum(rank >= 0 for rank in self.old) >= MIN_QUERIES

    @property
    def figures(self) -> ProbeFigures:
        """The old model's figures."""
        return top(self.old) | full_model_recall10(self.old_recalled, self.num_neighbours)


@dataclass(frozen=True, slots=True)
class Quality:
    """The quality of a commit.

    `figures` has those that can be measured, in per cent: `top1`, `top5`, `recall10`; `negative_flips`, the queries
    that the old model answers right and this commit does not; `group_gap`, top-1 of the best group less that of the
    worst; `own`, the embedded probe images whose own vector is stored under their id. `slot_share` is a ratio: the
    share of transformed vectors in the 10 nearest over their share of the index.
    """

    commit: int
    attempt_id: str  # of the commit file that was measured
    figures: ProbeFigures
    ranks: tuple[int, ...]  # as in `QualityBaseline`, one per probe image
    recalled: tuple[int, ...]  # of the new model's nearest probe images, in the index's codec, how many it finds
    own: tuple[tuple[int, int, int], ...]  # (wave, intact, images) of the probe images of each embedded wave
    groups: tuple[tuple[str, int, int], ...]  # (group, answered at rank 1, queries) of each large enough group


def full_estimate(known: QualityBaseline, start: Quality, left: float = 1.0) -> ProbeFigures:
    """The expected figures of the full new model, in per cent; those that can be estimated.

        full = commit 0 in the whole gallery + left * (new model - transformed), the last two among probe images alone

    `top1_error` and `top5_error` are standard errors in percentage points. The terms are correlated (same queries),
    which is accounted for. `recall10` is 100 by definition.

    Args:
        known: the baseline of the run.
        start: the quality of commit 0.
        left: the share of the gallery that is transformed in commit 0.
    """
    new, transformed = top(known.within_new), top(known.within_transformed)
    sums = {
        name: float(np.clip(start.figures[name] + left * (new[name] - transformed[name]), 0, 100))
        for name in new.keys() & start.figures.keys()
    }
    errors = {f"top{k}_error": _error(known, start, left, k) for k in (1, 5) if f"top{k}" in sums}
    return sums | errors | {"recall10": 100.0}


def _error(known: QualityBaseline, start: Quality, left: float, k: int) -> float:
    """The standard error of `top{k}`, over the queries with a match in the gallery and among the probe images."""
    ranks = np.array([start.ranks, known.within_new, known.within_transformed])
    ranks = ranks[:, (ranks >= 0).all(axis=0)]
    answers = 100.0 * ((ranks > 0) & (ranks <= k))
    return float((answers[0] + left * (answers[1] - answers[2])).std(ddof=1) / np.sqrt(ranks.shape[1]))


def read_baseline(run: Run) -> QualityBaseline | None:
    """The stored baseline, or None."""
    found = objects.read_versioned(_reference_uri(run))
    return documents.parse(QualityBaseline, found[0], _reference_uri(run), must_be_checked=True) if found else None


def read_quality(run: Run, commit: int) -> Quality | None:
    """The stored quality of a commit; None if it is not measured."""
    uri = _quality_uri(run, commit)
    found = objects.read_versioned(uri)
    return documents.parse(Quality, found[0], uri, must_be_checked=True) if found else None


def read_all_quality(run: Run) -> list[Quality]:
    """The quality of all measured commits, ascending."""
    return [read_file(uri) for uri in files(run)]


def files(run: Run) -> list[str]:
    """The quality files of all measured commits, sorted."""
    return objects.list_files(run.path("reports", PROBE_SET), ".json")


def read_file(uri: str) -> Quality:
    """One of `files`.

    Raises:
        DataError: it is damaged or of another format.
    """
    return documents.parse(Quality, objects.read_bytes(uri), uri, must_be_checked=True)


def read_best(run: Run, served: int | None) -> int | None:
    """The best commit that `prod` has served, none later than `served`; None if it is not known.

    Args:
        served: the commit that `prod` points to. After a rollback later commits do not count.
    """
    found = objects.read_versioned(_best_uri(run))
    if found is None or served is None:
        return None
    best = documents.parse(_Best, found[0], _best_uri(run), documents.REDO).commit
    return best if best <= served else None


def keep_best(run: Run, commit: int, before: int | None, anew: bool = False, check: Check = fenced.anyone) -> None:
    """Record the commit that `prod` serves now as the best one, if it is.

    Args:
        before: the commit that `prod` served before.
        anew: later commits are compared with this one even if an earlier one was better: a person has forced it.
        check: raises if the caller may not write any more.

    Raises:
        SnapshotConflict: another driver owns the run.
    """
    kept, measured = read_best(run, before), read_quality(run, commit)
    best = before if kept is None else kept  # after a rollback none is kept
    known = read_quality(run, best) if best is not None and not anew else None
    if known is None or (measured is not None and _value(measured) >= _value(known)):
        best = commit
    if best is not None and best != kept:
        fenced.replace(_best_uri(run), documents.encode(_Best(best)), check)


def write_baseline(run: Run, made: QualityBaseline) -> None:
    """Store the baseline."""
    objects.put(_reference_uri(run), documents.encode(made))


def write_quality(run: Run, made: Quality) -> None:
    """Store the quality of a commit."""
    objects.put(_quality_uri(run, made.commit), documents.encode(made))


def top(ranks: Sequence[int]) -> ProbeFigures:
    """`top1` and `top5` in per cent over the queries with a match; empty if these are too few."""
    measured = np.array([rank for rank in ranks if rank >= 0])
    if len(measured) < MIN_QUERIES:
        return {}
    right = measured > 0
    return {f"top{k}": 100 * float((right & (measured <= k)).mean()) for k in (1, 5)}


def full_model_recall10(recalled: Sequence[int], num_neighbours: int) -> ProbeFigures:
    """The share of the full model's neighbours that are found, in per cent, under its stored name `recall10`."""
    return {"recall10": 100 * float(np.mean(recalled)) / num_neighbours}


@dataclass(frozen=True, slots=True)
class _Best:
    commit: int


def _value(measured: Quality) -> float:
    return measured.figures.get("top1", measured.figures["recall10"])


def _best_uri(run: Run) -> str:
    return run.path("reports", "best.json")


def _reference_uri(run: Run) -> str:
    return run.path(PROBE_SET, "reference.json")


def _quality_uri(run: Run, commit: int) -> str:
    return run.path("reports", PROBE_SET, f"{commit:020d}.json")


@dataclass(frozen=True, slots=True)
class PromotionStatus:
    """`reports/standing.json`."""

    commit: int  # the number of the last commit that was judged
    refused: tuple[str, ...] = ()  # why it is not promoted
    stopped: str | None = None  # the condition of `--stop-when` that ended the backfill here


def write_promotion_status(run: Run, status: PromotionStatus, check: Check) -> None:
    """Store the result for the last commit; raises as `fenced.replace`."""
    fenced.replace(_uri(run), documents.encode(status), check)


def read_promotion_status(run: Run) -> PromotionStatus | None:
    """The result for the last commit that was judged, or None.

    Raises:
        DataError: the file is damaged or of another format.
    """
    found = objects.read_versioned(_uri(run))
    return None if found is None else documents.parse(PromotionStatus, found[0], _uri(run), documents.REDO)


def _uri(run: Run) -> str:
    return run.path("reports", "standing.json")
