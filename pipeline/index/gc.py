"""Garbage collection: remove commits that no tag, rule or reader keeps, and files that only they name.

A commit is kept if a tag points to it, if it is among the last ones, or if a live lease names it. If gc dies, the run
is whole and the next gc finishes the work. gc never touches the vector log or the plan, except for parts of dropped
plans.

Why nothing is lost if, at the same time:

- A reader opens a commit. It writes its lease, then reads the removals; gc announces in the removals, then lists the
  leases. So one of them sees the other. Either the reader withdraws the announcement and gc's confirmation fails; or gc
  finds the lease; or the reader finds the confirmation and goes to the tag's commit.
- A tag moves to an old commit. The mover reads the tag, then the removals, then replaces that very tag; gc announces,
  then rewrites the tag. If the mover read the removals before the announcement, it read the tag before, too: its
  replacement fails and it looks again.
- A driver publishes. The next commit shares files with the latest one alone, which a tag keeps. Other sealed files are
  named by no commit yet and may have any age, since a restarted driver reuses them. So files that no commit ever named
  are kept until the last wave is published; after that nobody seals.
- Another gc runs. Each change of the removals has one winner; a confirmation is never withdrawn.
- Nothing was promoted yet. The missing tag cannot be rewritten, so no commit is removed.

On a full disk gc first deletes what needs no agreement and no write: files of confirmed removals, temporary files,
expired leases, files that nobody will name. Only then it announces; if that does not fit, it deletes its reserve.

Ages are by the store's clock: against an object that gc has just written, and before that against the newest file of
the index, which makes everything look younger.
"""

from __future__ import annotations

import random
import re
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from pipeline.errors import ConfigError, Removed, SnapshotConflict
from pipeline.index import disk_reserve, tags
from pipeline.index.commits import Commit, read_commit
from pipeline.index.fenced import TRIES
from pipeline.index.leases import (
    Removals,
    change_removals,
    find_leases,
    read_removals,
    read_removals_versioned,
    swap_removals,
)
from pipeline.index.tags import CANDIDATE, COMMIT_FILE, PROD
from pipeline.planning.plan import dropped_files
from pipeline.run import Run
from pipeline.storage import documents, interface, objects
from pipeline.storage.interface import Stat, is_full

KEEP = 3
GRACE_SECONDS = 3600.0
LEFTOVER_SECONDS = 600.0  # whatever the grace time: a temporary file may belong to a running writer

