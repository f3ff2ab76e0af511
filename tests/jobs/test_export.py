"""The command `fastfill export`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from jobs import export
from jobs.cli import main
from tests.support.published_run import LAST, published_run


class Config:
    """All that export takes from a config."""

    def __init__(self, run: str) -> None:
        self.run = run


def test_export_into_a_relative_folder_writes_the_marker_and_refuses_a_foreign_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = published_run(tmp_path)
    whole.write_gallery()
    monkeypatch.setattr(export, "load", lambda *_: Config(whole.run.uri))  # a whole config needs encoders
    monkeypatch.chdir(tmp_path)
    arguments = ["export", "--config", "run.yaml", "--format"]

    result = CliRunner().invoke(main, [*arguments, "parquet", "--json", "out"])
    assert result.exit_code == 0, result.stderr
    marker = json.loads(result.stdout)
    assert marker["commit"] == LAST
    assert json.loads((tmp_path / "out" / "export.json").read_text()) == marker

    result = CliRunner().invoke(main, [*arguments, "faiss", "--commit", "0", str(tmp_path / "faiss")])
    assert result.exit_code == 0
    assert "shard 2 of 2" in result.stderr
    assert "commit 0 is in" in result.stderr
    assert "100 exact vectors in 2 files" in result.stderr

    result = CliRunner().invoke(main, [*arguments, "faiss", "out"])
    assert result.exit_code == 3
    assert "not empty" in result.stderr
    assert CliRunner().invoke(main, [*arguments, "csv", "out"]).exit_code == 2
