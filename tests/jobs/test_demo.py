"""The demo deletes and overwrites only what a demo wrote, and never through a link."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from jobs.cli import main
from jobs.demo import _MARKER, _config, check_ours
from pipeline.errors import ConfigError
from pipeline.schema import FORMAT_VERSION
from pipeline.storage import objects


def refused(folder: Path) -> str:
    result = CliRunner().invoke(main, ["demo", "--folder", str(folder)])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: this folder has files that are not the demo's\n")
    return result.stderr


def write_demo(root: Path) -> None:
    """What a demo leaves."""
    for name in ("run", "data"):
        objects.put(str(root / name / _MARKER), b"")
    (root / "data" / "gallery.parquet").write_text("of the demo")
    (root / "run" / "run.json").write_text(json.dumps({"format_version": FORMAT_VERSION}))
    (root / "demo.yaml").write_text(_config(root))


@pytest.mark.parametrize(
    "mine",
    [
        "run/thesis.tex",
        "run/.git",
        "run/gallery/part-00000.parquet",
        "data/gallery.parquet",
        "demo.yaml",
        "run",
        "data",
    ],
)
def test_demo_folder_with_files_of_the_user_is_refused(tmp_path: Path, mine: str) -> None:
    file = tmp_path / mine
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text('{"mine": 1}')
    assert str(tmp_path / mine.partition("/")[0]) in refused(tmp_path)
    assert file.read_text() == '{"mine": 1}'


def test_demo_folder_with_a_finished_run_of_the_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"format_version": FORMAT_VERSION, "config": {}}))
    (tmp_path / "demo.yaml").write_text(_config(tmp_path))
    assert f"no demo wrote {tmp_path / 'run'}" in refused(tmp_path)
    assert (tmp_path / "run" / "run.json").exists()


def test_demo_config_edited_by_the_user_is_refused(tmp_path: Path) -> None:
    write_demo(tmp_path)
    (tmp_path / "demo.yaml").write_text(_config(tmp_path).replace("waves: 8", "waves: 4"))
    assert f"no demo wrote {tmp_path / 'demo.yaml'}" in refused(tmp_path)


def test_demo_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused(tmp_path / "file")


@pytest.mark.parametrize("link", ["", "run", "data", "demo.yaml", "data/gallery.parquet"])
def test_demo_refuses_symbolic_links_even_to_files_of_a_demo(tmp_path: Path, link: str) -> None:
    write_demo(tmp_path / "demo")
    (tmp_path / "kept").mkdir()
    there = tmp_path / "demo" / link
    os.replace(there, tmp_path / "kept" / "target")
    there.symlink_to(tmp_path / "kept" / "target")
    before = sorted(tmp_path.rglob("*"))
    assert f"{there} is a symbolic link" in refused(tmp_path / "demo")
    assert sorted(tmp_path.rglob("*")) == before


def test_demo_killed_at_any_moment_starts_from_scratch(tmp_path: Path) -> None:
    check_ours(tmp_path / "missing")
    check_ours(tmp_path)
    write_demo(tmp_path)
    check_ours(tmp_path)
    (tmp_path / "demo.yaml").write_text(_config(tmp_path)[:40])
    check_ours(tmp_path)
    (tmp_path / "run" / _MARKER).unlink()
    with pytest.raises(ConfigError):
        check_ours(tmp_path)
    objects.delete(str(tmp_path / "run"))
    check_ours(tmp_path)
