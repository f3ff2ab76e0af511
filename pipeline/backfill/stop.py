"""The conditions of `--stop-when`: parsed, checked and decided. Pure.

Quality is compared after each commit, a budget after each unit. Finished work is kept: the same command without the
condition goes on.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

from pipeline.config.method import ProbeSettings
from pipeline.config.tree import ColumnNames, TelemetrySettings
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
    """One expression of `--stop-when`."""

    text: str  # as it was given
    figure: Figure  # the figure that is compared
    limit: float  # a value, or a share of the full new model's
    of_full: bool  # whether it is such a share


@dataclass(frozen=True, slots=True)
class Stop:
    """The conditions of a command: the first one met stops the run."""

    conditions: Sequence[Condition] = ()  # may be empty
    started_seconds: float = field(default_factory=time.monotonic)  # when the command began, by `time.monotonic`

    def by_quality(self, figures: Mapping[str, float], full: Mapping[str, float]) -> str | None:
        """The condition that a snapshot meets, with its figures; None if it meets none.

        Args:
            figures: of the snapshot, in per cent; `fraction` of the gallery, 0 to 1.
            full: of the full new model, in per cent, with standard errors as `<figure>_error`.
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
        """The budget that is spent, with its figure; None if none is."""
        spent = {"hours": (now_seconds - self.started_seconds) / 3600, "money": money}
        for item in self.conditions:
            if item.figure in spent and spent[item.figure] >= item.limit:
                return f"{item.text}: {item.figure} is {spent[item.figure]:.4g}"
        return None


def parse(text: str) -> Condition:
    """Parse an expression.

    Raises:
        ConfigError: it has another form than those allowed.
    """
    match = _FORM.fullmatch(text)
    if match is None or match[1] not in (*QUALITIES, *BUDGETS) or (match[3] and match[1] not in QUALITIES):
        raise ConfigError("--stop-when cannot be read", expected=ALLOWED, found=text)
    condition = Condition(text.strip(), cast(Figure, match[1]), float(match[2]), match[3] is not None)
    most = {"fraction": 1.0, "top1": 100.0, "top5": 100.0, "recall10": 100.0}.get(condition.figure)
    most = 1.0 if condition.of_full else most
    if condition.limit <= 0:
        raise ConfigError("--stop-when is met from the start: the limit must be above 0", expected=ALLOWED, found=text)
    if most is not None and condition.limit > most:
        summary = f"--stop-when can never be met: the limit must be at most {most:g}"
        raise ConfigError(summary, expected=ALLOWED, found=text)
    return condition


def check(
    conditions: Sequence[Condition], probe: ProbeSettings, columns: ColumnNames, telemetry: TelemetrySettings
) -> None:
    """Refuse conditions that this config can never meet, before any work.

    Args:
        conditions: of the command.
        probe: the section `probe`.
        columns: of the gallery.
        telemetry: with its prices.

    Raises:
        ConfigError: there is no probe set, no label or no price for a condition.
    """
    prices = telemetry.node_hour_price + telemetry.gpu_hour_price
    for item in conditions:
        if item.figure in QUALITIES and not probe.images:
            _refuse(item, "there is no probe set to measure quality on", "probe.images", "set it above 0")
        labelled = columns.label is not None or probe.manifest is not None
        if item.figure in ("top1", "top5") and not labelled:
            where, remedy = "gallery.columns.label, probe.manifest", "use recall10, which needs no labels"
            _refuse(item, "the gallery has no labels", where, remedy)
        if item.figure == "money" and not prices:
            names = "telemetry.node_hour_price, telemetry.gpu_hour_price"
            _refuse(item, "no price is configured", names, "give the price of a node or of a GPU per hour")


def _refuse(item: Condition, why: str, where: str, remedy: str) -> None:
    raise ConfigError(f"--stop-when {item.text!r} can never be met: {why}", where=where, remedy=remedy)
