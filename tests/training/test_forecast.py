"""The expected curve of a plan, each number computed in a second way."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import parallel
from pipeline.arrays import Float32, Float64, Int64
from pipeline.config.tree import Config
from pipeline.evaluation import probe_metrics, quality
from pipeline.evaluation.gallery_arrays import labelled_sample
from pipeline.evaluation.metrics import EvaluateOptions, evaluate
from pipeline.evaluation.probe_set import gather, load
from pipeline.planning.selection_result import Selection, TrialResult
from pipeline.storage import documents, objects
from tests.support.planned_run import HELD_OUT, config_of, labels_of, pairs_of, planned, write_pairs
from tests.support.sample import draw_probe, put_sample
from tests.support.synthetic_run import known
from training.forecast import Labelled, Outlook, SimulatedOrder, _own, curves_by_fold, ends_of, expected_curve
from training.simulation.folds import by_chance
from training.simulation.held_out import FOLDS, fold_places, priorities


def first_places(queries: Float32, gallery: Float32, own: Int64, labels: Int64, gallery_labels: Int64) -> Float64:
    """The rank of each query's first match, counted out; (Q,) from 1."""
    far = np.square(queries[:, None].astype(np.float64) - gallery).sum(axis=2)
    far[np.arange(len(queries)), own] = np.inf
    same = labels[:, None] == gallery_labels
    same[np.arange(len(queries)), own] = False
    nearest = np.where(same, far, np.inf).min(axis=1, keepdims=True)
    result: Float64 = 1.0 + (~same & (far <= nearest) & np.isfinite(far)).sum(axis=1)
    return result


def test_ends_of_are_the_gallerys_start_and_the_probe_sets_gain() -> None:
    images = known(500)
    labels = np.array([int(name.split()[1]) for name in images.labels or []])
    order = np.argsort(images.ids)
    ids, z, new, labels = images.ids[order], images.transformed[order], images.embedded[order], labels[order]
    rows = np.sort(np.random.default_rng(3).permutation(500)[:150])
    probe, gallery = Labelled(ids[rows], new[rows], labels[rows]), Labelled(ids, z, labels)
    found = ends_of(probe, z[rows], gallery, "l2")
    whole = first_places(new[rows], z, rows, labels[rows], labels)
    own = np.arange(150)
    before, after = (first_places(new[rows], side[rows], own, labels[rows], labels[rows]) for side in (z, new))
    for name, limit in (("top1", 1), ("top5", 5)):
        start = 100.0 * (whole <= limit)
        total = start + 100.0 * (after <= limit) - 100.0 * (before <= limit)
        assert found[name].start == pytest.approx(start.mean())
        assert found[name].end == pytest.approx(total.mean())
        draws = np.random.default_rng(0).integers(0, 150, (4000, 150))
        boots = start[draws].mean(axis=1), total[draws].mean(axis=1)
        assert found[name].start_error == pytest.approx(boots[0].std(), rel=0.1)
        assert found[name].end_error == pytest.approx(boots[1].std(), rel=0.1)
        assert found[name].correlation == pytest.approx(np.corrcoef(*boots)[0, 1], abs=0.05)


def test_ends_of_a_probe_set_that_is_the_whole_gallery_are_exact() -> None:
    images = known(300)
    labels, ids = np.array([int(name.split()[1]) for name in images.labels or []]), np.arange(300)
    every = Labelled(ids, images.embedded, labels)
    found = ends_of(every, images.transformed, Labelled(ids, images.transformed, labels), "l2")
    exact = evaluate(images.embedded, images.embedded, labels, labels, EvaluateOptions(self_match=True)).as_dict()
    assert {name: ends.end for name, ends in found.items()} == pytest.approx(exact)


