"""A store that a run cannot live in is refused in one line, with exit code 2, before an input is looked at."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from jobs.bars import Bars
from jobs.cli import main
from jobs.options import load
from jobs.prepare import open_run
from pipeline import storage
from pipeline.errors import DataError
from tests.seaweed import READONLY, SeaweedFS

CONFIG = str(Path(__file__).resolve().parents[2] / "jobs" / "configs" / "cifar100.yaml")
ENVIRONMENT = {
    "wrong secret": {"AWS_SECRET_ACCESS_KEY": "wrong"},
    "no credentials": {"AWS_SECRET_ACCESS_KEY": "", "AWS_ACCESS_KEY_ID": ""},
}


@pytest.fixture
def run_uri(
    request: pytest.FixtureRequest, seaweed: SeaweedFS, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """A run in a store of which something is wrong, named by the parameter."""
    case = request.param
    for name, value in (seaweed.environment(READONLY) if case == "read-only" else ENVIRONMENT.get(case, {})).items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    monkeypatch.setenv("FASTFILL_STORAGE", "")
    storage._store.cache_clear()
    names = {"missing": f"s3://missing-{uuid.uuid4().hex}/run", "read-only": f"s3://{READONLY}/run"}
    yield names.get(case, f"{bucket}/run")
    storage._store.cache_clear()


@pytest.mark.parametrize("run_uri", ["wrong secret", "no credentials", "missing", "read-only"], indirect=True)
def test_a_run_is_not_opened(run_uri: str) -> None:
    config = load(CONFIG, (f"run={run_uri}", "data_root=/nowhere"))
    with pytest.raises(DataError, match=r"refuses these credentials|bucket is not there") as caught:
        open_run(config, Bars(Console(quiet=True)))
    assert caught.value.exit_code == 2
    assert run_uri in str(caught.value)


@pytest.mark.parametrize("command", ["status", "backfill"])
@pytest.mark.parametrize("run_uri", ["wrong secret", "no credentials"], indirect=True)
def test_a_command_says_so_in_one_line(run_uri: str, command: str) -> None:
    result = CliRunner().invoke(main, [command, "--config", CONFIG, "--set", f"run={run_uri}"])
    assert result.exit_code == 2
    assert result.output.startswith("error: access is refused\n")
    assert run_uri in result.output
    assert "Traceback" not in result.output
