"""Runs that earlier versions wrote are read, resumed, audited, exported and repaired by this one.

Nothing here compares the bytes of vectors: the runs were made on another machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from jobs.cli import main
from pipeline.storage import documents
from tests.data.make_golden_runs import DATA, GALLERY
from tests.support.golden import FINISHED, HALF, copy_run

pytestmark = pytest.mark.usefixtures("ray_cluster")


def fastfill(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), catch_exceptions=False)


def read_json(*arguments: str) -> Any:
    result = fastfill(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def nearest(config: str) -> list[list[str]]:
    """The ids of what is nearest to the first ten images of the gallery."""
    queries = [str(DATA / "gallery.parquet"), "--column", "image", "--limit", "10", "-k", "3"]
    found: list[list[str]] = read_json("search", *queries, "--config", config)["ids"]
    return found


def test_golden_runs_exist() -> None:
    assert FINISHED
    assert HALF


@pytest.mark.parametrize("name", FINISHED)
def test_a_finished_golden_run_is_read_audited_and_exported(name: str, tmp_path: Path) -> None:
    config = copy_run(name, tmp_path)
    status = read_json("status", "--config", config)
    assert (status["gallery"], status["published"], status["prod"]) == (GALLERY, GALLERY - 2, 4)
    assert status["rejected"] == 2
    report = read_json("audit", "--config", config)
    assert report["problems"] == []
    assert [row[0] for row in nearest(config)] == [f"gallery {row}" for row in range(10)]
    result = fastfill("backfill", "--config", config)
    assert result.exit_code == 0, result.output
    assert "Nothing to do" in result.stderr
    marker = read_json("export", str(tmp_path / "out"), "--format", "parquet", "--config", config)
    assert sum(file["vectors"] for file in marker["files"]) == GALLERY


@pytest.mark.parametrize("name", HALF)
def test_a_half_finished_golden_run_is_resumed_to_the_end(name: str, tmp_path: Path) -> None:
    config = copy_run(name, tmp_path)
    before = read_json("status", "--config", config)
    assert 0 < before["published"] < before["durable"] < GALLERY
    assert read_json("audit", "--config", config)["problems"] == []
    result = fastfill("backfill", "--config", config)
    assert result.exit_code == 0, result.output
    after = read_json("status", "--config", config)
    assert (after["published"], after["rejected"], after["prod"]) == (GALLERY - 2, 2, 4)
    assert read_json("audit", "--config", config)["problems"] == []
    found = nearest(config)
    assert np.mean([f"gallery {row}" in ids for row, ids in enumerate(found)]) >= 0.9, "the codec is lossy"


@pytest.mark.parametrize("command", ["status", "audit", "backfill"])
def test_a_golden_run_that_would_cut_its_waves_again_on_the_way_needs_version_0_1(command: str, tmp_path: Path) -> None:
    config = copy_run(HALF[0], tmp_path)
    path = tmp_path / "run/plan/plan.json"
    plan = documents.decode(path.read_bytes(), str(path))
    path.write_bytes(documents.encode(plan | {"relearn_after": [3]}))
    result = fastfill(command, "--config", config)
    assert result.exit_code == 3
    assert "use fastfill 0.1 for this run" in " ".join(result.stderr.split())


@pytest.mark.parametrize("name", FINISHED + HALF)
def test_audit_names_a_damaged_segment_of_a_golden_run(name: str, tmp_path: Path) -> None:
    config = copy_run(name, tmp_path)
    segments = sorted((tmp_path / "run/index/segments").glob("*.faiss"))
    segment = segments[np.random.default_rng(0).integers(len(segments))]
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 16
    segment.write_bytes(data)
    result = fastfill("audit", "--config", config, "--json")
    assert result.exit_code == 1
    assert [Path(problem["where"]).name for problem in json.loads(result.stdout)["problems"]] == [segment.name]
