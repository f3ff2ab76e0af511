"""Agree on which commits are removed: gc announces, whoever needs a commit may still object, gc confirms.

Between the commits and those who use them. All of it is one file, `index/collected.json`, changed by
compare-and-swap. Guarantee: a confirmed removal is never taken back, and one that was objected to is never
confirmed. Does not know who needs which commit.
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
from pipeline.run import Run
from pipeline.storage import objects
from pipeline.storage.documents import from_json, to_json

logger = logging.getLogger(__name__)
LEASE_SECONDS = 600.0
_RENEWALS = 3  # in one length: two may fail
_SLACK_SECONDS = 2.0  # object stores give times in whole seconds


_TRIES = 16


def claim(run: Run, number: int, *, cancel: bool) -> None:
    """Make sure that gc does not remove a commit that the caller has pinned, by a lease or by its hold on a tag.

    Args:
        run: whose commit.
        number: the commit.
        cancel: object to a removal that is announced; needs the right to write.

    Raises:
        Removed: gc has removed it, or is about to.
        SnapshotConflict: others kept changing the file at the same time.
    """
    found = read_removals(run)
    if cancel and number in found.announced:
        found = change(run, lambda now: replace(now, announced=tuple(item for item in now.announced if item != number)))
    if number in found.confirmed:
        raise removed(run, number)


def change(run: Run, decide: Callable[[Removals], Removals]) -> Removals:
    """Replace the file by what `decide` makes of it, again where others changed it meanwhile.

    Returns:
        what it says now.

    Raises:
        SnapshotConflict: others kept changing it.
    """
    for _ in range(_TRIES):
        now, version = read_versioned(run)
        wanted = decide(now)
        if replace(wanted, attempt_id=now.attempt_id) == now:
            return now
        try:
            swap(run, wanted, version)
            return wanted
        except objects.Changed:
            continue
    raise SnapshotConflict("others keep changing this file", where=run.collected, remedy="try again")


def swap(run: Run, wanted: Removals, version: str | None) -> str:
    """Store `wanted` where the file is still at `version`; returns the new version.

    Raises:
        storage.Changed: it is not.
    """
    stored = replace(wanted, attempt_id=uuid.uuid4().hex)  # so that two writers never write the same bytes
    return objects.compare_and_swap(run.collected, to_json(stored), version)


def read_versioned(run: Run) -> tuple[Removals, str | None]:
    """The file and its version; empty and None where there is none.

    Raises:
        DataError: it is damaged.
    """
    found = objects.read_versioned(run.collected)
    if found is None:
        return Removals(), None
    return from_json(Removals, found[0], run.collected), found[1]


@dataclass(frozen=True, slots=True)
class Removals:
    """The commits that gc removes, as `index/collected.json` says; `removals` has the rules.

    Attributes:
        announced: those that go unless somebody objects; until then they are whole.
        confirmed: those that are gone, or may be from one moment to the next.
        files: paths inside the run of what only confirmed commits named, as far as it is not deleted yet.
        attempt_id: of the one write that put the file there.
    """

    announced: tuple[int, ...] = ()
    confirmed: tuple[int, ...] = ()
    files: tuple[str, ...] = ()
    attempt_id: str = ""


def read_removals(run: Run) -> Removals:
    """Which commits gc has removed, or is about to.

    Raises:
        DataError: the file is damaged or of another format.
    """
    found = objects.read_versioned(run.collected)
    return from_json(Removals, found[0], run.collected) if found else Removals()


def removed(run: Run, number: int) -> Removed:
    """The error of whoever asks for a commit that gc has removed."""
    return Removed(
        "gc has removed this commit",
        expected="a commit that is kept",
        found=number,
        where=run.commit(number),
        remedy="take a later one; `gc --keep` keeps more of those to come",
    )


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
                objects.delete_files([self.uri])
            except (OSError, TransientError) as error:
                logger.warning("a lease is left to expire: %s (%s)", self.uri, error)

    def _renew(self) -> None:
        with self._writing:
            if not self._released.is_set():
                file = LeaseFile(self.commit, self._seconds, time.time() + self._seconds, self._id)
                objects.put(self.uri, to_json(file))


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
    for uri, stat in objects.list_stats(run.path("index", "leases"), ".json"):
        age = now_seconds - stat.modified_seconds - _SLACK_SECONDS
        commit, seconds = None, LEASE_SECONDS
        try:
            lease = from_json(LeaseFile, objects.read_bytes(uri), uri)
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
