"""The command line: names, options, help and errors."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE

import click
import pytest
from click.testing import CliRunner

from jobs.cli import main
from jobs.shell.command import print_json, with_errors
from pipeline.storage import documents

ROOT = Path(__file__).resolve().parents[2]
SHARED = {"--config", "--set", "--json", "--help", "-h"}
COMMANDS = {
    "demo": {"--folder", "--json", "--help", "-h"},
    "manifest": {
        *("--to", "--suffix", "--uri-column", "--key-column", "--stat", "--hash", "--replace", "--no-ray"),
        *("--config", "--print-config", "--json", "--help", "-h"),
    },
    "fit": SHARED,
    "plan": SHARED | {"--measure"},
    "backfill": SHARED | {"--retry-rejects", "--new-run", "--stop-when"},
    "status": SHARED,
    "search": SHARED | {"--column", "-k", "--tag", "--commit", "--limit"},
    "evaluate": SHARED | {"--curve", "--commit"},
    "promote": SHARED | {"--commit", "--force"},
    "rollback": SHARED | {"--to"},
    "audit": SHARED,
    "repair": SHARED,
    "export": SHARED | {"--format", "--tag", "--commit"},
    "gc": SHARED | {"--keep", "--grace", "--dry-run"},
}


def options(command: click.Command) -> set[str]:
    context = click.Context(command, help_option_names=["-h", "--help"])
    return {name for item in command.get_params(context) if isinstance(item, click.Option) for name in item.opts}


def test_commands_and_their_options_change_only_on_purpose() -> None:
    assert isinstance(main, click.Group)
    assert {name: options(command) for name, command in main.commands.items()} == COMMANDS


def script_of(name: str) -> Path:
    (found,) = (ROOT / "jobs").rglob(f"{name}.py")
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_and_is_a_script_of_its_own(name: str) -> None:
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) > 5
    module = ".".join(script_of(name).relative_to(ROOT).with_suffix("").parts)
    assert importlib.import_module(module).main is main.commands[name]  # type: ignore[attr-defined]


def test_help_has_each_command_in_one_section_with_a_whole_sentence_at_80_columns() -> None:
    text = CliRunner().invoke(main, ["--help"], terminal_width=80).stdout
    commands = text[text.index("Start:") :].split("\n\n")
    assert [section.splitlines()[0] for section in commands] == ["Start:", "Run:", "Look:", "Serve:", "Keep house:"]
    listed = [line.split(maxsplit=1) for section in commands for line in section.splitlines()[1:]]
    assert sorted(name for name, _ in listed) == sorted(COMMANDS)
    assert [sentence for _, sentence in listed if not sentence.endswith(".") or sentence.endswith("...")] == []


def test_each_command_file_runs_as_a_script_from_any_folder(tmp_path: Path) -> None:
    scripts = {name: script_of(name) for name in COMMANDS}
    running = {
        name: subprocess.Popen([sys.executable, path, "--help"], cwd=tmp_path, stdout=PIPE, stderr=PIPE, text=True)
        for name, path in scripts.items()
    }
    for name, process in running.items():
        stdout, stderr = process.communicate(timeout=120)
        assert (process.returncode, stderr) == (0, ""), name
        assert stdout.startswith("Usage: "), name


def test_help_starts_fast() -> None:
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        subprocess.run([sys.executable, "-m", "jobs.cli", "--help"], check=True, capture_output=True)
        seconds.append(time.monotonic() - start)
    assert min(seconds) < 0.5


def modules_after(*words: str) -> set[str]:
    """The packages that a process has imported once it has run a command."""
    code = f"""
import sys
from jobs.cli import main
main({list(words)!r}, standalone_mode=False)
print("imported", *{{name.partition(".")[0] for name in sys.modules}})
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(result.stdout.splitlines()[-1].split())


HEAVY = {"torch", "torchvision", "ray", "faiss", "matplotlib", "sklearn", "simplejpeg", "s3fs", "obstore", "botocore"}


def test_help_imports_no_heavy_package() -> None:
    found = modules_after("--help")
    assert "click" in found
    assert found & (HEAVY | {"pyarrow", "numpy", "pydantic", "rich"}) == set()


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_status_imports_no_heavy_package(tmp_path: Path, options: list[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(documents.encode({"config": {}, "fingerprints": {}}).decode())
    config = ROOT / "jobs" / "configs" / "cifar100.yaml"
    found = modules_after("status", "--config", str(config), "--set", f"run={tmp_path / 'run'}", *options)
    assert "pyarrow" in found
    assert found & HEAVY == set()


def test_missing_config_exits_2_with_one_clear_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["status", "--config", str(tmp_path / "none.yaml")])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: cannot read the config file\n")
    assert result.stdout == ""


NOISY = """
import ctypes, os, click
from jobs.shell.command import print_json, with_errors

@click.command()
@with_errors
def main():
    ctypes.CDLL(None).puts(b"from native code")
    print("from Python")
    os.system("echo from a child")
    print_json({"a": 1})

main()
"""


def test_stdout_with_json_holds_the_document_alone() -> None:
    result = subprocess.run([sys.executable, "-c", NOISY], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == {"a": 1}
    for words in ("from native code", "from Python", "from a child"):
        assert words in result.stderr


def test_print_json_of_a_number_that_is_not_finite_is_a_bug_and_prints_no_document() -> None:
    @click.command()
    @with_errors
    def command() -> None:
        print_json({"distance": float("inf")})

    result = CliRunner().invoke(command)
    assert result.exit_code == 1
    assert "internal error: ValueError" in result.stderr
    assert result.stdout == ""
