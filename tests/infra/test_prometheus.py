"""Prometheus's files are valid, its alerts fire when they should, and name metrics that there are."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from tests.infra.metrics import DASHBOARDS, metrics_of, ours_and_rays, queries_of
from tests.support.prometheus import CONFIGS, Prometheus, promtool

OPERATIONS = (Path(__file__).resolve().parents[2] / "docs" / "operations.md").read_text()


def rules(name: str) -> list[dict[str, object]]:
    (group,) = yaml.safe_load((CONFIGS / name).read_text())["groups"]
    found: list[dict[str, object]] = group["rules"]
    return found


def test_the_configuration_and_the_rules_are_valid() -> None:
    said = promtool("check", "config", "prometheus.yml")
    assert said.count("SUCCESS") == 4  # the configuration twice, and two files of rules


def test_rules_and_alerts_do_what_their_unit_tests_say() -> None:
    assert "SUCCESS" in promtool("test", "rules", "rules_test.yml")


def test_every_alert_and_rule_has_a_unit_test() -> None:
    text = (CONFIGS / "rules_test.yml").read_text()
    alerts = {str(rule["alert"]) for rule in rules("alerts.yml")}
    fired = {
        case["alertname"]
        for test in yaml.safe_load(text)["tests"]
        for case in test["alert_rule_test"]
        if case["exp_alerts"]
    }
    assert fired == alerts


def test_every_expression_names_existing_metrics() -> None:
    records = {str(rule["record"]) for rule in rules("rules.yml")}
    known = ours_and_rays() | records | {"up"}
    for rule in [*rules("rules.yml"), *rules("alerts.yml")]:
        names = metrics_of(str(rule["expr"]))
        assert names
        assert names <= known, rule


def test_a_real_server_takes_every_query_and_every_alert(tmp_path: Path) -> None:
    queries = [query for name in DASHBOARDS for _, query in queries_of(name)]
    queries += [str(rule["expr"]) for rule in rules("alerts.yml")]
    with Prometheus(CONFIGS / "prometheus.yml", tmp_path) as server:
        for query in queries:
            server.query(query)  # refused with its words where it is wrong
        loaded = {rule["name"] for group in server.ask("rules")["groups"] for rule in group["rules"]}
    assert loaded >= {str(rule["alert"]) for rule in rules("alerts.yml")}
    assert loaded >= {str(rule["record"]) for rule in rules("rules.yml")}


def test_every_alert_leads_to_a_section_of_the_guide() -> None:
    anchors = {title.lower() for title in re.findall(r"^#+ (\w+)$", OPERATIONS, re.MULTILINE)}
    for rule in rules("alerts.yml"):
        annotations = rule["annotations"]
        assert isinstance(annotations, dict)
        page, _, anchor = annotations["runbook"].partition("#")
        assert page == "docs/operations.md"
        assert anchor == str(rule["alert"]).lower()
        assert anchor in anchors
