"""The command `fastfill gc`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from jobs.cli import main
from jobs.upkeep import gc
from pipeline.index.tags import list_commits
from pipeline.storage import objects
from pipeline.storage.settings import StorageSettings
from tests.support.published_run import LAST, published_run


class Config:
    """All that gc takes from a config."""

    def __init__(self, run: str) -> None:
        self.run = run


@pytest.fixture
def run_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    whole = published_run(tmp_path)

    def load(*_: object) -> Config:
        objects.configure(StorageSettings())
        return Config(whole.run.uri)

    monkeypatch.setattr(gc, "load", load)  # a whole config needs encoders, which gc does not
    return whole.run.uri


def call(*arguments: str) -> dict[str, object]:
    result = CliRunner().invoke(main, ["gc", "--config", "run.yaml", "--json", *arguments])
    assert result.exit_code == 0, result.stderr
    found: dict[str, object] = json.loads(result.stdout)
    return found


def test_gc_dry_run_prints_what_gc_then_removes(run_uri: str) -> None:
    told = call("--keep", "1", "--grace", "0", "--dry-run")
    assert told["commits"] == [0, 2, 3]
    assert told["kept"] == {"1": ["before prod"], str(LAST): ["candidate", "prod", "among the last 1"]}
    assert call("--keep", "1", "--grace", "0") == told | {"dry_run": False}
    assert call("--keep", "1", "--grace", "0")["commits"] == []


def test_gc_prints_why_each_commit_is_kept(run_uri: str) -> None:
    result = CliRunner().invoke(main, ["gc", "--config", "run.yaml"])
    assert result.exit_code == 0
    assert "commit 1 kept: before prod" in result.stderr
    assert "removed no commit" in result.stderr
    assert "; 0 index files, 0 left-over files, " in result.stderr


def test_gc_of_one_left_over_file_counts_it_in_the_singular(run_uri: str) -> None:
    left = Path(run_uri) / "index" / ".tmp-left"
    left.write_bytes(b"x")
    os.utime(left, (0, 0))
    result = CliRunner().invoke(main, ["gc", "--config", "run.yaml"])
    assert "1 left-over file," in result.stderr


@pytest.mark.parametrize("bad", [["--keep", "0"], ["--grace", "-1"]])
def test_gc_with_keep_0_or_a_negative_grace_is_refused(run_uri: str, bad: list[str]) -> None:
    assert CliRunner().invoke(main, ["gc", "--config", "run.yaml", *bad]).exit_code == 2


def test_the_help_lists_the_snapshots_that_are_kept() -> None:
    text = " ".join(CliRunner().invoke(main, ["gc", "--help"]).stdout.split())
    for words in (
        "every snapshot that a tag points to",
        "the newest snapshots (--keep)",
        "evaluate --curve",
        "never removed",
    ):
        assert words in text


def test_gc_without_a_run_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "load", lambda *_: Config(str(tmp_path / "none")))
    result = CliRunner().invoke(main, ["gc", "--config", "run.yaml"])
    assert result.exit_code == 2
    assert "there is no run here" in result.stderr
    assert not (tmp_path / "none").exists()


def test_gc_removes_the_files_of_its_commits(run_uri: str) -> None:
    from pipeline.run import Run

    call("--grace", "0")
    assert list_commits(Run(run_uri)) == [1, 2, 3, LAST]
