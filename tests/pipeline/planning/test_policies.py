"""Policies: a function of each image alone, the most uncertain first, and a shuffle that stays what it is."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.arrays import Float32, Int64
from pipeline.config.method import POLICY_NAMES
from pipeline.errors import ConfigError, DataError
from pipeline.planning.policies import POLICIES, load_policy, missing, prioritise
from pipeline.planning.policy_inputs import HeldOutPairs, PolicyInputs, build_policy_inputs
from pipeline.planning.signals import Scored, signals
from training.simulation.staleness_cost import fit_learned

OWN = f"{__name__}:length_of_transformed"
EXACT = ["uncertainty", "random", OWN]
PINNED_ORDERS = [[0, 2, 1, 3], [2, 1, 3, 0], [1, 3, 2, 0], [0, 2, 1, 3]]


def scored(ids: Int64) -> Scored:
    """Columns that are functions of the id."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(1000, 4)).astype(np.float32)[ids % 1000]
    names = np.array([f"label {number % 3}" for number in ids], object)
    return Scored(ids, table[:, 0], table[:, 1:], table[:, 2:], names, names, (ids % 7).astype(np.float32))


@cache
def known(labelled: bool = True, classifier: bool = True) -> PolicyInputs:
    """Of 50 pairs, which are images 1 to 50."""
    pairs, rng = scored(np.arange(1, 51)), np.random.default_rng(1)
    new = pairs.transformed + rng.normal(size=pairs.transformed.shape).astype(np.float32) / 3
    weight = rng.normal(size=(3, 3)).astype(np.float32), None
    old, z, s = pairs.old_embeddings, pairs.transformed, pairs.uncertainty
    labels = pairs.ids % 3 if labelled else None
    names = tuple(f"label {code}" for code in range(3))
    held_out = HeldOutPairs(old, z, s, new, labels, names)
    made = build_policy_inputs(held_out, weight if classifier else None, "l2", 0)
    harm = np.square(new - z).sum(axis=1)
    made = fit_learned(pairs, made, harm, 0)
    return replace(made, group_names=("label 0", "label 1"), group_need=np.array([1, 0], np.float32))


def length_of_transformed(columns: Scored) -> Float32:
    """A user's own policy."""
    found: Float32 = np.linalg.norm(columns.transformed, axis=1)
    return found


def gives_nan(columns: Scored) -> Float32:
    return np.where(columns.ids % 5 == 0, np.nan, 1.0).astype(np.float32)


def gives_too_few(columns: Scored) -> Float32:
    return np.zeros(len(columns.ids) - 1, np.float32)


def gives_float64(columns: Scored) -> NDArray[np.float64]:
    return columns.ids.astype(np.float64)


def test_the_most_uncertain_image_comes_first() -> None:
    columns = scored(np.arange(50))
    priority = prioritise(load_policy("uncertainty", 0), columns, "here")
    assert np.array_equal(priority, columns.uncertainty)


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=20, deadline=None)
@given(cut=st.integers(0, 60), seed=st.integers(0, 2**32 - 1))
def test_a_priority_does_not_depend_on_what_else_is_in_the_part(name: str, cut: int, seed: int) -> None:
    ids, policy = np.arange(60) * 7919, load_policy(name, seed)
    whole = prioritise(policy, scored(ids), "here")
    parts = [prioritise(policy, scored(part), "here") for part in (ids[:cut], ids[cut:])]
    assert np.array_equal(np.concatenate(parts), whole)
    assert whole.dtype == np.float32


def test_random_of_a_seed_is_pinned_and_differs_between_seeds() -> None:
    columns = scored(np.arange(4))
    orders = [np.argsort(-prioritise(load_policy("random", seed), columns, "")).tolist() for seed in range(4)]
    assert orders == PINNED_ORDERS
    assert len({tuple(order) for order in orders}) > 1


def test_random_is_uniform_and_independent_of_the_uncertainty() -> None:
    ids = np.arange(100_000)
    priority = prioritise(load_policy("random", 1), scored(ids), "here")
    assert 0 <= priority.min() < priority.max() < 1
    counts, _ = np.histogram(priority, 10, (0, 1))
    assert np.abs(counts - 10_000).max() < 600  # 6 standard deviations
    assert abs(np.corrcoef(priority, scored(ids).uncertainty)[0, 1]) < 0.02


