"""The policy inputs of a fit, and the need of each group."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.models.offset import LinearClassifier
from pipeline.planning.policies import POLICIES, load_policy, missing, prioritise
from pipeline.planning.signals import Scored
from training.fitting.learner import PairArrays
from training.simulation.build_policy_inputs import group_needs, policy_inputs_of
from training.simulation.folds import Fold

NUM, D_OLD, D_NEW = 90, 6, 4


def pairs(labelled: bool) -> PairArrays:
    rng = np.random.default_rng(0)
    labels = np.arange(NUM) % 6
    new = (rng.normal(size=(6, D_NEW))[labels] + rng.normal(size=(NUM, D_NEW)) / 2).astype(np.float32)
    return PairArrays(rng.normal(size=(NUM, D_OLD)).astype(np.float32), new, None, labels if labelled else None)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_policy_inputs_of_a_fit_cover_all_policies(labelled: bool, metric: str) -> None:
    found, names = pairs(labelled), tuple("abcdef") if labelled else None
    groups = np.array([f"group {row % 3}" for row in range(NUM)], object)
    z = found.new + np.random.default_rng(1).normal(size=found.new.shape).astype(np.float32)
    classifier = LinearClassifier(np.ones((6, D_NEW), np.float32), None) if labelled else None
    known = policy_inputs_of(Fold(found, z, z[:, 0], classifier), z + 1, groups, names, metric, 0)
    wanted = {name for name in POLICIES if not missing(name, known)}
    without = {"entropy", "least_confidence", "margin", "class_mean", "neighbour_purity"}
    assert wanted == set(POLICIES) - (set() if labelled else without)
    assert known.group_names == (("group 0", "group 1", "group 2") if labelled else ())
    none = np.full(NUM, None, object)
    scored = Scored(np.arange(NUM), known.uncertainty, known.transformed, known.old, none, none)
    for name in wanted:
        prioritise(load_policy(name, 0, known), scored, name)


def test_group_needs_is_highest_for_the_group_with_the_largest_errors() -> None:
    found = pairs(labelled=True)
    assert found.labels is not None
    groups = np.array([("good", "bad", "better", None)[label % 4] for label in found.labels], object)
    noise = np.random.default_rng(1).normal(size=found.new.shape)
    served = found.new + np.where(groups == "bad", 3, np.where(groups == "good", 0.5, 0))[:, None] * noise
    names, need = group_needs(served.astype(np.float32), found.new, found.labels, groups, "l2")
    assert names == ("bad", "better", "good")
    assert need[0] == 1
    assert need.min() == 0
