"""Policies: a function of each image alone, the most uncertain first, and a shuffle that stays what it is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.errors import ConfigError, DataError
from pipeline.policy import Scored, load_policy, prioritise
from pipeline.schema import Float32, Int64

POLICIES = ["uncertainty", "random", f"{__name__}:length_of_transformed"]
PINNED_ORDERS = [[0, 2, 1, 3], [2, 1, 3, 0], [1, 3, 2, 0], [0, 2, 1, 3]]


def scored(ids: Int64) -> Scored:
    """Columns that are functions of the id."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(1000, 4)).astype(np.float32)[ids % 1000]
    names = np.array([f"label {number % 3}" for number in ids], object)
    return Scored(ids, table[:, 0], table[:, 1:], table[:, 2:], names, names)


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


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=20, deadline=None)
@given(cut=st.integers(0, 60), seed=st.integers(0, 2**32 - 1))
def test_a_priority_does_not_depend_on_what_else_is_in_the_part(name: str, cut: int, seed: int) -> None:
    ids, policy = np.arange(60) * 7919, load_policy(name, seed)
    whole = prioritise(policy, scored(ids), "here")
    parts = [prioritise(policy, scored(part), "here") for part in (ids[:cut], ids[cut:])]
    assert np.array_equal(np.concatenate(parts), whole)
    assert whole.dtype == np.float32


def test_random_stays_what_it_is_for_a_seed_and_differs_between_seeds() -> None:
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
    with pytest.raises(ConfigError, match=r"the policy failed\n  found: KeyError: 'colour' \(.*test_policy\.py, line "):
        prioritise(load_policy(f"{__name__}:raises", 0), scored(np.arange(5)), "plan.policy: x")
