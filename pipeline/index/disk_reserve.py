"""Room for gc on a full disk: a file without use, which gc deletes if its own small writes do not fit.

gc has to announce what it removes before it may remove it, so it cannot free the first byte without a write.
Beside the commits; the driver writes the file, `index/reserve`, when it takes the run over, and each gc writes it
again. An object store is never full and has none. Guarantee: nothing reads the file. A run without it, such as one of
an earlier version, only lacks the room. Does not know what gc writes.
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
    """Write the reserve where there is none; a disk that is full now goes without."""
    where = _path(run)
    if not objects.is_local(where) or objects.exists(where):
        return
    try:
        objects.put(where, random.Random(0).randbytes(SIZE_BYTES))  # zeros may take no room: some disks compress
    except OSError as error:
        if not is_full(error):
            raise
        logger.info("the disk is full: there is no reserve for gc in %s", where)


def with_room(run: Run, write: Callable[[], T]) -> T:
    """What `write` returns; if the disk is full, it is called once more after the reserve is deleted.

    Raises:
        FastfillError: that is not enough; the reserve is there again.
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
            expected="a little room: gc notes what it removes before it removes it",
            found=error.strerror,
            where=error.filename,
            remedy="free space there by hand, 1 MB is enough (a file that is not the run's), then run gc again",
        ) from error


def _path(run: Run) -> str:
    return run.path("index", "reserve")
