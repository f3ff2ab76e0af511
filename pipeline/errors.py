"""Failures, grouped by what the caller does next.

    FastfillError                exit 1   something failed; the message says what
    |-- ConfigError              exit 2   fix the config and run again
    |-- DataError                exit 2   an input breaks its contract; fix the data and run again
    |-- TransientError           exit 1   retried already, gave up; run again later
    `-- Refused                  exit 3   nothing is broken, but going on would be wrong
        |-- IncompatibleRun               this run was started with something else
        |-- SnapshotConflict              another writer owns the run
        |-- Removed                       gc has removed this snapshot
        `-- GateRefused                   a snapshot failed its quality gate

Every message says what was expected, what was found, where, and what to do. Errors survive pickling, so a worker's
error reaches the user unchanged.
"""

from __future__ import annotations


class FastfillError(Exception):
    """Base of every error that a user is meant to read."""

    exit_code = 1

    def __init__(
        self,
        summary: str,
        *,
        expected: object = None,
        found: object = None,
        where: object = None,
        remedy: str | None = None,
    ) -> None:
        self.summary = summary
        self.details = {"expected": expected, "found": found, "where": where, "remedy": remedy}
        super().__init__(summary)

    def __str__(self) -> str:
        labels = {"expected": "expected", "found": "found", "where": "where", "remedy": "what to do"}
        details = {key: _text(value) for key, value in self.details.items() if value is not None}
        return "\n".join([self.summary, *(f"  {labels[key]}: {text}" for key, text in details.items())])

    def __reduce__(self) -> tuple[object, ...]:
        plain = (str, int, float, type(None))  # other values are sent as text: they may not be picklable
        details = {key: value if isinstance(value, plain) else _text(value) for key, value in self.details.items()}
        return (_rebuild, (type(self), self.summary, details))


class ConfigError(FastfillError):
    """The config is wrong: fix it and run again."""

    exit_code = 2


class DataError(FastfillError):
    """An input breaks its contract: fix the data and run again."""

    exit_code = 2


class TransientError(FastfillError):
    """The outside world failed after all retries: run again later."""


class Refused(FastfillError):
    """Going on would be wrong."""

    exit_code = 3


class IncompatibleRun(Refused):
    """The run under this URI was started with other inputs or settings."""


class SnapshotConflict(Refused):
    """Another writer published to this run, or took it over."""


class Removed(Refused):
    """The requested snapshot was removed by gc."""


class GateRefused(Refused):
    """A snapshot failed its quality gate and is not promoted."""


def _text(value: object) -> str:
    """A detail as text. A tuple of texts becomes a list; a tuple of numbers is a shape, `(2, 8)`."""
    is_list = isinstance(value, tuple) and any(isinstance(item, str) for item in value)
    return ", ".join(map(str, value)) if is_list else str(value)  # type: ignore[call-overload]


def _rebuild(cls: type[FastfillError], summary: str, details: dict[str, object]) -> FastfillError:
    error = cls(summary)
    error.details = details
    return error
