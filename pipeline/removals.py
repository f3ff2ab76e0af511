"""Agree on which commits are removed: gc announces, whoever needs a commit may still object, gc confirms.

Between the commits and those who use them. All of it is one file, `index/collected.json`, changed by
compare-and-swap. Guarantee: a confirmed removal is never taken back, and one that was objected to is never
confirmed. Does not know who needs which commit.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace

from pipeline import storage
from pipeline.commits import Removals, read_removals, removed
from pipeline.documents import from_json, to_json
from pipeline.errors import SnapshotConflict
from pipeline.run import Run

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
        except storage.Changed:
            continue
    raise SnapshotConflict("others keep changing this file", where=run.collected, remedy="try again")


def swap(run: Run, wanted: Removals, version: str | None) -> str:
    """Store `wanted` where the file is still at `version`; returns the new version.

    Raises:
        storage.Changed: it is not.
    """
    stored = replace(wanted, attempt_id=uuid.uuid4().hex)  # so that two writers never write the same bytes
    return storage.compare_and_swap(run.collected, to_json(stored), version)


def read_versioned(run: Run) -> tuple[Removals, str | None]:
    """The file and its version; empty and None where there is none.

    Raises:
        DataError: it is damaged.
    """
    found = storage.read_versioned(run.collected)
    if found is None:
        return Removals(), None
    return from_json(Removals, found[0], run.collected), found[1]
