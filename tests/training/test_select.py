"""The selection: measured on pairs that nothing of it was fitted on, the same each time, and kept until it is made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline import storage
from pipeline.config import Config
from pipeline.config_file import validate
from pipeline.errors import ConfigError
from pipeline.offset import Classifier, fit_offset
from pipeline.policy import load_policy
from pipeline.reference import load_reference
from pipeline.run import Run
from pipeline.selection import read_selection, resolve_policy
from pipeline.transformation import read_info
from tests.training.test_fit import D_NEW, _data
from training import folds
from training import select as selecting
from training.candidates import Recipe, Serving
from training.fit import fit
from training.folds import FOLDER, Fold
from training.learner import FitData, PairArrays
from training.select import select
from training.simulate import Detail, curves_of, measure_fold, order_by

RECIPE = Recipe("fastfill", 0.1, 16, 4)
POLICIES = ("random", "uncertainty", "entropy", "learned")


def config_of(folder: Path, **select_settings: object) -> Config:
    chosen = {"folds": 2, "lambdas": [0.1], "strengths": [0.5], "finalists": 2, "policies": POLICIES}
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


def silent(what: str, done: int, total: int) -> None:
    """Say nothing."""


@pytest.mark.usefixtures("ray_cluster")
def test_two_selections_are_the_same_and_a_kept_fit_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, config = _data(tmp_path, hard=True), config_of(tmp_path)
    run, told = Run(config.run), []
    first = select(config, run, data, lambda *words: told.append(words))
    times = {uri: storage.stat(uri).modified_seconds for uri in storage.list_files(run.path(FOLDER), ".safetensors")}
    assert len(times) == 2 * 2  # recipes x folds
    (kept,) = storage.list_files(run.path(FOLDER), ".json")
    storage.delete_files([kept])  # as if it had been stopped before its end
    second = select(config, run, data, silent)
    assert second.to_json() == first.to_json()
    assert {uri: storage.stat(uri).modified_seconds for uri in times} == times
    assert [words for words in told if words[0] == "select: fits"][-1][1:] == (4, 4)
    monkeypatch.setattr(selecting, "_select", None)
    assert select(config, run, data, silent).to_json() == first.to_json()
    assert {row.policy for row in first.candidates} == set(POLICIES)
    assert {row.offset for row in first.candidates} >= {"none"}
    assert {row.offset for row in first.screened} == {"none", "uncertainty", "confidence"}
    assert {row.loss for row in first.candidates} <= {"alignment+uncertainty", "fastfill"}
    scores = [np.mean([row.area[name] for name in first.metrics]) for row in first.candidates]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.usefixtures("ray_cluster")
def test_the_fit_takes_what_was_selected_and_the_plan_its_policy(tmp_path: Path) -> None:
    config, run = (
        config_of(tmp_path, policies=["uncertainty"], losses=["alignment+uncertainty"]),
        Run(str(tmp_path / "run")),
    )
    fit(config, run, _data(tmp_path))
    found = read_selection(run)
    assert found is not None
    assert read_info(run).loss == found.chosen.loss == "alignment+uncertainty"
    assert resolve_policy(run, "selected") == "uncertainty"
    assert not storage.list_files(run.path(FOLDER))


def test_a_policy_that_was_not_selected_is_named_as_missing(tmp_path: Path) -> None:
    from tests.pipeline.test_gate import fitted

    with pytest.raises(ConfigError, match="nothing was selected"):
        resolve_policy(fitted(tmp_path, True), "selected")


@pytest.mark.usefixtures("ray_cluster")
def test_without_labels_it_goes_by_what_the_new_model_would_find(tmp_path: Path) -> None:
    config = config_of(tmp_path, policies=["random", "uncertainty"])
    found = select(config, Run(config.run), _data(tmp_path, labelled=False), silent)
    assert found.metrics == ("recall10",)
    assert found.chosen.loss == "alignment+uncertainty"
    assert all(curve[-1] == 100 for curve in found.curves["recall10"])


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_the_fit_keeps_the_classifier_of_a_selected_order(tmp_path: Path) -> None:
    label_free = {"losses": ["alignment+uncertainty"], "offsets": ["none"]}
    config, run = config_of(tmp_path, **label_free, policies=["entropy"]), Run(str(tmp_path / "run"))
    data = _data(tmp_path)
    assert data.classifier is None
    fit(config, run, data)
    known = load_reference(run)
    assert known is not None
    assert known.classifier_weight is not None
    load_policy(resolve_policy(run, "selected"), config.seed, known)


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"policies": ["class_mean"]}, "every order to choose from needs"), ({"metrics": ["recall10"]}, "measured by")],
)
def test_what_cannot_be_chosen_is_refused_before_anything_is_fitted(
    tmp_path: Path, settings: dict[str, object], says: str
) -> None:
    config = config_of(tmp_path, **settings)
    with pytest.raises(ConfigError, match=says):
        select(config, Run(config.run), _data(tmp_path), silent)


@pytest.mark.parametrize("settings", [{"policies": ["entropi"]}, {"losses": []}, {"strengths": []}, {"metrics": []}])
def test_settings_with_nothing_to_choose_from_are_refused(tmp_path: Path, settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"select.{next(iter(settings))}|{next(iter(settings))}: expected"):
        config_of(tmp_path, **settings)


def test_a_fold_is_scored_with_the_classifier_that_has_not_seen_it(tmp_path: Path) -> None:
    """A policy and an offset by confidence, with a classifier of `other` that would give another order."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(120, D_NEW)).astype(np.float32)
    labels = rng.integers(0, 3, 120)
    pairs = PairArrays(z, z + rng.normal(size=z.shape).astype(np.float32), None, labels)
    mine, foreign = (Classifier(rng.normal(size=(3, D_NEW)).astype(np.float32), None) for _ in range(2))
    s, config = np.zeros(120, np.float32), config_of(tmp_path)
    fold, detail = Fold(pairs, z, s, mine), Detail(5, 100)
    serving = Serving("confidence", 0.5)

    def curve(classifier: Classifier) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        other = Fold(pairs, z, s, mine)
        scored = replace(fold, classifier=classifier)
        return measure_fold(config, scored, other, serving, ["entropy"], detail)["entropy"]

    fitted = fit_offset("confidence", 0.5, z, s, pairs.new, mine, "l2")
    served = replace(fitted, classifier=foreign).apply(z, s)
    shares = foreign.probabilities(z)
    order = order_by(-(shares * np.log(shares)).sum(axis=1), config.seed)
    by_hand = curves_of(config, served, fold, {"entropy": [order]}, detail)[1]["entropy"]
    np.testing.assert_allclose(curve(foreign), by_hand)
    assert not np.allclose(curve(mine), by_hand)


