"""A run goes on only as what it was started as, and another one starts beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from jobs.cli import main
from pipeline.config.load import load_config
from pipeline.index import tags
from pipeline.run import Run
from pipeline.storage import objects

pytestmark = pytest.mark.usefixtures("ray_cluster")

CHANGES = {
    "seed": "seed=7",
    "plan.policy": "plan.policy=random",
    "plan.waves": "plan.waves=4",
    "encoders.new.preprocess.pixel_range": "encoders.new.preprocess.pixel_range=255",
    "content of encoders.new": "encoders.new.export=old.pt2",
    "content of gallery": "gallery.manifest=training.parquet",
    "gallery.metric": "gallery.metric=ip",
}


def fastfill(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), catch_exceptions=False)


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_setting_or_input_is_refused_by_its_name(backfilled: str, name: str) -> None:
    result = fastfill("backfill", "--config", backfilled, "--set", CHANGES[name])
    assert result.exit_code == 3, result.output
    assert name in result.stderr
    assert "--new-run" in result.stderr


@pytest.mark.slow
def test_a_new_run_starts_beside_the_one_that_is_there(backfilled: str) -> None:
    run = load_config(backfilled).run
    before = {uri: objects.sha256(uri) for uri in objects.list_files(run)}
    result = fastfill("backfill", "--config", backfilled, "--set", "plan.waves=3", "--new-run")
    assert result.exit_code == 0, result.output
    assert f"--set run={run}-2" in result.stderr
    assert tags.list_commits(Run(f"{run}-2")) == [0, 1, 2, 3]
    assert {uri: objects.sha256(uri) for uri in objects.list_files(run)} == before
    assert Path(f"{run}-3").exists() is False
