"""The command line as a user meets it: names, options, help and errors."""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from jobs.cli import main
from jobs.options import find_cause
from pipeline.errors import ConfigError, DataError

SHARED = {"--config", "--set", "--json", "--help", "-h"}
COMMANDS = {
    "demo": {"--folder", "--json", "--help", "-h"},
    "manifest": {
        *("--to", "--suffix", "--uri-column", "--key-column", "--stat", "--hash", "--replace", "--no-ray"),
        *("--config", "--print-config", "--json", "--help", "-h"),
    },
    "fit": SHARED,
    "plan": SHARED,
    "backfill": SHARED | {"--retry-rejects", "--new-run"},
    "status": SHARED,
    "search": SHARED | {"--column", "-k", "--tag", "--commit", "--limit"},
    "evaluate": SHARED | {"--curve", "--commit"},
    "promote": SHARED | {"--commit", "--force"},
    "rollback": SHARED | {"--to"},
    "audit": SHARED,
    "export": SHARED | {"--format", "--tag", "--commit"},
    "gc": SHARED | {"--keep", "--grace", "--dry-run"},
}


def options(command: click.Command) -> set[str]:
    context = click.Context(command, help_option_names=["-h", "--help"])
    return {name for item in command.get_params(context) if isinstance(item, click.Option) for name in item.opts}


def test_commands_and_their_options_change_only_on_purpose() -> None:
    assert isinstance(main, click.Group)
    assert {name: options(command) for name, command in main.commands.items()} == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_and_is_a_script_of_its_own(name: str) -> None:
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) > 5
    assert importlib.import_module(f"jobs.{name}").main is main.commands[name]  # type: ignore[attr-defined]


def test_help_comes_in_a_blink() -> None:
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        subprocess.run([sys.executable, "-m", "jobs.cli", "--help"], check=True, capture_output=True)
        seconds.append(time.monotonic() - start)
    assert min(seconds) < 0.5


def test_missing_config_exits_2_with_one_clear_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["status", "--config", str(tmp_path / "none.yaml")])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: cannot read the config file\n")
    assert result.stdout == ""


def test_the_error_behind_wrappers_is_found() -> None:
    ours = DataError("the data", found=1)
    wrapped = RuntimeError("ray says")
    wrapped.__cause__ = ValueError("user code")
    wrapped.__cause__.__context__ = ours
    assert find_cause(wrapped) is ours
    assert find_cause(ValueError("not ours")) is None
    assert find_cause(ConfigError("x")) is not None
