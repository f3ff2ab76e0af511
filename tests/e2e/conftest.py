"""A transformation that is fitted once, for all runs that do not test the fit, and a run that is finished once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from jobs.cli import main
from tests.support.galleries import write_config


@pytest.fixture(scope="session")
def fitted(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    """The folder of a small run whose pairs are embedded and whose transformation is fitted."""
    folder = tmp_path_factory.mktemp("fitted")
    result = CliRunner().invoke(main, ["fit", "--config", write_config(folder)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="session")
def make_run(fitted: Path) -> Callable[..., str]:
    """Like `write_config`, with the fitted run's data, pairs and transformation in place."""

    def make(folder: Path, **changes: Any) -> str:
        shutil.copytree(fitted / "data", folder / "data")
        for name in ("pairs", "transformation"):
            shutil.copytree(fitted / "run" / name, folder / "run" / name)
        return write_config(folder, **changes)

    return make


@pytest.fixture(scope="session")
def backfilled(tmp_path_factory: pytest.TempPathFactory, make_run: Callable[..., str]) -> str:
    """The config of a finished run by the command, with a Flat index; a test may move its tags and lose its report."""
    path = make_run(tmp_path_factory.mktemp("run"), index__nprobe=3)
    result = CliRunner().invoke(main, ["backfill", "--config", path], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return path
