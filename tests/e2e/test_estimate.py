"""`fastfill plan` measures a sample of the gallery's own images, and leaves the run as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from jobs.cli import main
from pipeline.backfill.estimate import WAVE_CPU_SECONDS
from pipeline.config.load import load_config
from pipeline.planning.plan import read_plan
from pipeline.run import Run
from pipeline.storage import objects

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def fastfill(*arguments: str) -> Result:
    result = CliRunner().invoke(main, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_plan_estimates_the_backfill_prints_it_and_keeps_nothing_else_of_it(
    make_run: Callable[..., str], tmp_path: Path
) -> None:
    path = make_run(tmp_path, telemetry__node_hour_price=2.0)
    fastfill("plan", "--config", path, "--measure", "0")
    run = Run(load_config(path).run)
    before = {uri: objects.sha256(uri) for uri in objects.list_files(run.uri)}
    found = json.loads(fastfill("plan", "--config", path, "--measure", "2", "--json").stdout)["estimate"]
    after = {uri: objects.sha256(uri) for uri in objects.list_files(run.uri)}
    assert after.items() >= before.items()
    assert after.keys() - before.keys() == {run.estimate}
    assert found == json.loads(objects.read_bytes(run.estimate))
    rates = found["rates"]
    assert found["images"] == 300
    assert min(rates["fetch"], rates["decode"], rates["stream"], *rates["forward"].values()) > 0
    plan = read_plan(run)
    assert plan is not None
    publishing = len(plan.waves) * WAVE_CPU_SECONDS / rates["cpus"]
    assert found["seconds"] == pytest.approx(rates["start_seconds"] + 300 / rates["stream"] + publishing)
    assert found["money"] == pytest.approx(2.0 * found["node_hours"])
    assert found["bytes"] == round(300 * rates["bytes_fetched_per_image"])
    text = fastfill("plan", "--config", path, "--measure", "1").stderr
    assert ("expected quality" in text) != ("No estimate of the quality" in text), "a curve, or why there is none"
    for word in ("to embed", "300 images", "node hours", "bottleneck", "backfill.batch_size="):
        assert word in text, text
