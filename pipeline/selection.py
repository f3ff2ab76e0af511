"""What a selection found: the table of all candidates, the one that was chosen, and its curve.

Part of the transformation that was fitted by it. `training.select` makes it; the plan takes the policy from it, and
fit and report show it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Literal, Self

import numpy as np

from pipeline import documents
from pipeline.config import Config, LossMode
from pipeline.config_method import Offset, Relearn
from pipeline.errors import ConfigError, DataError
from pipeline.plan import wave_ends
from pipeline.ranking import Float64
from pipeline.run import Run
from pipeline.shift import Likeness
from pipeline.transformation import read_part

PART = "selection.json"
Figures = dict[str, float]
Learnt = Literal["nothing", "order", "transformation"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One row of the table; figures are means over the folds, in per cent.

    Attributes:
        loss, lambda_disc, inner_width, epochs, offset, offset_strength: settings of `fit`.
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
    epochs: int
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


_SURE = 2.0  # standard errors


@dataclass(frozen=True, slots=True)
class Learning:
    """Whether it is worth while to learn on the way (`relearn`), with the chosen candidate.

    Attributes:
        what: what to learn again: `transformation`, `order` or `nothing`.
        starts: after which fractions of the gallery.
        gain: by the same names, points of the score more than with nothing, as the mean over the folds; empty where
            nothing has labels to tell by.
        gain_error: the standard error of that.
    """

    what: Learnt
    starts: tuple[float, ...]
    gain: Figures
    gain_error: Figures

    @classmethod
    def decide(cls, starts: tuple[float, ...], scores: dict[Learnt, list[Float64]]) -> Self:
        """The way that gains most, of those that gain more than two standard errors; else nothing.

        Args:
            starts: see `starts`.
            scores: of each way and fold the area of each query, as the mean over the metrics that count, (Q,) float64.
                The error is of the fits, by the folds, and of the images, by the queries, which folds may share.
        """
        gain, error = dict[str, float](), dict[str, float]()
        for way, folds in scores.items():
            gains = [mine - nothing for mine, nothing in zip(folds, scores["nothing"], strict=True)]
            means = np.array([some.mean() for some in gains])
            images = np.mean([some.var(ddof=1) / len(some) for some in gains])
            gain[way], error[way] = float(means.mean()), float(np.sqrt(means.var(ddof=1) / len(means) + images))
        clear = [way for way in scores if gain[way] > _SURE * error[way]]
        what: Learnt = max(clear, key=lambda way: gain[way], default="nothing")
        return cls(what, starts, gain, error)

    def __str__(self) -> str:
        """One line for people."""
        if not self.gain:
            return "nothing: without labels nobody can tell what it is worth"
        others = [way for way in self.gain if way != "nothing"]
        texts = [f"{way} {self.gain[way]:+.2f} ± {self.gain_error[way]:.2f}" for way in others]
        return f"{self.what} (points of the area: {', '.join(texts)})"


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
        learning: whether to learn on the way; None where that was not asked.
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
    learning: Learning | None = None

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
        kinds = {"likeness": Likeness, "learning": Learning}
        tree |= {name: kind(**tree[name]) for name, kind in kinds.items() if tree.get(name) is not None}
        if tree.get("learning") is not None:
            tree["learning"] = replace(tree["learning"], starts=tuple(tree["learning"].starts))
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
    return policy if policy != "selected" else _selected(run, "plan.policy").chosen.policy


def resolve_relearn(run: Run, config: Config) -> Relearn:
    """What `relearn` means: with `what: selected`, what was found to be worth while, or to learn after no wave.

    Raises:
        ConfigError: nothing was selected, or not with these waves.
    """
    relearn = config.relearn
    if relearn.what != "selected" or not relearn.after_waves:
        return relearn
    found, starts = _selected(run, "relearn.what").learning, learning_starts(config)
    if found is None or found.starts != starts:
        raise ConfigError(
            "the selection was not asked whether to learn after these waves",
            expected="relearn.what, relearn.after_waves and plan.waves as they were when the transformation was fitted",
            found="not asked" if found is None else f"asked for {_shares(found.starts)}, and now {_shares(starts)}",
            where="relearn.what: selected",
            remedy="say what to learn in relearn.what, or start a run with these settings",
        )
    update = {"after_waves": ()} if found.what == "nothing" else {"what": found.what}
    return relearn.model_copy(update=update)


def learning_starts(config: Config) -> tuple[float, ...]:
    """The fractions of the gallery that `relearn.after_waves` stand for."""
    ends = wave_ends(config.plan.waves)
    return tuple(float(ends[wave - 1]) for wave in config.relearn.after_waves)


def _shares(fractions: tuple[float, ...]) -> str:
    return "after " + ", ".join(f"{fraction:.1%}" for fraction in fractions)


def _selected(run: Run, where: str) -> Selection:
    found = read_selection(run)
    if found is None:
        raise ConfigError(
            "nothing was selected for this run",
            expected="a transformation that was fitted with a `select` section, or with `fastfill fit --select`",
            where=f"{where}: selected",
            remedy=f"say it in {where}, or start a run with a `select` section",
        )
    return found