def test_losses_that_all_need_labels_are_refused_without_any(tmp_path: Path) -> None:
    config = config_of(tmp_path, losses=["fastfill"])
    with pytest.raises(ConfigError, match="needs labels"):
        select(config, Run(config.run), _data(tmp_path, labelled=False), silent)


def test_what_is_measured_was_not_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the rows that the fit of a fold is given, and those that it holds out."""
    seen: list[tuple[set[bytes], set[bytes]]] = []

    class Stop(Exception):
        pass

    def look(job: object, train: PairArrays, held: PairArrays, *rest: object) -> None:
        seen.append(({row.tobytes() for row in train.new}, {row.tobytes() for row in held.new}))
        raise Stop

    monkeypatch.setattr(folds, "fit_alone", look)
    config, data, parts = config_of(tmp_path), _data(tmp_path), _parts(_data(tmp_path))
    for fold in range(2):
        with pytest.raises(Stop):
            folds._fit_fold(config, data, parts, RECIPE, fold, str(tmp_path / "none"))
    (train0, held0), (train1, held1) = seen
    assert not train0 & held0
    assert not train1 & held1
    assert not held0 & held1
    assert held0 <= train1


def test_of_a_large_fold_a_chance_sample_is_measured_not_the_first_labels(tmp_path: Path) -> None:
    """Pairs whose index follows their labels, as a training set in folders by class has it."""
    config, data = config_of(tmp_path), _data(tmp_path)
    table = _parts(data).table.sort_by("label")
    table = table.set_column(0, "index", pa.array(np.arange(table.num_rows)))
    parts = folds.Split(table, np.zeros(table.num_rows, np.int64), None)
    held = parts.held(0, folds.job_of(config, data, RECIPE), 100)
    assert len(held.old) == 100
    assert held.labels is not None
    assert set(held.labels.tolist()) == set(table["label"].to_pylist())


def _parts(data: FitData) -> folds.Split:
    tables = [storage.read_parquet(uri) for uri in [*data.train_parts, *data.held_out_parts]]
    table = pa.concat_tables(tables).sort_by("index")
    return folds.Split(table, np.arange(table.num_rows) % 2, None)
