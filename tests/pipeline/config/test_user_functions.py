"""The user's own functions: found in the working directory, and what goes wrong in them is said with its line."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest

from pipeline.config.user_functions import fingerprint, load_function, own_code
from pipeline.errors import ConfigError, DataError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that is not in the Python path, as for a console script."""
    monkeypatch.setattr("sys.path", [item for item in sys.path if item])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_module_in_the_working_directory_is_found(folder: Path) -> None:
    (folder / "own_order.py").write_text("def rank(scored):\n    return scored + 1\n")
    assert load_function("own_order:rank", "the policy", "plan.policy")(1) == 2


def test_a_file_of_the_users_does_not_hide_a_module_that_is_installed(folder: Path) -> None:
    (folder / "yaml.py").write_text("def safe_load(text):\n    raise ValueError\n")
    assert load_function("yaml:safe_load", "the policy", "here")("1") == 1


def test_a_module_that_is_not_there_is_named_with_the_folder_and_the_remedy(folder: Path) -> None:
    with pytest.raises(ConfigError, match="the policy's function cannot be found") as caught:
        load_function("own_missing:rank", "the policy", "plan.policy: own_missing:rank")
    assert f"no module own_missing in the Python path or in {folder}" in str(caught.value)
    assert "the folder where you start the command" in str(caught.value)
    assert "--working-dir ." in str(caught.value)


def test_a_function_that_is_not_there_is_named_with_its_file(folder: Path) -> None:
    (folder / "own_empty.py").write_text("rank = 3\n")
    for name in ("rank", "other"):
        with pytest.raises(ConfigError, match=rf"no function {name} in .*own_empty\.py"):
            load_function(f"own_empty:{name}", "the policy", "here")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import own_other_missing\n", "ModuleNotFoundError: No module named 'own_other_missing' "),
        ("def rank(\n", "SyntaxError: "),
        ("1 / 0\n", r"ZeroDivisionError: division by zero \(.*own_broken\d\.py, line 1\)"),
    ],
)
def test_a_module_that_cannot_be_imported_is_a_config_error(folder: Path, text: str, found: str) -> None:
    name = f"own_broken{len(text)}"
    (folder / f"{name}.py").write_text(text)
    with pytest.raises(ConfigError, match=f"the encoder's module cannot be imported\n  found: {found}"):
        load_function(f"{name}:rank", "the encoder", "here")


def test_own_code_that_raises_is_a_config_error_with_its_line_and_our_errors_pass() -> None:
    def failing() -> None:
        raise KeyError("colour")

    said = rf"KeyError: 'colour' \({__file__}, line \d+, from {__file__}, line \d+\)(.|\n)*where: plan\.policy"
    with pytest.raises(ConfigError, match=said), own_code("the policy failed", "plan.policy"):
        failing()
    with pytest.raises(DataError, match="of ours"), own_code("the policy failed", "plan.policy"):
        raise DataError("of ours")


def test_own_code_that_fails_in_a_library_names_the_users_lines_alone_from_the_innermost_on() -> None:
    def inner() -> None:
        json.loads("{")

    def outer() -> None:
        inner()

    with pytest.raises(ConfigError) as caught, own_code("the policy failed", "plan.policy"):
        outer()
    found = caught.value.details["found"]
    first, second = inner.__code__.co_firstlineno + 1, outer.__code__.co_firstlineno + 1
    assert f"({__file__}, line {first}, from {__file__}, line {second}, from " in str(found)
    assert "json/decoder.py" not in str(found)


def test_own_code_that_exits_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="SystemExit: 0"), own_code("the policy failed", "plan.policy"):
        sys.exit(0)


def test_the_fingerprint_is_of_the_source_file_and_does_not_run_it(folder: Path) -> None:
    text = "raise RuntimeError\n"
    (folder / "own_source.py").write_text(text)
    assert fingerprint("own_source:rank") == hashlib.sha256(text.encode()).hexdigest()
    assert "own_source" not in sys.modules
    for name in ("own_nowhere:rank", "own_nowhere.below:rank", "time:time"):
        assert fingerprint(name) is None
