"""The options, exit codes and output streams that all commands share.

Text for people goes to stderr; with `--json`, one JSON document goes to stdout. Exit codes: 0 done, 1 failed, 2 bad
config or input, 3 refused. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import IO, TYPE_CHECKING, Any

import click

from jobs.shell.failures import CLOSED_PIPE, Command, discard_unwritten, in_one_message
from jobs.shell.ray_session import RAY_NOISE
from pipeline.errors import FastfillError

if TYPE_CHECKING:
    from rich.console import Console


_STDOUT = "jobs.stdout"


class Seconds(click.FloatRange):
    """A finite number of seconds."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # Any: click's own
        """The number, or a usage error."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


def command(name: str) -> Callable[[Callable[..., None]], click.Command]:
    """A click command with `--config`, `--set` and `--json`; its docstring is its help."""
    options = [
        click.option("--config", "config_path", required=True, metavar="FILE", help="The run's YAML config file."),
        click.option(
            "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a config key: a.b=value."
        ),
        click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document on stdout."),
    ]

    def decorate(function: Callable[..., None]) -> click.Command:
        wrapped = with_errors(function)
        for option in reversed(options):
            wrapped = option(wrapped)
        return click.command(name, Command, context_settings={"help_option_names": ["-h", "--help"]})(wrapped)

    return decorate


def with_errors(function: Callable[..., None]) -> Callable[..., None]:
    """End a command with a message and an exit code on any error, and keep stdout for its result."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:  # Any: click decides what a command is called with
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", RAY_NOISE)  # Ray reads it when it is imported
        try:
            with in_one_message(), _results_alone() as stdout:
                click.get_current_context().meta[_STDOUT] = stdout
                function(*args, **kwargs)
        except KeyboardInterrupt:
            click.secho("stopped; finished work is kept: run the same command again to continue", err=True)
            if ray := sys.modules.get("ray"):
                ray.shutdown()  # ends threads that wait for Ray
            sys.exit(130)

    return run


def console() -> Console:
    """The console for people, on stderr. Strings are printed as they are: `[a]` and `:b:` are no markup."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def print_json(document: object) -> None:
    """Print the result for programs: one JSON document on stdout.

    Raises:
        ValueError: a number is not finite; JSON has no such numbers.
    """
    print_text(json.dumps(document, indent=1, allow_nan=False))


def print_text(text: str) -> None:
    """Print to stdout; if its reader has closed it, exit without a message.

    Raises:
        FastfillError: stdout is closed or full.
    """
    stdout: IO[str] | None = click.get_current_context().meta[_STDOUT]
    try:
        if stdout is None:
            raise OSError(errno.EBADF, "stdout is closed")
        click.echo(text, file=stdout)
        stdout.flush()
    except OSError as error:
        discard_unwritten(stdout)
        if isinstance(error, BrokenPipeError):
            sys.exit(CLOSED_PIPE)
        raise FastfillError(
            "the result cannot be written",
            found=error.strerror,
            where="stdout",
            remedy="the work itself is done: run the same command again with a stdout that can be written",
        ) from error


def _open_missing_streams() -> None:
    """Open /dev/null in place of stdin, stdout and stderr that the caller closed.

    Otherwise the next file to be opened would take the number, and printed text would be written into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number


@contextmanager
def _results_alone() -> Iterator[IO[str] | None]:
    """Keep stdout for results: everything else that is written to it, also by native code, goes to stderr."""
    _open_missing_streams()
    stdout = sys.stdout
    try:
        number, stderr = stdout.fileno(), sys.stderr.fileno()
    except (AttributeError, OSError):  # not a file: a test's buffer, a notebook
        with redirect_stdout(sys.stderr):
            yield stdout
        return
    stdout.flush()
    kept = os.dup(number)
    os.dup2(stderr, number)
    try:
        with redirect_stdout(sys.stderr), os.fdopen(os.dup(kept), "w", encoding="utf-8") as results:
            yield results
    finally:
        ctypes.CDLL(None).fflush(None)  # the buffer of native code
        os.dup2(kept, number)
        os.close(kept)