@pytest.mark.parametrize(("num", "folds"), [(400, 1), (1200, FOLDS)])
@pytest.mark.parametrize("boost", [0.0, 8.0])
def test_curves_by_fold_equal_embedding_each_fold_piece_by_piece(
    tmp_path: Path, num: int, folds: int, boost: float
) -> None:
    pairs, config = pairs_of(num), config_of(tmp_path)
    names, curves = curves_by_fold(pairs, SimulatedOrder("uncertainty", boost), config.gallery, config.seed)
    assert names == ("top1", "top5", "map")
    assert curves.shape == (folds, 22, 3)
    priority = priorities(pairs, "uncertainty", config.gallery, config.seed, boost)
    assert pairs.fold.pairs.labels is not None
    for fold in range(folds):
        rows = np.flatnonzero(fold_places(num, folds) == fold)
        new, state, labels = pairs.fold.pairs.new[rows], pairs.served[rows].copy(), pairs.fold.pairs.labels[rows]
        order = np.argsort(-priority[rows], kind="stable")
        for point in (0, 4, 11, 21):
            some = order[: point * len(rows) // 21]
            state[some] = new[some]
            exact = evaluate(new, state, labels, labels, EvaluateOptions(self_match=True))
            assert curves[fold, point].tolist() == pytest.approx([exact.top1, exact.top5, exact.map])


def test_curves_by_fold_with_pairs_from_the_gallery_begin_with_a_random_share(tmp_path: Path) -> None:
    pairs, config, share = pairs_of(400), config_of(tmp_path), 6 / 21
    _, plain = curves_by_fold(pairs, SimulatedOrder("uncertainty"), config.gallery, config.seed)
    _, curves = curves_by_fold(pairs, SimulatedOrder("uncertainty", first=share), config.gallery, config.seed)
    assert pairs.fold.pairs.labels is not None
    new, state, labels = pairs.fold.pairs.new, pairs.served.copy(), pairs.fold.pairs.labels
    known = by_chance(400, round(share * 400))
    state[known] = new[known]
    exact = evaluate(new, state, labels, labels, EvaluateOptions(self_match=True))
    assert curves[0, 6].tolist() == pytest.approx([exact.top1, exact.top5, exact.map])
    assert curves[0, [0, -1]].tolist() == plain[0, [0, -1]].tolist()
    assert not np.allclose(curves[0, 3:9], plain[0, 3:9])


def test_expected_recall_without_labels_ends_at_100(tmp_path: Path) -> None:
    pairs = pairs_of()
    gallery = config_of(tmp_path).gallery
    names, curves = curves_by_fold(pairs, SimulatedOrder("uncertainty"), gallery, 0, labelled=False)
    assert names == ("recall10",)
    assert curves[0, -1, 0] == 100
    assert curves[0, 0, 0] == pytest.approx(recall10(pairs.fold.pairs.new, pairs.served))


def recall10(new: Float32, served: Float32) -> float:
    """Of each image's ten nearest, how many are among its ten nearest served vectors; per cent."""
    sides = []
    for side in (new, served):
        far = np.square(new[:, None].astype(np.float64) - side).sum(axis=2)
        np.fill_diagonal(far, np.inf)
        sides.append(np.argsort(far, axis=1)[:, :10])
    return 10.0 * float(np.mean([len(np.intersect1d(*two)) for two in zip(*sides, strict=True)]))


def test_labelled_pairs_and_a_gallery_without_labels_are_compared_by_recall(tmp_path: Path) -> None:
    config, run, plan = planned(tmp_path, replace(known(1500), labels=None))
    found = expected_curve(config, run, plan)
    assert list(found.curves) == ["recall10"]
    probe = load(run)
    assert probe is not None
    assert found.curves["recall10"].values[[0, -1]] == pytest.approx([recall10(probe.new, probe.transformed), 100])
    assert found.notes == ()
    again = expected_curve(config, run, plan)
    assert again.curves["recall10"].to_json() == found.curves["recall10"].to_json()


def test_expected_curve_of_pairs_without_labels_takes_its_shape_from_the_probe_set(tmp_path: Path) -> None:
    config, run, plan = planned(tmp_path, known(1500), labelled_pairs=False)
    found = expected_curve(config, run, plan).curves
    assert list(found) == ["top1", "top5", "map"]
    probe = load(run)
    assert probe is not None
    rows = np.flatnonzero(probe.labels >= 0)
    labelled = Labelled(probe.ids[rows], probe.new[rows], probe.labels[rows])
    own = _own(run, plan, labelled, probe.transformed[rows], config.gallery.metric)
    for name, curve in found.items():
        mine, fractions = own[name].mean(axis=0), curve.fractions
        bend = mine - mine[0] - fractions * (mine[-1] - mine[0])
        line = curve.values[0] + fractions * (curve.values[-1] - curve.values[0])
        assert curve.values == pytest.approx(line + bend)


def test_expected_curve_without_a_probe_set_is_a_note_that_says_why(tmp_path: Path) -> None:
    found = expected_curve(*planned(tmp_path, known(), probe=0))
    assert not found.curves
    assert found.notes == (
        "No estimate of the quality: it needs a probe set, and the run has none (probe.images is 0).",
    )


def limited(config: Config, images: int) -> Config:
    return config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"max_images": images})})