def test_a_policy_of_the_users_own_may_give_any_numbers() -> None:
    columns = scored(np.arange(5))
    assert prioritise(load_policy(f"{__name__}:gives_float64", 0), columns, "").tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("name", "found"), [("gives_nan", r"shape \(50,\), 10 NaN"), ("gives_too_few", r"shape \(49,\), 0 NaN")]
)
def test_unusable_priorities_are_refused_with_their_place(name: str, found: str) -> None:
    with pytest.raises(DataError, match=f"expected: 50 numbers(.|\n)*{found}(.|\n)*part 7"):
        prioritise(load_policy(f"{__name__}:{name}", 0), scored(np.arange(50)), "part 7")


@pytest.mark.parametrize("name", ["no_such_module:policy", f"{__name__}:no_such_function"])
def test_a_policy_that_cannot_be_found_is_a_config_error(name: str) -> None:
    with pytest.raises(ConfigError, match=f"plan.policy: {name}"):
        load_policy(name, 0)


def raises(columns: Scored) -> Float32:
    raise KeyError("colour")


def test_a_policy_that_raises_is_a_config_error_with_the_line() -> None:
    with pytest.raises(
        ConfigError, match=r"the policy failed\n  found: KeyError: 'colour' \(.*test_policies\.py, line "
    ):
        prioritise(load_policy(f"{__name__}:raises", 0), scored(np.arange(5)), "plan.policy: x")


def test_the_config_knows_every_policy_and_no_other_the_simplest_first() -> None:
    assert tuple(sorted(POLICIES, key=lambda name: POLICIES[name].simplicity)) == POLICY_NAMES


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", POLICIES)
def test_policy_of_an_image_does_not_depend_on_the_others(name: str, weighted: bool) -> None:
    """But for the last bits of a product, which depend on how many rows it has."""
    policy = load_policy(name, 3, known(), weighted, 2.0 if weighted else 0.0)
    ids = np.arange(300, 400)
    whole = prioritise(policy, scored(ids), "here")
    assert whole.dtype == np.float32
    assert len(np.unique(whole)) > 3
    shuffle = np.random.default_rng(0).permutation(100)
    assert np.allclose(prioritise(policy, scored(ids[shuffle]), "here"), whole[shuffle], rtol=1e-3, atol=1e-5)
    parts = [prioritise(policy, scored(part), "here") for part in (ids[:1], ids[1:37], ids[37:], ids[:0])]
    assert np.allclose(np.concatenate(parts), whole, rtol=1e-3, atol=1e-5)
    assert np.array_equal(prioritise(policy, scored(ids), "here"), whole)


def test_signals_of_identical_images_are_finite() -> None:
    ids = np.full(20, 700)
    for labelled in (True, False):
        for classifier in (True, False):
            found = signals(scored(ids), known(labelled, classifier))
            assert all(np.isfinite(column).all() for column in found.values())
            assert all(column.shape == (20,) and column.dtype == np.float32 for column in found.values())
            assert ("entropy" in found) == classifier
            assert ("neighbour_purity" in found) == labelled


def test_a_part_is_scored_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    columns, whole = scored(np.arange(200)), signals(scored(np.arange(200)), known())
    monkeypatch.setattr("pipeline.planning.signals._NUMBERS_AT_ONCE", 350)
    for name, column in signals(columns, known()).items():
        assert np.allclose(column, whole[name], rtol=1e-3, atol=1e-5), name


def test_confidence_is_that_of_the_classifier() -> None:
    columns, reference = scored(np.arange(100, 150)), known()
    assert reference.classifier_weight is not None
    logits = columns.transformed.astype(np.float64) @ reference.classifier_weight.T
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    best = -np.sort(-shares, axis=1)
    expected = {
        "entropy": -(shares * np.log(shares)).sum(axis=1),
        "least_confidence": 1 - best[:, 0],
        "margin": 1 - (best[:, 0] - best[:, 1]),
    }
    for name, values in expected.items():
        assert np.allclose(load_policy(name, 0, reference)(columns), values, atol=1e-5)


def test_neighbours_are_the_nearest_pairs_and_an_image_is_not_its_own() -> None:
    columns, reference = scored(np.arange(20, 80)), known()
    far = np.square(columns.transformed[:, None] - reference.transformed).sum(axis=2)
    pairs = np.arange(20, 51)
    far[np.arange(len(pairs)), pairs - 1] = np.inf
    rows = np.argsort(far, axis=1)[:, :10]
    found = signals(columns, reference)
    assert np.allclose(found["neighbour_distance"], np.sort(far, axis=1)[:, :10].mean(axis=1), atol=1e-4)
    assert np.allclose(found["neighbour_residual"], reference.residual[rows].mean(axis=1), atol=1e-5)
    shares = [np.bincount(reference.labels[row]).max() / 10 for row in rows]
    assert np.allclose(found["neighbour_purity"], 1 - np.array(shares), atol=1e-6)


