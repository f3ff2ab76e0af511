"""The selection: measured on pairs that were not fitted on, deterministic, and stored."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.arrays import vectors_from_arrow, vectors_to_arrow
from pipeline.config.load import validate
from pipeline.config.tree import Config
from pipeline.errors import ConfigError, FastfillError
from pipeline.models.offset import HeldOutPairs, LinearClassifier, fit_offset
from pipeline.models.transformation import read_info
from pipeline.planning import selection_result
from pipeline.planning.policies import load_policy
from pipeline.planning.policy_inputs import load_policy_inputs
from pipeline.planning.selection_result import Selection, TrialResult, read_selection, resolve_policy
from pipeline.run import Run
from pipeline.storage import objects, parquet
from tests.support.pairs import D_NEW, synthetic_fit_data
from training import select as selecting
from training.fit import fit
from training.fitting.learner import FitData, PairArrays
from training.select import select
from training.simulation import folds
from training.simulation.folds import FOLDER, Fold
from training.simulation.simulate import (
    FINAL,
    FoldPair,
    SimulatedGallery,
    SimulationDetail,
    curves_of,
    measure_fold,
    order_by,
)
from training.simulation.trials import Recipe, Serving

RECIPE = Recipe("fastfill", 0.1, 16, 4)
CHOSEN = Selection(
    ("top1",),
    2,
    9,
    TrialResult("fastfill", 0.1, 16, 4, "none", 0, "random", {}, {}, {}, {}, {}, 0, 0),
    (),
    (),
    {},
    (),
    {},
)
POLICIES = ("random", "uncertainty", "entropy", "learned")


def config_of(folder: Path, **select_settings: object) -> Config:
    chosen = {"folds": 2, "lambdas": [0.1], "strengths": [0.5], "finalists": 2, "policies": POLICIES}
    chosen |= {"transformations": ["fastfill"], "offsets": ["none", "uncertainty", "confidence"]}
    tree: dict[str, object] = {
        "run": str(folder / "run"),
        "device": "cpu",
        "encoders": {"new": {"export": "new.pt2", "dim": D_NEW, "preprocess": {"size": 4}}},
        "gallery": {"manifest": "gallery", "columns": {}},
        "pairs": {"manifest": "pairs", "columns": {}},
        "fit": {"inner_width": 16, "epochs": 4, "batch_size": 64, "warmup_epochs": 1, "lr": 5e-3},
        "plan": {"policy": "selected"},
        "select": chosen | {"max_measured": 200} | select_settings,
    }
    return validate(tree, where="test")


def settings_of(config: Config, data: FitData) -> folds.FoldSettings:
    return folds.FoldSettings(config.fit, config.select, data, config.gallery.metric, config.seed, config.device)


def silent(what: str, done: int, total: int) -> None:
    """Say nothing."""


@pytest.mark.usefixtures("ray_cluster")
def test_select_twice_is_the_same_and_reuses_stored_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, config = synthetic_fit_data(tmp_path, hard=True), config_of(tmp_path)
    run, told = Run(config.run), []
    first = select(config, run, data, lambda *words: told.append(words))
    times = {uri: objects.stat(uri).modified_seconds for uri in objects.list_files(run.path(FOLDER), ".safetensors")}
    assert len(times) == 2 * 2  # recipes x folds
    (kept,) = objects.list_files(run.path(FOLDER), ".json")
    objects.delete_files([kept])  # as if it had been stopped before its end
    second = select(config, run, data, silent)
    assert second.to_json() == first.to_json()
    assert {uri: objects.stat(uri).modified_seconds for uri in times} == times
    assert [words for words in told if words[0] == "select: fits of fastfill 0.1"][-1][1:] == (2, 2)
    monkeypatch.setattr(selecting, "_select", None)
    assert select(config, run, data, silent).to_json() == first.to_json()
    assert {row.policy for row in first.candidates} == set(POLICIES)
    assert {row.offset for row in first.candidates} >= {"none"}
    assert {row.offset for row in first.screened} == {"none", "uncertainty", "confidence"}
    assert {row.loss for row in first.candidates} <= {"alignment+uncertainty", "fastfill"}
    scores = [np.mean([row.area[name] for name in first.metrics]) for row in first.candidates]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_fit_and_plan_use_the_selected_settings(tmp_path: Path) -> None:
    config, run = (
        config_of(tmp_path, policies=["uncertainty"], losses=["alignment+uncertainty"]),
        Run(str(tmp_path / "run")),
    )
    fit(config, run, synthetic_fit_data(tmp_path))
    found = read_selection(run)
    assert found is not None
    assert read_info(run).loss == found.chosen.loss == "alignment+uncertainty"
    assert resolve_policy(run, "selected") == "uncertainty"
    assert not objects.list_files(run.path(FOLDER))


def test_a_policy_that_was_not_selected_is_named_as_missing(tmp_path: Path) -> None:
    from tests.support.transformations import fitted

    with pytest.raises(ConfigError, match="has no selection to take the policy from"):
        resolve_policy(fitted(tmp_path, True), "selected")


@pytest.mark.usefixtures("ray_cluster")
def test_select_without_labels_measures_recall10(tmp_path: Path) -> None:
    config = config_of(tmp_path, policies=["random", "uncertainty"])
    found = select(config, Run(config.run), synthetic_fit_data(tmp_path, labelled=False), silent)
    assert found.metrics == ("recall10",)
    assert found.chosen.loss == "alignment+uncertainty"
    assert all(curve[-1] == 100 for curve in found.curves["recall10"])


def sample_of(data: FitData, count: int, labelled: bool = True) -> pa.Table:
    """Some pairs as the probe set of a gallery; what is drawn from one is in test_probe_set."""
    rows = pa.concat_tables(map(parquet.read_parquet, data.train_parts)).sort_by("index").slice(0, count)
    names = [f"class {code}" for code in rows["label"].to_pylist()] if labelled else [None] * count
    labels = pa.array(names, pa.string())
    return pa.table({"id": rows["index"], "label": labels, "old": rows["old"], "new": rows["new"]})


def probed(monkeypatch: pytest.MonkeyPatch, table: pa.Table) -> None:
    monkeypatch.setattr(selecting.probe_set, "embedded", lambda *_: table)


@pytest.mark.usefixtures("ray_cluster")
def test_select_measured_on_probe_measures_the_probe_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = synthetic_fit_data(tmp_path, hard=True)
    sample = sample_of(data, 201)
    probed(monkeypatch, sample)
    one = {"policies": ["uncertainty"], "losses": ["alignment+uncertainty"], "offsets": ["none"]}
    config = config_of(tmp_path, **one, measured_on="probe")
    run = Run(config.run)
    found = select(config, run, data, silent)
    assert (found.measured_on, found.num_measured) == ("probe", 101)
    assert found.likeness is not None
    assert found.likeness.error_ratio is not None
    assert Selection.from_json(found.to_json()) == found
    recipe = Recipe("alignment+uncertainty", 1.0, config.fit.inner_width, config.fit.epochs)
    given = settings_of(config, data)
    measured = selecting._sample(given, sample)
    parts = folds.split(given, measured)
    assert measured is not None
    assert not {row.tobytes() for row in parts.train(0, given.job(RECIPE)).old} & {
        row.tobytes() for row in measured.old
    }, "pairs that are images of the sample are left out"
    fits = folds.fit_folds(given, run, recipe, parts, silent)
    assert fits.sample[0].pairs.new.tobytes() == vectors_from_arrow(sample["new"]).tobytes()
    shares = [
        np.flatnonzero(np.isin(mine.pairs.new[:, 0], pair.measured.pairs.new[:, 0]))
        for mine, pair in zip(fits.sample, selecting._fold_pairs(fits, config.select), strict=True)
    ]
    assert np.sort(np.concatenate(shares)).tolist() == list(range(201))
    for number, (held, mine) in enumerate(zip(fits.held, fits.sample, strict=True)):
        share = mine.take(shares[number])
        serving = Serving("none", 0, found.chosen.calibrate)
        curve = measure_fold(FoldPair(share, held), serving, ["uncertainty"], FINAL, "l2", config.seed)["uncertainty"]
        np.testing.assert_allclose(np.array([found.curves[name][number] for name in found.curves]).T, curve)


@pytest.mark.parametrize(("count", "found"), [(0, 0), (150, 150)])
def test_a_probe_set_that_is_too_small_to_choose_by_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, found: int
) -> None:
    data, config = synthetic_fit_data(tmp_path), config_of(tmp_path, measured_on="probe")
    if count:
        probed(monkeypatch, sample_of(data, count))
    with pytest.raises(ConfigError, match="the probe set is too small for") as error:
        select(config, Run(config.run), data, silent)
    assert error.value.details["found"] == found


def test_select_of_metrics_that_the_probe_set_rules_out_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, config = (
        synthetic_fit_data(tmp_path, labelled=False),
        config_of(tmp_path, measured_on="probe", metrics=["recall10"]),
    )
    probed(monkeypatch, sample_of(synthetic_fit_data(tmp_path / "labelled"), 300))
    with pytest.raises(ConfigError, match="recall10, which is for"):
        select(config, Run(config.run), data, silent)


def test_select_on_a_partly_labelled_probe_set_measures_the_labelled_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, config = synthetic_fit_data(tmp_path), config_of(tmp_path, measured_on="probe")
    table = sample_of(data, 400)
    names = [name if row % 3 else None for row, name in enumerate(table["label"].to_pylist())]
    probed(monkeypatch, table.set_column(1, "label", pa.array(names)))
    sample = selecting._sample(
        settings_of(config, data), selecting.probe_set.embedded(config.probe, config.encoders, Run(config.run))
    )
    found = selecting._measured(sample, config.select)
    assert len(found.old) == sum(name is not None for name in names)
    few = [name if row % 8 == 0 else None for row, name in enumerate(table["label"].to_pylist())]
    probed(monkeypatch, table.set_column(1, "label", pa.array(few)))
    with pytest.raises(ConfigError, match=r"at least 200 images with a label(.|\n)*found: 50"):
        select(config, Run(config.run), data, silent)


def test_select_with_too_few_labelled_queries_measures_without_labels(tmp_path: Path) -> None:
    """Where one share has each label once, no other is measured by labels either."""
    rng = np.random.default_rng(0)
    vectors, s = rng.normal(size=(80, D_NEW)).astype(np.float32), np.zeros(80, np.float32)
    some, each = np.arange(80) % 4, np.where(np.arange(80) < 49, 0, np.arange(80))
    sides = [Fold(PairArrays(vectors, vectors, None, labels), vectors, s, None) for labels in (some, each)]
    found = selecting._comparable([FoldPair(fold, fold) for fold in sides])
    assert [pair.measured.labels() for pair in found] == [None, None]
    assert selecting._comparable([FoldPair(sides[0], sides[1])])[0].measured is sides[0]


@pytest.mark.parametrize("width", [64, 512])
def test_split_leaves_out_pairs_of_sample_images_even_if_rounded(tmp_path: Path, width: int) -> None:
    rng = np.random.default_rng(0)
    old = np.maximum(rng.normal(size=(900, width)), 0).astype(np.float32)
    rounded = torch.from_numpy(old[:300]).bfloat16().float().numpy()
    table = pa.table({"index": np.arange(900), "old": vectors_to_arrow(old)})
    objects.put(str(tmp_path / "pairs.parquet"), parquet.parquet_bytes(table.schema, [table]))
    data = FitData([str(tmp_path / "pairs.parquet")], [], 900, None, width, D_NEW)
    config = config_of(tmp_path, measured_on="probe")
    given = settings_of(config, data)
    sample = PairArrays(rounded, np.zeros((300, D_NEW), np.float32), None, None)
    parts = folds.split(given, sample)
    assert parts.table["index"].to_pylist() == list(range(300, 900))
    others = given.select.model_copy(update={"measured_on": "pairs"})
    whole = folds.split(replace(given, select=others), sample)
    assert whole.table.num_rows == 900
    assert whole.digest() != parts.digest(), "a fit of other pairs is another one"
    elsewhere = folds.split(given, replace(sample, new=sample.new + np.float32(1e-7)))
    assert elsewhere.digest() == parts.digest(), "a fit that was kept on another processor is used"
    every = PairArrays(old[:850], np.zeros((850, D_NEW), np.float32), None, None)
    with pytest.raises(ConfigError, match=r"nearly all pairs are images of the probe set(.|\n)*found: 50 of 900"):
        folds.split(given, every)


def test_resolve_policy_selected_without_a_selection_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Selection | None] = [None, CHOSEN, None, CHOSEN]
    monkeypatch.setattr(selection_result, "read_selection", lambda run: found.pop(0))
    run = Run(str(tmp_path))
    with pytest.raises(ConfigError, match=r"has no selection to take the policy from(.|\n)*set plan\.policy to auto"):
        resolve_policy(run, "selected")
    assert resolve_policy(run, "selected") == "random"
    assert resolve_policy(run, "auto") == "uncertainty"
    assert resolve_policy(run, "auto") == "random"
    assert resolve_policy(run, "margin") == "margin"


def test_a_selection_of_version_0_1_is_read() -> None:
    tree = json.loads(CHOSEN.to_json()) | {"learning": {"what": "nothing", "starts": [0.1], "gain": {}}}
    assert Selection.from_json(json.dumps(tree)) == CHOSEN


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_the_fit_keeps_the_classifier_of_a_selected_order(tmp_path: Path) -> None:
    label_free = {"losses": ["alignment+uncertainty"], "offsets": ["none"]}
    config, run = config_of(tmp_path, **label_free, policies=["entropy"]), Run(str(tmp_path / "run"))
    data = synthetic_fit_data(tmp_path)
    assert data.classifier is None
    fit(config, run, data)
    known = load_policy_inputs(run)
    assert known is not None
    assert known.classifier_weight is not None
    load_policy(resolve_policy(run, "selected"), config.seed, known)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"policies": ["class_mean"]}, "every policy in select.policies needs"),
        ({"metrics": ["recall10"]}, "recall10, which is for images without labels"),
    ],
)
def test_select_of_impossible_policies_or_metrics_is_refused_before_any_fit(
    tmp_path: Path, settings: dict[str, object], says: str
) -> None:
    config = config_of(tmp_path, **settings)
    with pytest.raises(ConfigError, match=says):
        select(config, Run(config.run), synthetic_fit_data(tmp_path), silent)


@pytest.mark.parametrize("settings", [{"policies": ["entropi"]}, {"losses": []}, {"strengths": []}, {"metrics": []}])
def test_settings_with_nothing_to_choose_from_are_refused(tmp_path: Path, settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"select.{next(iter(settings))}|{next(iter(settings))}: expected"):
        config_of(tmp_path, **settings)


def test_measure_fold_ranks_by_the_classifier_of_the_measured_fold(tmp_path: Path) -> None:
    """A policy and an offset by confidence, with a classifier of `other` that would give another order."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(120, D_NEW)).astype(np.float32)
    labels = rng.integers(0, 3, 120)
    pairs = PairArrays(z, z + rng.normal(size=z.shape).astype(np.float32), None, labels)
    mine, foreign = (LinearClassifier(rng.normal(size=(3, D_NEW)).astype(np.float32), None) for _ in range(2))
    s, config = np.zeros(120, np.float32), config_of(tmp_path)
    fold, detail = Fold(pairs, z, s, mine), SimulationDetail(5, 100)
    serving = Serving("confidence", 0.5, calibrate=False)

    def curve(classifier: LinearClassifier) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        other = Fold(pairs, z, s, mine)
        scored = replace(fold, classifier=classifier)
        return measure_fold(FoldPair(scored, other), serving, ["entropy"], detail, "l2", config.seed)["entropy"]

    fitted = fit_offset("confidence", 0.5, HeldOutPairs(z, s, pairs.new), mine, "l2")
    served = replace(fitted, classifier=foreign).apply(z, s)
    shares = foreign.probabilities(z)
    order = order_by(-(shares * np.log(shares)).sum(axis=1), config.seed)
    by_hand = curves_of(SimulatedGallery(served, pairs.new, fold.labels(), "l2"), {"entropy": [order]}, detail)[1][
        "entropy"
    ]
    np.testing.assert_allclose(curve(foreign), by_hand)
    assert not np.allclose(curve(mine), by_hand)


