"""`fastfill repair` as a user types it, on golden runs that are damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from jobs.cli import main
from pipeline.config.load import load_config
from pipeline.index import commits, tags
from pipeline.run import Run
from pipeline.storage import objects
from tests.data.make_golden_runs import GALLERY
from tests.support.golden import FINISHED, HALF, copy_run

pytestmark = pytest.mark.usefixtures("ray_cluster")


def fastfill(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), catch_exceptions=False)


def json_of(result: Result, exit_code: int = 0) -> Any:
    assert result.exit_code == exit_code, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", FINISHED)
def test_repair_brings_back_a_segment_that_backfill_says_is_missing(name: str, tmp_path: Path) -> None:
    path = copy_run(name, tmp_path)
    run = Run(load_config(path).run)
    segment = Path(run.path(commits.read_commit(run, 4).segments[0].path))
    before = segment.read_bytes()
    segment.unlink()
    refused = fastfill("backfill", "--config", path)
    assert refused.exit_code == 2
    assert "Nothing to do" not in refused.stderr
    assert "fastfill repair" in refused.stderr
    audited = fastfill("audit", "--config", path)
    assert audited.exit_code == 1
    assert audited.stderr.splitlines()[-1].startswith("Stop the backfill, then run `fastfill repair`")
    found = json_of(fastfill("repair", "--config", path, "--json"))
    assert (found["ok"], found["rebuilt"], found["left"], found["problems"]) == (True, [str(segment)], [], [])
    assert segment.read_bytes() == before
    again = fastfill("backfill", "--config", path)
    assert again.exit_code == 0
    assert "Nothing to do" in again.stderr


def test_backfill_of_a_finished_run_names_an_older_commit_that_lacks_a_file_and_what_it_has_not_read(
    tmp_path: Path,
) -> None:
    path = copy_run(FINISHED[0], tmp_path)
    run = Run(load_config(path).run)
    served = {ref.path for ref in commits.read_commit(run, 4).segments}
    older = next(ref.path for ref in commits.read_commit(run, 0).segments if ref.path not in served)
    naming = [item.number for item in tags.read_commits(run) if older in {ref.path for ref in item.segments}]
    Path(run.path(older)).unlink()
    result = fastfill("backfill", "--config", path)
    assert result.exit_code == 0, "prod does not serve the file"
    assert f"lack files: {', '.join(map(str, naming))};" in result.stderr
    assert "`fastfill repair` rebuilds what it can" in result.stderr
    assert result.stderr.splitlines()[-1].endswith("`fastfill audit` also checks their contents.")


@pytest.mark.parametrize("name", HALF)
def test_repair_of_a_damaged_part_lets_the_run_be_resumed_to_the_end(name: str, tmp_path: Path) -> None:
    path = copy_run(name, tmp_path)
    part = tmp_path / "run/embedded/wave-003/unit-00000.parquet"
    part.write_bytes(part.read_bytes()[:-100])
    assert str(part) in [
        item["where"] for item in json_of(fastfill("audit", "--config", path, "--json"), 1)["problems"]
    ]
    found = json_of(fastfill("repair", "--config", path, "--json"))
    assert (found["ok"], found["embed_again"]) == (True, [[3, 0]])
    assert not part.exists()
    assert fastfill("backfill", "--config", path).exit_code == 0
    assert json_of(fastfill("status", "--config", path, "--json"))["published"] == GALLERY - 2
    assert json_of(fastfill("audit", "--config", path, "--json"))["ok"]


@pytest.mark.parametrize("name", FINISHED)
def test_repair_embeds_a_lost_unit_of_a_published_wave_again(name: str, tmp_path: Path) -> None:
    path = copy_run(name, tmp_path)
    part = tmp_path / "run/embedded/wave-002/unit-00000.parquet"
    part.unlink()
    result = fastfill("repair", "--config", path, "--json")
    found = json.loads(result.stdout)
    assert found["embed_again"] == [[2, 0]]
    assert part.exists()
    others = {item["kind"] for item in found["problems"]}
    assert others <= {"vector", "log_digest"}, "on another kind of processor the vectors may differ by rounding"
    assert result.exit_code == (1 if others else 0)


def test_repair_with_another_encoder_than_that_of_the_run_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    path = copy_run(FINISHED[0], tmp_path)
    run = Run(load_config(path).run)
    part = tmp_path / "run/embedded/wave-002/unit-00000.parquet"
    part.write_bytes(part.read_bytes()[:-100])
    before = objects.list_files(run.uri)
    refused = fastfill("repair", "--config", path, "--set", "encoders.new.preprocess.mean=[0.25]")
    assert refused.exit_code == 3, refused.output
    assert "encoders.new.preprocess.mean" in refused.stderr
    assert objects.list_files(run.uri) == before


def test_repair_of_a_run_that_is_whole_says_so(tmp_path: Path) -> None:
    result = fastfill("repair", "--config", copy_run(FINISHED[0], tmp_path))
    assert result.exit_code == 0
    assert result.stderr == "the run is whole\n"