def test_an_image_that_another_processor_embedded_as_a_pair_is_not_its_own_neighbour() -> None:
    columns, reference = scored(np.arange(20, 80)), known()
    rounded = replace(columns, old_embeddings=columns.old_embeddings * np.float32(1 + 2e-6))
    assert not (rounded.old_embeddings == columns.old_embeddings).all(axis=1).any()
    found, expected = (signals(some, reference) for some in (rounded, columns))
    for name in ("neighbour_distance", "neighbour_purity", "old_distance", "hits"):
        assert np.allclose(found[name], expected[name], rtol=1e-4), name


def test_hubness_counts_the_queries_that_reach_an_image_but_its_own() -> None:
    columns, reference = scored(np.arange(20, 80)), known()
    far = np.square(columns.transformed[:, None] - reference.queries).sum(axis=2)
    pairs = np.arange(20, 51)
    far[np.arange(len(pairs)), pairs - 1] = np.inf
    counts = (far < reference.reach * (1 + 1e-4)).sum(axis=1)
    assert np.allclose(signals(columns, reference)["hits"], counts / 10)
    order = load_policy("hubness", 0, reference)(columns)
    assert order[counts.argmin()] == order.max()


def test_the_distance_to_the_own_class_needs_a_label_and_else_takes_the_nearest_class() -> None:
    columns, reference = scored(np.arange(90, 96)), known()
    labels = columns.labels.copy()
    labels[4:] = [None, "another"]
    found = load_policy("class_mean", 0, reference)(replace(columns, labels=labels))
    far = np.square(columns.transformed[:, None] - reference.centroids).sum(axis=2)
    assert np.allclose(found[:4], far[np.arange(4), columns.ids[:4] % 3], rtol=1e-4)
    assert np.allclose(found[4:], far[4:].min(axis=1), rtol=1e-4)


def test_traffic_multiplies_the_priority() -> None:
    columns = scored(np.arange(300, 350))
    cost = load_policy("entropy", 0, known())(columns)
    assert np.allclose(load_policy("entropy", 0, known(), traffic=True)(columns), cost * (columns.ids % 7))
    weighed = load_policy("uncertainty", 0, None, traffic=True)(columns)  # a logarithm, so exp comes first
    assert np.allclose(weighed, np.exp(columns.uncertainty) * (columns.ids % 7))
    assert (load_policy("random", 0, None, traffic=True)(columns)[columns.ids % 7 == 0] == 0).all()


def test_a_boost_lifts_the_images_of_the_group_that_suffers_most() -> None:
    columns = scored(np.arange(300, 360))
    cost = load_policy("entropy", 0, known())(columns)
    ratio = load_policy("entropy", 0, known(), group_boost=4.0)(columns) / cost
    expected = {"label 0": 5.0, "label 1": 1.0, "label 2": 3.0}  # the last is of no pair: the mean of the others
    assert np.allclose(ratio, [expected[name] for name in columns.groups], rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "labelled", "classifier", "expected"),
    [
        ("entropy", True, False, {"classifier"}),
        ("neighbour_purity", False, True, {"labels"}),
        ("class_mean", False, True, {"labels"}),
        ("centroid", False, False, set()),
        ("learned", False, False, set()),
    ],
)
def test_policy_without_its_inputs_is_refused(name: str, labelled: bool, classifier: bool, expected: set[str]) -> None:
    assert missing(name, known(labelled, classifier)) == expected
    if expected:
        with pytest.raises(ConfigError, match=f"expected: {expected.pop()}\n  where: plan.policy: {name}"):
            load_policy(name, 0, known(labelled, classifier))
    with pytest.raises(ConfigError, match="expected: policy inputs"):
        load_policy(name, 0, None)


def test_learned_policy_and_group_boost_without_their_inputs_are_refused() -> None:
    bare = replace(known(), model=None, group_names=())
    with pytest.raises(ConfigError, match="expected: learned"):
        load_policy("learned", 0, bare)
    with pytest.raises(ConfigError, match="expected: groups of the pairs"):
        load_policy("entropy", 0, bare, group_boost=1.0)
