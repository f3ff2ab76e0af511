"""What every command shares: its options, its errors and exit codes, and where it prints.

People read stderr; with `--json` a program reads one JSON document from stdout. Exit codes: 0 done,
1 failed, 2 bad config or input, 3 refused. Nothing heavy is imported before a command runs.
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
    """Seconds from 0 on, without NaN and infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # Any: click's own
        """The number, or a usage error."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


def command(name: str) -> Callable[[Callable[..., None]], click.Command]:
    """A click command with `--config`, `--set` and `--json`; its docstring is its help."""
    options = [
        click.option("--config", "config_path", required=True, metavar="FILE", help="The run's YAML file."),
        click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting: a.b=value."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document on stdout."),
    ]

    def decorate(function: Callable[..., None]) -> click.Command:
        wrapped = with_errors(function)
        for option in reversed(options):
            wrapped = option(wrapped)
        return click.command(name, Command, context_settings={"help_option_names": ["-h", "--help"]})(wrapped)

    return decorate


def with_errors(function: Callable[..., None]) -> Callable[..., None]:
    """Turn every error into a clear message and an exit code, wherever it was raised."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:  # Any: click decides what a command is called with
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", RAY_NOISE)  # Ray reads it when it is imported
        try:
            with in_one_message(), _results_alone() as stdout:
                click.get_current_context().meta[_STDOUT] = stdout
                function(*args, **kwargs)
        except KeyboardInterrupt:
            click.secho("stopped; what is durable is kept, the same command goes on from there", err=True)
            if ray := sys.modules.get("ray"):
                ray.shutdown()  # what other threads wait for ends, and so do they
            sys.exit(130)

    return run


def console() -> Console:
    """Where people read: stderr. Strings are data, in which `[a]` and `:b:` mean nothing; style comes as Text."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def print_json(document: object) -> None:
    """Where programs read: one JSON document on stdout.

    Raises:
        ValueError: a number is not finite, which JSON cannot say; a result says null there.
    """
    print_text(json.dumps(document, indent=1, allow_nan=False))


def print_text(text: str) -> None:
    """To stdout, which belongs to what was asked for; silent if its reader has gone.

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
            remedy="the work itself is done: run the same command again with stdout where it can be written",
        ) from error


def _open_missing_streams() -> None:
    """Take the places of stdin, stdout and stderr if the caller closed them.

    Else the next file that is opened gets the place, and what is printed is written into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest free place


@contextmanager
def _results_alone() -> Iterator[IO[str] | None]:
    """stdout for results; whatever else is written there meanwhile, by native code as well, goes to stderr."""
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
        ctypes.CDLL(None).fflush(None)  # what native code has in its own buffer
        os.dup2(kept, number)
        os.close(kept)
