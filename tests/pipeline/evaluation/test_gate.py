"""The gate: a transformation that is worse than doing nothing is not served while anything depends on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.method import GateSettings
from pipeline.evaluation import quality
from pipeline.evaluation.gate import Earlier, blockers, judge, mixed_up
from pipeline.evaluation.quality import Quality, QualityBaseline
from pipeline.index.commits import Commit, SegmentCounts
from pipeline.run import Run
from tests.support.transformations import fitted


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Run]:
    return {better: fitted(tmp_path_factory.mktemp(str(better)), better) for better in (True, False)}


def commit(gallery: int, embedded: int, rejected: int) -> Commit:
    counts = SegmentCounts(gallery, gallery - embedded, embedded, rejected)
    return Commit(0, None, "codebook", "0", "l2", 1, 3, 2, 1, (), counts)


@settings(deadline=None)
@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50), st.booleans())
def test_a_snapshot_is_blocked_if_and_only_if_a_bad_transformation_still_serves_images_to_come(
    runs: dict[bool, Run], embedded: int, rejected: int, waiting: int, better: bool
) -> None:
    snapshot = commit(embedded + rejected + waiting, embedded, rejected)
    assert bool(blockers(runs[better], snapshot)) == (not better and waiting > 0)


def test_a_blocker_says_the_figures_and_how_many_images_wait(runs: dict[bool, Run]) -> None:
    (sentence,) = blockers(runs[False], commit(gallery=3000, embedded=995, rejected=5))
    assert "transformed top1 12.3, map 5.0 against old_old top1 20.0, map 7.0" in sentence
    assert "2,000 images are still transformed" in sentence


def reference(old: list[int]) -> QualityBaseline:
    ranks = tuple(old)
    return QualityBaseline(ranks, (5,) * len(ranks), 10, ranks, ranks, ranks)


def measured(ranks: list[int], number: int = 3, own: tuple[tuple[int, int, int], ...] = ()) -> Quality:
    return Quality(number, "attempt", {}, tuple(ranks), (5,) * len(ranks), own, ())


def answers(right: int, of: int) -> list[int]:
    return [1] * right + [0] * (of - right)


@pytest.mark.parametrize(("right", "refused"), [(500, False), (495, False), (480, False), (470, True), (300, True)])
def test_fall_is_refused_if_larger_than_the_limit_plus_its_noise(right: int, refused: bool) -> None:
    known, served = reference(answers(200, 1000)), measured(answers(500, 1000), number=2)
    found = judge(known, measured(answers(right, 1000)), Earlier(2, (served,)), 100, GateSettings())
    assert [refusal.check for refusal in found] == (["fall"] if refused else [])
    if refused:
        assert f"top-1 fell from 50.0 (commit 2, served by prod) to {right / 10:.1f}" in found[0].sentence
        assert "gate.max_fall allows 1" in found[0].sentence


def test_small_falls_in_each_wave_are_compared_with_the_best_commit() -> None:
    known, served, best = (
        reference(answers(200, 5000)),
        measured(answers(2450, 5000), 2),
        measured(answers(2600, 5000), 1),
    )
    now = measured(answers(2420, 5000))
    assert judge(known, now, Earlier(2, (served,)), 100, GateSettings()) == []
    (refusal,) = judge(known, now, Earlier(2, (served, best)), 100, GateSettings())
    assert (refusal.check, refusal.mends) == ("fall", True)
    assert [item.mends for item in judge(known, now, Earlier(2, (served, best)), 0, GateSettings())] == [False]
    assert "top-1 fell from 52.0 (commit 1, the best that prod has served) to 48.4: 3.6 points" in refusal.sentence
    (only,) = judge(known, measured(answers(2000, 5000)), Earlier(2, (served, best)), 100, GateSettings())
    assert "commit 2, served by prod" in only.sentence
    assert not only.mends


def test_wave_is_compared_with_the_one_before_if_prod_is_behind() -> None:
    known, served, before = (
        reference(answers(200, 5000)),
        measured(answers(2600, 5000), 1),
        measured(answers(2450, 5000), 2),
    )
    (refusal,) = judge(known, measured(answers(2420, 5000)), Earlier(1, (served, before)), 100, GateSettings())
    assert "commit 1, served by prod" in refusal.sentence
    assert refusal.mends
    (refusal,) = judge(known, measured(answers(2000, 5000)), Earlier(1, (served, before)), 100, GateSettings())
    assert "commit 2, the one before" in refusal.sentence
    assert not refusal.mends
    (refusal,) = judge(
        known, measured(answers(2000, 5000)), Earlier(0, (before,)), 100, GateSettings()
    )  # 0 was not measured
    assert "commit 2, the one before" in refusal.sentence


def test_best_commit_is_kept_until_a_rollback_or_a_forced_promotion(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    for number, top1 in enumerate((40.0, 45.0, 42.0, 45.0)):
        quality.write_quality(run, replace(measured([1], number), figures={"top1": top1, "recall10": 50.0}))
    found = []
    for number in range(4):
        quality.keep_best(run, number, number - 1 if number else None)
        found.append(quality.read_best(run, number))
    assert found == [0, 1, 1, 3]
    assert quality.read_best(run, 2) is None  # prod was rolled back
    quality.keep_best(run, 2, 0)
    assert quality.read_best(run, 2) == 2
    quality.keep_best(run, 0, 2, anew=True)
    assert quality.read_best(run, 2) == 0
    quality.keep_best(run, 3, None)
    quality.keep_best(run, 2, 1)  # after a rollback from 3 to 1, which is better than 2
    assert quality.read_best(run, 2) == 1


def test_fall_within_noise_is_promoted_for_any_number_of_queries() -> None:
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(500):
        queries = int(rng.integers(20, 400))
        before = rng.random(queries) < 0.5
        now = np.where(rng.random(queries) < 0.1, rng.random(queries) < 0.5, before)
        known = reference([0] * queries)
        ranks = now.astype(int).tolist()
        refused += bool(
            judge(known, measured(ranks), Earlier(2, (measured(before.astype(int).tolist(), 2),)), 10, GateSettings())
        )
    assert refused <= 1


def test_quality_below_the_old_model_is_mended_by_going_on_while_images_wait() -> None:
    known = reference(answers(500, 1000))
    for waiting in (0, 10):
        (refusal,) = judge(known, measured(answers(400, 1000)), Earlier(), waiting, GateSettings())
        assert (refusal.check, refusal.mends) == ("old_old", waiting > 0)
        assert "top-1 is 40.0, against 50.0" in refusal.sentence
    assert judge(known, measured(answers(500, 1000)), Earlier(), 0, GateSettings()) == []


@pytest.mark.parametrize(
    ("own", "refused"),
    [
        ([(1, 0, 1)], 0),  # one image says little
        ([(1, 0, 4)], 1),
        ([(1, 46, 50)], 0),
        ([(1, 30, 50)], 1),
        ([(1, 50, 50), (2, 1, 9), (3, 20, 20)], 1),
        ([(wave, 1, 2) for wave in range(1, 20)], 1),  # no wave alone, but all together
        ([], 0),
    ],
)
def test_a_wave_is_mixed_up_where_chance_cannot_explain_it(own: list[tuple[int, int, int]], refused: int) -> None:
    found = mixed_up(measured([1], own=tuple(own)), 90.0)
    assert len(found) == refused


def test_min_own_of_0_or_1_is_a_valid_limit() -> None:
    assert mixed_up(measured([1], own=((1, 5, 5),)), 100.0) == []
    assert len(mixed_up(measured([1], own=((1, 4, 5),)), 100.0)) == 1
    assert mixed_up(measured([1], own=((1, 0, 5000),)), 0.0) == []
    assert len(mixed_up(measured([1], own=((1, 0, 5000),)), 90.0)) == 1
    assert mixed_up(measured([1], own=((1, 0, 50),)), None) == []
