"""What a selection found: the table of all candidates, the one that was chosen, and its curve.

Part of the transformation that was fitted by it. `training.select` makes it; the plan takes the policy from it, and
fit and report show it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal, Self

from pipeline import documents
from pipeline.config import LossMode, TransformationKind
from pipeline.config_method import Offset
from pipeline.errors import ConfigError, DataError
from pipeline.run import Run
from pipeline.shift import Likeness
from pipeline.transformation import read_part

PART = "selection.json"
Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One row of the table; figures are means over the folds, in per cent.

    Attributes:
        transformation, loss, lambda_disc, inner_width, epochs, offset, offset_strength: settings of `fit`.
        policy: the order.
        area: by metric, the plain mean of the curve's points.
        area_std: by metric, the sample deviation over the folds.
        start: by metric, with nothing embedded yet.
        fraction95, fraction99: by metric, the fraction from which on the curve stays at so many per cent of its end.
        behind: of the best candidate, in points of the score: the mean of the metrics that count.
        behind_error: the standard error of that, paired by fold.
    """

    loss: LossMode
    lambda_disc: float
    inner_width: int
    epochs: int | None
    offset: Offset
    offset_strength: float
    policy: str
    area: Figures
    area_std: Figures
    start: Figures
    fraction95: Figures
    fraction99: Figures
    behind: float
    behind_error: float
    transformation: TransformationKind = "fastfill"


@dataclass(frozen=True, slots=True)
class Selection:
    """The outcome.

    Attributes:
        metrics: whose mean area counts.
        folds: how often each recipe was fitted.
        num_measured: pairs of a fold, or images of its share of the probe set, that were gallery and queries.
        chosen: the candidate.
        candidates: all that were measured in full, the best score first.
        screened: all that were tried, with a few orders, points and queries, by which finalists were found.
        ends: old/old and new/new over the folds; empty without labels.
        fractions: of the points of `curves`.
        curves: of the chosen one, per metric and fold its value at each point.
        measured_on: `pairs` that were held out, or images of the `probe` set.
        likeness: of these pairs and the probe set; None without one.
    """

    metrics: tuple[str, ...]
    folds: int
    num_measured: int
    chosen: Candidate
    candidates: tuple[Candidate, ...]
    screened: tuple[Candidate, ...]
    ends: dict[str, Figures]
    fractions: tuple[float, ...]
    curves: dict[str, list[list[float]]]
    measured_on: Literal["pairs", "probe"] = "pairs"
    likeness: Likeness | None = None

    def to_json(self) -> str:
        """As one JSON object."""
        return json.dumps(asdict(self), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The inverse of `to_json`.

        Raises:
            DataError: it is not what `to_json` gives.
        """
        where = "the selection"
        return cls.from_tree(documents.decode(text.encode() if isinstance(text, str) else text, where), where)

    @classmethod
    def from_tree(cls, tree: documents.Tree, where: str) -> Self:
        """As `from_json`, of the tree in its file."""
        try:
            return cls._from_tree(dict(tree))
        except (KeyError, TypeError) as error:
            raise DataError("not a selection", found=repr(error), where=where, remedy=documents.REDO) from error

    @classmethod
    def _from_tree(cls, tree: documents.Tree) -> Self:
        tree["chosen"] = Candidate(**tree["chosen"])
        tree.pop("learning", None)  # of version 0.1
        if tree.get("likeness") is not None:
            tree["likeness"] = Likeness(**tree["likeness"])
        tree |= {name: tuple(Candidate(**item) for item in tree.get(name, ())) for name in ("candidates", "screened")}
        return cls(**tree | {name: tuple(tree[name]) for name in ("metrics", "fractions")})


def read_selection(run: Run) -> Selection | None:
    """The selection that the run's transformation was fitted by, or None where its settings were given.

    Raises:
        DataError: there is no transformation, or the file is missing or damaged.
    """
    data = read_part(run, PART)
    return None if data is None else Selection.from_json(data)


def resolve_policy(run: Run, policy: str) -> str:
    """The policy that `plan.policy` means: where that is `selected`, the one that was.

    Raises:
        ConfigError: nothing was selected.
    """
    if policy != "selected":
        return policy
    found = read_selection(run)
    if found is None:
        raise ConfigError(
            "nothing was selected for this run",
            expected="a transformation that was fitted with a `select` section, or with `fastfill fit --select`",
            where="plan.policy: selected",
            remedy="say it in plan.policy, or start a run with a `select` section",
        )
    return found.chosen.policy
