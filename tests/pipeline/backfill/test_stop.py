"""--stop-when: what is understood, what is refused before any work, and when it is met."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.backfill.stop import Stop, check, parse
from pipeline.config.load import validate
from pipeline.config.tree import Config
from pipeline.errors import ConfigError


def config(**changes: Any) -> Config:
    tree = {
        "run": "run",
        "encoders": {"new": {"function": "my:encoder", "dim": 4, "preprocess": {"size": 32}}},
        "gallery": {"manifest": "gallery.parquet", "columns": {"image": "image"}},
        "pairs": {"manifest": "pairs.parquet", "columns": {}},
    }
    return validate(tree | changes, "a test")


@pytest.mark.parametrize(
    ("text", "figure", "limit", "of_full"),
    [
        ("top1>=0.99*full", "top1", 0.99, True),
        (" recall10 >= 0.95 * full ", "recall10", 0.95, True),
        ("top1>=48", "top1", 48.0, False),
        ("fraction>=0.3", "fraction", 0.3, False),
        ("hours>=2", "hours", 2.0, False),
        ("money>=150.5", "money", 150.5, False),
    ],
)
def test_parse_of_a_valid_condition_gives_its_parts(text: str, figure: str, limit: float, of_full: bool) -> None:
    found = parse(text)
    assert (found.figure, found.limit, found.of_full) == (figure, limit, of_full)


@pytest.mark.parametrize(
    "text",
    ["", "top1", "top1>48", "top1<=48", "top1>=x", "speed>=3", "hours>=2*full", "fraction>=30", "top1>=1.2*full",
     "top1>=480", "top1>=0", "top1>=48; hours>=2", "__import__('os')>=1"],
)  # fmt: skip
def test_parse_of_an_invalid_condition_is_refused_with_the_allowed_ones(text: str) -> None:
    with pytest.raises(ConfigError, match=r"top1>=0.99\*full") as caught:
        parse(text)
    assert caught.value.exit_code == 2


def check_conditions(texts: list[str], **changes: Any) -> None:
    """Check some conditions against a config."""
    found = config(**changes)
    check([parse(text) for text in texts], found.probe, found.gallery.columns, found.telemetry)


@pytest.mark.parametrize(
    ("text", "changes", "where"),
    [
        ("top1>=48", {}, "gallery.columns.label"),
        ("recall10>=90", {"probe": {"images": 0}}, "probe.images"),
        ("money>=3", {}, "telemetry.node_hour_price"),
    ],
)
def test_check_of_a_condition_that_the_config_can_never_meet_is_refused(
    text: str, changes: dict[str, Any], where: str
) -> None:
    with pytest.raises(ConfigError, match=where):
        check_conditions([text], **changes)


def test_check_of_conditions_that_can_be_met_passes() -> None:
    check_conditions(["top1>=48", "top5>=0.9*full"], probe={"manifest": "sample.parquet"})
    check_conditions(["recall10>=90", "fraction>=0.3", "hours>=1"])
    check_conditions(["money>=3"], telemetry={"gpu_hour_price": 2})


def test_stop_on_the_first_condition_that_is_met_names_its_figures() -> None:
    stop = Stop([parse("top1>=0.99*full"), parse("fraction>=0.3")])
    assert stop.by_quality({"top1": 49.4, "fraction": 0.2}, {"top1": 50.0}) is None
    met = stop.by_quality({"top1": 49.6, "fraction": 0.2}, {"top1": 50.0})
    assert met == "top1>=0.99*full: top1 is 49.6 (0.99 of an expected 50.0 is 49.5)"
    met = stop.by_quality({"top1": 49.6, "fraction": 0.2}, {"top1": 50.0, "top1_error": 1.54})
    assert met is not None
    assert met.endswith("(0.99 of an expected 50.0 with a standard error of 1.5 is 49.5)")
    assert stop.by_quality({"top1": 10.0, "fraction": 0.3}, {"top1": 50.0}) == "fraction>=0.3: fraction is 0.3"


def test_budgets_are_spent_from_the_start_of_the_command() -> None:
    stop = Stop([parse("hours>=2"), parse("money>=150")], started_seconds=1000.0)
    assert stop.by_budget(1000.0 + 7199, money=149.9) is None
    assert stop.by_budget(1000.0 + 7200, money=0.0) == "hours>=2: hours is 2"
    assert stop.by_budget(1000.0, money=151.25) == "money>=150: money is 151.2"


def test_without_conditions_nothing_stops() -> None:
    assert Stop().by_quality({"top1": 100.0, "fraction": 1.0}, {}) is None
    assert Stop().by_budget(1e12, money=1e12) is None
