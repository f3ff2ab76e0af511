"""Policies: pure functions from scored columns to a priority; a higher priority is re-embedded earlier.

A policy sees one part of the gallery at a time, so a priority must not depend on other images of the part (except for
float32 rounding). The plan breaks ties.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from pipeline.arrays import Float32
from pipeline.config import user_functions
from pipeline.errors import ConfigError, DataError
from pipeline.hashing import splitmix64
from pipeline.planning.policy_inputs import PolicyInputs
from pipeline.planning.signals import Scored, signals

Policy = Callable[[Scored], Float32]
Own = Callable[[Scored, PolicyInputs], Float32]

_MOST_EXPONENT = np.float32(80.0)  # exp of it is a float32


@dataclass(frozen=True, slots=True)
class Named:
    """A built-in policy."""

    function: Own | None  # its priorities, (N,) float32, of scored images and policy inputs; None if it needs no inputs
    needs: frozenset[str]  # of classifier, labels (of the pairs), gallery_labels, learned
    simplicity: int  # smaller is simpler; among equally good policies the simplest is taken
    logarithmic: bool = False  # the priority is the logarithm of a cost


def load_policy(
    name: str, seed: int, inputs: PolicyInputs | None = None, traffic: bool = False, group_boost: float = 0.0
) -> Policy:
    """A policy by its name in the config: one of POLICIES, or the user's `module:function`.

    With `traffic` or `group_boost` the priority is a cost times the image's traffic weight, times 1 + group_boost *
    need. The need of a group is 1 if its held-out pairs suffer most, 0 if they suffer least; the mean for a group that
    the pairs lack. A logarithmic priority (`uncertainty`) is exponentiated first. Both factors depend on the image
    alone.

    Raises:
        ConfigError: the function cannot be imported, or the policy needs an input that is missing.
    """
    known = POLICIES.get(name)
    if known is None:
        policy: Policy = user_functions.load_function(name, "the policy", f"plan.policy: {name}")
    elif name == "random":
        policy = partial(random, seed=seed)
    elif known.function is None:
        policy = uncertainty
    else:
        policy = _with(known.function, _checked(name, inputs))
    if not traffic and not group_boost:
        return policy
    if group_boost and (inputs is None or not inputs.group_names):
        raise _wanting("groups of the pairs", "plan.group_boost", "name pairs.columns.group and gallery.columns.group")
    logarithmic = known is not None and known.logarithmic
    return partial(_weighted, policy, logarithmic, inputs if group_boost else None, traffic, group_boost)


def missing(name: str, inputs: PolicyInputs | None) -> set[str]:
    """The inputs that a built-in policy needs and lacks, as in `Named.needs`; labels of the gallery are not checked."""
    known = POLICIES[name]
    if known.function is None:
        return set()
    if inputs is None:
        return {"policy inputs"}
    there = {
        "classifier": inputs.classifier_weight is not None,
        "labels": inputs.centroid_labels is not None,
        "gallery_labels": True,
        "learned": inputs.model is not None,
    }
    return {item for item in known.needs if not there[item]}


def prioritise(policy: Policy, scored: Scored, where: str) -> Float32:
    """The priorities of a part, (N,) float32, checked; an empty part is not passed to the policy.

    Raises:
        ConfigError: the policy raised an exception.
        DataError: the policy gave another shape, or a NaN.
    """
    if not len(scored.ids):
        return np.zeros(0, np.float32)
    with user_functions.own_code("the policy failed", where):
        priority = np.asarray(policy(scored), dtype=np.float32)
    if priority.shape != scored.ids.shape or np.isnan(priority).any():
        raise DataError(
            "the policy gave priorities that cannot be used",
            expected=f"{len(scored.ids)} numbers, none of them NaN",
            found=f"shape {priority.shape}, {int(np.isnan(priority).sum())} NaN",
            where=where,
        )
    return priority


def uncertainty(scored: Scored) -> Float32:
    """Most uncertain first: FastFill's order (arXiv 2303.04766, section 3.3)."""
    return scored.uncertainty


def random(scored: Scored, seed: int) -> Float32:
    """A shuffle by a stable hash of the id, in [0, 1)."""
    return (splitmix64(scored.ids, seed) >> np.uint64(40)).astype(np.float32) / np.float32(2**24)


def class_mean(scored: Scored, inputs: PolicyInputs) -> Float32:
    """Farthest from its own class's mean embedding first (lambda-Orthogonality, arXiv 2509.16664).

    Without a label, or for a class that no held-out pair has, the nearest mean counts.
    """
    assert inputs.centroid_labels is not None, "checked where the policy is loaded"
    names = inputs.label_names
    places = {
        str(code) if names is None else names[code]: row for row, code in enumerate(inputs.centroid_labels.tolist())
    }
    rows = np.array([places.get(label, -1) for label in scored.labels.tolist()], np.int64)
    nearest = signals(scored, inputs, ["centroid"])["centroid"]
    own = np.square(scored.transformed - inputs.centroids[rows]).sum(axis=1)
    return np.where(rows >= 0, own, nearest).astype(np.float32)


