"""Every error ends a command with one message and an exit code.

Errors of the machine (full disk, closed pipe, no memory) and of libraries become FastfillErrors here. No command ends
in a traceback unless FASTFILL_TRACEBACK=1 is set.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, NoReturn

import click

from pipeline.errors import DataError, FastfillError, TransientError

TRACEBACK = "FASTFILL_TRACEBACK"
CLOSED_PIPE = 141  # a shell's exit code for a program that was ended by SIGPIPE
_MOST_CHARACTERS = 2000  # per line
_AGAIN = "run the same command again: finished work is kept"
_CLICKS_OWN = (click.ClickException, click.exceptions.Exit, click.Abort)

_Answer = tuple[type[FastfillError], str, str]

_FULL: _Answer = (
    FastfillError,
    "the disk is full",
    f"free disk space (`fastfill gc` removes files that no snapshot uses), then {_AGAIN}",
)
_NO_MEMORY: _Answer = (
    FastfillError,
    "memory ran out",
    f"use a machine with more memory, or lower backfill.batch_size and plan.unit_images; then {_AGAIN}",
)
_REFUSED: _Answer = (
    DataError,
    "access is refused",
    "check the permissions and, for s3://, the credentials",
)
_TOO_MANY: _Answer = (FastfillError, "too many files are open", f"raise the limit (`ulimit -n 65536`), then {_AGAIN}")
_ANSWERS: dict[int | None, _Answer] = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.ENOMEM: _NO_MEMORY,
    errno.EACCES: _REFUSED,
    errno.EPERM: _REFUSED,
    errno.EMFILE: _TOO_MANY,
    errno.ENFILE: _TOO_MANY,
    errno.EROFS: (DataError, "the file system is read-only", "name a folder that can be written"),
    errno.ENOENT: (DataError, "a file or folder is missing", "check the path"),
    errno.EISDIR: (DataError, "a file is expected, and the path is a folder", "give the path of a file"),
    errno.ENOTDIR: (DataError, "a folder is expected, and the path is a file", "give the path of a folder"),
    errno.EEXIST: (DataError, "a folder is expected, and the path is a file", "give the path of a folder"),
    errno.ENAMETOOLONG: (DataError, "a path is too long", "give a shorter path"),
    errno.ELOOP: (DataError, "symbolic links form a circle", "correct the links"),
    errno.EIO: (FastfillError, "the disk failed", f"check the disk (`dmesg`), then {_AGAIN}"),
}


class Command(click.Command):
    """A click command that never ends in a traceback, not even from its help or a usage error."""

    def main(self, *args: Any, **extra: Any) -> Any:  # Any: as click has it
        """Run the command line."""
        with in_one_message():
            return super().main(*args, **extra)


class Group(Command, click.Group):
    """A group of such commands, whose help lists them in sections."""

    def __init__(self, *args: Any, **extra: Any) -> None:  # Any: as click has it
        super().__init__(*args, **extra)
        self.sections: dict[str, list[click.Command]] = {}

    def add_section(self, title: str, *commands: click.Command) -> None:
        """Add commands under a title."""
        self.sections[title] = list(commands)
        for command in commands:
            self.add_command(command)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each section with its commands in the order in which they were added."""
        names = [command.name or "" for commands in self.sections.values() for command in commands]
        limit = formatter.width - 6 - max(map(len, names))
        for title, commands in self.sections.items():
            with formatter.section(title):
                formatter.write_dl([(item.name or "", item.get_short_help_str(limit)) for item in commands])


@contextmanager
def in_one_message() -> Iterator[None]:
    """End the process with a message and an exit code on any error, except click's own."""
    try:
        yield
    except _CLICKS_OWN:
        raise
    except Exception as error:  # noqa: BLE001 (not swallowed: it ends the command)
        fail(error)


def fail(error: Exception) -> NoReturn:
    """Print an error as one message on stderr, and exit with its code."""
    ours = as_ours(error)
    discard_unwritten(sys.stdout)
    summary, *details = str(ours).splitlines() or [""]
    with suppress(OSError, ValueError):  # stderr may be closed or full: the exit code remains
        if os.environ.get(TRACEBACK, "0") not in ("", "0"):
            click.echo("".join(traceback.format_exception(error)), err=True)
        click.secho(_shown(f"error: {summary}"), fg="red", bold=True, err=True)
        for line in details:
            click.echo(_shown(line), err=True)
    sys.exit(CLOSED_PIPE if isinstance(error, BrokenPipeError) else ours.exit_code)


