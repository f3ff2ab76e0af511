"""The README's code blocks are run: every command and the Python, on the demo's run."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from jobs.cli import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def commands(program: str) -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith(f"{program} ")]


def test_make_lines_are_targets_of_the_makefile() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert commands("make")
    assert all(target in targets for words in commands("make") for target in words)


def test_fastfill_is_on_the_path_after_the_line_that_says_so_and_not_before() -> None:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    activate = lines.index(". .venv/bin/activate")
    first = next(number for number, line in enumerate(lines) if line.startswith("fastfill "))
    assert activate < first
    found = subprocess.run(
        ["bash", "-c", f"{lines[activate]} && command -v fastfill"],
        cwd=ROOT, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if not (ROOT / ".venv").exists():
        pytest.skip("needs the .venv that make sets up")
    assert found.stdout.strip() == str(ROOT / ".venv" / "bin" / "fastfill")
    assert "`.venv/bin/fastfill`" in README


def test_readme_is_short() -> None:
    assert len(README.splitlines()) < 200


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_commands_and_python_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    demo = runner.invoke(main, ["demo"], catch_exceptions=False)
    assert demo.exit_code == 0, demo.output
    assert "report.html" in demo.stderr
    for words in commands("fastfill"):
        result = runner.invoke(main, words, catch_exceptions=False)
        assert result.exit_code == 0, (words, result.output)
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})
