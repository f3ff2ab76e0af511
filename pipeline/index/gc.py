"""Remove what nobody needs: commits that no tag, rule or reader keeps, and the files that only they name.

After the snapshots; run it by hand or on a schedule, beside anything. Guarantee: a commit that a tag points to,
that is among the last ones, or that a live lease names stays whole, and whatever moment gc dies at, the run is
whole and the next gc finishes its work. Knows nothing of what is inside a segment, and never touches the
vector log or the run's plan. Parts of a plan that was dropped for another one are removed (`plan.dropped_files`).

What could happen beside it, and why nothing is lost:

- A reader opens a commit. It writes its lease and then reads the removals; gc announces in the removals and
  then lists the leases. One of them sees the other: the reader takes the announcement back, which makes gc's
  confirmation fail, or gc finds the lease, or the reader finds the confirmation and goes to where the tag is.
- A tag moves to an old commit. The mover reads the tag, then the removals, then replaces that very tag; gc
  announces, then writes the tag again. A mover that read the removals before the announcement has read the tag
  before too, so its replacement fails and it looks again.
- A driver publishes. The next commit shares only files with the latest one, which a tag keeps. What it has
  sealed beyond that is named by no commit yet, and may be any age: a driver that starts again takes over what
  its predecessor sealed, and writes nothing new. So files that no commit ever named stay until the last wave
  is published, for then nobody seals any more.
- Another gc runs. The removals have one winner per change; what is confirmed is never taken back, and
  deleting twice is harmless.
- Nothing was promoted yet: the first tag cannot be written again, so no commit is removed before.

A disk may be full, so gc first deletes what needs nobody's consent, and writes nothing for it: files of commits that
are confirmed to go, temporary files, expired leases, files that nobody will ever name. Only then it
announces; if that does not fit, it deletes its reserve first.

Time is the store's: ages are taken against an object that gc itself has written, and before that against the newest
file of the index, which makes everything look younger than it is.
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
from pipeline.index import disk_reserve, retention, tags
from pipeline.index.commits import Commit, read_commit
from pipeline.index.retention import Removals, find_leases, read_removals
from pipeline.index.tags import CANDIDATE, PROD
from pipeline.planning.plan import dropped_files
from pipeline.run import Run
from pipeline.storage import objects
from pipeline.storage.documents import to_json
from pipeline.storage.interface import Stat, is_full

KEEP = 3
GRACE_SECONDS = 3600.0
LEFTOVER_SECONDS = 600.0  # whatever the grace time: a temporary file may be that of a writer at work

_TRIES = 16
_PAUSE_SECONDS = 0.2
_COMMIT_FILE = re.compile(r"/(\d{20})\.json$")
_INDEX_FILE = re.compile(r"/(index/(?:segments/[0-9a-f]{64}\.(?:faiss|parquet)|codebook-[0-9a-f]{64}\.faiss))$")
_TAG_FILE = re.compile(r"/([\w-]+)\.json$")


@dataclass(frozen=True, slots=True)
class Rules:
    """What stays although no tag and no lease names it.

    Attributes:
        keep: the last published commits.
        grace_seconds: a commit that was the latest, a file without a commit, an expired lease: for so long;
            a temporary file never for less than LEFTOVER_SECONDS.
    """

    keep: int = KEEP
    grace_seconds: float = GRACE_SECONDS

    def __post_init__(self) -> None:
        if self.keep < 1 or not self.grace_seconds >= 0:
            raise ConfigError("gc cannot work by these rules", expected="keep >= 1 and grace >= 0 seconds", found=self)


@dataclass(frozen=True, slots=True)
class Collection:
    """What gc has removed (or would have), and why the rest stays.

    Attributes:
        commits: the numbers of the removed ones.
        kept: by the number of each published commit that stays, the reasons.
        files: segments, sidecars and codebooks.
        bytes: their sizes, and those of the leftovers.
        leases: expired ones.
        leftovers: temporary files and probes of processes that died, and parts of plans that were dropped.
    """

    dry_run: bool
    commits: list[int]
    kept: dict[int, list[str]]
    files: int
    bytes: int
    leases: int
    leftovers: int


@dataclass(frozen=True, slots=True)
class _Clock:
    """Facts of the file by which gc asks the store for the time."""

    attempt_id: str
    started_unix_seconds: float


@dataclass(frozen=True, slots=True)
class _View:
    """The run as gc finds it.

    Attributes:
        latest: the last published commit, None before the first.
        commits: those that are stored and not confirmed to go, also commits that are not announced yet.
        superseded: by commit, when the next one was created, by the store's clock.
        leftover_commits: files of commits that are confirmed to be gone.
    """

    latest: int | None
    commits: dict[int, Commit]
    superseded: dict[int, float]
    leftover_commits: list[str]

    @property
    def finished(self) -> bool:
        """Whether the last wave is published: nothing will be sealed any more."""
        return self.latest is not None and self.latest == self.commits[self.latest].num_waves

    def files(self, without: Iterable[int] = ()) -> set[str]:
        """All that the commits name, but for those of `without`."""
        left = self.commits.keys() - set(without)
        return {path for number in left for path in _files(self.commits[number])}


@dataclass(slots=True)
class _Collector:
    """One gc of one run."""

    run: Run
    rules: Rules
    now_seconds: float
    dry_run: bool
    removed: list[int] = field(default_factory=list)

    def agree(self) -> tuple[_View, Removals, dict[int, list[str]]]:
        """Announce, look again, confirm; until nobody interferes.

        Returns:
            the run as it is then, what is to be deleted, and why the other commits stay.

        Raises:
            SnapshotConflict: others kept interfering.
        """
        for attempt in range(_TRIES):
            try:
                return self._agree_once()
            except (objects.Changed, Removed):
                time.sleep(random.uniform(0, _PAUSE_SECONDS * attempt))  # who objects needs a moment to finish
        raise SnapshotConflict(
            "others keep changing what gc works by", where=self.run.collected, remedy="run gc again later"
        )

    def _agree_once(self) -> tuple[_View, Removals, dict[int, list[str]]]:
        now, version = retention.read_versioned(self.run)
        view = _look(self.run, now)
        kept = needed(view, self.rules, self.now_seconds, self._pins())
        doomed = sorted(view.commits.keys() - kept.keys())
        if self.dry_run or not (doomed or now.announced):
            return view, self._confirmed(now, view, doomed), kept
        version = retention.swap(self.run, replace(now, announced=tuple(doomed)), version)
        tags.fence(self.run, PROD)
        kept = needed(view, self.rules, self.now_seconds, self._pins())
        wanted = self._confirmed(now, view, sorted(set(doomed) - kept.keys()))
        retention.swap(self.run, wanted, version)
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
        for uri in objects.list_files(self.run.path("index", "tags"), ".json"):
            match = _TAG_FILE.search(uri)
            tag = tags.read_tag(self.run, match[1]) if match else None
            if tag is None or match is None:
                continue
            if tag.commit is not None:
                pins[tag.commit].append(match[1])
            if tag.previous is not None:
                pins[tag.previous].append(f"before {match[1]}")
        for number in find_leases(self.run, self.now_seconds)[0]:
            pins[number].append("a reader's lease")
        return pins

    def delete_commits(self, view: _View, wanted: Removals) -> None:
        """First the commits that are confirmed to go, then what only they named."""
        uris = [*map(self.run.commit, self.removed), *view.leftover_commits]
        objects.delete_files(uris)
        if wanted.files:
            objects.delete_files([self.run.path(path) for path in wanted.files])
            gone = set(wanted.files)
            retention.change(
                self.run, lambda now: replace(now, files=tuple(path for path in now.files if path not in gone))
            )


@dataclass(frozen=True, slots=True)
class _Waste:
    """What may be deleted without anybody's consent, by URI.

    Attributes:
        commits: files of commits that are confirmed to be gone; they go first, then what only they named.
        files: segments, sidecars and codebooks.
        leases: expired ones.
        leftovers: temporary files, probes, and parts of plans that were dropped.
    """

    commits: list[str]
    files: dict[str, Stat]
    leases: list[str]
    leftovers: dict[str, Stat]

    @classmethod
    def find(cls, run: Run, rules: Rules, view: _View, dead: Iterable[str], now_seconds: float) -> _Waste:
        """Look for it; `dead` are the paths of files that only confirmed commits name."""
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
        """Commits first, so that none is left without its files."""
        objects.delete_files(self.commits)
        objects.delete_files([*self.files, *self.leases, *self.leftovers])

    def size_bytes(self) -> int:
        """Of the files and leftovers."""
        return sum(stat.size_bytes for stat in (self.files | self.leftovers).values())


def _free(run: Run, rules: Rules) -> _Waste:
    """Delete what can be deleted without a write, which may fail on a full disk."""
    now = read_removals(run)
    view = _look(run, now)
    waste = _Waste.find(run, rules, view, set(now.files) - view.files(), _newest(run))
    waste.delete()
    return waste


def collect_garbage(run_uri: str, rules: Rules | None = None, dry_run: bool = False) -> Collection:
    """Remove what nobody needs; safe at any time, beside anything, and to do again.

    Args:
        run_uri: the run.
        rules: what stays.
        dry_run: change nothing, and tell what would be removed now.

    Raises:
        DataError: a commit or a tag cannot be read, so nobody can tell what it needs; nothing is removed.
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
    """The commits that stay, with the reasons; pure.

    Args:
        view: the run.
        rules: what stays in any case.
        now_seconds: the time by the store's clock.
        pins: by commit, the tags and leases that name it.
    """
    reasons: dict[int, list[str]] = defaultdict(list, {number: list(names) for number, names in pins.items()})
    promoted = any("prod" in names for names in pins.values())
    for number in view.commits:
        if view.latest is None or number > view.latest:
            reasons[number].append("not announced yet")
        elif number > view.latest - rules.keep:
            reasons[number].append(f"among the last {rules.keep}")
        elif view.superseded.get(number, -1.0) > now_seconds - rules.grace_seconds:
            reasons[number].append("the latest one within the grace time")
        if not promoted:
            reasons[number].append("nothing is promoted yet")
    return dict(reasons)


def _look(run: Run, now: Removals) -> _View:
    """Raises DataError where a commit that was not removed cannot be read: its files must stay."""
    tag = tags.read_tag(run, CANDIDATE)
    latest = tag.commit if tag else None
    stats = objects.list_stats(run.path("index", "commits"), ".json")
    found = {int(match[1]): stat for uri, stat in stats if (match := _COMMIT_FILE.search(uri))}
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
    """The time by the clock that the store stamps objects with; an earlier one if the disk is full."""
    where = run.path("index", "gc.json")
    try:
        objects.put(where, to_json(_Clock(uuid.uuid4().hex, time.time())))
        return objects.stat(where).modified_seconds
    except OSError as error:
        if not is_full(error):
            raise
        return _newest(run)


def _newest(run: Run) -> float:
    """A time that is not later than now, by the same clock: when the newest file of the index was written."""
    written = (stat.modified_seconds for _, stat in objects.iter_stats(run.path("index")))
    return min(time.time(), max(written, default=0.0))
