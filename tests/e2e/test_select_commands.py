"""From a selection to the last snapshot by the commands alone."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from jobs.cli import main
from pipeline.config.load import load_config
from pipeline.planning.plan import read_plan
from pipeline.planning.selection_result import read_selection, resolve_policy
from pipeline.run import Run
from pipeline.storage import objects
from tests.support.galleries import write_config

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

SELECT = {"folds": 2, "transformations": ["linear", "fastfill"], "lambdas": [0.1], "finalists": 1, "max_measured": 100}


def fastfill(*arguments: str) -> Result:
    result = CliRunner().invoke(main, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_selection_by_a_labelled_sample_is_planned_backfilled_and_reported(tmp_path: Path) -> None:
    """The gallery has no labels, but for the images of the sample."""
    write_config(tmp_path)
    sample = pq.read_table(tmp_path / "data" / "gallery.parquet").slice(20, 220)
    pq.write_table(sample.select(["name", "digit"]), tmp_path / "data" / "sample.parquet")
    path = write_config(
        tmp_path,
        gallery__columns={"id": "name", "image": "image"},
        probe={"manifest": "sample.parquet", "columns": {"id": "name", "label": "digit"}},
        select=SELECT | {"measured_on": "probe"},
        fit={"inner_width": 32, "epochs": 8, "batch_size": 64, "lr": 5e-3},
    )
    shown = " ".join(fastfill("fit", "--config", path).stderr.split())
    run = Run(load_config(path).run)
    found = read_selection(run)
    assert found is not None
    assert "on the probe set, 2 folds" in shown
    assert "Chosen: " in shown
    assert f"in the order {found.chosen.policy}" in shown
    fastfill("plan", "--config", path, "--measure", "0")
    plan = read_plan(run)
    assert plan is not None
    assert resolve_policy(run, plan.policy) == found.chosen.policy
    fastfill("backfill", "--config", path)
    report = json.loads(objects.read_bytes(run.path("reports", "report.json")))
    assert report["selection"]["count"] == len(found.candidates)
    assert all("top1" in commit["figures"] for commit in report["probe"])
    status = json.loads(fastfill("status", "--config", path, "--json").stdout)
    assert status["published"] == status["gallery"]
    assert json.loads(fastfill("audit", "--config", path, "--json").stdout)["ok"]