def test_losses_that_all_need_labels_are_refused_without_any(tmp_path: Path) -> None:
    config = config_of(tmp_path, losses=["fastfill"])
    with pytest.raises(ConfigError, match="needs labels"):
        select(config, Run(config.run), synthetic_fit_data(tmp_path, labelled=False), silent)


def test_select_measures_no_pair_that_the_fit_was_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the rows that the fit of a fold is given, and those that it holds out."""
    seen: list[tuple[set[bytes], set[bytes]]] = []

    class Stop(Exception):
        pass

    def look(job: object, train: PairArrays, held: PairArrays, *rest: object) -> None:
        seen.append(({row.tobytes() for row in train.new}, {row.tobytes() for row in held.new}))
        raise Stop

    monkeypatch.setattr(folds, "fit_alone", look)
    config, data, parts = config_of(tmp_path), synthetic_fit_data(tmp_path), _parts(synthetic_fit_data(tmp_path))
    for fold in range(2):
        with pytest.raises(Stop):
            folds._fit_fold(settings_of(config, data), parts, RECIPE, fold, str(tmp_path / "none"))
    (train0, held0), (train1, held1) = seen
    assert not train0 & held0
    assert not train1 & held1
    assert not held0 & held1
    assert held0 <= train1


def test_select_of_a_large_fold_measures_a_random_sample(tmp_path: Path) -> None:
    """Pairs whose index follows their labels, as a training set in folders by class has it."""
    config, data = config_of(tmp_path), synthetic_fit_data(tmp_path)
    table = _parts(data).table.sort_by("label")
    table = table.set_column(0, "index", pa.array(np.arange(table.num_rows)))
    parts = folds.Split(table, np.zeros(table.num_rows, np.int64), None)
    held = parts.held(0, settings_of(config, data).job(RECIPE), 100)
    assert len(held.old) == 100
    assert held.labels is not None
    assert set(held.labels.tolist()) == set(table["label"].to_pylist())


def _parts(data: FitData) -> folds.Split:
    tables = [parquet.read_parquet(uri) for uri in [*data.train_parts, *data.held_out_parts]]
    table = pa.concat_tables(tables).sort_by("index")
    return folds.Split(table, np.arange(table.num_rows) % 2, None)


@pytest.mark.usefixtures("ray_cluster")
def test_select_without_time_takes_the_simplest_recipe_and_names_the_others(tmp_path: Path) -> None:
    data = synthetic_fit_data(tmp_path)
    settings = {"transformations": ["linear", "residual", "fastfill"], "losses": ["fastfill"], "offsets": ["none"]}
    config = config_of(tmp_path, **settings, policies=["random"], minutes=1e-9)
    found = select(config, Run(config.run), data, silent)
    assert found.chosen.transformation == "linear"
    assert found.left_out == ("residual", "fastfill 0.1")
    assert "Not tried for lack of time: residual, fastfill 0.1;" in selection_result.describe(found)


@pytest.mark.usefixtures("ray_cluster")
def test_select_on_pairs_of_a_linear_map_takes_linear_though_others_were_tried(tmp_path: Path) -> None:
    data = linear_data(tmp_path)
    settings = {"transformations": ["linear", "residual"], "offsets": ["none"], "minutes": 5.0, "folds": 3}
    config = config_of(tmp_path, **settings, policies=["random"])
    found = select(config, Run(config.run), data, silent)
    assert found.chosen.transformation == "linear"
    assert {row.transformation for row in found.screened} == {"linear", "residual"}
    assert found.left_out == ()


def linear_data(folder: Path, num: int = 600) -> FitData:
    """Pairs whose new embedding is a rotation of the old one, and noise."""
    rng = np.random.default_rng(0)
    old = rng.normal(size=(num, D_NEW)).astype(np.float32)
    turn = np.linalg.qr(rng.normal(size=(D_NEW, D_NEW)))[0]
    new = (old @ turn + 0.1 * rng.normal(size=old.shape)).astype(np.float32)
    columns = {"old": vectors_to_arrow(old), "new": vectors_to_arrow(new)}
    table = pa.table({"index": np.arange(num), "label": pa.nulls(num, pa.int32())} | columns)
    parts = [str(folder / "pairs" / f"part-{part}.parquet") for part in range(2)]
    for uri, rows in zip(parts, (table.slice(0, num - 60), table.slice(num - 60)), strict=True):
        objects.put(uri, parquet.parquet_bytes(rows.schema, [rows]))
    return FitData(parts[:1], parts[1:], num - 60, None, D_NEW, D_NEW)


@pytest.mark.usefixtures("ray_cluster")
def test_fit_folds_beyond_its_time_is_stopped(tmp_path: Path) -> None:
    data = synthetic_fit_data(tmp_path)
    config = config_of(tmp_path)
    config = config.model_copy(update={"fit": config.fit.model_copy(update={"epochs": 10**6})})
    recipe = Recipe("fastfill", 0.1, 16, 10**6)
    given = settings_of(config, data)
    parts = folds.split(given, None)
    with pytest.raises(folds.OutOfTime):
        folds.fit_folds(given, Run(config.run), recipe, parts, silent, seconds=1.0)
    assert not objects.list_files(Run(config.run).path(FOLDER))


def curves_of_selection(top1: list[float], old: float) -> Selection:
    points = tuple(np.linspace(0, 1, len(top1)).tolist())
    return replace(CHOSEN, ends={"old_old": {"top1": old}}, fractions=points, curves={"top1": [top1, top1]})


@pytest.mark.parametrize(
    ("top1", "fraction"),
    [
        ([50.0, 55.0, 60.0], 0.0),
        ([30.0, 45.0, 60.0], 0.5),
        ([30.0, 35.0, 60.0], 1.0),
        ([45.0, 35.0, 60.0], 1.0),
        ([30.0, 35.0, 39.0], None),
    ],
)
def test_passes_old_is_the_fraction_from_which_on_the_curve_reaches_the_old_model(
    top1: list[float], fraction: float | None
) -> None:
    assert curves_of_selection(top1, 40.0).passes_old() == fraction


def test_passes_old_of_a_selection_that_measured_no_old_model_is_none() -> None:
    assert replace(curves_of_selection([50.0, 60.0], 0.0), ends={}).passes_old() is None


@pytest.mark.usefixtures("ray_cluster")
def test_select_names_a_recipe_whose_fit_failed_and_takes_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = linear_data(tmp_path)
    settings = {"transformations": ["linear", "fastfill"], "losses": ["alignment"], "offsets": ["none"], "minutes": 5.0}
    config = config_of(tmp_path, **settings, policies=["random"])
    config = config.model_copy(update={"fit": config.fit.model_copy(update={"lr": 1e30})})
    found = select(config, Run(config.run), data, silent)
    assert found.chosen.transformation == "linear"
    assert (found.left_out, found.failed) == ((), ("fastfill, alignment",))
    assert selection_result.describe(found).endswith("Could not be fitted: fastfill, alignment.")
    assert "could not be fitted on these pairs and is left out" in caplog.text


def test_a_classifier_that_does_not_fit_is_refused_before_anything_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.fit.select", None)
    data = replace(synthetic_fit_data(tmp_path), classifier=(np.zeros((1, D_NEW), np.float32), None))
    with pytest.raises(FastfillError, match="does not match the training pairs"):
        fit(config_of(tmp_path), Run(str(tmp_path / "run")), data)
