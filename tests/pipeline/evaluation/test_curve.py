"""A run's curve from its files: loaded, simulated, compared with what was published, and stored."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.arrays import Float32
from pipeline.errors import DataError
from pipeline.evaluation import curve as curves
from pipeline.evaluation import snapshot_metrics
from pipeline.evaluation.curve import curve, read_curve
from pipeline.evaluation.gallery_arrays import has_labels, load_gallery
from pipeline.evaluation.metrics import EvaluateOptions, evaluate
from pipeline.evaluation.simulated_curve import CurveInputs, CurveOptions, order_by_priority, simulate_curve
from pipeline.evaluation.snapshot_metrics import published_point, published_points
from pipeline.index.codebook import Codebook
from pipeline.index.commits import read_commit
from pipeline.index.segment import Segment, decode_segment
from pipeline.index.tags import list_commits
from pipeline.models.calibration import fit_calibration
from pipeline.planning.plan import wave_sizes
from pipeline.run import Run
from pipeline.storage import objects
from tests.support.synthetic_run import Known, Options, known, make_run

METRICS = {"top1", "top5", "map"}


@pytest.fixture(scope="module")
def images() -> Known:
    return known()


def test_gallery_arrays_are_sorted_by_id_and_row_i_is_one_image(tmp_path: Path, images: Known) -> None:
    _, run = make_run(tmp_path, images, Options(commits=False, rejects=3))
    gallery = load_gallery(run)
    order = np.argsort(images.ids)
    assert np.array_equal(gallery.ids, images.ids[order])
    assert np.array_equal(gallery.old, images.old[order])
    assert np.array_equal(gallery.transformed, images.transformed[order])
    assert np.array_equal(gallery.uncertainty, images.uncertainty[order])
    assert [gallery.label_names[label] for label in gallery.labels] == [images.labels[row] for row in order]
    assert [gallery.group_names[group] for group in gallery.groups] == [images.groups[row] for row in order]
    assert gallery.rejected.sum() == 3
    assert np.array_equal(gallery.embedded_mask, ~gallery.rejected)
    assert np.array_equal(gallery.embedded[gallery.embedded_mask], images.embedded[order][gallery.embedded_mask])
    assert np.array_equal(gallery.embedded[gallery.rejected], gallery.transformed[gallery.rejected])


def test_old_embeddings_are_read_from_the_log_where_they_were_computed(tmp_path: Path, images: Known) -> None:
    _, run = make_run(tmp_path, images, Options(commits=False, old_in_log=True))
    assert np.array_equal(load_gallery(run).old, images.old[np.argsort(images.ids)])


def test_missing_old_embeddings_and_strangers_in_the_log_are_refused(tmp_path: Path, images: Known) -> None:
    _, run = make_run(tmp_path, images, Options(commits=False, old_in_log=True))
    objects.delete(run.path("gallery", "old", "wave-001"))
    with pytest.raises(DataError, match="old embeddings are missing"):
        load_gallery(run)
    _, other = make_run(tmp_path / "other", replace(images, ids=images.ids + 100_000), Options(commits=False))
    unit = "embedded/wave-001/unit-00000.parquet"
    objects.put(other.path(unit), objects.read_bytes(run.path(unit)))
    with pytest.raises(DataError, match="not in the gallery"):
        load_gallery(other)


@pytest.mark.parametrize("options", [Options(), Options(rejects=5, old_in_log=True), Options(metric="cosine")])
def test_published_points_lie_on_the_simulated_curve_of_the_runs_own_order(
    tmp_path: Path, images: Known, options: Options
) -> None:
    config, run = make_run(tmp_path, images, options)
    points = published_points(run)
    assert [point["commit"] for point in points] == [0, 1, 2, 3, 4]
    cuts = np.cumsum([0, *wave_sizes(options.waves, len(images.ids))]) / len(images.ids)
    result = curve(config, run)
    first, last = result["orders"]["uncertainty"]["points"][0], result["orders"]["uncertainty"]["points"][-1]
    for name in METRICS:
        assert points[0][name] == pytest.approx(first[name], abs=1e-9)
        assert points[-1][name] == pytest.approx(last[name], abs=1e-9)
    if options.rejects:  # the rejects of later waves are not known to an earlier commit
        assert points[-1]["fraction"] == 1
    else:
        np.testing.assert_allclose([point["fraction"] for point in points], cuts)


def test_a_published_point_is_the_evaluation_of_its_gallery_and_the_default_is_what_prod_serves(
    tmp_path: Path, images: Known
) -> None:
    _, run = make_run(tmp_path, images)
    gallery = load_gallery(run)
    mixed = np.where((gallery.wave <= 2)[:, None], gallery.embedded, gallery.transformed)
    expected = evaluate(gallery.embedded, mixed, gallery.labels, gallery.labels, EvaluateOptions(self_match=True))
    found = published_point(run, 2)
    assert found == {"commit": 2, "fraction": 0.3, **expected.as_dict(), "num_queries": 300, "recall10": 100.0}
    assert published_point(run)["commit"] == 4
    with pytest.raises(DataError, match="no such commit"):
        published_point(run, 9)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_published_points_of_a_calibrated_run_are_the_simulated_ones(
    tmp_path: Path, images: Known, metric: str
) -> None:
    images = replace(images, transformed=images.transformed / 2)
    map_ = fit_calibration(images.transformed, images.embedded, metric, seed=0)
    config, run = make_run(tmp_path, images, Options(metric=metric, calibration=map_))
    gallery = load_gallery(run)
    order = order_by_priority(gallery.priority, gallery.ids, config.seed)
    done = np.cumsum([0, *wave_sizes(4, len(images.ids))])
    inputs = CurveInputs(gallery.transformed, gallery.embedded, gallery.embedded, gallery.labels, gallery.labels)
    options = CurveOptions(points=301, metric=metric, self_match=True, calibration=map_)
    simulated = simulate_curve(inputs, {"own": [order]}, options).orders["own"]
    found, plain = published_points(run), []
    for number, point in enumerate(found):
        values = dict(zip(("top1", "top5", "map"), simulated.values[done[number]].tolist(), strict=True))
        assert {name: point[name] for name in METRICS} == pytest.approx(values, abs=1e-9)
        left = gallery.wave > number
        mixed = np.where(left[:, None], gallery.transformed, gallery.embedded)
        sides_of = (gallery.embedded, mixed, gallery.labels, gallery.labels)
        by_map = evaluate(
            *sides_of, EvaluateOptions(metric=metric, self_match=True, transformed=left, calibration=map_)
        )
        assert point["map"] == pytest.approx(by_map.map)
        plain.append(evaluate(*sides_of, EvaluateOptions(metric=metric, self_match=True)).map)
    assert plain[2] != pytest.approx(found[2]["map"])
    assert published_point(run, 2)["recall10"] == 100
    result = curve(config, run)
    for place, point in ((0, found[0]), (-1, found[-1])):
        assert result["orders"]["uncertainty"]["points"][place]["map"] == pytest.approx(point["map"])


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_recall_is_the_share_of_the_nearest_stored_vectors_that_nprobe_lets_the_index_find(
    tmp_path: Path, images: Known, metric: str
) -> None:
    found = {}
    for name, nprobe in (("few", 1), ("all", 8)):
        options = Options(metric=metric, factory="IVF8,SQ8", nprobe=nprobe)
        _, run = make_run(tmp_path / name, images, options)
        found[name] = published_point(run)["recall10"]
    assert found["all"] == 100
    gallery = load_gallery(run)
    codebook, vectors = _stored(run)
    prepared = codebook.prepare(gallery.embedded)
    lists = codebook.assign(vectors, 1)[0][:, 0]
    scores = prepared @ vectors.T - (np.square(vectors).sum(axis=1) / 2 if metric == "l2" else 0)
    nearest = np.argsort(-scores, axis=1)[:, :10]
    reached = lists[nearest] == codebook.assign(prepared, 1)[0]
    assert found["few"] == pytest.approx(100 * reached.mean(), abs=0.5)
    assert 20 < found["few"] < 95


def _stored(run: Run) -> tuple[Codebook, Float32]:
    """The codebook of the last commit, and the vectors that its segments hold, in any order."""
    commit = read_commit(run, max(list_commits(run)))
    codebook = Codebook.open(run, commit.codebook_path, commit.codebook_sha256)
    parts = [decode_segment(codebook, Segment.open(run, codebook, ref))[1] for ref in commit.segments]
    return codebook, np.concatenate(parts)


def test_one_snapshot_of_an_unfinished_run_is_not_measured_with_the_most_uncertain_queries(
    tmp_path: Path, images: Known
) -> None:
    _, run = make_run(tmp_path, images, Options(embedded_waves=2))
    with pytest.raises(DataError, match=r"every labelled image[\s\S]*30\.0 %"):
        published_point(run, 1)


def test_images_without_a_label_need_no_new_embedding_to_measure_a_snapshot(tmp_path: Path, images: Known) -> None:
    first = set(np.argsort(-images.uncertainty)[:90].tolist())  # the first two waves
    labels = [label if row in first else None for row, label in enumerate(images.labels or [])]
    _, run = make_run(tmp_path, replace(images, labels=labels), Options(embedded_waves=2))  # type: ignore[arg-type]
    assert published_point(run)["num_queries"] == 90


def test_new_embeddings_of_the_manifest_give_the_curve_of_a_plan_that_is_not_run(tmp_path: Path, images: Known) -> None:
    config, run = make_run(tmp_path / "run", images)
    other, planned = make_run(tmp_path / "plan", images, Options(embedded_waves=0, commits=False, new_in_manifest=True))
    expected, found = curve(config, run), curve(other, planned)
    assert found.pop("published") == {"points": []}
    del expected["published"]
    assert found == expected


def test_an_image_that_is_rejected_stays_transformed_though_its_new_embedding_is_given(
    tmp_path: Path, images: Known
) -> None:
    config, run = make_run(tmp_path, images, Options(rejects=5, new_in_manifest=True))
    gallery = load_gallery(run)
    assert (gallery.rejected.sum(), gallery.embedded_mask.all()) == (5, True)
    result = curve(config, run)
    assert result["num_queries"] == 300
    assert result["slot_share"]["points"][-1]["share"] is not None


def test_the_random_policys_own_permutation_is_the_first_of_the_random_orders(tmp_path: Path, images: Known) -> None:
    config, run = make_run(tmp_path, images, Options(policy="random", commits=False))
    gallery = load_gallery(run)
    settings = curves._Settings(config.evaluate, config.plan.policy, config.gallery.metric, config.seed)
    orders = curves._orders(settings, gallery)
    np.testing.assert_array_equal(orders["random"][0], order_by_priority(gallery.priority, gallery.ids, config.seed))
    assert np.all(np.diff(gallery.wave[orders["random"][0]]) >= 0), "the run's own waves, in order"
    assert len(orders["random"]) == config.evaluate.random_seeds


def test_each_stored_segment_is_decoded_once(tmp_path: Path, images: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    _, run = make_run(tmp_path, images)
    calls: list[int] = []

    def counting(*args: object) -> object:
        calls.append(1)
        return decode_segment(*args)

    monkeypatch.setattr(snapshot_metrics, "decode_segment", counting)
    published_points(run)
    assert len(calls) == len(objects.list_files(run.path("index", "segments"), ".faiss")) == 2 * 4 * 2


def test_the_result_has_the_shape_of_the_command_line_and_its_ends_agree(tmp_path: Path, images: Known) -> None:
    config, run = make_run(tmp_path, images)
    result = json.loads(json.dumps(curve(config, run), allow_nan=False))
    assert result["num_queries"] == result["num_gallery"] == len(images.ids)
    assert result["distance"] == "l2"
    assert set(result["orders"]) == {"uncertainty", "random", "oracle"}
    for name, order in result["orders"].items():
        assert len(order["points"]) == config.evaluate.points
        assert {key: order["points"][-1][key] for key in METRICS} == result["new_new"]
        assert set(order["points"][0]) == {"fraction", *METRICS}
        assert set(order["area"]) == set(order["area_trapezoid"]) == METRICS
        assert ("area_std" in order) == (name == "random")
        assert order["area"]["map"] == pytest.approx(np.mean([point["map"] for point in order["points"]]))
        share = (order["area"]["map"] - result["old_old"]["map"]) / (
            result["new_new"]["map"] - result["old_old"]["map"]
        )
        assert result["share_of_gap"][name]["map"] == pytest.approx(share)
    assert [point["commit"] for point in result["published"]["points"]] == [0, 1, 2, 3, 4]
    old = evaluate(
        images.old, images.old, np.array(images.labels), np.array(images.labels), EvaluateOptions(self_match=True)
    )
    assert result["old_old"] == pytest.approx(old.as_dict())
    assert result["negative_flips"]["points"][0]["percent"] > 0
    assert result["slot_share"]["points"][0]["share"] == 1
    assert result["slot_share"]["points"][-1]["share"] is None


def test_the_gap_between_groups_is_from_the_best_to_the_worst(tmp_path: Path, images: Known) -> None:
    config, run = make_run(tmp_path, images, Options(commits=False))
    groups = curve(config, run, published=False)["groups"]
    ends = [member["end"]["top1"] for member in groups["members"]]
    assert len(ends) == 3
    assert sum(member["queries"] for member in groups["members"]) == len(images.ids)
    assert groups["points"][-1]["gap"]["top1"] == pytest.approx(max(ends) - min(ends))


def test_a_gallery_without_groups_has_no_gap(tmp_path: Path, images: Known) -> None:
    config, run = make_run(tmp_path, replace(images, groups=None), Options(commits=False))
    assert curve(config, run, published=False)["groups"] is None


def test_a_runs_own_policy_is_an_order_of_its_own(tmp_path: Path, images: Known) -> None:
    config, run = make_run(tmp_path, images, Options(policy="my:policy"))
    result = curve(config, run)
    assert set(result["orders"]) == {"my:policy", "uncertainty", "random", "oracle"}
    assert result["negative_flips"]["order"] == "my:policy"


def test_an_unfinished_run_is_refused_with_what_is_there_and_what_to_do(tmp_path: Path, images: Known) -> None:
    config, run = make_run(tmp_path, images, Options(embedded_waves=2))
    with pytest.raises(DataError, match=r"30\.0 %[\s\S]*fastfill backfill"):
        curve(config, run)
    assert read_curve(run) is None


def test_rejected_images_do_not_keep_a_run_from_being_finished(tmp_path: Path, images: Known) -> None:
    config, run = make_run(tmp_path, images, Options(rejects=5))
    result = curve(config, run)
    assert (result["num_queries"], result["num_gallery"]) == (len(images.ids) - 5, len(images.ids))
    assert result["slot_share"]["points"][-1]["share"] is not None, "the rejects are transformed to the end"


def test_a_gallery_without_labels_cannot_be_measured_and_says_so(tmp_path: Path, images: Known) -> None:
    config, run = make_run(tmp_path, replace(images, labels=None), Options(commits=False))
    assert not has_labels(run)
    with pytest.raises(DataError, match="with a label"):
        curve(config, run, published=False)


def test_images_without_a_label_are_in_the_gallery_and_are_no_queries(tmp_path: Path, images: Known) -> None:
    labels = [label if row % 3 else None for row, label in enumerate(images.labels or [])]
    config, run = make_run(tmp_path, replace(images, labels=labels), Options(commits=False))  # type: ignore[arg-type]
    assert has_labels(run)
    result = curve(config, run, published=False)
    assert (result["num_queries"], result["num_gallery"]) == (200, 300)


def test_curve_is_computed_again_only_if_its_inputs_change(
    tmp_path: Path, images: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = make_run(tmp_path, images)
    first = curve(config, run)
    assert read_curve(run) == json.loads(json.dumps(first))
    monkeypatch.setattr("pipeline.evaluation.curve.load_gallery", None)  # computing again would call it
    assert curve(config, run) == first
    other = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"points": 7})})
    with pytest.raises(TypeError):
        curve(other, run)


def test_progress_goes_from_the_first_query_to_all_of_it(tmp_path: Path, images: Known) -> None:
    config, run = make_run(tmp_path, images)
    seen: list[tuple[int, int]] = []
    curve(config, run, on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (1000, 1000)
    assert seen == sorted(seen)
