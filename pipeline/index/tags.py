"""Snapshots of the index: immutable numbered commits, and tags that point to them.

After the segments, before search. Commit n names every segment of the snapshot in which waves 1..n are
embedded. Guarantee: a commit is created whole or not at all, once; one writer at a time publishes, in
order; `prod` only ever points to a commit that was published, and goes back by `rollback` alone. The
`candidate` tag is the writer's: it holds the last published commit and the epoch of whoever may publish
the next. Knows nothing of what is inside a segment.

An object store settles a write whose answer was lost by reading back, and takes equal bytes for its own
(`object_store`). So no two writes of a tag or a commit are ever equal: each has an `attempt_id`. That also
keeps the version of a tag, which may be a digest of its content, from ever coming back.
"""

from __future__ import annotations

import contextlib
import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from pipeline.errors import DataError, GateRefused, Refused, Removed, SnapshotConflict
from pipeline.index import retention
from pipeline.index.commits import Commit, read_commit
from pipeline.index.fenced import Check, anyone
from pipeline.index.retention import read_removals
from pipeline.run import Run
from pipeline.storage import objects
from pipeline.storage.documents import from_json, to_json

CANDIDATE = "candidate"
PROD = "prod"
_TRIES = 16
_TAG_FILE = re.compile(r"/([^/]+)\.json$")
_COMMIT_FILE = re.compile(r"/(\d{20})\.json$")


@dataclass(frozen=True, slots=True)
class Tag:
    """Where a tag points.

    Attributes:
        commit: the commit's number; None in a candidate tag before the first commit.
        epoch: of the writer that owns the run; only in the candidate tag.
        previous: the commit that the tag pointed to before, which `rollback` goes back to.
        pinned: set by `rollback`: `auto_promote` leaves the tag alone until the next `promote`.
        pinned_unix_seconds: when; None also in a tag that an earlier version pinned.
        attempt_id: of the one write that put the tag there; two tags that say the same are equal without it.
    """

    commit: int | None
    epoch: int | None = None
    previous: int | None = None
    pinned: bool = False
    pinned_unix_seconds: float | None = field(default=None, compare=False)
    attempt_id: str = field(default="", compare=False)


def list_commits(run: Run) -> list[int]:
    """The numbers of the published commits that are stored and that gc has not removed, ascending."""
    tag = read_tag(run, CANDIDATE)
    if tag is None or tag.commit is None:
        return []
    names = list(map(_COMMIT_FILE.search, objects.list_files(run.path("index", "commits"), ".json")))
    gone = set(read_removals(run).confirmed)  # after the listing: what is removed meanwhile is in here
    return sorted(number for name in names if name and (number := int(name[1])) <= tag.commit and number not in gone)


def read_commits(run: Run) -> list[Commit]:
    """The published commits, ascending, without those that gc removes meanwhile.

    Raises:
        DataError: one is damaged.
    """
    found = []
    for number in list_commits(run):
        with contextlib.suppress(Removed):
            found.append(read_commit(run, number))
    return found


def read_tag(run: Run, name: str) -> Tag | None:
    """Where a tag points; None where there is no such tag.

    Raises:
        DataError: the tag's file is damaged or of another format.
    """
    found = _read_versioned(run, name)
    return found[0] if found else None


def tagged(run: Run, name: str) -> int:
    """The number of the commit that a tag points to.

    Raises:
        DataError: there is no such tag, or it is damaged or points to no commit yet; the message lists what there is.
    """
    tag = read_tag(run, name)
    if tag is not None and tag.commit is not None:
        return tag.commit
    found = map(_TAG_FILE.search, objects.list_files(run.path("index", "tags"), ".json"))
    numbers = ", ".join(map(str, list_commits(run))) or "none yet"
    raise DataError(
        f"there is no tag {name!r}" if tag is None else f"tag {name!r} points to no commit yet",
        expected="a tag that points to a commit",
        found=", ".join(sorted(item[1] for item in found if item)) or "no tag yet",
        where=run.tag(name),
        remedy=f"wait for the first commit, promote one, or name one of the commits that are there: {numbers}",
    )


def fence(run: Run, name: str) -> Tag | None:
    """Write a tag again as it is, so that whoever read it before can no longer move it, and has to look again.

    Returns:
        where it points at that moment; None where there is no such tag.

    Raises:
        SnapshotConflict: others kept moving the tag at the same time.
    """
    for _ in range(_TRIES):
        found = _read_versioned(run, name)
        if found is None:
            return None
        tag = replace(found[0], attempt_id=uuid.uuid4().hex)
        try:
            objects.compare_and_swap(run.tag(name), to_json(tag), found[1])
            return tag
        except objects.Changed:
            continue
    raise SnapshotConflict("others keep moving this tag", where=run.tag(name), remedy="try again")


