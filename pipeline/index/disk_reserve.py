"""A reserve file, `index/reserve`, that gc deletes to make room for its own small writes on a full disk.

gc has to announce removals before it removes anything, so it cannot free the first byte without a write. The driver
writes the file when it takes the run over, and each gc writes it again. Nothing reads it. Object stores are never full
and have none.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import TypeVar

from pipeline.errors import FastfillError
from pipeline.run import Run
from pipeline.storage import objects
from pipeline.storage.interface import is_full

logger = logging.getLogger(__name__)

T = TypeVar("T")

SIZE_BYTES = 2**18  # gc lists the files to delete, about 90 bytes for each


def keep(run: Run) -> None:
    """Write the reserve if it is missing; a disk that is full now goes without it."""
    where = _path(run)
    if not objects.is_local(where) or objects.exists(where):
        return
    try:
        objects.put(where, random.Random(0).randbytes(SIZE_BYTES))  # zeros may take no room: some disks compress
    except OSError as error:
        if not is_full(error):
            raise
        logger.info("the disk is full: cannot write gc's reserve %s", where)


def with_room(run: Run, write: Callable[[], T]) -> T:
    """The result of `write`; if the disk is full, the reserve is deleted and `write` is called once more.

    Raises:
        FastfillError: the disk is still full; the reserve is restored.
    """
    try:
        return write()
    except OSError as error:
        if not is_full(error):
            raise
    objects.delete_files([_path(run)])
    try:
        return write()
    except OSError as error:
        if not is_full(error):
            raise
        keep(run)
        raise FastfillError(
            "the disk is full",
            expected="about 1 MB free: gc must write a small list first",
            found=error.strerror,
            where=error.filename,
            remedy="delete a file there that is not the run's, then run gc again",
        ) from error


def _path(run: Run) -> str:
    return run.path("index", "reserve")
