"""The staleness cost: exactly the change of rankings if one image moves; and the model that predicts it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.arrays import Float32, Int64
from pipeline.evaluation.metrics import EvaluateOptions, evaluate
from pipeline.evaluation.simulated_curve import (
    CurveInputs,
    CurveOptions,
    order_by_priority,
    random_order,
    simulate_curve,
)
from pipeline.planning.policies import load_policy
from pipeline.planning.policy_inputs import HeldOutPairs, PolicyInputs, build_policy_inputs
from pipeline.planning.signals import Scored
from training.simulation.staleness_cost import _Ranking, _Side, fit_learned, staleness_cost


def worth(relevant: Float32, others: Float32) -> tuple[float, float]:
    """Average precision and reciprocal rank of one ranking, counted out; ties are pessimistic."""
    before = (others <= np.sort(relevant)[:, None]).sum(axis=1)
    place = np.arange(1, len(relevant) + 1)
    return float((place / (place + before)).mean()), float(1 / (1 + before[0]))


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num=st.tuples(st.integers(1, 6), st.integers(1, 12)), values=st.integers(2, 20))
def test_ranking_gain_of_an_image_equals_ranking_twice(seed: int, num: tuple[int, int], values: int) -> None:
    rng = np.random.default_rng(seed)
    draws = [[rng.integers(0, values, count).astype(np.float32) for _ in range(2)] for count in num]
    sides = [_Side(*both, rng.random(count) < 0.5) for both, count in zip(draws, num, strict=True)]
    ranking = _Ranking(*sides)
    for kind, function in enumerate((ranking.of_relevant, ranking.of_other)):
        found = function(sides[kind].embedded) - function(sides[kind].transformed)
        for row in range(num[kind]):
            expected = []
            for key in (sides[kind].embedded[row], sides[kind].transformed[row]):
                moved = [side.current.copy() for side in sides]
                moved[kind][row] = key
                expected.append(worth(*moved))
            assert np.allclose(found[:, row], np.subtract(*expected))


def gallery(num: int = 240, seed: int = 0) -> tuple[Float32, Float32, Float32, Int64, Float32]:
    """old, z, new, labels, and how far z is off: the first coordinate of the old embedding says it."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num) % 8
    new = (rng.normal(size=(8, 6))[labels] + 0.4 * rng.normal(size=(num, 6))).astype(np.float32)
    off = rng.uniform(0, 2, num).astype(np.float32)
    z = (new + off[:, None] * rng.normal(size=new.shape)).astype(np.float32)
    old = np.concatenate([off[:, None], rng.normal(size=(num, 3)) / 10], axis=1).astype(np.float32)
    return old, z, new, labels, off


def test_staleness_cost_of_an_exactly_transformed_image_is_zero() -> None:
    _, z, new, labels, _ = gallery()
    z[::2] = new[::2]
    cost = staleness_cost(z, new, labels, "l2", 0)
    assert (cost[::2] == 0).all()
    assert cost[1::2].mean() > 0


def test_staleness_cost_is_the_loss_in_reciprocal_rank_and_average_precision() -> None:
    """One image is off, in a gallery that is right otherwise: the costs are those of evaluating twice."""
    _, z, new, labels, _ = gallery(60)
    served = new.copy()
    served[7] = z[7] + 1
    found = [evaluate(new, side, labels, labels, EvaluateOptions(self_match=True)) for side in (new, served)]
    precision = np.nansum(found[0].average_precision - found[1].average_precision)
    reciprocal = (1 / found[0].first_rank - 1 / found[1].first_rank).sum()
    cost = staleness_cost(served, new, labels, "l2", 0)
    one_of_many = np.zeros(60)
    one_of_many[7] = 1
    assert cost[7] == pytest.approx((np.sign(precision) + np.sign(reciprocal)) / one_of_many.std(), rel=1e-5)
    assert (np.delete(cost, 7) == 0).all()


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("labelled", [True, False])
def test_staleness_cost_grows_with_the_error(metric: str, labelled: bool) -> None:
    _, z, new, labels, off = gallery()
    if metric == "cosine":
        z, new = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (z, new))
    cost = staleness_cost(z, new, labels if labelled else None, metric, 0)
    assert np.isfinite(cost).all()
    assert cost.dtype == np.float32
    if metric != "ip":
        assert np.corrcoef(cost, off)[0, 1] > 0.2


def test_staleness_cost_of_unlabelled_images_uses_them_as_wrong_answers_only() -> None:
    _, z, new, labels, _ = gallery(80)
    labels[:70] = -1
    cost = staleness_cost(z, new, labels, "l2", 0)
    assert np.isfinite(cost).all()
    assert (cost != 0).any()
    assert (staleness_cost(z, new, np.arange(80), "l2", 0) == 0).all()  # no query has a match


def learn(seed: int = 0) -> tuple[PolicyInputs, Scored]:
    old, z, new, labels, off = gallery()
    none = np.full(len(z), None, object)
    scored = Scored(np.arange(len(z)), off[::-1].copy(), z, old, none, none)
    known = build_policy_inputs(HeldOutPairs(old, z, scored.uncertainty, new, labels), None, "l2", seed)
    return fit_learned(scored, known, staleness_cost(z, new, labels, "l2", seed), seed), scored


def test_fit_learned_is_deterministic_and_survives_storage() -> None:
    one, other = learn(), learn()
    assert one[0].to_bytes() == other[0].to_bytes() != learn(1)[0].to_bytes()
    stored = PolicyInputs.from_bytes(one[0].to_bytes())
    found = [load_policy("learned", 0, known)(one[1]) for known in (one[0], stored)]
    assert np.array_equal(*found)
    assert np.isfinite(found[0]).all()


def test_a_learned_order_is_better_than_chance_on_images_it_has_not_seen() -> None:
    known, _ = learn()
    old, z, new, labels, off = gallery(seed=5)
    none, ids = np.full(len(z), None, object), np.arange(len(z))
    priority = load_policy("learned", 0, known)(Scored(ids, off[::-1].copy(), z, old, none, none))
    orders = {
        "learned": [order_by_priority(priority, ids, 0)],
        "random": [random_order(ids, seed) for seed in range(5)],
    }
    found = simulate_curve(
        CurveInputs(z, new, new, labels, labels), orders, CurveOptions(points=12, self_match=True)
    ).orders
    assert found["learned"].area[[0, 2]].sum() > found["random"].area[[0, 2]].sum()
