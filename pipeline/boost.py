"""The `group_boost` that `plan.group_bound` stands for, as it was chosen for a run: which number, and by what figures.

`training.boost` chooses it before the plan; the actors that score the gallery read it. Guarantee: it is written once
per policy and bound, and what is there is used again.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline import documents, storage
from pipeline.config import Config
from pipeline.run import Run, settings_digest


@dataclass(frozen=True, slots=True)
class Boost:
    """What was chosen. A gap is what the worst group lacks of the full new model's mAP more than groups do in the mean.

    Attributes:
        boost: the number.
        fraction: of the gallery that is embedded where gaps are looked at.
        start: the gap with nothing embedded, in points.
        gap: the gap at `fraction` with this boost.
        bound: `plan.group_bound`.
        tried: by boost, the gap at `fraction`.
    """

    boost: float
    fraction: float
    start: float
    gap: float
    bound: float
    tried: dict[str, float]

    @property
    def kept(self) -> bool:
        """Whether the gap is within the bound."""
        return self.gap <= self.bound * self.start

    def __str__(self) -> str:
        kept = "within" if self.kept else "no boost that was tried keeps it within"
        return (
            f"group_boost {self.boost:g}: at {self.fraction:.0%} the worst group is {self.gap:.1f} points of mAP "
            f"behind the others, {self.start:.1f} at the start; {kept} {self.bound:g} of that"
        )


def boost_uri(run: Run, policy: str, bound: float) -> str:
    """Where the choice for this policy and bound is kept."""
    return run.path("plan", f"group-boost-{settings_digest({'policy': policy, 'bound': bound})}.json")


def read_boost(config: Config, run: Run, policy: str) -> Boost | None:
    """What was chosen for this policy, or None where `plan.group_boost` is given or nothing was chosen yet."""
    if config.plan.group_bound is None:
        return None
    where = boost_uri(run, policy, config.plan.group_bound)
    found = storage.read_versioned(where)
    return None if found is None else documents.parse(Boost, found[0], where, documents.REDO)


def resolve_boost(config: Config, run: Run, policy: str) -> float:
    """The `group_boost` that counts: the given one, or the chosen one."""
    found = read_boost(config, run, policy)
    assert found is not None or config.plan.group_bound is None, "chosen before the gallery is scored"
    return config.plan.group_boost if found is None else found.boost