def test_forecast_of_a_large_gallery_uses_a_sample_with_the_probe_set_and_says_so(tmp_path: Path) -> None:
    config, run, plan = planned(tmp_path, known(1500))
    found = expected_curve(limited(config, 400), run, plan)
    sample = found.curves["top1"].sample
    assert 300 < sample <= 400
    assert found.notes[0].startswith(f"The estimate uses {sample} of the gallery's images")
    assert expected_curve(config, run, plan).notes == found.notes, "stored with the curve"
    objects.delete(run.path("reports", "expected.json"))
    whole = expected_curve(config, run, plan)
    assert whole.notes == ()
    assert whole.curves["top1"].values[0] == pytest.approx(found.curves["top1"].values[0], abs=15)


def represented(found: Outlook) -> str:
    """What the only note says of the images that were searched."""
    (note,) = found.notes
    (said,) = re.findall(r"The estimate uses (\S+ of the gallery's images \(.*?\))\.", note)
    return str(said)


def test_forecast_of_a_partly_labelled_gallery_uses_the_labelled_images_and_says_so(tmp_path: Path) -> None:
    images = known(1500)
    some: list[Any] = [label if row % 2 else None for row, label in enumerate(labels_of(images))]
    config, run, plan = planned(tmp_path, replace(images, labels=some))
    found = expected_curve(config, run, plan)
    assert represented(found) == "750 of the gallery's images (only these have labels)"
    assert expected_curve(config, run, plan).notes == found.notes, "stored with the curve"
    objects.delete(run.path("reports", "expected.json"))
    found = expected_curve(limited(config, 400), run, plan)
    sample = found.curves["top1"].sample
    assert 300 < sample <= 400
    assert represented(found) == f"{sample} of the gallery's images (evaluate.max_images, of the 750 that have labels)"


def test_forecast_note_of_an_older_version_without_a_reason_names_the_limit(tmp_path: Path) -> None:
    config, run, plan = planned(tmp_path, known(1500))
    expected_curve(limited(config, 400), run, plan)
    uri = run.path("reports", "expected.json")
    tree = documents.decode(objects.read_bytes(uri), uri)
    for curve in tree.values():
        del curve["sampled"]
    objects.put(uri, documents.encode(tree))
    assert represented(expected_curve(config, run, plan)).endswith("(evaluate.max_images)")


@pytest.mark.parametrize("partly", [False, True])
@pytest.mark.parametrize("labelled", [300, 200])
def test_forecast_with_a_sample_of_a_partly_labelled_gallery_searches_the_sample_alone(
    tmp_path: Path, labelled: int, partly: bool
) -> None:
    images = known(1500)
    names = labels_of(images)
    some: list[Any] = [name if partly and row > 700 else None for row, name in enumerate(names)]
    config, run, plan = planned(tmp_path, replace(images, labels=some), probe=0)
    pairs = [name if row < labelled else None for row, name in enumerate(names[:300])]
    config = put_sample(config, tmp_path, id=images.ids[:300], label=pairs)
    write_pairs(run, images, labelled=True)
    assert draw_probe(config, run) is not None
    found = expected_curve(config, run, plan)
    assert represented(found) == f"{labelled} of the gallery's images (the labelled images of probe.manifest)"
    z, new, truth = images.transformed[:labelled], images.embedded[:labelled], np.array(names[:labelled])
    start, end = (evaluate(new, side, truth, truth, EvaluateOptions(self_match=True)).as_dict() for side in (z, new))
    for name, curve in found.curves.items():
        assert curve.values[[0, -1]] == pytest.approx([start[name], end[name]])
    probe = load(run)
    assert probe is not None
    measured = quality.top(
        probe_metrics.baseline_of(config.encoders, config.gallery.metric, run, plan, probe).within_transformed
    )
    assert measured["top1"] == pytest.approx(start["top1"]), "snapshot 0 is measured as it is expected"


