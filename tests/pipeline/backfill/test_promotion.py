"""Snapshots of small runs, with real segments and tags, before the gate: what is promoted, and what never is."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.arrays import Float32, Int64
from pipeline.backfill.promotion import Promotion
from pipeline.backfill.stop import Stop, parse
from pipeline.config.method import GateSettings
from pipeline.config.tree import Config
from pipeline.errors import GateRefused
from pipeline.evaluation import probe_metrics, quality
from pipeline.evaluation.gate import blockers
from pipeline.evaluation.quality import read_promotion_status
from pipeline.index import commits, tags
from pipeline.models.calibration import fit_calibration
from pipeline.planning.plan import read_plan
from pipeline.run import Run
from pipeline.storage import objects, parquet
from tests.support.sample import draw_probe
from tests.support.synthetic_run import Known, Options, known, make_run, storage_waves

LAST = 4


def probed(folder: Path, images: Known, **options: Any) -> tuple[Config, Run]:
    """A run whose commits are all published and not judged yet; its probe set is drawn."""
    config, run = make_run(folder, images, Options(waves=LAST, new_in_manifest=True, **options))
    objects.delete_files([run.tag("prod")])
    assert draw_probe(config, run) is not None
    return config, run


def promotion(config: Config, run: Run, *stop: str) -> Promotion:
    plan = read_plan(run)
    assert plan is not None
    return Promotion(config, run, plan, Stop([parse(text) for text in stop]))


def settle(config: Config, run: Run, first: int = 0, last: int = LAST) -> list[list[str]]:
    """Judge commits in order, as a driver that publishes them does; gives the checks that each fails."""
    gate = promotion(config, run)
    failed = []
    for number in range(first, last + 1):
        gate.settle(commits.read_commit(run, number))
        failed.append([refusal.check for refusal in gate.refusals])
    gate.finish(commits.read_commit(run, last))
    return failed


def prod(run: Run) -> int | None:
    tag = tags.read_tag(run, tags.PROD)
    return tag.commit if tag else None


def limited(config: Config, **limits: Any) -> Config:
    return config.model_copy(update={"gate": GateSettings(**limits)})


def well_known(num: int = 600) -> Known:
    """Images whose old embeddings are good, so that it shows where something is worse."""
    images = known(num)
    noise = np.random.default_rng(3).normal(size=images.old.shape)
    return replace(images, old=(images.embedded[:, :8] + 0.3 * noise).astype(np.float32))


def fit_linear(old: Float32, new: Float32) -> Float32:
    """The least-squares transformation of the old embeddings, fitted on these pairs, applied to them."""
    return (old @ np.linalg.lstsq(old, new, rcond=None)[0]).astype(np.float32)


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@pytest.mark.parametrize("seed", range(4))
def test_a_sound_run_is_promoted_commit_by_commit(tmp_path: Path, metric: str, seed: int) -> None:
    config, run = probed(tmp_path, known(seed=seed), metric=metric, rejects=5)
    assert settle(config, run) == [[]] * (LAST + 1)
    assert prod(run) == LAST


@pytest.mark.parametrize("seed", range(4))
def test_a_sound_run_without_labels_is_promoted_too(tmp_path: Path, seed: int) -> None:
    config, run = probed(tmp_path, replace(known(seed=seed), labels=None, groups=None))
    assert settle(config, run) == [[]] * (LAST + 1)
    assert "top1" not in quality.read_all_quality(run)[0].figures


def test_recall10_that_falls_between_start_and_end_keeps_prod_until_it_is_better(tmp_path: Path) -> None:
    images = known(num=2000)
    shrunk = replace(images, transformed=images.embedded / 2, labels=None, groups=None)
    config, run = probed(tmp_path, shrunk)
    failed = settle(config, run)
    recalled = [item.figures["recall10"] for item in quality.read_all_quality(run)]
    assert min(recalled) < recalled[0] - 5, "the case is one"
    assert failed[0] == failed[-1] == []
    assert {check for checks in failed for check in checks} == {"fall"}
    assert prod(run) == LAST


def test_recall10_does_not_fall_with_a_calibration_of_the_scale(tmp_path: Path) -> None:
    images = known(num=2000)
    scaled = replace(images, transformed=images.embedded * np.float32(1.5), labels=None, groups=None)
    falls = []
    for map_ in (None, fit_calibration(scaled.transformed, scaled.embedded, "l2", seed=0)):
        config, run = probed(tmp_path / str(len(falls)), scaled, calibration=map_)
        failed = settle(config, run)
        recalled = [item.figures["recall10"] for item in quality.read_all_quality(run)]
        falls.append(recalled[0] - min(recalled))
        assert any(failed) == (map_ is None)
    assert falls[0] > 5
    assert falls[1] <= 0


def test_a_draft_that_was_examined_is_not_searched_again_as_a_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = probed(tmp_path, known(), commits=True)
    settle(config, run)
    alone = quality.read_all_quality(run)
    objects.delete(run.path("reports", "probe-set"))
    measured, measure = list[int](), probe_metrics.measure_probe
    monkeypatch.setattr(probe_metrics, "measure_probe", lambda *of: (measured.append(of[2].number), measure(*of))[1])
    gate = promotion(config, run)
    for number in range(1, LAST + 1):
        commit = commits.read_commit(run, number)
        gate.inspect(replace(commit, attempt_id="", segments=commit.segments[::-1]))  # a draft's are in no order
        gate.settle(commit)
    assert quality.read_all_quality(run) == alone[1:]
    assert measured == list(range(1, LAST + 1))


def test_every_figure_equals_exact_search_over_the_commit(tmp_path: Path) -> None:
    images = known()
    config, run = probed(tmp_path, images, commits=True)
    settle(config, run)
    order = np.argsort(images.ids)
    labels = np.array(images.labels)[order]
    waves = storage_waves(run)
    probe = np.isin(images.ids[order], parquet.read_parquet(run.path("probe-set", "set.parquet"))["id"].to_numpy())
    for number, measured in enumerate(quality.read_all_quality(run)):
        vectors = np.where((waves <= number)[:, None], images.embedded[order], images.transformed[order])
        distances = ((images.embedded[order][probe][:, None] - vectors[None]) ** 2).sum(axis=2)
        distances[np.arange(len(distances)), np.flatnonzero(probe)] = np.inf
        nearest = labels[np.argsort(distances, axis=1, kind="stable")[:, :10]] == labels[probe][:, None]
        assert measured.figures["top1"] == pytest.approx(100 * nearest[:, 0].mean())
        assert measured.figures["top5"] == pytest.approx(100 * nearest[:, :5].any(axis=1).mean())


@pytest.mark.parametrize("labelled", [True, False])
def test_a_transformation_of_shuffled_pairs_is_never_served_and_does_not_stop_the_backfill(
    tmp_path: Path, labelled: bool
) -> None:
    images = well_known()
    if not labelled:
        images = replace(images, labels=None, groups=None)
    shuffled = np.random.default_rng(1).permutation(len(images.ids))
    bad = replace(images, transformed=fit_linear(images.old, images.embedded[shuffled]))
    config, run = probed(tmp_path, bad)
    gate = promotion(config, run)
    gate.settle(commits.read_commit(run, 0))
    assert [refusal.check for refusal in gate.refusals] == ["old_old"]
    assert "600 images are still transformed" in gate.refusals[0].sentence
    assert prod(run) is None
    failed = settle(config, run, first=1)
    assert failed[-1] == []
    assert prod(run) == LAST


def test_a_new_model_that_is_worse_than_the_old_one_stops_the_backfill_at_snapshot_0(tmp_path: Path) -> None:
    images = well_known()
    noise = np.random.default_rng(1).normal(size=images.embedded.shape).astype(np.float32)
    worse = replace(images, embedded=noise, transformed=fit_linear(images.old, noise))
    config, run = probed(tmp_path, worse)
    with pytest.raises(GateRefused, match="the new model is worse than the old one: top-1") as caught:
        settle(config, run)
    assert caught.value.exit_code == 3
    assert prod(run) is None
    standing = read_promotion_status(run)
    assert standing is not None
    assert (standing.commit, len(standing.refused)) == (0, len(set(standing.refused)))


def test_a_new_model_that_is_worse_is_refused_at_the_end_where_all_is_to_be_embedded(tmp_path: Path) -> None:
    images = well_known()
    noise = np.random.default_rng(1).normal(size=images.embedded.shape).astype(np.float32)
    config, run = probed(tmp_path, replace(images, embedded=noise))
    with pytest.raises(GateRefused, match="commit 4 is not promoted"):
        settle(limited(config, on_refusal="go_on"), run)
    assert prod(run) is None


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@pytest.mark.parametrize("wave", [2, 3, 4])
@pytest.mark.parametrize("labelled", [True, False])
def test_a_wave_with_swapped_ids_is_stopped_and_the_wave_before_it_served_on(
    tmp_path: Path, wave: int, labelled: bool, metric: str
) -> None:
    images = known(num=600)
    if not labelled:
        images = replace(images, labels=None, groups=None)
    config, run = probed(tmp_path, images, swapped_wave=wave, metric=metric)
    with pytest.raises(
        GateRefused, match=rf"wave {wave}: only .* return their own embedding; gate.min_own asks for 90 %"
    ):
        settle(config, run)
    assert prod(run) == wave - 1


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_recall10_is_measured_with_the_stored_vectors(tmp_path: Path, metric: str) -> None:
    images = replace(known(num=600), labels=None, groups=None)
    (sound, damaged) = (
        probed(tmp_path / name, images, metric=metric, swapped_wave=wave) for name, wave in (("a", None), ("b", 3))
    )
    settle(*sound)
    with suppress(GateRefused):
        settle(limited(damaged[0], on_refusal="go_on", min_own=None), damaged[1])
    ends = [quality.read_all_quality(run)[-1].figures["recall10"] for _, run in (sound, damaged)]
    assert ends[0] == 100
    assert ends[1] < 90


@pytest.mark.parametrize("factory", ["IVF4,SQ8", "IVF4,PQ2x4", "PCA4,IVF4,SQ8"])
@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_own_vector_check_allows_a_lossy_codec_and_finds_swapped_vectors(
    tmp_path: Path, metric: str, factory: str
) -> None:
    images = replace(known(num=600), labels=None, groups=None)
    config, run = probed(tmp_path / "sound", images, metric=metric, factory=factory, imprecision=0.005)
    assert settle(limited(config, max_fall=100), run)[-1] == []
    assert quality.read_all_quality(run)[-1].figures["recall10"] > 90
    config, run = probed(tmp_path / "swapped", images, metric=metric, factory=factory, swapped_wave=3)
    with pytest.raises(GateRefused, match=r"wave 3: only .* return their own embedding"):
        settle(limited(config, max_fall=100), run)


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_images_with_many_duplicates_are_no_reason_to_refuse(tmp_path: Path, metric: str) -> None:
    images = known(num=600)
    first = np.arange(600) // 20 * 20
    same = replace(
        images,
        embedded=images.embedded[first],
        labels=[images.labels[row] for row in first],  # type: ignore[index]
    )
    config, run = probed(tmp_path, same, metric=metric)
    assert settle(config, run)[-1] == []
    assert quality.read_all_quality(run)[-1].figures["own"] == 100


@pytest.mark.parametrize("wave", [2, 4])
def test_a_wave_with_swapped_ids_is_refused_before_it_is_committed(tmp_path: Path, wave: int) -> None:
    config, run = probed(tmp_path, known(num=600), swapped_wave=wave)
    gate = promotion(config, run)
    for number in range(1, wave):
        gate.inspect(commits.read_commit(run, number))
    with pytest.raises(
        GateRefused, match=rf"wave {wave} is not published:\n  - wave {wave}: only \d of \d+ probe images"
    ) as caught:
        gate.inspect(commits.read_commit(run, wave))
    assert caught.value.exit_code == 3
    assert f"embedded/wave-{wave:03d}" in str(caught.value)
    promotion(limited(config, on_refusal="go_on"), run).inspect(commits.read_commit(run, wave))
    promotion(limited(config, min_own=None), run).inspect(commits.read_commit(run, wave))


def test_going_on_after_a_refusal_ends_refused_if_the_last_commit_is_refused(tmp_path: Path) -> None:
    config, run = probed(tmp_path, known(num=600), swapped_wave=2)
    with pytest.raises(GateRefused, match="commit 4 is not promoted"):
        settle(limited(config, on_refusal="go_on"), run)
    assert prod(run) == 1
    assert [item.commit for item in quality.read_all_quality(run)] == list(range(LAST + 1))


def test_a_refused_commit_is_judged_anew_by_the_limits_of_the_next_start(tmp_path: Path) -> None:
    config, run = probed(tmp_path, known(num=600), swapped_wave=4)
    for _ in range(2):
        with pytest.raises(GateRefused):
            settle(config, run)
    assert settle(limited(config, min_own=None, max_fall=100), run, first=LAST) == [[]]
    assert prod(run) == LAST


@pytest.mark.parametrize(
    ("limit", "sentence"),
    [
        ({"max_slot_share": 0.01}, r"transformed images take \S+ times their share .* gate.max_slot_share allows 0.01"),
        ({"min_slot_share": 50}, r"transformed images take \S+ times their share .* gate.min_slot_share asks for 50"),
    ],
)
def test_a_slot_share_out_of_bounds_keeps_prod_back_until_nothing_is_transformed(
    tmp_path: Path, limit: dict[str, float], sentence: str
) -> None:
    config, run = probed(tmp_path, known(num=600))
    gate = promotion(limited(config, **limit), run)
    for number in range(LAST):
        gate.settle(commits.read_commit(run, number))
        (refusal,) = gate.refusals
        assert re.search(sentence, refusal.sentence)
    assert prod(run) is None
    assert settle(limited(config, **limit), run, first=LAST) == [[]]


def test_lost_answers_beyond_the_limit_stop_the_backfill(tmp_path: Path) -> None:
    config, run = probed(tmp_path, known(num=600))
    with pytest.raises(GateRefused, match=r"\S+ % of the \d+ queries .* gate.max_negative_flips allows 0 %"):
        settle(limited(config, max_negative_flips=0), run)


def test_a_group_that_is_left_behind_is_named(tmp_path: Path) -> None:
    images = known(num=1000)
    assert images.groups is not None
    left = np.array(images.groups) == "group 1"
    noise = 5 * np.random.default_rng(0).normal(size=images.embedded.shape).astype(np.float32)
    config, run = probed(tmp_path, replace(images, embedded=np.where(left[:, None], noise, images.embedded)))
    with pytest.raises(
        GateRefused, match=r"top-1 of groups differs by .* for 'group 1' .* gate.max_group_gap allows 10"
    ):
        settle(limited(config, max_group_gap=10), run)


def test_promotion_without_a_probe_set_checks_the_held_out_pairs_alone(tmp_path: Path) -> None:
    config, run = probed(tmp_path, known(num=600), swapped_wave=2)
    off = config.model_copy(update={"probe": config.probe.model_copy(update={"images": 0})})
    assert settle(off, run) == [[]] * (LAST + 1)
    assert quality.read_all_quality(run) == []


def test_a_condition_is_met_by_the_first_commit_that_reaches_it(tmp_path: Path) -> None:
    config, run = probed(tmp_path, known(num=600))
    gate = promotion(config, run, "top1>=0.97*full")
    for number in range(LAST + 1):
        gate.settle(commits.read_commit(run, number))
        if gate.stopped:
            break
    estimate = quality.full_estimate(quality.read_baseline(run), quality.read_quality(run, 0))  # type: ignore[arg-type]
    full, error = estimate["top1"], estimate["top1_error"]
    reached = [item.figures["top1"] >= 0.97 * full for item in quality.read_all_quality(run)]
    assert reached == [False] * (len(reached) - 1) + [True]
    standing = read_promotion_status(run)
    assert standing is not None
    assert standing.stopped == gate.stopped
    assert f"an expected {full:.1f} with a standard error of {error:.1f}" in str(standing.stopped)
    assert prod(run) == number


def test_prod_stays_at_the_best_commit_if_each_wave_is_a_little_worse(tmp_path: Path) -> None:
    config, run = probed(tmp_path, known(num=600), commits=True)
    settle(config, run)
    for number in range(LAST + 1):  # top-1 falls by less than `max_fall` each time, and by more from first to last
        before = quality.read_quality(run, number)
        assert before is not None
        ranks = tuple(1 if row < 180 - 5 * number else 0 for row in range(len(before.ranks)))
        figures = before.figures | {"top1": 100 * sum(ranks) / len(ranks)}
        quality.write_quality(run, replace(before, ranks=ranks, figures=figures))
    objects.delete_files([run.tag("prod"), run.path("reports", "best.json")])
    with pytest.raises(GateRefused, match=r"top-1 fell from \S+ \(commit 0, the best that prod has served\)"):
        settle(limited(config, max_fall=2), run)
    assert quality.read_best(run, prod(run)) == 0


def bad_at_first() -> Known:
    """Images whose transformed vectors are worse than the old ones: every commit but the last is refused."""
    images = well_known()
    shuffled = np.random.default_rng(1).permutation(len(images.ids))
    return replace(images, transformed=fit_linear(images.old, images.embedded[shuffled]))


def test_a_snapshot_that_is_refused_reaches_no_quality(tmp_path: Path) -> None:
    config, run = probed(tmp_path, bad_at_first())
    gate = promotion(config, run, "top1>=1", "recall10>=1")
    gate.settle(commits.read_commit(run, 0))
    assert gate.refusals
    assert gate.stopped is None
    gate.finish(commits.read_commit(run, 0))
    gate.settle(commits.read_commit(run, LAST))
    assert str(gate.stopped).startswith("top1>=1")
    gate.finish(commits.read_commit(run, LAST))


def test_a_backfill_that_stops_as_asked_where_the_gate_refuses_is_no_success(tmp_path: Path) -> None:
    config, run = probed(tmp_path, bad_at_first())
    gate = promotion(config, run, "fraction>=0.01")
    gate.settle(commits.read_commit(run, 0))
    assert gate.stopped is None
    gate.settle(first := commits.read_commit(run, 1))
    assert gate.stopped is not None, "a refusal that going on mends ends nothing by itself"
    with pytest.raises(GateRefused) as caught:
        gate.finish(first)
    assert caught.value.exit_code == 3
    assert "stopped there, as asked (fraction>=0.01: fraction is" in str(caught.value)
    assert "worse than the old model and gallery: top-1 is" in str(caught.value)
    assert "run the same command without --stop-when: the waves that follow may mend it" in str(caught.value)
    budget = promotion(config, run)
    budget.settle(first)
    budget.stop_now(first, "hours>=1: hours is 1")
    with pytest.raises(GateRefused, match=r"as asked \(hours>=1"):
        budget.finish(first)


def test_a_commit_that_was_not_measured_is_promoted_by_force_alone(tmp_path: Path) -> None:
    config, run = probed(tmp_path, known())
    first = commits.read_commit(run, 0)
    (sentence,) = blockers(run, first)  # killed before there was anything to compare with
    assert "not measured on the probe set yet: run `fastfill backfill`, or promote it with --force" in sentence
    assert blockers(run, first, probed=False) == []
    settle(config, run, last=1)
    assert blockers(run, commits.read_commit(run, 1)) == []
    assert blockers(run, commits.read_commit(run, 2)) == [sentence]
    quality.write_quality(run, replace(quality.read_all_quality(run)[1], commit=2))  # of another attempt
    assert blockers(run, commits.read_commit(run, 2)) == [sentence]


def test_settle_of_a_measured_commit_measures_it_no_more(tmp_path: Path) -> None:
    config, run = probed(tmp_path, known())
    settle(config, run)
    stored = {uri: objects.read_bytes(uri) for uri in objects.list_files(run.path("reports", "probe-set"))}
    objects.delete(run.path("index", "segments"))  # what a new measurement would need
    settle(config, run)
    assert {uri: objects.read_bytes(uri) for uri in objects.list_files(run.path("reports", "probe-set"))} == stored


def test_the_error_of_what_the_full_model_reaches_is_that_of_drawing_the_probe_images_anew() -> None:
    rng = np.random.default_rng(0)
    right = rng.random((3, 400)) < np.array([[0.4], [0.6], [0.5]])
    ranks = np.where(right, 1, rng.choice([-1, 0, 2, 7], (3, 400), p=[0.02, 0.28, 0.4, 0.3]))

    def estimate(rows: Int64, left: float = 1.0) -> quality.ProbeFigures:
        start, new, transformed = (tuple(some[rows].tolist()) for some in ranks)
        known = quality.QualityBaseline(start, (1,) * len(rows), 10, start, transformed, new)
        figures = quality.top(start)
        return quality.full_estimate(known, quality.Quality(0, "", figures, start, (), (), ()), left)

    drawn = [estimate(rng.integers(0, 400, 400)) for _ in range(2000)]
    found = estimate(np.arange(400))
    for name in ("top1", "top5"):
        assert found[f"{name}_error"] == pytest.approx(np.std([item[name] for item in drawn]), rel=0.08)
    start, most = estimate(np.arange(400), left=0.0)["top1"], found["top1"]
    assert estimate(np.arange(400), left=0.75)["top1"] == pytest.approx(0.25 * start + 0.75 * most), (
        "a quarter is there"
    )
