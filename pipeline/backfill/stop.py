"""When a backfill is to stop although images are left: `--stop-when`, parsed and decided. Pure.

Quality is looked at after each commit, a budget at any time. Who stops keeps everything: the same command without
the condition goes on.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

from pipeline.config.tree import Config
from pipeline.errors import ConfigError

QUALITIES = ("top1", "top5", "recall10")
BUDGETS = ("fraction", "hours", "money")
ALLOWED = (
    "top1>=48, top5>=70 or recall10>=90 (per cent); top1>=0.99*full, and so on, where `full` is what the full new "
    "model is expected to reach; fraction>=0.3 of the gallery; hours>=2 and money>=150 since the command began"
)

Figure = Literal["top1", "top5", "recall10", "fraction", "hours", "money"]

_FORM = re.compile(r"\s*(\w+)\s*>=\s*(\d+(?:\.\d+)?)\s*(?:\*\s*(full)\s*)?")


@dataclass(frozen=True, slots=True)
class Condition:
    """One expression of `--stop-when`.

    Attributes:
        text: as it was given.
        figure: what is looked at.
        limit: reached at this value, or at this share of the full new model's.
        of_full: whether it is such a share.
    """

    text: str
    figure: Figure
    limit: float
    of_full: bool


@dataclass(frozen=True, slots=True)
class Stop:
    """When to stop: any of the conditions suffices.

    Attributes:
        conditions: none of them means at the end.
        started_seconds: when the command began, of `time.monotonic`.
    """

    conditions: Sequence[Condition] = ()
    started_seconds: float = field(default_factory=time.monotonic)

    def by_quality(self, figures: Mapping[str, float], full: Mapping[str, float]) -> str | None:
        """Which condition on quality a snapshot meets, with the figures; None where it meets none.

        Args:
            figures: of the snapshot, in per cent; `fraction` of the gallery, 0 to 1.
            full: of the full new model, in per cent; a figure's standard error as `<figure>_error`.
        """
        for item in self.conditions:
            value, whole = figures.get(item.figure), full.get(item.figure) if item.of_full else 1.0
            if value is None or whole is None or value < item.limit * whole:
                continue
            error = full.get(f"{item.figure}_error")
            known = "" if error is None else f" with a standard error of {error:.1f}"
            of_full = f" ({item.limit:g} of an expected {whole:.1f}{known} is {item.limit * whole:.1f})"
            return f"{item.text}: {item.figure} is {value:.4g}{of_full if item.of_full else ''}"
        return None

    def by_budget(self, now_seconds: float, money: float) -> str | None:
        """Which budget is spent; None where none is."""
        spent = {"hours": (now_seconds - self.started_seconds) / 3600, "money": money}
        for item in self.conditions:
            if item.figure in spent and spent[item.figure] >= item.limit:
                return f"{item.text}: {item.figure} is {spent[item.figure]:.4g}"
        return None


def parse(text: str) -> Condition:
    """An expression as it was given.

    Raises:
        ConfigError: it is none, with what is allowed.
    """
    match = _FORM.fullmatch(text)
    if match is None or match[1] not in (*QUALITIES, *BUDGETS) or (match[3] and match[1] not in QUALITIES):
        raise ConfigError("--stop-when is not understood", expected=ALLOWED, found=text)
    condition = Condition(text.strip(), cast(Figure, match[1]), float(match[2]), match[3] is not None)
    most = {"fraction": 1.0, "top1": 100.0, "top5": 100.0, "recall10": 100.0}.get(condition.figure)
    most = 1.0 if condition.of_full else most
    if condition.limit <= 0 or (most is not None and condition.limit > most):
        raise ConfigError("--stop-when can never be met, or is from the start", expected=ALLOWED, found=text)
    return condition


def check(conditions: Sequence[Condition], config: Config) -> None:
    """Refuse what this config can never meet, before any work.

    Raises:
        ConfigError: there is no probe set, no label or no price for a condition.
    """
    prices = config.telemetry.node_hour_price + config.telemetry.gpu_hour_price
    for item in conditions:
        if item.figure in QUALITIES and not config.probe.images:
            _refuse(item, "there is no probe set to measure it on", "probe.images", "set it above 0")
        labelled = config.gallery.columns.label is not None or config.probe.manifest is not None
        if item.figure in ("top1", "top5") and not labelled:
            where, remedy = "gallery.columns.label, probe.manifest", "take recall10, which needs none"
            _refuse(item, "the gallery has no labels", where, remedy)
        if item.figure == "money" and not prices:
            names = "telemetry.node_hour_price, telemetry.gpu_hour_price"
            _refuse(item, "nothing has a price", names, "give what a node costs per hour, or what a GPU does")


def _refuse(item: Condition, why: str, where: str, remedy: str) -> None:
    raise ConfigError(f"--stop-when {item.text!r} can never be met: {why}", where=where, remedy=remedy)
