"""Policies: which images are re-embedded first. Pure functions from the scored columns to a priority.

An image with a higher priority comes earlier; ties are broken by the plan. A policy sees one part of
the gallery at a time, so a priority must not depend on what else is in the part (but for float32 round-off).
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
    """A policy of ours.

    Attributes:
        function: its priorities, (N,) float32, of scored images and the reference; None for those that need none.
        needs: of classifier, labels (of the pairs), gallery_labels, learned: what has to be there.
        simplicity: the smaller the simpler; of equally good ones the simpler is taken.
        logarithmic: whether a priority is the logarithm of what leaving the image as it is costs.
    """

    function: Own | None
    needs: frozenset[str]
    simplicity: int
    logarithmic: bool = False


def load_policy(
    name: str, seed: int, reference: PolicyInputs | None = None, traffic: bool = False, group_boost: float = 0.0
) -> Policy:
    """A policy by its name in the config: one of POLICIES, or the user's own `module:function`.

    With `traffic` or `group_boost` a priority is a cost that is multiplied: by the image's traffic weight, and by
    1 + group_boost * need, where the need of the image's group is 1 for the one that suffers most on held-out pairs,
    0 for the one that suffers least, and their mean for a group that the pairs do not have. A policy that gives the
    logarithm of a cost (`uncertainty`) is raised first. So both depend on the image alone.

    Args:
        name: of the policy.
        seed: of `random`.
        reference: what is known of pairs; `uncertainty`, `random` and the user's own do without.
        traffic: whether to weigh by `Scored.traffic`.
        group_boost: how much more the group counts that suffers most; not negative.

    Raises:
        ConfigError: the function cannot be imported, or the policy needs what the reference does not have.
    """
    known = POLICIES.get(name)
    if known is None:
        policy: Policy = user_functions.load_function(name, "the policy", f"plan.policy: {name}")
    elif name == "random":
        policy = partial(random, seed=seed)
    elif known.function is None:
        policy = uncertainty
    else:
        policy = _with(known.function, _checked(name, reference))
    if not traffic and not group_boost:
        return policy
    if group_boost and (reference is None or not reference.group_names):
        raise _wanting("groups of the pairs", "plan.group_boost", "name pairs.columns.group and gallery.columns.group")
    logarithmic = known is not None and known.logarithmic
    return partial(_weighted, policy, logarithmic, reference if group_boost else None, traffic, group_boost)


def missing(name: str, reference: PolicyInputs | None) -> set[str]:
    """What a policy of ours needs and the reference does not have: names as in `Named.needs`, or `reference`.

    Labels of the gallery are not the reference's matter.
    """
    known = POLICIES[name]
    if known.function is None:
        return set()
    if reference is None:
        return {"reference"}
    there = {
        "classifier": reference.classifier_weight is not None,
        "labels": reference.centroid_labels is not None,
        "gallery_labels": True,
        "learned": reference.model is not None,
    }
    return {item for item in known.needs if not there[item]}


def prioritise(policy: Policy, scored: Scored, where: str) -> Float32:
    """The priorities of a part, (N,) float32, checked; where it has no images the policy is not asked.

    Raises:
        ConfigError: the policy raised something.
        DataError: the policy gave another shape, or a NaN.
    """
    if not len(scored.ids):
        return np.zeros(0, np.float32)
    with user_functions.own_code("the policy failed", where):
        priority = np.asarray(policy(scored), dtype=np.float32)
    if priority.shape != scored.ids.shape or np.isnan(priority).any():
        raise DataError(
            "the policy gave unusable priorities",
            expected=f"{len(scored.ids)} numbers, none of them NaN",
            found=f"shape {priority.shape}, {int(np.isnan(priority).sum())} NaN",
            where=where,
        )
    return priority


def uncertainty(scored: Scored) -> Float32:
    """Most uncertain first: FastFill's order (arXiv 2303.04766, section 3.3)."""
    return scored.uncertainty


def random(scored: Scored, seed: int) -> Float32:
    """A shuffle by a stable hash of the id, as a fraction of 1."""
    return (splitmix64(scored.ids, seed) >> np.uint64(40)).astype(np.float32) / np.float32(2**24)