def learned(scored: Scored, inputs: PolicyInputs) -> Float32:
    """The predicted cost of leaving an image transformed, from all signals: a mean over two-layer networks."""
    model, mean, scale = inputs.model, inputs.mean, inputs.scale
    assert model is not None, "checked where the policy is loaded"
    assert mean is not None, "comes with the model"
    assert scale is not None, "the same"
    known = signals(scored, inputs)
    return predict(model, (np.stack([known[name] for name in inputs.signals], axis=1) - mean) / scale)


def predict(model: dict[str, Float32], columns: Float32) -> Float32:
    """The output of the learned policy's E networks, (N,) float32, for standardised signals (N, S) float32.

    `model` has `weight` (E, S, H), `bias` (E, H), `out` (E, H) and `shift` (1,).
    """
    total = np.zeros(len(columns), np.float32)
    for weight, bias, out in zip(model["weight"], model["bias"], model["out"], strict=True):
        total += np.maximum(columns @ weight + bias, 0) @ out
    result: Float32 = (total / len(model["weight"]) + model["shift"]).astype(np.float32)
    return result


def _signal(name: str) -> Own:
    def policy(scored: Scored, inputs: PolicyInputs) -> Float32:
        return signals(scored, inputs, [name])[name]

    return policy


_CLASSIFIER, _LABELS = frozenset({"classifier"}), frozenset({"labels"})
_NOTHING: frozenset[str] = frozenset()

POLICIES: dict[str, Named] = {
    "random": Named(None, _NOTHING, 0),
    "uncertainty": Named(None, _NOTHING, 1, logarithmic=True),
    "norm": Named(_signal("norm"), _NOTHING, 2),
    "entropy": Named(_signal("entropy"), _CLASSIFIER, 3),
    "least_confidence": Named(_signal("least_confidence"), _CLASSIFIER, 4),
    "margin": Named(_signal("margin"), _CLASSIFIER, 5),
    "centroid": Named(_signal("centroid"), _NOTHING, 6),
    "class_mean": Named(class_mean, frozenset({"labels", "gallery_labels"}), 7),
    "neighbour_distance": Named(_signal("neighbour_distance"), _NOTHING, 8),
    "neighbour_residual": Named(_signal("neighbour_residual"), _NOTHING, 9),
    "neighbour_purity": Named(_signal("neighbour_purity"), _LABELS, 10),
    "hubness": Named(_signal("hubness"), _NOTHING, 11),
    "learned": Named(learned, frozenset({"learned"}), 12),
}
"""The built-in policies by name. `norm` takes the shortest vector first, `hubness` the least retrieved one."""


def _with(function: Own, inputs: PolicyInputs) -> Policy:
    return lambda scored: function(scored, inputs)


def _checked(name: str, inputs: PolicyInputs | None) -> PolicyInputs:
    wanting = missing(name, inputs)
    if wanting or inputs is None:
        remedy = _REMEDIES[sorted(wanting)[0]]
        raise _wanting(", ".join(sorted(wanting)), f"plan.policy: {name}", remedy)
    return inputs


_REMEDIES = {
    "classifier": "name a classifier in fit.classifier, or labels of the pairs and a loss or an offset that fits one",
    "labels": "name pairs.columns.label",
    "learned": "fit the transformation again, or use another policy",
    "policy inputs": "fit the transformation again, or use uncertainty or random",
}


def _wanting(what: str, where: str, remedy: str) -> ConfigError:
    return ConfigError(
        "the policy needs an input that this transformation lacks", expected=what, where=where, remedy=remedy
    )


def _weighted(
    policy: Policy, logarithmic: bool, inputs: PolicyInputs | None, traffic: bool, boost: float, scored: Scored
) -> Float32:
    """The priority as a cost, times the image's traffic and its group's need."""
    cost = np.asarray(policy(scored), np.float32)
    if logarithmic:
        cost = np.exp(np.clip(cost, -_MOST_EXPONENT, _MOST_EXPONENT))
    if traffic:
        assert scored.traffic is not None, "the config names the column"
        cost = cost * scored.traffic
    if inputs is not None and inputs.group_need is not None:
        needs = dict(zip(inputs.group_names, inputs.group_need.tolist(), strict=True))
        other = float(inputs.group_need.mean())
        need = np.array([needs.get(group, other) for group in scored.groups.tolist()], np.float32)
        cost = cost * (1 + np.float32(boost) * need)
    return cost
