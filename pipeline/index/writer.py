"""The one writer of a run: it publishes commits in order, until another writer takes over.

A commit is created whole or not at all, and once.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, replace
from typing import Self

from pipeline.errors import SnapshotConflict
from pipeline.index.commits import Commit, check_commit, read_commit
from pipeline.index.tags import CANDIDATE, Tag, change_tag, read_tag, read_tag_versioned
from pipeline.run import Run
from pipeline.storage import documents, interface, objects


@dataclass(slots=True)
class Writer:
    """The run's publisher, until another one acquires the run."""

    run: Run
    epoch: int
    latest: int | None  # the last published commit, or None

    @classmethod
    def acquire(cls, run: Run) -> Self:
        """Take the run over: earlier writers are refused from now on.

        If a predecessor died after it created a commit and before it announced it, that commit becomes the latest.

        Raises:
            SnapshotConflict: other writers kept taking the run at the same time.
        """

        def take(tag: Tag | None) -> Tag:
            latest = _after_orphans(run, tag.commit if tag else None)
            return Tag(latest, (tag.epoch or 0) + 1 if tag else 1)

        tag = change_tag(run, CANDIDATE, take)
        return cls(run, tag.epoch or 0, tag.commit)

    def publish(self, draft: Commit) -> Commit:
        """Create the next commit, then announce it as the candidate; after any failure it may be called again.

        If another writer takes over, this one is stopped by the first step, which reads the tag, or by the last one,
        which replaces the very tag that was read. Suspended between them, it may still create a commit file. That is
        harmless: the file has the number after an announced commit. The new writer either created that file before,
        and this create fails; or it finds the file when it acquires the run or creates its own. It adopts the file if
        it holds the same images (segment names may differ by processor). Else it stops with a conflict, and the next
        start continues from that file, a whole commit of the same plan and log. Readers do not see the file before it
        is announced.

        Returns:
            the commit as stored; an earlier attempt's, if there was one.

        Raises:
            DataError: the segments or counts do not make a whole snapshot.
            SnapshotConflict: another writer took the run over or published something else, or the number is not the
                next one; nothing has moved.
        """
        where = self.run.commit(draft.number)
        commit = replace(
            draft,
            segments=tuple(sorted(draft.segments, key=lambda segment: (segment.wave, segment.shard, segment.kind))),
            attempt_id=uuid.uuid4().hex,
            epoch=self.epoch,
            created_unix_seconds=time.time(),
        )
        check_commit(commit, where)
        expected = 0 if self.latest is None else self.latest + 1
        if draft.number != expected:
            raise SnapshotConflict("commits are published in order", expected=expected, found=draft.number, where=where)
        version = self._version_while_ours(draft.number)
        commit = _create(self.run, commit)
        self._announce(commit.number, version)
        self.latest = commit.number
        return commit

    def check(self) -> None:
        """Notice early if another writer took the run over; `publish` would notice in any case.

        Raises:
            SnapshotConflict: another one did.
        """
        found = read_tag(self.run, CANDIDATE)
        if found is None or found.epoch != self.epoch:
            raise self._taken_over(found)

    def _version_while_ours(self, number: int) -> str:
        found = read_tag_versioned(self.run, CANDIDATE)
        if found is None or found[0].epoch != self.epoch or found[0].commit not in (self.latest, number):
            raise self._taken_over(found[0] if found else None)
        return found[1]

    def _announce(self, number: int, version: str) -> None:
        tag = Tag(number, self.epoch, attempt_id=uuid.uuid4().hex)
        try:
            objects.compare_and_swap(self.run.tag(CANDIDATE), documents.encode(tag), version)
        except interface.Changed:
            now = read_tag(self.run, CANDIDATE)
            if now != tag:  # an equal tag is ours: the answer was lost, or an earlier try arrived late
                raise self._taken_over(now) from None

    def _taken_over(self, found: Tag | None) -> SnapshotConflict:
        return SnapshotConflict(
            "another driver took this run over",
            expected=f"epoch {self.epoch} at commit {self.latest}",
            found="no tag" if found is None else f"epoch {found.epoch} at commit {found.commit}",
            where=self.run.tag(CANDIDATE),
            remedy="let the other driver continue, or stop it and start this one again",
        )


def _create(run: Run, commit: Commit) -> Commit:
    """Create the commit file; an existing one must be ours or hold the same snapshot."""
    where = run.commit(commit.number)
    try:
        objects.put_if_absent(where, documents.encode(commit))
        return commit
    except interface.AlreadyExists:
        existing = read_commit(run, commit.number)
    if existing.held() != commit.held():
        differs = [key for key, value in existing.held().items() if value != commit.held()[key]]
        raise SnapshotConflict(
            "another writer created this commit with other content",
            expected=f"attempt {commit.attempt_id}",
            found=f"attempt {existing.attempt_id}, which differs in {', '.join(differs)}",
            where=where,
            remedy="repeat this command: the existing commit becomes the latest, and the run continues from it",
        )
    return existing


def _after_orphans(run: Run, latest: int | None) -> int | None:
    """The last of the commits after `latest` that were created but not announced."""
    following = 0 if latest is None else latest + 1
    while objects.exists(run.commit(following)):
        latest = read_commit(run, following).number
        following += 1
    return latest