def class_mean(scored: Scored, reference: PolicyInputs) -> Float32:
    """Farthest from the mean embedding of its own class first (lambda-Orthogonality, arXiv 2509.16664).

    An image without a label, or of a class that no held-out pair has, is measured from the nearest mean.
    """
    assert reference.centroid_labels is not None, "checked where the policy is loaded"
    names = reference.label_names
    places = {
        str(code) if names is None else names[code]: row for row, code in enumerate(reference.centroid_labels.tolist())
    }
    rows = np.array([places.get(label, -1) for label in scored.labels.tolist()], np.int64)
    nearest = signals(scored, reference, ["centroid"])["centroid"]
    own = np.square(scored.transformed - reference.centroids[rows]).sum(axis=1)
    return np.where(rows >= 0, own, nearest).astype(np.float32)


def learned(scored: Scored, reference: PolicyInputs) -> Float32:
    """The predicted cost of leaving an image transformed, from all signals: two layers, a mean over some networks."""
    model, mean, scale = reference.model, reference.mean, reference.scale
    assert model is not None, "checked where the policy is loaded"
    assert mean is not None, "comes with the model"
    assert scale is not None, "the same"
    known = signals(scored, reference)
    return predict(model, (np.stack([known[name] for name in reference.signals], axis=1) - mean) / scale)


def predict(model: dict[str, Float32], columns: Float32) -> Float32:
    """What the learned policy's networks give, (N,) float32, of standardised signals (N, S).

    Args:
        model: of E networks: `weight` (E, S, H), `bias` (E, H), `out` (E, H), `shift` (1,).
        columns: float32.
    """
    total = np.zeros(len(columns), np.float32)
    for weight, bias, out in zip(model["weight"], model["bias"], model["out"], strict=True):
        total += np.maximum(columns @ weight + bias, 0) @ out
    result: Float32 = (total / len(model["weight"]) + model["shift"]).astype(np.float32)
    return result


def _signal(name: str) -> Own:
    def policy(scored: Scored, reference: PolicyInputs) -> Float32:
        return signals(scored, reference, [name])[name]

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
"""All policies of ours by name. `norm` is the shortest vector first, `hubness` the one that is retrieved least."""


def _with(function: Own, reference: PolicyInputs) -> Policy:
    return lambda scored: function(scored, reference)


def _checked(name: str, reference: PolicyInputs | None) -> PolicyInputs:
    wanting = missing(name, reference)
    if wanting or reference is None:
        remedy = _REMEDIES[sorted(wanting)[0]]
        raise _wanting(", ".join(sorted(wanting)), f"plan.policy: {name}", remedy)
    return reference


_REMEDIES = {
    "classifier": "name a classifier in fit.classifier, or labels of the pairs and a loss or an offset that fits one",
    "labels": "name pairs.columns.label",
    "learned": "fit the transformation again, or take another policy",
    "reference": "fit the transformation again, or take uncertainty or random",
}


def _wanting(what: str, where: str, remedy: str) -> ConfigError:
    return ConfigError(
        "the policy needs what the transformation was not fitted with", expected=what, where=where, remedy=remedy
    )


def _weighted(
    policy: Policy, logarithmic: bool, reference: PolicyInputs | None, traffic: bool, boost: float, scored: Scored
) -> Float32:
    """The priority as a cost, times the image's traffic and its group's need."""
    cost = np.asarray(policy(scored), np.float32)
    if logarithmic:
        cost = np.exp(np.clip(cost, -_MOST_EXPONENT, _MOST_EXPONENT))
    if traffic:
        assert scored.traffic is not None, "the config names the column"
        cost = cost * scored.traffic
    if reference is not None and reference.group_need is not None:
        needs = dict(zip(reference.group_names, reference.group_need.tolist(), strict=True))
        other = float(reference.group_need.mean())
        need = np.array([needs.get(group, other) for group in scored.groups.tolist()], np.float32)
        cost = cost * (1 + np.float32(boost) * need)
    return cost