def test_labelled_sample_reads_no_more_vectors_than_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, run, plan = planned(tmp_path, known(3000))
    came: list[int] = []
    each = parallel.each

    def counting(*arguments: object) -> object:
        for found in each(*arguments):  # type: ignore[arg-type]
            came.append(getattr(found, "num_rows", 0))
            yield found

    monkeypatch.setattr("pipeline.evaluation.gallery_arrays.parallel.each", counting)
    out = np.arange(1000)
    table, total = labelled_sample(run, plan.num_parts, plan.num_gallery, 500, out)
    assert 400 < table.num_rows <= 500
    assert sum(came) < 600
    assert total == 3000 - np.isin(known(3000).ids, out).sum()
    assert not np.isin(table["id"].to_numpy(), out).any()
    everything, _ = labelled_sample(run, plan.num_parts, plan.num_gallery, 10_000, out)
    assert everything.num_rows == total
    assert set(table["id"].to_pylist()) < set(everything["id"].to_pylist())


def selected() -> Selection:
    """One by curves that no simulation gives: they fall and rise again."""
    curve = [50.0 - 40 * (0 < point < 21) for point in range(22)]
    none: dict[str, float] = {}
    best = TrialResult("alignment", 0.0, 16, 1, "none", 0.0, "uncertainty", none, none, none, none, none, 0.0, 0.0)
    curves = {name: [curve, curve] for name in ("top1", "top5", "map")}
    return Selection(("top1",), 2, HELD_OUT, best, (best,), (), {}, tuple(np.linspace(0, 1, 22).tolist()), curves)


@pytest.mark.parametrize("changes", [{}, {"traffic": True}, {"group_boost": 2.0}])
def test_expected_curve_reuses_the_selection_s_curves_only_for_the_same_order(
    tmp_path: Path, changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run, plan = planned(tmp_path, known(1500), selected=selected())
    config = config.model_copy(update={"plan": config.plan.model_copy(update=changes)})
    pairs = pairs_of()  # with groups, which the run's reference has not
    monkeypatch.setattr("training.forecast.held_out", lambda config, run: pairs)
    found = expected_curve(config, run, plan)
    curve = found.curves["top1"].values
    bend = curve - np.linspace(curve[0], curve[-1], 22)
    share = 200 / (200 + 2000)  # of the probe set's own bend, which is no more than some points
    assert (bend.min() == pytest.approx(-40 * (1 - share), abs=2)) == (not changes)
    assert ["ignores `plan.traffic`" in note for note in found.notes] == [True] * ("traffic" in changes)


def test_probe_set_backfill_equals_embedding_it_piece_by_piece(tmp_path: Path) -> None:
    """In the plan's order, by each query that has a match."""
    config, run, plan = planned(tmp_path, known(3000))
    probe = gather(config.probe, config.encoders, run, plan)
    assert probe is not None
    rows = np.flatnonzero(probe.labels >= 0)
    labelled = Labelled(probe.ids[rows], probe.new[rows], probe.labels[rows])
    found = _own(run, plan, labelled, probe.transformed[rows], config.gallery.metric)
    order = np.argsort(-probe.uncertainty[rows], kind="stable")
    labels = probe.labels[rows]
    for point in (0, 4, 11, 21):
        state = probe.transformed[rows].copy()
        some = order[: point * len(rows) // 21]
        state[some] = probe.new[rows][some]
        exact = evaluate(probe.new[rows], state, labels, labels, EvaluateOptions(self_match=True))
        assert [found[name][:, point].mean() for name in ("top1", "top5", "map")] == pytest.approx(
            [exact.top1, exact.top5, exact.map]
        )


def test_the_curve_of_a_plan_in_a_folder_of_its_own_is_that_of_the_same_plan(tmp_path: Path) -> None:
    config, run, plan = planned(tmp_path / "plain", known())
    expected = expected_curve(config, run, plan).curves
    config, run, plan = planned(tmp_path / "own", known())
    parts = Path(run.path("transformed"))
    shutil.move(parts, tmp_path / "parts")
    parts.mkdir()
    shutil.move(tmp_path / "parts", parts / "layout")
    found = expected_curve(config, run, replace(plan, layout="layout")).curves
    assert {name: curve.to_json() for name, curve in found.items()} == {
        name: curve.to_json() for name, curve in expected.items()
    }
