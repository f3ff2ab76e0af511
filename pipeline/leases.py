"""Reader leases: what gc must leave alone although no tag and no rule keeps it.

Beside the commits. A lease is a small object, `index/leases/<id>.json`, that names one commit; gc keeps that
commit while the lease is there and not older than its own length, by the store's clock: a reader that dies
keeps nothing for long. A reader holds its lease for as long as it lives, and not only while it opens: on a
network file system an unlinked segment breaks whoever has it mapped. A reader that cannot write its lease (no
permission, a full disk) reads without one. A lease belongs to the process that took it: in a forked child the thread
that renews it is gone, so a child takes a lease of its own and leaves its parent's alone.

Guarantee: of a reader that takes a lease and then asks `removals.claim`, and a gc that announces and then
looks for leases, at least one sees the other. Does not decide what is removed.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pipeline import removals, storage
from pipeline.documents import from_json, to_json
from pipeline.errors import DataError, TransientError
from pipeline.run import Run

logger = logging.getLogger(__name__)

LEASE_SECONDS = 600.0
_RENEWALS = 3  # in one length: two may fail
_SLACK_SECONDS = 2.0  # object stores give times in whole seconds


@dataclass(frozen=True, slots=True)
class LeaseFile:
    """What a lease says. It ends `seconds` after the store wrote it; the last two fields are for people."""

    commit: int
    seconds: float
    expires_unix_seconds: float
    attempt_id: str


class Lease:
    """Keeps a commit from gc until its process releases it, or does not refer to it any more."""

    def __init__(self, run: Run, commit: int, seconds: float = LEASE_SECONDS) -> None:
        """Write the lease, and renew it in a thread from now on.

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
        """Give the commit up; what cannot be deleted now expires by itself. In a forked child nothing happens."""
        if os.getpid() != self._process:
            return
        with self._writing:
            self._released.set()
            try:
                storage.delete_files([self.uri])
            except (OSError, TransientError) as error:
                logger.warning("a lease is left to expire: %s (%s)", self.uri, error)

    def _renew(self) -> None:
        with self._writing:
            if not self._released.is_set():
                file = LeaseFile(self.commit, self._seconds, time.time() + self._seconds, self._id)
                storage.put(self.uri, to_json(file))


def _end_renewal(released: threading.Event, process: int) -> None:
    """In a forked child there is no thread to end, and the event's lock may be held for ever by one of the parent."""
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
            logger.warning("a lease is not renewed, the next try follows: %s (%s)", found.uri, error)
        del found


def take(run: Run, commit: int) -> Lease | None:
    """A lease on a commit that gc has not removed; None if it cannot be written.

    Raises:
        Removed: gc has removed the commit.
    """
    lease = None
    try:
        lease = Lease(run, commit)
    except OSError as error:  # whatever keeps a machine from writing does not keep it from reading
        logger.info("reading commit %d without a lease: %s cannot be written (%s)", commit, run.uri, error)
    try:
        removals.claim(run, commit, cancel=lease is not None)
    except OSError as error:
        if lease is None:
            raise
        logger.info("reading commit %d without a lease: %s cannot be written (%s)", commit, run.uri, error)
        lease.release()
        removals.claim(run, commit, cancel=False)
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
    """The commits that live leases name, and for how long each of the others has been over.

    Args:
        run: whose.
        now_seconds: the time by the store's clock.

    Returns:
        the numbers of the commits; and by URI the seconds since a lease expired.

    Raises:
        DataError: a lease that may be live cannot be read.
    """
    pinned, expired = set(), {}
    for uri, stat in storage.list_stats(run.path("index", "leases"), ".json"):
        age = now_seconds - stat.modified_seconds - _SLACK_SECONDS
        commit, seconds = None, LEASE_SECONDS
        try:
            lease = from_json(LeaseFile, storage.read_bytes(uri), uri)
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
