"""Learning on the way, on Ray, by the commands that a user types."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline import snapshot, storage
from pipeline.codebook import Codebook
from pipeline.index import Segment, decode
from pipeline.plan import read_plan, read_transformed
from pipeline.run import Run
from pipeline.schema import Float32
from tests.e2e.test_gate import contents, fastfill, fitted_copy, index_files, said, status, write_sound_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.usefixtures("ray_cluster")]

RELEARN = {"after_waves": [3]}


def served(run: Run, number: int) -> dict[int, Float32]:
    """What a commit serves, by id."""
    commit = snapshot.read_commit(run, number)
    codebook = Codebook.open(run, commit.codebook_path, commit.codebook_sha256)
    each = [decode(codebook, Segment.open(run, codebook, ref)) for ref in commit.segments]
    return {id: vector for ids, vectors in each for id, vector in zip(ids.tolist(), vectors, strict=True)}


def test_a_run_that_learns_on_the_way_ends_as_any_other_and_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    assert fastfill("backfill", "--config", write_sound_config(plain)).exit_code == 0
    path = fitted_copy(plain, tmp_path / "learning", relearn=RELEARN)
    result = fastfill("backfill", "--config", path)
    assert result.exit_code == 0, result.output
    assert "learnt on the way after wave 3, from 120 images" in said(result)
    assert status(path)["prod"] == 5
    found = json.loads(fastfill("audit", "--config", path, "--json").stdout)
    assert (found["ok"], found["problems"]) == (True, [])
    run = Run(str(tmp_path / "learning" / "run"))
    plan = read_plan(run)
    assert plan is not None
    before, after = (read_transformed(run, plan, 5, ["id"], commit=commit)["id"].to_pylist() for commit in (1, 5))
    assert len(before) == len(after) == plan.waves[4].images
    last, expected = served(run, 5), served(Run(str(plain / "run")), 5)
    assert last.keys() == expected.keys()
    for id, vector in expected.items():
        np.testing.assert_allclose(last[id], vector, rtol=1e-4, atol=1e-5)  # of units with other images beside it

    path = fitted_copy(plain, tmp_path / "stopped", relearn=RELEARN)
    assert fastfill("backfill", "--config", path, "--stop-when", "fraction>=0.15").exit_code == 0
    assert status(path)["commit"] == 2
    assert fastfill("backfill", "--config", path).exit_code == 0
    stopped = Run(str(tmp_path / "stopped" / "run"))
    assert index_files(stopped) == index_files(run)
    assert contents(stopped) == contents(run)
    assert not storage.exists(stopped.relearnt(3).path("scored", "part-00000.parquet"))
