"""Every error becomes one message with an exit code; a traceback is shown only on request."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from jobs.shell.command import print_text, with_errors
from jobs.shell.failures import as_ours, find_cause
from pipeline.errors import DataError, FastfillError, TransientError

ROOT = Path(__file__).resolve().parents[3]
PRINTS = "import click; from jobs.shell.command import print_text, with_errors\n"
PRINTS += "click.command()(with_errors(lambda: print_text('x' * 100_000)))()"


def command_that_raises(error: Exception) -> click.Command:
    @click.command()
    @with_errors
    def command() -> None:
        raise error

    return command


def wrapped(cause: Exception) -> Exception:
    """As Ray gives back a task's error: a copy without its number, and the original behind it."""
    copy: Exception = type(cause)("ray says")
    copy.cause = cause  # type: ignore[attr-defined] - Ray's own attribute
    return copy


ERRORS: dict[str, tuple[Exception, type[FastfillError], str]] = {
    "disk full": (OSError(errno.ENOSPC, "No space left", "/run/x"), FastfillError, "the disk is full"),
    "quota": (OSError(errno.EDQUOT, "Quota exceeded", "/run/x"), FastfillError, "the disk is full"),
    "broken disk": (OSError(errno.EIO, "Input/output error", "/run/x"), FastfillError, "the disk failed"),
    "read-only": (OSError(errno.EROFS, "Read-only", "/run/x"), DataError, "read-only"),
    "no permission": (PermissionError(errno.EACCES, "Permission denied", "/run/x"), DataError, "access is refused"),
    "a file as folder": (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/run/x"), DataError, "path of a folder"),
    "a folder as file": (IsADirectoryError(errno.EISDIR, "Is a directory", "/run/x"), DataError, "path of a file"),
    "too many files": (OSError(errno.EMFILE, "Too many open files", "/run/x"), FastfillError, "ulimit -n"),
    "unknown number": (OSError(errno.EXDEV, "Cross-device link", "/run/x"), FastfillError, "Cross-device link"),
    "rename": (OSError(errno.ENOSPC, "No space left", "/run/a", None, "/run/x"), FastfillError, "/run/a -> /run/x"),
    "in a task": (wrapped(OSError(errno.ENOSPC, "No space left", "/run/x")), FastfillError, "the disk is full"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_as_ours_of_an_os_error_names_the_path_and_what_to_do(case: str) -> None:
    error, kind, said = ERRORS[case]
    ours = as_ours(error)
    assert type(ours) is kind
    assert said in str(ours)
    assert "/run/x" in str(ours)
    assert "what to do: " in str(ours)


def test_as_ours_of_other_errors_of_users_and_machines_is_not_a_bug() -> None:
    for error in (
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        RecursionError("maximum recursion depth exceeded"),
        MemoryError("Unable to allocate 12 TiB"),
        ConnectionError("Could not find any running Ray instance"),
    ):
        assert "this is a bug" not in str(as_ours(error))
    assert isinstance(as_ours(ConnectionResetError(errno.ECONNRESET, "reset")), TransientError)


def test_as_ours_of_a_bug_while_an_os_error_was_handled_is_a_bug() -> None:
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left", "/run/x")
        except OSError:
            {}["nothing"]
    except KeyError as error:
        found = str(as_ours(error))
    assert "internal error: KeyError" in found
    assert f"{__file__}, line" in found


def test_find_cause_of_a_wrapped_error_finds_ours() -> None:
    ours = DataError("the data", found=1)
    outer = RuntimeError("ray says")
    outer.__cause__ = ValueError("user code")
    outer.__cause__.__context__ = ours
    assert find_cause(outer) is ours
    assert as_ours(outer) is ours
    assert find_cause(ValueError("not ours")) is None


def test_with_errors_of_a_bug_is_one_message_that_asks_for_a_report() -> None:
    result = CliRunner().invoke(command_that_raises(ValueError("a\x1b[31mb\nsecond line")))
    assert result.exit_code == 1
    summary, where, remedy = result.stderr.splitlines()
    assert summary == r"error: internal error: ValueError: a\x1b[31mb"
    assert where.startswith("  where: ")
    assert "this is a bug: run the same command with FASTFILL_TRACEBACK=1" in remedy


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(errno.ENOSPC, "full"), DataError("ours")])
def test_with_errors_under_fastfill_traceback_shows_the_traceback_and_the_message(error: Exception) -> None:
    command = command_that_raises(error)
    plain = CliRunner().invoke(command, env={"FASTFILL_TRACEBACK": None})
    traced = CliRunner().invoke(command, env={"FASTFILL_TRACEBACK": "1"})
    assert "Traceback" not in plain.stderr
    assert traced.stderr.startswith("Traceback (most recent call last)")
    assert traced.stderr.endswith(plain.stderr)
    assert traced.exit_code == plain.exit_code


def test_with_errors_of_a_message_of_megabytes_cuts_its_lines() -> None:
    result = CliRunner().invoke(command_that_raises(DataError("too wide", found="x" * 1_000_000)))
    assert len(result.stderr) < 5_000


def test_with_errors_of_clicks_own_errors_leaves_them_to_click() -> None:
    result = CliRunner().invoke(command_that_raises(click.UsageError("give one file")))
    assert result.exit_code == 2
    assert "Usage: " in result.stderr


def test_with_errors_in_a_deleted_working_directory_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    code = (
        "import os, sys; sys.path.insert(0, sys.argv.pop(1)); os.rmdir(os.getcwd()); from jobs.cli import main; main()"
    )
    command = [sys.executable, "-c", code, str(ROOT), "status", "--config", str(ROOT / "jobs/configs/cifar100.yaml")]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: the working directory was deleted\n")


def printed_to(stdout: object, code: str = PRINTS) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)  # type: ignore[call-overload, no-any-return] - any file


@pytest.mark.parametrize("code", [PRINTS, "import sys; sys.argv[1:] = ['--help']; from jobs.cli import main; main()"])
def test_print_text_to_a_full_stdout_is_one_message(code: str) -> None:
    with open("/dev/full", "w") as full:
        result = printed_to(full, code)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert "No space left on device" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr


def test_print_text_to_a_closed_pipe_ends_silently_with_the_code_of_sigpipe() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as pipe:
        result = printed_to(pipe)
    assert (result.returncode, result.stderr) == (141, "")


def test_print_text_with_stdout_closed_from_the_start_is_one_message_and_writes_into_no_file(tmp_path: Path) -> None:
    code = "import os, click\nfrom jobs.shell.command import print_text, with_errors\n"
    code += (
        "@click.command()\n@with_errors\ndef main():\n    with open('mine', 'w'):\n        os.system('echo child')\n"
    )
    code += "        print_text('x')\nmain()"
    script = tmp_path / "script.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}")
    command = ["sh", "-c", 'exec "$0" script.py >&-', sys.executable]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "found: stdout is closed" in result.stderr
    assert (tmp_path / "mine").read_text() == ""


def test_with_errors_with_a_full_stderr_still_has_the_exit_code() -> None:
    code = "import sys; sys.argv[1:] = ['status', '--config', 'none.yaml']; from jobs.cli import main; main()"
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, stderr=full, stdout=subprocess.PIPE, check=False
        )
    assert (result.returncode, result.stdout) == (2, b"")


def test_print_text_under_click_testing_goes_to_stdout() -> None:
    result = CliRunner().invoke(click.command()(with_errors(lambda: print_text("a"))))
    assert (result.stdout, result.exit_code) == ("a\n", 0)
