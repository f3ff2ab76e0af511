"""The boost is the least that keeps the worst group within the bound, by what held-out pairs say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.boost import Boost, read_boost, resolve_boost
from pipeline.config import Config
from pipeline.config_file import validate
from pipeline.errors import ConfigError
from pipeline.reference import build_reference
from pipeline.run import Run
from training import boost as boosts
from training.boost import BOOSTS, choose_boost, ensure_boost
from training.folds import Fold
from training.held_out import HeldOut
from training.knowledge import group_needs
from training.learner import PairArrays

NUM, WIDTH, CLASSES = 400, 6, 8
BAD = 1  # of the four groups of two classes each


def config(folder: Path, **plan: object) -> Config:
    encoder = {"export": "new.pt2", "dim": WIDTH, "preprocess": {"size": 4}}
    columns = {"manifest": "images", "columns": {}}
    tree = {"run": str(folder), "encoders": {"new": encoder}, "gallery": columns, "pairs": columns, "plan": plan}
    return validate(tree, "test")


def pairs(grouped: bool = True) -> HeldOut:
    """One group is transformed badly, and no image is more uncertain than another by anything but chance."""
    rng = np.random.default_rng(0)
    labels = np.arange(NUM) % CLASSES
    groups = np.array([f"group {label // 2}" for label in labels], object)
    new = (rng.normal(size=(CLASSES, WIDTH))[labels] * 2 + rng.normal(size=(NUM, WIDTH)) / 2).astype(np.float32)
    noise = np.where(labels // 2 == BAD, 3.0, 1.0)[:, None] * rng.normal(size=new.shape)
    served, s = (new + noise).astype(np.float32), rng.normal(size=NUM).astype(np.float32)
    known = build_reference(new, served, s, new, labels, None, "l2", 0)
    if grouped:
        names, need = group_needs(served, new, labels, groups, "l2")
        known = replace(known, group_names=names, group_need=need)
    return HeldOut(Fold(PairArrays(new, new, None, labels), served, s, None), served, groups, known)


def test_the_least_boost_that_keeps_the_bound_is_taken(tmp_path: Path) -> None:
    found = choose_boost(config(tmp_path), pairs(), "uncertainty", 0.6)
    assert found.kept
    assert found.boost > 0, "by chance alone the worst group lacks more"
    assert found.gap == found.tried[f"{found.boost:g}"] <= 0.6 * found.start
    assert all(found.tried[f"{boost:g}"] > 0.6 * found.start for boost in BOOSTS if boost < found.boost)
    assert list(found.tried) == [f"{boost:g}" for boost in BOOSTS]


def test_no_boost_is_taken_where_none_is_needed(tmp_path: Path) -> None:
    assert choose_boost(config(tmp_path), pairs(), "uncertainty", 0.99).boost == 0


def test_a_bound_that_no_boost_keeps_is_said_to_be_missed(tmp_path: Path) -> None:
    found = choose_boost(config(tmp_path), pairs(), "uncertainty", 0.01)
    assert not found.kept
    assert found.gap == min(found.tried.values())
    assert "no boost that was tried keeps it within 0.01 of that" in str(found)


def test_pairs_without_groups_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"groups of the pairs(.|\n)*pairs.columns.group"):
        choose_boost(config(tmp_path), pairs(grouped=False), "uncertainty", 0.5)


def test_groups_of_few_pairs_are_refused(tmp_path: Path) -> None:
    some = pairs()
    lonely = np.where(np.arange(NUM) < 9, "group 1", None)
    few = HeldOut(some.fold, some.served, lonely.astype(object), some.reference)
    with pytest.raises(ConfigError, match=r"found: 0 such groups(.|\n)*raise pairs.held_out_fraction"):
        choose_boost(config(tmp_path), few, "uncertainty", 0.5)


def test_a_run_chooses_once_for_each_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[float] = []

    def choose(config: Config, pairs: HeldOut, policy: str, bound: float) -> Boost:
        made.append(bound)
        return Boost(4.0, 0.2, 10.0, 3.0, bound, {"0": 8.0, "4": 3.0})

    monkeypatch.setattr(boosts, "choose_boost", choose)
    monkeypatch.setattr(boosts, "held_out", lambda config, run: None)
    run, first = Run(str(tmp_path)), config(tmp_path, group_bound=0.5)
    assert read_boost(first, run, "uncertainty") is None
    assert ensure_boost(first, run) == ensure_boost(first, run) == read_boost(first, run, "uncertainty")
    assert made == [0.5]
    assert resolve_boost(first, run, "uncertainty") == 4.0
    ensure_boost(config(tmp_path, group_bound=0.25), run)
    assert made == [0.5, 0.25]
    given = config(tmp_path, group_boost=2.0)
    assert ensure_boost(given, run) is None
    assert resolve_boost(given, run, "uncertainty") == 2.0


@pytest.mark.parametrize("other", [{"group_boost": 1.0}, {"policy": "random"}])
def test_a_bound_beside_what_it_would_choose_is_refused(tmp_path: Path, other: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="group_bound: it chooses group_boost"):
        config(tmp_path, group_bound=0.5, **other)