def promote(run: Run, number: int | None, *, blockers: Sequence[str], force: bool = False) -> Tag:
    """Let `prod` point to a commit (None: the candidate's), and let later commits follow again.

    Raises:
        GateRefused: there are blockers, and no force.
        Refused: `prod` points to a later commit; that way leads only `rollback`, which also stays there.
        DataError: there is no such commit, or it is not whole.
        SnapshotConflict: others kept moving the tag at the same time.
    """
    wanted = _published(run, number)
    if blockers and not force:
        raise GateRefused(
            f"commit {wanted} is not promoted:\n" + "\n".join(f"  - {line}" for line in blockers),
            where=run.commit(wanted),
            remedy="see the report, or promote with force",
        )

    def forward(now: Tag | None) -> Tag:
        if now and now.commit is not None and now.commit > wanted:
            raise Refused(
                "prod serves a later commit",
                expected=f"commit {now.commit} or a later one",
                found=wanted,
                where=run.tag(PROD),
                remedy=f"to go back to it, `fastfill rollback --to {wanted}`",
            )
        return Tag(wanted, previous=_before(now, wanted))

    return _change_tag(run, PROD, forward)


def auto_promote(run: Run, number: int, blockers: Sequence[str] = (), check: Check = anyone) -> bool:
    """Move `prod` forward to a commit, unless it is pinned, blocked, or that far already.

    Args:
        run: the run.
        number: of the commit.
        blockers: what is against it.
        check: whether the caller may still move the tag; asked after the tag was read.

    Returns:
        whether `prod` points to the commit now.

    Raises:
        DataError: there is no such commit, or it is not whole.
        SnapshotConflict: others kept moving the tag at the same time.
    """
    _published(run, number)
    if blockers:
        return False

    def forward(now: Tag | None) -> Tag:
        check()
        if now and (now.pinned or (now.commit is not None and now.commit >= number)):
            return now
        return Tag(number, previous=_before(now, number))

    return _change_tag(run, PROD, forward).commit == number


def rollback(run: Run, to: int | None = None) -> Tag:
    """Point `prod` back to the commit before (or to `to`), and pin it there until the next `promote`.

    Raises:
        Refused: there is no commit to go back to, `to` is not an earlier one, or gc has removed it.
        DataError: the commit is not there any more, or it is not whole.
        SnapshotConflict: others kept moving the tag at the same time.
    """

    def back(now: Tag | None) -> Tag:  # by the tag that it replaces: others may have moved it meanwhile
        number = to if to is not None or now is None else now.previous
        if now is None or now.commit is None or number is None or number >= now.commit:
            before = [item for item in list_commits(run) if now and now.commit and item < now.commit]
            raise Refused(
                "there is nothing to roll back to",
                expected=f"a commit before {now.commit if now else None}",
                found=number,
                where=run.tag(PROD),
                remedy=(f"name one of the commits {before}; " if before else "") + "`promote` goes forward",
            )
        return Tag(_published(run, number), pinned=True, pinned_unix_seconds=time.time())

    return _change_tag(run, PROD, back)


def _published(run: Run, number: int | None) -> int:
    """The number of a published commit that can be read; None stands for the candidate's."""
    candidate = read_tag(run, CANDIDATE)
    last = candidate.commit if candidate else None
    if last is None or (number is not None and not 0 <= number <= last):
        expected = "none yet" if last is None else f"0..{last}"
        raise DataError("there is no such commit", expected=expected, found=number, where=run.path("index/commits"))
    return read_commit(run, last if number is None else number).number


def _before(now: Tag | None, number: int) -> int | None:
    if now is None:
        return None
    return now.previous if now.commit == number else now.commit


def _change_tag(run: Run, name: str, decide: Callable[[Tag | None], Tag]) -> Tag:
    """Replace a tag by what `decide` makes of it, again where others moved it meanwhile.

    Two that want the same at the same time (the next epoch) are told apart by their attempt ids: one of them
    loses, and decides again by what the other one wrote.

    Raises:
        Removed: gc has removed the commit that it would point to.
        SnapshotConflict: others kept moving it.
    """
    for _ in range(_TRIES):
        now, version = _read_versioned(run, name) or (None, None)
        wanted = decide(now)
        if wanted == now:
            return wanted
        wanted = replace(wanted, attempt_id=uuid.uuid4().hex)
        if wanted.commit is not None:
            retention.claim(run, wanted.commit, cancel=True)  # after the tag was read: see `fence`
        try:
            objects.compare_and_swap(run.tag(name), to_json(wanted), version)
            return wanted
        except objects.Changed:
            continue
    raise SnapshotConflict("others keep moving this tag", where=run.tag(name), remedy="try again")


def _read_versioned(run: Run, name: str) -> tuple[Tag, str] | None:
    where = run.tag(name)
    found = objects.read_versioned(where)
    if found is None:
        return None
    return from_json(Tag, found[0], where), found[1]