def discard_unwritten(stream: IO[str] | None) -> None:
    """Drop output that a stream could not write; Python would try again at exit and end with another exit code."""
    if stream is None:
        return
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def as_ours(error: BaseException) -> FastfillError:
    """The FastfillError behind an error, or one that says the same; an unknown error is reported as a bug."""
    ours = find_cause(error)
    if ours is not None:
        return ours
    chain = list(_chain(error))
    known = (_of_known(item) for item in sorted(chain, key=_has_no_number))
    return next((item for item in known if item is not None), None) or _of_ray(chain[-1]) or _bug(chain[-1])


def find_cause(error: BaseException | None) -> FastfillError | None:
    """The FastfillError that another error (such as Ray's) wraps, or None."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        item = waiting.pop()
        if item is None or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, FastfillError) and type(item).__module__ == "pipeline.errors":
            return item
        waiting += [getattr(item, "cause", None), item.__cause__, item.__context__]
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and its causes; Ray keeps the error of a task in `cause`."""
    seen: set[int] = set()
    item: object = error
    while isinstance(item, BaseException) and id(item) not in seen:
        seen.add(id(item))
        yield item
        item = getattr(item, "cause", None) or item.__cause__


def _has_no_number(error: BaseException) -> bool:
    """True for Ray's copy of a task's OSError, which lacks the number; the original follows in the chain."""
    return isinstance(error, OSError) and error.errno is None


def _of_known(error: BaseException) -> FastfillError | None:
    """The FastfillError for an error of the machine or of an input's text; None for other errors."""
    if isinstance(error, OSError):
        return _of_machine(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's and Ray's class
        kind, summary, remedy = _NO_MEMORY
        return kind(summary, found=_first_line(error), remedy=remedy)
    if isinstance(error, UnicodeError):
        return DataError("a text is not UTF-8", found=_first_line(error), remedy="save the file as UTF-8")
    if isinstance(error, RecursionError):
        return DataError(
            "an input is nested too deeply", found=_first_line(error), remedy="use fewer levels of nesting"
        )
    return None


def _of_machine(error: OSError) -> FastfillError:
    names = (name for name in (error.filename, error.filename2) if name is not None)
    where = " -> ".join(os.fsdecode(name) if isinstance(name, bytes) else str(name) for name in names) or None
    found = error.strerror or _first_line(error)
    if error.errno == errno.ENOENT and where is None and _is_nowhere():
        return DataError("the working directory was deleted", remedy="change to a folder that exists (`cd`)")
    if isinstance(error, BrokenPipeError):
        return TransientError("the output or a connection was closed by its reader", found=found)
    if isinstance(error, ConnectionError | TimeoutError):
        return TransientError(
            "a connection failed", found=found, where=where, remedy=f"check the network, then {_AGAIN}"
        )
    unknown: _Answer = (FastfillError, "the operating system reported an error", f"correct the cause, then {_AGAIN}")
    kind, summary, remedy = _ANSWERS.get(error.errno, unknown)
    return kind(summary, found=found, where=where, remedy=remedy)


def _of_ray(error: BaseException) -> FastfillError | None:
    if not type(error).__module__.startswith("ray.exceptions"):
        return None
    return FastfillError(
        "Ray could not finish a task",
        found=f"{type(error).__name__}: {_first_line(error)}",
        remedy=f"{_AGAIN}; {TRACEBACK}=1 prints Ray's traceback, and Ray's log files have the details",
    )


def _bug(error: BaseException) -> FastfillError:
    frames = traceback.extract_tb(error.__traceback__)
    return FastfillError(
        f"internal error: {type(error).__name__}: {_first_line(error)}",
        where=f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else None,
        remedy=f"this is a bug: run the same command with {TRACEBACK}=1, and report its output",
    )


def _is_nowhere() -> bool:
    try:
        os.getcwd()
    except OSError:
        return True
    return False


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _shown(line: str) -> str:
    """A line for a terminal: unprintable characters are escaped, and a long line is cut."""
    line = line if len(line) <= _MOST_CHARACTERS else f"{line[:_MOST_CHARACTERS]}..."
    return "".join(item if item.isprintable() or item == "\t" else repr(item)[1:-1] for item in line)
