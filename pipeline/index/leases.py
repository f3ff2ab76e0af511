"""Leases and removals: how readers and gc agree on which commits are removed.

A reader's lease, `index/leases/<id>.json`, keeps a commit while the reader renews it. The removals are one file,
`index/collected.json`, changed by compare-and-swap: gc announces a removal, readers and movers of tags may object, gc
confirms. A confirmed removal is never withdrawn, and one that was objected to is never confirmed.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from pipeline.errors import DataError, Removed, SnapshotConflict, TransientError
from pipeline.index.fenced import TRIES
from pipeline.run import Run
from pipeline.storage import documents, interface, objects

logger = logging.getLogger(__name__)
LEASE_SECONDS = 600.0
_RENEWALS = 3  # per LEASE_SECONDS, so that two may fail
_SLACK_SECONDS = 2.0  # object stores give times in whole seconds


@dataclass(frozen=True, slots=True)
class Removals:
    """The commits that gc removes, as in `index/collected.json`."""

    announced: tuple[int, ...] = ()  # removed unless somebody objects; whole until then
    confirmed: tuple[int, ...] = ()  # removed, or about to be
    files: tuple[str, ...] = ()  # paths inside the run that only confirmed commits named, and that are not deleted yet
    attempt_id: str = ""  # of the write of the file


@dataclass(frozen=True, slots=True)
class LeaseFile:
    """The content of a lease. It expires `seconds` after the store wrote it; the last two fields are for people."""

    commit: int
    seconds: float
    expires_unix_seconds: float
    attempt_id: str


class Lease:
    """Keeps a commit from gc until its process releases it or drops the object."""

    def __init__(self, run: Run, commit: int, seconds: float = LEASE_SECONDS) -> None:
        """Write the lease, and start the thread that renews it.

        Raises:
            OSError: nothing can be written here.
        """
        self.commit, self._process = commit, os.getpid()
        self._id, self._seconds = uuid.uuid4().hex, seconds
        self.uri = run.path("index", "leases", f"{self._id}.json")
        self._writing, self._released = threading.Lock(), threading.Event()
        self._renew()
        weakref.finalize(self, _end_renewal, self._released, self._process).atexit = False
        arguments = (weakref.ref(self), self._released, seconds / _RENEWALS)
        threading.Thread(target=_keep_alive, args=arguments, name="lease", daemon=True).start()

    def release(self) -> None:
        """Give the commit up; a lease that cannot be deleted expires. Does nothing in a forked child."""
        if os.getpid() != self._process:
            return
        with self._writing:
            self._released.set()
            try:
                objects.delete_files([self.uri])
            except (OSError, TransientError) as error:
                logger.warning("a lease could not be deleted and will expire: %s (%s)", self.uri, error)

    def _renew(self) -> None:
        with self._writing:
            if not self._released.is_set():
                file = LeaseFile(self.commit, self._seconds, time.time() + self._seconds, self._id)
                objects.put(self.uri, documents.encode(file))


def take(run: Run, commit: int) -> Lease | None:
    """Take a lease on a commit; None if it cannot be written.

    Raises:
        Removed: gc has removed the commit.
    """
    lease = None
    try:
        lease = Lease(run, commit)
    except OSError as error:  # a machine that cannot write may still read
        logger.info("reading commit %d without a lease: %s cannot be written (%s)", commit, run.uri, error)
    try:
        claim(run, commit, cancel=lease is not None)
    except OSError as error:
        if lease is None:
            raise
        logger.info("reading commit %d without a lease: %s cannot be written (%s)", commit, run.uri, error)
        lease.release()
        claim(run, commit, cancel=False)
        return None
    except BaseException:
        if lease is not None:
            lease.release()
        raise
    return lease


@contextmanager
def hold(run: Run, commit: int) -> Iterator[None]:
    """Keep a commit from gc for the length of a `with`; raises as `take`."""
    lease = take(run, commit)
    try:
        yield
    finally:
        if lease is not None:
            lease.release()


def find_leases(run: Run, now_seconds: float) -> tuple[set[int], dict[str, float]]:
    """The commits of live leases; and by URI for how many seconds each of the others has been expired.

    Raises:
        DataError: a lease that may be live cannot be read.
    """
    pinned, expired = set(), {}
    for uri, stat in objects.list_stats(run.path("index", "leases"), ".json"):
        age = now_seconds - stat.modified_seconds - _SLACK_SECONDS
        commit, seconds = None, LEASE_SECONDS
        try:
            lease = documents.parse(LeaseFile, objects.read_bytes(uri), uri, must_be_checked=True)
            commit, seconds = lease.commit, lease.seconds
        except FileNotFoundError:
            continue  # released just now
        except DataError:
            if age <= seconds:
                raise
        if commit is None or age > seconds:
            expired[uri] = age - seconds
        else:
            pinned.add(commit)
    return pinned, expired


def claim(run: Run, number: int, *, cancel: bool) -> None:
    """Make sure that gc does not remove a commit that the caller has pinned by a lease or a tag.

    With `cancel`, which needs the right to write, an announced removal is withdrawn.

    Raises:
        Removed: gc has removed it, or is about to.
        SnapshotConflict: others kept changing the file at the same time.
    """
    found = read_removals(run)
    if cancel and number in found.announced:
        found = change_removals(
            run, lambda now: replace(now, announced=tuple(item for item in now.announced if item != number))
        )
    if number in found.confirmed:
        raise removed(run, number)


def read_removals(run: Run) -> Removals:
    """The commits that gc has removed, or is about to.

    Raises:
        DataError: the file is damaged or of another format.
    """
    return read_removals_versioned(run)[0]


def read_removals_versioned(run: Run) -> tuple[Removals, str | None]:
    """The removals and the file's version; empty and None without a file.

    Raises:
        DataError: it is damaged.
    """
    found = objects.read_versioned(run.collected)
    if found is None:
        return Removals(), None
    return documents.parse(Removals, found[0], run.collected, must_be_checked=True), found[1]


def change_removals(run: Run, decide: Callable[[Removals], Removals]) -> Removals:
    """Replace the removals by the result of `decide` and return it; if others changed them meanwhile, decide again.

    Raises:
        SnapshotConflict: others kept changing the file.
    """
    for _ in range(TRIES):
        now, version = read_removals_versioned(run)
        wanted = decide(now)
        if replace(wanted, attempt_id=now.attempt_id) == now:
            return now
        try:
            swap_removals(run, wanted, version)
            return wanted
        except interface.Changed:
            continue
    raise SnapshotConflict("others keep changing this file", where=run.collected, remedy="try again")


def swap_removals(run: Run, wanted: Removals, version: str | None) -> str:
    """Store `wanted` if the file is still at `version`; returns the new version.

    Raises:
        interface.Changed: it is not.
    """
    stored = replace(wanted, attempt_id=uuid.uuid4().hex)  # so that two writers never write the same bytes
    return objects.compare_and_swap(run.collected, documents.encode(stored), version)


def removed(run: Run, number: int) -> Removed:
    """The error for a commit that gc has removed."""
    return Removed(
        "gc has removed this commit",
        expected="a commit that is kept",
        found=number,
        where=run.commit(number),
        remedy="use a later one; `fastfill gc --keep` keeps more commits from now on",
    )


def _end_renewal(released: threading.Event, process: int) -> None:
    """Does nothing in a forked child: it has no thread, and one of the parent's may hold the event's lock."""
    if os.getpid() == process:
        released.set()


def _keep_alive(lease: weakref.ref[Lease], released: threading.Event, pause_seconds: float) -> None:
    while not released.wait(pause_seconds):
        found = lease()
        if found is None:
            return
        try:
            found._renew()
        except (OSError, TransientError) as error:
            logger.warning("a lease could not be renewed and will be tried again: %s (%s)", found.uri, error)
        del found
