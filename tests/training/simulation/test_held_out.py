"""Held-out pairs: their served vectors, and their priorities under the run's policy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.arrays import vectors_from_arrow
from pipeline.models.offset import Offset
from pipeline.planning.policies import load_policy
from pipeline.planning.signals import Scored
from tests.support.planned_run import config_of, pairs_of, save, write_pairs
from tests.support.synthetic_run import Options, known, make_run
from training.simulation.held_out import FOLDS, HeldOut, fold_places, held_out, priorities
from training.simulation.staleness_cost import fit_learned, staleness_cost


def test_held_out_gives_pairs_by_index_transformed_and_served_with_the_offset(tmp_path: Path) -> None:
    images = known(400)
    config, run = make_run(tmp_path, images, Options(commits=False, transformation=False))
    table = write_pairs(run, images, labelled=True).sort_by("index")
    aside = np.eye(16, dtype=np.float32)[0]
    network = save(run, images, Offset("uncertainty", 4.0, 0.0, aside, False, None), None)
    found = held_out(config, run)
    with torch.no_grad():
        z, s = (side.numpy() for side in network(torch.tensor(vectors_from_arrow(table["old"])), None))
    assert found.fold.z == pytest.approx(z, abs=1e-5)
    assert found.fold.s == pytest.approx(s.reshape(-1), abs=1e-5)
    assert found.served == pytest.approx(z + 2 * np.exp(s.reshape(-1, 1) / 2) * aside, abs=1e-4)
    assert found.fold.pairs.labels is not None
    assert found.fold.pairs.labels.tolist() == table["label"].to_pylist()
    assert found.groups.tolist() == table["group"].to_pylist()


def test_folds_hold_each_pair_once_and_are_as_large_as_each_other() -> None:
    sizes = np.bincount(fold_places(402, 4))
    assert sorted(sizes.tolist()) == [100, 100, 101, 101]


def test_the_learned_order_of_a_pair_is_by_a_model_of_the_other_folds_alone(tmp_path: Path) -> None:
    pairs, config = pairs_of(), config_of(tmp_path)
    reference, fold = pairs.reference, pairs.fold
    assert reference is not None
    assert fold.pairs.labels is not None
    found, places, scored = (
        priorities(pairs, "learned", config.gallery, config.seed),
        fold_places(400, FOLDS),
        fold.scored(),
    )
    for number in range(FOLDS):
        rows, rest = np.flatnonzero(places == number), np.flatnonzero(places != number)
        taken = fold.take(rest)
        cost = staleness_cost(taken.z, taken.pairs.new, fold.pairs.labels[rest], "l2", 0)
        model = fit_learned(taken.scored(), reference, cost, 0)
        assert found[rows] == pytest.approx(load_policy("learned", 0, model)(scored)[rows], rel=1e-4, abs=1e-4)
    in_sample = load_policy("learned", 0, reference)(scored)
    cost = staleness_cost(fold.z, fold.pairs.new, fold.pairs.labels, "l2", 0)
    assert np.corrcoef(in_sample, cost)[0, 1] > np.corrcoef(found, cost)[0, 1], "a model flatters what it has seen"


def test_held_out_class_mean_uses_the_pairs_labels_if_the_gallery_has_labels(tmp_path: Path) -> None:
    pairs = pairs_of()
    labels, new = pairs.fold.pairs.labels, pairs.fold.pairs.new
    assert labels is not None
    means = np.stack([new[labels == label].mean(axis=0) for label in range(labels.max() + 1)])
    found = priorities(pairs, "class_mean", config_of(tmp_path, label="label").gallery, 0)
    assert found == pytest.approx(np.square(pairs.fold.z - means[labels]).sum(axis=1), rel=1e-4)
    nearest = np.square(pairs.fold.z[:, None] - means).sum(axis=2).min(axis=1)
    assert priorities(pairs, "class_mean", config_of(tmp_path).gallery, 0) == pytest.approx(nearest, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("policy", ["uncertainty", "learned"])
def test_a_boost_raises_the_groups_that_need_it(tmp_path: Path, policy: str) -> None:
    pairs, config = pairs_of(), config_of(tmp_path)
    assert pairs.reference is not None
    assert pairs.reference.group_need is not None
    needs = dict(zip(pairs.reference.group_names, pairs.reference.group_need.tolist(), strict=True))
    need = np.array([needs[group] for group in pairs.groups.tolist()])
    plain, boosted = (priorities(pairs, policy, config.gallery, config.seed, boost) for boost in (0.0, 4.0))
    cost = np.exp(plain) if policy == "uncertainty" else plain
    assert boosted == pytest.approx(cost * (1 + 4 * need), rel=1e-4, abs=1e-5)


def test_held_out_of_two_pairs_is_enough_to_rank(tmp_path: Path) -> None:
    pairs = pairs_of(40)
    few = HeldOut(pairs.fold.take(np.arange(2)), pairs.served[:2], pairs.groups[:2], pairs.reference)
    assert np.isfinite(priorities(few, "learned", config_of(tmp_path).gallery, 0)).all()


def test_a_policy_of_the_users_own_sees_all_pairs_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own_order_of_pairs.py"
    own.write_text("def order(scored):\n    return scored.uncertainty + len(scored.ids)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    pairs = replace(pairs_of(60), reference=None)
    assert isinstance(pairs.fold.scored(), Scored)
    assert priorities(pairs, "own_order_of_pairs:order", config_of(tmp_path).gallery, 0) == pytest.approx(
        pairs.fold.s + 60
    )
