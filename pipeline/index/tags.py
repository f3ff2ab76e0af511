"""Tags: names that point to commits, and the rules by which `prod` moves.

`prod` only points to published commits, and goes back by `rollback` alone. The `candidate` tag is the writer's: it
holds the last published commit, and the epoch of the driver that may publish the next one.

No two writes of a tag or a commit are equal: each has an `attempt_id`. An object store settles a write whose answer
was lost by reading back, and takes equal bytes for its own; and the version of a tag, which may be a digest of its
content, must never come back.
"""

from __future__ import annotations

import contextlib
import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from pipeline.errors import DataError, GateRefused, Refused, Removed, SnapshotConflict
from pipeline.index import leases
from pipeline.index.commits import Commit, read_commit
from pipeline.index.fenced import TRIES, Check, anyone
from pipeline.index.leases import read_removals
from pipeline.run import Run
from pipeline.storage import documents, interface, objects

CANDIDATE = "candidate"
PROD = "prod"
_TAG_FILE = re.compile(r"/([\w-]+)\.json$")
COMMIT_FILE = re.compile(r"/(\d{20})\.json$")


@dataclass(frozen=True, slots=True)
class Tag:
    """Where a tag points."""

    commit: int | None  # the commit's number; None in a candidate tag before the first commit
    epoch: int | None = None  # of the writer that owns the run; only in the candidate tag
    previous: int | None = None  # the commit before, to which `rollback` goes back
    pinned: bool = False  # set by `rollback`: `auto_promote` leaves the tag alone until the next `promote`
    # When; None in tags that earlier versions pinned
    pinned_unix_seconds: float | None = field(default=None, compare=False)
    attempt_id: str = field(default="", compare=False)  # of the write of the tag; not compared


def list_commits(run: Run) -> list[int]:
    """The numbers of the published commits that gc has not removed, ascending."""
    tag = read_tag(run, CANDIDATE)
    if tag is None or tag.commit is None:
        return []
    names = list(map(COMMIT_FILE.search, objects.list_files(run.path("index", "commits"), ".json")))
    gone = set(read_removals(run).confirmed)  # after the listing, so that it has all removals until then
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
    """Where a tag points; None if there is no such tag.

    Raises:
        DataError: the tag's file is damaged or of another format.
    """
    found = read_tag_versioned(run, name)
    return found[0] if found else None


def list_tags(run: Run) -> list[str]:
    """The names of all tags, sorted."""
    found = map(_TAG_FILE.search, objects.list_files(run.path("index", "tags"), ".json"))
    return sorted(match[1] for match in found if match)


def tagged(run: Run, name: str) -> int:
    """The number of the commit that a tag points to.

    Raises:
        DataError: there is no such tag, or it is damaged or points to no commit yet; the message lists existing tags.
    """
    tag = read_tag(run, name)
    if tag is not None and tag.commit is not None:
        return tag.commit
    numbers = ", ".join(map(str, list_commits(run))) or "none yet"
    raise DataError(
        f"there is no tag {name!r}" if tag is None else f"tag {name!r} points to no commit yet",
        expected="a tag that points to a commit",
        found=", ".join(list_tags(run)) or "no tag yet",
        where=run.tag(name),
        remedy=f"wait for the first commit, promote one, or name an existing commit: {numbers}",
    )


def fence(run: Run, name: str) -> Tag | None:
    """Rewrite a tag unchanged and return it: a process that read it before cannot move it and has to look again.

    Raises:
        SnapshotConflict: others kept moving the tag at the same time.
    """
    for _ in range(TRIES):
        found = read_tag_versioned(run, name)
        if found is None:
            return None
        tag = replace(found[0], attempt_id=uuid.uuid4().hex)
        try:
            objects.compare_and_swap(run.tag(name), documents.encode(tag), found[1])
            return tag
        except interface.Changed:
            continue
    raise SnapshotConflict("others keep moving this tag", where=run.tag(name), remedy="try again")


def promote(run: Run, number: int | None, *, blockers: Sequence[str], force: bool = False) -> Tag:
    """Point `prod` to a commit (None: the candidate's), and let later commits follow again.

    Raises:
        GateRefused: there are blockers, and `force` is False.
        Refused: `prod` points to a later commit; only `rollback` goes back, and it pins the tag there.
        DataError: there is no such commit, or it is not whole.
        SnapshotConflict: others kept moving the tag at the same time.
    """
    wanted = _published(run, number)
    if blockers and not force:
        raise GateRefused(
            f"commit {wanted} is not promoted:\n" + "\n".join(f"  - {line}" for line in blockers),
            where=run.commit(wanted),
            remedy="see the report; to serve it anyway: `fastfill promote --force`",
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

    return change_tag(run, PROD, forward)


def auto_promote(run: Run, number: int, blockers: Sequence[str] = (), check: Check = anyone) -> bool:
    """Move `prod` forward to a commit, unless it is pinned, blocked, or already there; True if it points there now.

    `check` raises if the caller may no longer move the tag; it is called after the tag was read.

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

    return change_tag(run, PROD, forward).commit == number


def rollback(run: Run, to: int | None = None) -> Tag:
    """Point `prod` back to the previous commit (or to `to`), and pin it there until the next `promote`.

    Raises:
        Refused: prod has no previous commit, `to` is not an earlier one, or gc has removed it.
        DataError: the commit is missing or not whole.
        SnapshotConflict: others kept moving the tag at the same time.
    """

    def back(now: Tag | None) -> Tag:  # decides by the tag that it replaces: others may have moved it meanwhile
        number = to if to is not None or now is None else now.previous
        if now is None or now.commit is None or number is None or number >= now.commit:
            before = [item for item in list_commits(run) if now and now.commit and item < now.commit]
            raise Refused(
                "prod has no previous commit to go back to" if number is None else f"cannot roll back to {number}",
                expected=f"one of the commits {', '.join(map(str, before))}" if before else "a commit before prod's",
                found=number,
                where=run.tag(PROD),
                remedy=("name one of them with --to; " if before else "") + "`fastfill promote` goes forward",
            )
        return Tag(_published(run, number), pinned=True, pinned_unix_seconds=time.time())

    return change_tag(run, PROD, back)


def _published(run: Run, number: int | None) -> int:
    """The number of a published commit that can be read; None means the candidate's."""
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


def change_tag(run: Run, name: str, decide: Callable[[Tag | None], Tag]) -> Tag:
    """Replace a tag by the result of `decide`, which is called again if others moved the tag meanwhile.

    If two processes want the same change (the next epoch), their attempt ids differ: one loses, and decides again.

    Raises:
        Removed: gc has removed the commit that it would point to.
        SnapshotConflict: others kept moving it.
    """
    for _ in range(TRIES):
        now, version = read_tag_versioned(run, name) or (None, None)
        wanted = decide(now)
        if wanted == now:
            return wanted
        wanted = replace(wanted, attempt_id=uuid.uuid4().hex)
        if wanted.commit is not None:
            leases.claim(run, wanted.commit, cancel=True)  # after the tag was read: see `fence`
        try:
            objects.compare_and_swap(run.tag(name), documents.encode(wanted), version)
            return wanted
        except interface.Changed:
            continue
    raise SnapshotConflict("others keep moving this tag", where=run.tag(name), remedy="try again")


def read_tag_versioned(run: Run, name: str) -> tuple[Tag, str] | None:
    """As `read_tag`, with the version of its file."""
    where = run.tag(name)
    found = objects.read_versioned(where)
    if found is None:
        return None
    return documents.parse(Tag, found[0], where, must_be_checked=True), found[1]
