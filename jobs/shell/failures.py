"""Every error that a command can end with, as one message and an exit code.

Our own errors say what to do. Errors of the machine (a full disk, a closed pipe, no memory) and of libraries are
turned into ours here, in one place. Guarantee: no command ends in a traceback, unless FASTFILL_TRACEBACK=1 asks for
it. This module does not know the commands.
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
CLOSED_PIPE = 141  # what a shell reports of a program that SIGPIPE ended
_MOST_CHARACTERS = 2000  # per line
_AGAIN = "run the same command again: finished work is kept"
_CLICKS_OWN = (click.ClickException, click.exceptions.Exit, click.Abort)

_Answer = tuple[type[FastfillError], str, str]

_FULL: _Answer = (
    FastfillError,
    "the disk is full",
    f"free space there (`fastfill gc` removes files that no snapshot uses), then {_AGAIN}",
)
_NO_MEMORY: _Answer = (
    FastfillError,
    "memory ran out",
    f"use a machine with more memory, or smaller backfill.batch_size and plan.unit_images; then {_AGAIN}",
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
    errno.EROFS: (DataError, "the file system is read-only", "give a place that can be written"),
    errno.ENOENT: (DataError, "a file or folder is missing", "check the path"),
    errno.EISDIR: (DataError, "a folder is where a file is expected", "give the path of a file"),
    errno.ENOTDIR: (DataError, "a file is where a folder is expected", "give the path of a folder"),
    errno.EEXIST: (DataError, "a file is where a folder is expected", "give the path of a folder"),
    errno.ENAMETOOLONG: (DataError, "a path is too long", "give a shorter path"),
    errno.ELOOP: (DataError, "symbolic links lead in a circle", "mend the links"),
    errno.EIO: (FastfillError, "the disk failed", f"check the disk (`dmesg`), then {_AGAIN}"),
}


class Command(click.Command):
    """A click command whose help and usage errors, too, never end in a traceback."""

    def main(self, *args: Any, **extra: Any) -> Any:  # Any: as click has it
        """Run the command line."""
        with in_one_message():
            return super().main(*args, **extra)


class Group(Command, click.Group):
    """The same for a group of commands."""


@contextmanager
def in_one_message() -> Iterator[None]:
    """End with a message and an exit code if anything fails; click's own errors pass."""
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
    with suppress(OSError, ValueError):  # stderr may be closed or full: the exit code still tells
        if os.environ.get(TRACEBACK, "0") not in ("", "0"):
            click.echo("".join(traceback.format_exception(error)), err=True)
        click.secho(_shown(f"error: {summary}"), fg="red", bold=True, err=True)
        for line in details:
            click.echo(_shown(line), err=True)
    sys.exit(CLOSED_PIPE if isinstance(error, BrokenPipeError) else ours.exit_code)


def discard_unwritten(stream: IO[str] | None) -> None:
    """Drop what a stream could not write: else Python tries again at its end, and complains with a code of its own."""
    if stream is None:
        return
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def as_ours(error: BaseException) -> FastfillError:
    """The error of ours that an error contains, or that says the same; for anything unknown, that it is a bug."""
    ours = find_cause(error)
    if ours is not None:
        return ours
    chain = list(_chain(error))
    known = (_of_known(item) for item in sorted(chain, key=_has_no_number))
    return next((item for item in known if item is not None), None) or _of_ray(chain[-1]) or _bug(chain[-1])


def find_cause(error: BaseException | None) -> FastfillError | None:
    """The error of ours behind what Ray wrapped it in, or None."""
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
    """An error and what it was raised from; `cause` is where Ray keeps the error of a task."""
    seen: set[int] = set()
    item: object = error
    while isinstance(item, BaseException) and id(item) not in seen:
        seen.add(id(item))
        yield item
        item = getattr(item, "cause", None) or item.__cause__


def _has_no_number(error: BaseException) -> bool:
    """Ray's copy of a task's OSError has lost its number; the original, behind it, tells more."""
    return isinstance(error, OSError) and error.errno is None


def _of_known(error: BaseException) -> FastfillError | None:
    """What an error of the machine, of a text or of its nesting says; None for all others."""
    if isinstance(error, OSError):
        return _of_machine(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # the latter: of torch, of Ray
        kind, summary, remedy = _NO_MEMORY
        return kind(summary, found=_first_line(error), remedy=remedy)
    if isinstance(error, UnicodeError):
        return DataError("a text is not UTF-8", found=_first_line(error), remedy="save the file as UTF-8")
    if isinstance(error, RecursionError):
        return DataError("an input is nested too deeply", found=_first_line(error), remedy="write it flatter")
    return None


def _of_machine(error: OSError) -> FastfillError:
    names = (name for name in (error.filename, error.filename2) if name is not None)
    where = " -> ".join(os.fsdecode(name) if isinstance(name, bytes) else str(name) for name in names) or None
    found = error.strerror or _first_line(error)
    if error.errno == errno.ENOENT and where is None and _is_nowhere():
        return DataError("the working directory was deleted", remedy="change to a folder that exists (`cd`)")
    if isinstance(error, BrokenPipeError):
        return TransientError("the reader of the output closed it, or a connection was closed", found=found)
    if isinstance(error, ConnectionError | TimeoutError):
        return TransientError(
            "a connection failed", found=found, where=where, remedy=f"check the network, then {_AGAIN}"
        )
    unknown: _Answer = (FastfillError, "the operating system reported an error", f"see what was found, then {_AGAIN}")
    kind, summary, remedy = _ANSWERS.get(error.errno, unknown)
    return kind(summary, found=found, where=where, remedy=remedy)


def _of_ray(error: BaseException) -> FastfillError | None:
    if not type(error).__module__.startswith("ray.exceptions"):
        return None
    return FastfillError(
        "Ray could not finish a task",
        found=f"{type(error).__name__}: {_first_line(error)}",
        remedy=f"{_AGAIN}; {TRACEBACK}=1 shows Ray's own account, and Ray's log files have all of it",
    )


def _bug(error: BaseException) -> FastfillError:
    frames = traceback.extract_tb(error.__traceback__)
    return FastfillError(
        f"internal error: {type(error).__name__}: {_first_line(error)}",
        where=f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else None,
        remedy=f"this is a bug: run the same command with {TRACEBACK}=1, and report what it prints",
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
    """A line for a terminal: what is not printable is escaped, and what is too long is cut."""
    line = line if len(line) <= _MOST_CHARACTERS else f"{line[:_MOST_CHARACTERS]}..."
    return "".join(item if item.isprintable() or item == "\t" else repr(item)[1:-1] for item in line)
