"""Small files that only the run's current writer may replace."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.errors import SnapshotConflict
from pipeline.storage import interface, objects

TRIES = 16  # of a compare-and-swap that fails because others change the object

Check = Callable[[], None]
"""Raises SnapshotConflict if another driver owns the run."""


def anyone() -> None:
    """The check of a command that a person runs: it need not own the run."""


def replace(uri: str, data: bytes, check: Check) -> None:
    """Replace an object if the caller still owns the run.

    The version is read before the check, so a successor's write after the check makes the replacement fail.

    Raises:
        SnapshotConflict: another driver owns the run, or others kept replacing the object.
    """
    for _ in range(TRIES):
        found = objects.read_versioned(uri)
        check()
        try:
            objects.compare_and_swap(uri, data, found[1] if found else None)
            return
        except interface.Changed:
            continue
    raise SnapshotConflict("others keep changing this file", where=uri, remedy="run the same command again")
