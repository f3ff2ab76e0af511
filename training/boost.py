"""Choose the `group_boost` that keeps the worst group within `plan.group_bound`, by simulation on held-out pairs.

    held-out pairs as served, their groups -> an order per boost -> what each group lacks on the way -> the least boost

What a group lacks is the average precision that its queries gain from here to the full new model, and the gap is what
the worst one lacks more than groups do in the mean. So it is no gap that a group is hard for any encoder, and neither
what all lack. The same lack at the start is the need that the boost goes by (`knowledge.group_needs`).
Guarantee: a function of the pairs, the policy, the bound and the seed; no pair has trained the model that ranks it. A
column of traffic is not looked at: pairs have none.
"""

from __future__ import annotations

import numpy as np

from pipeline import documents, storage
from pipeline.boost import Boost, boost_uri, read_boost
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.evaluate import simulate_curve
from pipeline.ranking import Float64
from pipeline.run import Run
from pipeline.selection import resolve_policy
from training.held_out import HeldOut, held_out, priorities
from training.losses import NO_LABEL
from training.simulate import order_by

BOOSTS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
EMBEDDED = 0.2
_POINTS = 6  # of the curve, of which the second is at EMBEDDED
_LEAST_QUERIES = 10  # as `quality.MIN_QUERIES`, of a group that is looked at


def ensure_boost(config: Config, run: Run) -> Boost | None:
    """The choice for this run, made where it is missing; None without `plan.group_bound`.

    Raises:
        ConfigError: the transformation was fitted without groups of the pairs, or these have too few pairs.
    """
    bound, policy = config.plan.group_bound, resolve_policy(run, config.plan.policy)
    if bound is None:
        return None
    done = read_boost(config, run, policy)
    if done is not None:
        return done
    chosen = choose_boost(config, held_out(config, run), policy, bound)
    storage.put_once(boost_uri(run, policy, bound), documents.encode(chosen))
    return read_boost(config, run, policy)  # another driver's, where that was faster


def choose_boost(config: Config, pairs: HeldOut, policy: str, bound: float) -> Boost:
    """The least of BOOSTS with which the worst group is within the bound; the one with the least gap where none is.

    Args:
        config: `gallery` and `seed` count.
        pairs: with labels, and groups.
        policy: by its name.
        bound: the share of the worst group's gap at the start that may be left at EMBEDDED.

    Raises:
        ConfigError: the policy's reference has no groups, or they have too few pairs.
    """
    boosts = (*BOOSTS[1:], *BOOSTS[:1])  # one that asks for groups first
    found = priorities(config, pairs, policy, boosts)
    orders = {f"{boost:g}": [order_by(some, config.seed)] for boost, some in zip(boosts, found, strict=True)}
    labels, new, ids = pairs.fold.pairs.labels, pairs.fold.pairs.new, np.arange(len(pairs.served))
    assert labels is not None, "groups have needs only where pairs have labels"
    queries = np.flatnonzero(labels != NO_LABEL)
    simulation = simulate_curve(
        pairs.served,
        new,
        new[queries],
        labels[queries],
        labels,
        orders,
        points=_POINTS,
        metric=config.gallery.metric,
        query_ids=queries,
        gallery_ids=ids,
        per_query=True,
    )
    assert simulation.queries is not None
    gaps = {name: _gap(precision[0], pairs.groups[queries]) for name, (_, precision) in simulation.queries.items()}
    tried = {f"{boost:g}": float(gaps[f"{boost:g}"][1]) for boost in BOOSTS}
    start = float(gaps["0"][0])
    within = [boost for boost in BOOSTS if tried[f"{boost:g}"] <= bound * start]
    best = within[0] if within else min(BOOSTS, key=lambda boost: (tried[f"{boost:g}"], boost))
    return Boost(best, EMBEDDED, start, tried[f"{best:g}"], bound, tried)


def _gap(precision: Float64, groups: np.typing.NDArray[np.object_]) -> Float64:
    """The worst group's gap at each point, (P,) in points of mAP, from the precisions of queries (P, Q)."""
    measured = np.isfinite(precision[0])
    gain, mine = 100 * (precision[-1] - precision)[:, measured], groups[measured]
    names = [name for name in {*mine.tolist()} - {None} if (mine == name).sum() >= _LEAST_QUERIES]
    if len(names) < 2:
        raise ConfigError(
            "too few held-out pairs to choose a boost by",
            expected=f"two groups with {_LEAST_QUERIES} pairs each that another one's label matches",
            found=f"{len(names)} such groups among {len(mine)} pairs",
            where="plan.group_bound",
            remedy="raise pairs.held_out_fraction, or give plan.group_boost",
        )
    lack = np.stack([gain[:, mine == name].mean(axis=1) for name in names])
    found: Float64 = lack.max(axis=0) - lack.mean(axis=0)
    return found