_PAUSE_SECONDS = 0.2
_INDEX_FILE = re.compile(r"/(index/(?:segments/[0-9a-f]{64}\.(?:faiss|parquet)|codebook-[0-9a-f]{64}\.faiss))$")


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules that keep commits and files without a tag or lease."""

    keep: int = KEEP  # the number of last published commits
    # For commits that were the latest, files without a commit, and expired leases; at least LEFTOVER_SECONDS for
    # temporary files
    grace_seconds: float = GRACE_SECONDS

    def __post_init__(self) -> None:
        if self.keep < 1 or not self.grace_seconds >= 0:
            raise ConfigError(
                "--keep or --grace is out of range",
                expected="keep >= 1, grace >= 0 seconds",
                found=f"keep {self.keep}, grace {self.grace_seconds:g} seconds",
            )


@dataclass(frozen=True, slots=True)
class Collection:
    """The outcome: what gc has removed (or would have), and why the rest is kept."""

    dry_run: bool
    commits: list[int]  # numbers of the removed ones
    kept: dict[int, list[str]]  # for each published commit that is kept, the reasons
    files: int  # number of segments, sidecars and codebooks
    bytes: int  # of these files and of the leftovers
    leases: int  # number of expired ones
    leftovers: int  # number of temporary files, capability checks of dead processes, and parts of dropped plans


def collect_garbage(run_uri: str, rules: Rules | None = None, dry_run: bool = False) -> Collection:
    """Remove commits and files that no rule keeps; safe at any time, beside anything, and to repeat.

    With `dry_run` nothing changes, and the result is what would be removed now.

    Raises:
        DataError: a commit or a tag cannot be read, so its files are unknown; nothing is removed.
        SnapshotConflict: others kept interfering; nothing is lost.
        FastfillError: the disk is full, and gc has no reserve on it; nothing is lost.
    """
    run, rules = Run(run_uri), rules or Rules()
    freed = [] if dry_run else [_free(run, rules)]
    now_seconds = time.time() if dry_run else _store_time(run)
    collector = _Collector(run, rules, now_seconds, dry_run)
    view, wanted, kept = disk_reserve.with_room(run, collector.agree)
    waste = _Waste.find(run, rules, view, wanted.files, now_seconds)
    if not dry_run:
        collector.delete_commits(view, wanted)
        waste.delete()
        disk_reserve.keep(run)
    freed.append(waste)
    return Collection(
        dry_run=dry_run,
        commits=collector.removed,
        kept={number: kept[number] for number in sorted(kept.keys() & view.commits.keys())},
        files=sum(len(item.files) for item in freed),
        bytes=sum(item.size_bytes() for item in freed),
        leases=sum(len(item.leases) for item in freed),
        leftovers=sum(len(item.leftovers) for item in freed),
    )


def needed(view: _View, rules: Rules, now_seconds: float, pins: dict[int, list[str]]) -> dict[int, list[str]]:
    """The commits to keep, with the reasons; `pins` are the tags and leases that name each commit."""
    reasons: dict[int, list[str]] = defaultdict(list, {number: list(names) for number, names in pins.items()})
    promoted = any("prod" in names for names in pins.values())
    for number in view.commits:
        if view.latest is None or number > view.latest:
            reasons[number].append("not announced yet")
        elif number > view.latest - rules.keep:
            reasons[number].append(f"among the last {rules.keep}")
        elif view.superseded.get(number, -1.0) > now_seconds - rules.grace_seconds:
            reasons[number].append(f"was the newest snapshot less than {rules.grace_seconds:g} s ago (--grace)")
        if not promoted:
            reasons[number].append("nothing is promoted yet")
    return dict(reasons)


def _free(run: Run, rules: Rules) -> _Waste:
    """Delete what can be deleted without a write, which may fail on a full disk."""
    now = read_removals(run)
    view = _look(run, now)
    waste = _Waste.find(run, rules, view, set(now.files) - view.files(), _newest(run))
    waste.delete()
    return waste


@dataclass(frozen=True, slots=True)
class _Clock:
    attempt_id: str
    started_unix_seconds: float


@dataclass(frozen=True, slots=True)
class _View:
    """The run as gc finds it."""

    latest: int | None  # the last published commit, None before the first
    commits: dict[int, Commit]  # stored ones without a confirmed removal, also those that are not announced yet
    superseded: dict[int, float]  # by commit, when the next one was created, by the store's clock
    leftover_commits: list[str]  # files of removed commits

    @property
    def finished(self) -> bool:
        """Whether the last wave is published, so that nothing is sealed any more."""
        return self.latest is not None and self.latest == self.commits[self.latest].num_waves

    def files(self, without: Iterable[int] = ()) -> set[str]:
        """All files that the commits name, except those of `without`."""
        left = self.commits.keys() - set(without)
        return {path for number in left for path in _files(self.commits[number])}


@dataclass(slots=True)
class _Collector:
    run: Run
    rules: Rules
    now_seconds: float
    dry_run: bool
    removed: list[int] = field(default_factory=list)

    def agree(self) -> tuple[_View, Removals, dict[int, list[str]]]:
        """Announce, look again, confirm; repeated until nobody interferes.

        Returns the run at that time, the files to delete, and why other commits are kept. Raises SnapshotConflict if
        others kept interfering.
        """
        for attempt in range(TRIES):
            try:
                return self._agree_once()
            except (interface.Changed, Removed):
                time.sleep(random.uniform(0, _PAUSE_SECONDS * attempt))  # lets the other process finish
        raise SnapshotConflict("others keep changing this file", where=self.run.collected, remedy="run gc again later")

    def _agree_once(self) -> tuple[_View, Removals, dict[int, list[str]]]:
        now, version = read_removals_versioned(self.run)
        view = _look(self.run, now)
        kept = needed(view, self.rules, self.now_seconds, self._pins())
        doomed = sorted(view.commits.keys() - kept.keys())
        if self.dry_run or not (doomed or now.announced):
            return view, self._confirmed(now, view, doomed), kept
        version = swap_removals(self.run, replace(now, announced=tuple(doomed)), version)
        tags.fence(self.run, PROD)
        kept = needed(view, self.rules, self.now_seconds, self._pins())
        wanted = self._confirmed(now, view, sorted(set(doomed) - kept.keys()))
        swap_removals(self.run, wanted, version)
        return view, wanted, kept

    def _confirmed(self, now: Removals, view: _View, doomed: list[int]) -> Removals:
        self.removed = doomed
        dead = view.files(without=view.commits.keys() - set(doomed)) | set(now.files)
        return Removals(
            confirmed=tuple(sorted({*now.confirmed, *doomed})), files=tuple(sorted(dead - view.files(without=doomed)))
        )

    def _pins(self) -> dict[int, list[str]]:
        """The commits that tags and live leases name, with the reasons."""
        pins: dict[int, list[str]] = defaultdict(list)
        for name in tags.list_tags(self.run):
            tag = tags.read_tag(self.run, name)
            if tag is not None and tag.commit is not None:
                pins[tag.commit].append(name)
            if tag is not None and tag.previous is not None:
                pins[tag.previous].append(f"before {name}")
        for number in find_leases(self.run, self.now_seconds)[0]:
            pins[number].append("a reader's lease")
        return pins

    def delete_commits(self, view: _View, wanted: Removals) -> None:
        """Delete the removed commits, then the files that only they named."""
        uris = [*map(self.run.commit, self.removed), *view.leftover_commits]
        objects.delete_files(uris)
        if wanted.files:
            objects.delete_files([self.run.path(path) for path in wanted.files])
            gone = set(wanted.files)
            change_removals(
                self.run, lambda now: replace(now, files=tuple(path for path in now.files if path not in gone))
            )


@dataclass(frozen=True, slots=True)
class _Waste:
    """What may be deleted without agreement, by URI."""

    commits: list[str]  # files of removed commits; deleted first, then the files that only they named
    files: dict[str, Stat]  # segments, sidecars and codebooks
    leases: list[str]  # expired ones
    leftovers: dict[str, Stat]  # temporary files, capability checks, and parts of dropped plans

    @classmethod
    def find(cls, run: Run, rules: Rules, view: _View, dead: Iterable[str], now_seconds: float) -> _Waste:
        """Look for it; `dead` are paths that only removed commits name."""
        stored, dead = _index_files(run), set(dead)
        lost = _strays(stored, view, dead, now_seconds - rules.grace_seconds)
        over = find_leases(run, now_seconds)[1]
        leftover_age = max(rules.grace_seconds, LEFTOVER_SECONDS)
        return cls(
            commits=view.leftover_commits,
            files={run.path(path): stored[path] for path in {*dead, *lost} if path in stored},
            leases=[uri for uri, seconds in over.items() if seconds > rules.grace_seconds],
            leftovers=_older(objects.list_leftovers(run.uri), now_seconds - leftover_age) | dropped_files(run),
        )

    def delete(self) -> None:
        """Commits first, so that no commit is left without its files."""
        objects.delete_files(self.commits)
        objects.delete_files([*self.files, *self.leases, *self.leftovers])

    def size_bytes(self) -> int:
        return sum(stat.size_bytes for stat in (self.files | self.leftovers).values())


def _look(run: Run, now: Removals) -> _View:
    """Raises DataError if a commit that was not removed cannot be read: its files must be kept."""
    tag = tags.read_tag(run, CANDIDATE)
    latest = tag.commit if tag else None
    stats = objects.list_stats(run.path("index", "commits"), ".json")
    found = {int(match[1]): stat for uri, stat in stats if (match := COMMIT_FILE.search(uri))}
    gone = set(now.confirmed)
    numbers = {*range(0 if latest is None else latest + 1), *found} - gone
    return _View(
        latest=latest,
        commits={number: read_commit(run, number) for number in sorted(numbers)},
        superseded={number - 1: stat.modified_seconds for number, stat in found.items()},
        leftover_commits=[run.commit(number) for number in sorted(found.keys() & gone)],
    )


def _strays(stored: dict[str, Stat], view: _View, dead: set[str], before_seconds: float) -> list[str]:
    """Files that no commit names and nobody is about to name."""
    if not view.finished:
        return []
    known = view.files() | dead
    return list(_older([item for item in stored.items() if item[0] not in known], before_seconds))


def _index_files(run: Run) -> dict[str, Stat]:
    """Segments, sidecars and codebooks by their path inside the run."""
    return {match[1]: stat for uri, stat in objects.list_stats(run.path("index")) if (match := _INDEX_FILE.search(uri))}


def _files(commit: Commit) -> set[str]:
    paths = {path for ref in commit.segments for path in (ref.path, ref.sidecar_path)}
    return {commit.codebook_path, *paths}


def _older(found: Iterable[tuple[str, Stat]], before_seconds: float) -> dict[str, Stat]:
    return {name: stat for name, stat in found if stat.modified_seconds <= before_seconds}


def _store_time(run: Run) -> float:
    """The time by the store's clock; an earlier one if the disk is full."""
    where = run.path("index", "gc.json")
    try:
        objects.put(where, documents.encode(_Clock(uuid.uuid4().hex, time.time())))
        return objects.stat(where).modified_seconds
    except OSError as error:
        if not is_full(error):
            raise
        return _newest(run)


def _newest(run: Run) -> float:
    """When the newest file of the index was written: by the store's clock, and not later than now."""
    written = (stat.modified_seconds for _, stat in objects.iter_stats(run.path("index")))
    return min(time.time(), max(written, default=0.0))
