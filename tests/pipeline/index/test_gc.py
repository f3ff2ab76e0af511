"""gc removes what nobody needs and nothing else, whenever it dies and whatever goes on beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ConfigError, DataError, Refused, Removed
from pipeline.index import commits, gc, leases, tags
from pipeline.index.commits import read_commit
from pipeline.index.gc import Collection, Rules, collect_garbage
from pipeline.index.leases import Removals, read_removals
from pipeline.index.tags import Tag, list_commits, read_tag, rollback
from pipeline.index.writer import Writer
from pipeline.reporting.audit import audit
from pipeline.run import Run
from pipeline.serving.searcher import Searcher
from pipeline.storage import documents, objects
from tests.support.commit_drafts import draft
from tests.support.interleave import Turns
from tests.support.published_run import LAST, WAVES, Crash, dying, published_run, template, upload
from tests.support.seaweed import READONLY, SeaweedFS
from tests.support.whole_run import DIM, WholeRun

NOW = Rules(keep=1, grace_seconds=0)  # as if everything were old


def paths(run: Run, folder: str = "index") -> set[str]:
    return {uri.removeprefix(run.uri) for uri in objects.list_files(run.path(folder))}


def segments(run: Run) -> set[str]:
    return {uri.removeprefix(f"{run.uri}/") for uri in objects.list_files(run.path("index/segments"))}


def named(run: Run) -> set[str]:
    refs = [ref for number in list_commits(run) for ref in read_commit(run, number).segments]
    return {path for ref in refs for path in (ref.path, ref.sidecar_path)}


def assert_whole(whole: WholeRun) -> None:
    """Every commit that is left and every tag can be searched, and the audit finds nothing."""
    report = audit(whole.run.uri)
    assert report.problems == []
    for number in list_commits(whole.run):
        with Searcher(whole.run.uri, commit=number) as searcher:
            found = searcher.search(np.zeros((1, DIM)), whole.num)
            assert (found.commit, set(found.ids[0].tolist())) == (number, set(whole.ids.tolist()))
    with Searcher(whole.run.uri) as searcher:
        tag = read_tag(whole.run, "prod")
        assert tag is not None
        assert searcher.commit.number == tag.commit


def test_gc_keeps_commits_named_by_tags_rules_and_leases_and_removes_the_rest(tmp_path: Path) -> None:
    whole = published_run(tmp_path)
    before = paths(whole.run, "")
    with Searcher(whole.run.uri, commit=2):
        found = collect_garbage(whole.run.uri, NOW)
        assert found.commits == [0, 3]
        assert found.kept == {
            1: ["before prod"],
            2: ["a reader's lease"],
            LAST: ["candidate", "prod", "among the last 1"],
        }
    assert list_commits(whole.run) == [1, 2, LAST]
    assert segments(whole.run) == named(whole.run)
    gone = before - paths(whole.run, "")
    assert all(path.startswith(("/index/segments/", "/index/commits/")) for path in gone)
    assert found.files == sum("/segments/" in path for path in gone) > 0
    assert found.bytes > 0
    assert_whole(whole)
    assert collect_garbage(whole.run.uri, NOW).commits == [2]
    assert_whole(whole)
    assert audit(whole.run.uri).checked["removed_commits"] == 3


def test_gc_dry_run_reports_and_changes_no_file(tmp_path: Path) -> None:
    whole = published_run(tmp_path)
    before = paths(whole.run, "")
    told = collect_garbage(whole.run.uri, NOW, dry_run=True)
    assert paths(whole.run, "") == before
    assert told == replace(collect_garbage(whole.run.uri, NOW), dry_run=True)
    assert told.commits == [0, 2, 3]


def test_gc_defaults_keep_three_commits_and_those_newest_within_the_hour(tmp_path: Path) -> None:
    whole = published_run(tmp_path)
    assert collect_garbage(whole.run.uri).commits == []
    assert collect_garbage(whole.run.uri, Rules(grace_seconds=0)).commits == [0]
    for rules in ({"keep": 0}, {"grace_seconds": -1.0}, {"grace_seconds": float("nan")}):
        with pytest.raises(ConfigError):
            Rules(**rules)  # type: ignore[arg-type]


def test_the_grace_time_counts_from_when_the_next_commit_was_created(tmp_path: Path) -> None:
    whole = published_run(tmp_path)
    for number in range(LAST + 1):
        hours = LAST - number
        os.utime(whole.run.commit(number), (time.time() - 3600 * hours - 60,) * 2)
    found = collect_garbage(whole.run.uri, Rules(keep=1))
    assert found.commits == [0, 2]
    assert found.kept[3] == ["was the newest snapshot less than 3600 s ago (--grace)"]


def test_gc_without_a_promoted_commit_removes_none(tmp_path: Path) -> None:
    whole = published_run(tmp_path)
    Path(whole.run.tag("prod")).unlink()
    found = collect_garbage(whole.run.uri, NOW)
    assert found.commits == []
    assert found.kept[0] == ["nothing is promoted yet"]


def test_gc_of_a_run_without_commits_removes_none_and_with_lost_ones_is_refused(tmp_path: Path) -> None:
    empty = Run(str(tmp_path / "empty"))
    assert collect_garbage(empty.uri, NOW) == Collection(False, [], {}, 0, 0, 0, 0)
    whole = published_run(tmp_path)
    before = segments(whole.run)
    Path(whole.run.commit(2)).unlink()
    with pytest.raises(DataError, match="no such commit"):
        collect_garbage(whole.run.uri, NOW)
    assert segments(whole.run) == before


def test_a_removed_commit_is_refused_by_everyone_and_told_from_a_lost_one(tmp_path: Path) -> None:
    whole = published_run(tmp_path)
    collect_garbage(whole.run.uri, NOW)
    for ask in (
        lambda: rollback(whole.run, to=3),
        lambda: read_commit(whole.run, 3),
        lambda: Searcher(whole.run.uri, commit=3),
        lambda: leases.take(whole.run, 3),
    ):
        with pytest.raises(Removed, match="gc has removed this commit") as caught:
            ask()
        assert caught.value.exit_code == 3
        assert whole.run.commit(3) in str(caught.value)
    assert objects.list_files(whole.run.path("index", "leases")) == []
    assert rollback(whole.run) == Tag(1, pinned=True)
    with pytest.raises(Removed):
        tags.auto_promote(whole.run, 2)
    Path(whole.run.commit(1)).unlink()
    kinds = {item.kind for item in audit(whole.run.uri).problems if item.where == whole.run.commit(1)}
    assert kinds == {"commit"}


def test_the_backfill_goes_on_after_gc_and_adopts_what_is_not_announced(tmp_path: Path) -> None:
    whole = published_run(tmp_path)
    orphan = replace(whole.draft(WAVES), attempt_id="dead", epoch=1)
    objects.put_if_absent(whole.run.commit(WAVES), documents.encode(orphan))
    found = collect_garbage(whole.run.uri, NOW)
    assert found.kept[WAVES] == ["not announced yet"]
    assert Writer.acquire(whole.run).latest == WAVES
    tags.auto_promote(whole.run, WAVES)
    assert_whole(whole)


def stray(run: Run, age_seconds: float) -> Path:
    path = Path(run.path("index", "segments", f"{'a' * 64}.faiss"))
    path.write_bytes(b"sealed by a driver that died")
    os.utime(path, (time.time() - age_seconds,) * 2)
    return path


def test_gc_keeps_unreferenced_files_for_the_grace_time(tmp_path: Path) -> None:
    whole = published_run(tmp_path)
    old = stray(whole.run, age_seconds=10**6)
    foreign = Path(whole.run.path("index", "segments", "README"))
    foreign.write_text("not ours")
    assert collect_garbage(whole.run.uri, NOW).files > 0
    assert old.exists()  # the last wave is not published: a driver may be about to name it
    whole.publish(WAVES)
    stray(whole.run, age_seconds=60)
    collect_garbage(whole.run.uri, Rules(keep=9))
    assert old.exists()
    stray(whole.run, age_seconds=3700)
    assert collect_garbage(whole.run.uri, Rules(keep=9)).files == 1
    assert not old.exists()
    assert foreign.exists()
    assert_whole(whole)


def test_gc_removes_expired_leases_and_leftover_files(tmp_path: Path) -> None:
    whole = published_run(tmp_path)
    live, expired = leases.Lease(whole.run, 2), leases.Lease(whole.run, 3)
    damaged = Path(whole.run.path("index", "leases", "x.json"))
    damaged.write_bytes(b"{")
    leftovers = [Path(whole.run.path(folder, f".tmp-{number}")) for number, folder in enumerate(("plan", "index"))]
    for path in leftovers:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    with pytest.raises(DataError, match="not a JSON file"):
        collect_garbage(whole.run.uri, NOW)  # it may be live
    for path in (Path(expired.uri), damaged):
        os.utime(path, (time.time() - leases.LEASE_SECONDS - 60,) * 2)
    os.utime(leftovers[0], (time.time() - 3700,) * 2)
    os.utime(leftovers[1], (time.time() - 1000,) * 2)

    found = collect_garbage(whole.run.uri, Rules(keep=1))
    assert (found.leases, found.leftovers) == (0, 1)  # both within the grace time
    assert [path.exists() for path in leftovers] == [False, True]

    at_work = leftovers[0]
    at_work.write_bytes(b"by a writer that is not dead")
    found = collect_garbage(whole.run.uri, NOW)
    assert (found.leases, found.leftovers, found.commits) == (2, 1, [0, 3])
    assert [path.exists() for path in leftovers] == [True, False]
    assert objects.list_files(whole.run.path("index", "leases")) == [live.uri]


def test_a_lease_lives_as_long_as_its_reader_and_no_longer(tmp_path: Path) -> None:
    run, others = template().copy_to(tmp_path).run, set(threading.enumerate())
    lease = leases.Lease(run, 1, seconds=0.3)
    threads = [thread for thread in threading.enumerate() if thread.name == "lease" and thread not in others]
    assert threads
    first = objects.stat(lease.uri).modified_seconds
    deadline = time.monotonic() + 20
    while objects.stat(lease.uri).modified_seconds < first + 0.3:  # renewed, though nobody asked
        assert time.monotonic() < deadline
        time.sleep(0.05)
    lease.release()
    time.sleep(0.2)
    assert not objects.exists(lease.uri)
    forgotten = leases.Lease(run, 1, seconds=0.3)
    uri = forgotten.uri
    del forgotten
    last = objects.stat(uri).modified_seconds
    time.sleep(0.4)
    assert objects.stat(uri).modified_seconds == last
    for thread in threads:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in threads)
    assert leases.find_leases(run, last + 1.0) == ({1}, {})
    assert set(leases.find_leases(run, last + 3.0)[1]) == {uri}


def test_a_searcher_moves_its_lease_and_lets_go(tmp_path: Path) -> None:
    whole = published_run(tmp_path)

    def pinned() -> set[int]:
        return leases.find_leases(whole.run, time.time())[0]

    with Searcher(whole.run.uri) as searcher:
        assert pinned() == {LAST}
        whole.publish(WAVES)
        tags.auto_promote(whole.run, WAVES)
        Path(whole.run.path(whole.segment(0, WAVES, "embedded").path)).rename(tmp_path / "away")
        with pytest.raises(DataError):
            searcher.refresh()
        assert pinned() == {LAST}
        Path(tmp_path / "away").rename(whole.run.path(whole.segment(0, WAVES, "embedded").path))
        assert searcher.refresh()
        assert pinned() == {WAVES}
    assert pinned() == set()
    with pytest.raises(DataError, match="no such commit"):
        Searcher(str(tmp_path / "typo"), commit=1)
    assert not (tmp_path / "typo").exists()


def test_a_reader_without_a_lease_follows_the_tag_when_gc_is_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = published_run(tmp_path)
    rollback(whole.run)

    def forbidden(*_: object) -> None:
        raise PermissionError("read-only")

    real, done = Searcher._open, []

    def slow(self: Searcher, commit: commits.Commit, *rest: object) -> object:
        if not done:
            done.append(commit.number)
            tags.promote(whole.run, 3, blockers=[])
            tags.promote(whole.run, LAST, blockers=[])
            assert collect_garbage(whole.run.uri, NOW).commits == [0, 1, 2]
        return real(self, commit, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(leases.Lease, "__init__", forbidden)
    monkeypatch.setattr(Searcher, "_open", slow)
    with Searcher(whole.run.uri) as searcher:
        assert searcher.commit.number == LAST
    assert done == [1]


def test_gc_killed_at_any_operation_is_finished_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = published_run(tmp_path / "undisturbed")
    collect_garbage(expected.run.uri, NOW)
    steps = 0
    while True:
        whole = published_run(tmp_path / str(steps))
        with dying(monkeypatch, steps):
            try:
                collect_garbage(whole.run.uri, NOW)
                break
            except Crash:
                steps += 1
        assert_whole(whole)
        assert set(list_commits(whole.run)) >= {1, LAST}
        collect_garbage(whole.run.uri, NOW)
        assert_whole(whole)
        assert paths(whole.run) == paths(expected.run)
        assert read_removals(whole.run) == replace(
            read_removals(expected.run), attempt_id=read_removals(whole.run).attempt_id
        )
    assert steps >= 7


def test_a_removal_that_a_dead_gc_announced_does_not_block(tmp_path: Path) -> None:
    whole = published_run(tmp_path)
    leases.change_removals(whole.run, lambda now: replace(now, announced=(0, 2, 3)))
    assert list_commits(whole.run) == list(range(LAST + 1))
    with Searcher(whole.run.uri, commit=2):
        assert read_removals(whole.run).announced == (0, 3)
        assert rollback(whole.run, to=3) == Tag(3, pinned=True)
        assert read_removals(whole.run).announced == (0,)
        assert collect_garbage(whole.run.uri, NOW).commits == [0, 1]
    assert_whole(whole)


@pytest.mark.parametrize("damage", [b"{}", b"", documents.encode(Removals(confirmed=(99,)))[:-9]])
def test_a_damaged_record_is_named_and_stops_gc(tmp_path: Path, damage: bytes) -> None:
    whole = published_run(tmp_path)
    collect_garbage(whole.run.uri, NOW)
    Path(whole.run.collected).write_bytes(damage)
    with pytest.raises(DataError, match=whole.run.collected):
        collect_garbage(whole.run.uri, NOW)
    assert any(item.kind == "removals" for item in audit(whole.run.uri).problems)


def by_name(folder: str) -> Run:
    """A run whose segments are empty files, in memory where that can be: here only the order of steps counts."""
    run = Run(folder)
    writer = Writer.acquire(run)
    for number in range(4):
        publish_by_name(run, writer, number)
    tags.promote(run, 3, blockers=[])
    return run


def publish_by_name(run: Run, writer: Writer, number: int) -> None:
    commit = draft(number)
    renamed = tuple(
        replace(
            ref, path=(path := f"index/segments/{ref.wave}{ref.shard}{ref.kind[0]}"), sidecar_path=f"{path}.parquet"
        )
        for ref in commit.segments
    )
    for ref in renamed:
        for path in (ref.path, ref.sidecar_path):
            objects.put(run.path(path), b"")
    objects.put(run.path(commit.codebook_path), b"")
    writer.publish(replace(commit, segments=renamed))


def assert_files(run: Run) -> None:
    """What may be asked for is there, and all tags and leases can ask for it."""
    gone = set(read_removals(run).confirmed)
    for number in set(range(4)) - gone:
        commit = read_commit(run, number)
        for ref in commit.segments:
            assert objects.exists(run.path(ref.path)), (number, ref.path)
            assert objects.exists(run.path(ref.sidecar_path))
    prod = read_tag(run, "prod")
    assert prod is not None
    assert {prod.commit, prod.previous}.isdisjoint(gone)
    assert leases.find_leases(run, time.time())[0].isdisjoint(gone)


def check_beside(order: Iterable[int], beside: Sequence[str]) -> None:
    """Run gc and other things at the same time, in this order of their storage calls."""
    folder = tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    held: list[object] = []
    try:
        run = by_name(folder)
        if "promote" in beside:
            rollback(run, to=1)

        def read() -> object:
            held.append(lease := leases.take(run, 2))
            return lease

        actions: dict[str, Callable[[], object]] = {
            "read": read,
            "rollback": lambda: rollback(run, to=1),
            "promote": lambda: tags.promote(run, 2, blockers=[]),
            "publish": lambda: publish_by_name(run, Writer.acquire(run), 4),
            "gc": lambda: collect_garbage(run.uri, NOW),
        }
        with pytest.MonkeyPatch.context() as patch:
            results = Turns(patch, order).run(
                lambda: collect_garbage(run.uri, NOW), *(actions[name] for name in beside)
            )

        for result in results:
            assert not isinstance(result, Exception) or isinstance(result, Refused), result
        assert isinstance(results[0], Collection) or "gc" in beside
        assert_files(run)
        collect_garbage(run.uri, NOW)
        assert_files(run)
        if "rollback" in beside and isinstance(results[1 + beside.index("rollback")], Tag):
            assert 1 in list_commits(run)
        if held:
            assert 2 in list_commits(run)
    finally:
        held.clear()
        shutil.rmtree(folder)


@pytest.mark.parametrize("what", ["read", "rollback"])
@pytest.mark.parametrize("steps", [2, 3, 4, 5])  # the first is to start
def test_gc_with_a_read_or_rollback_in_any_gap_stays_consistent(what: str, steps: int) -> None:
    """gc goes some calls far, the other one some, gc to its end, the other one to its end."""
    for calls in range(33):
        check_beside([0] * calls + [1] * steps + [0] * 99, [what])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 25)), max_size=8),
    st.lists(st.sampled_from(["read", "rollback", "promote", "publish", "gc"]), min_size=1, max_size=2, unique=True),
)
def test_gc_beside_any_operations_in_any_order_stays_consistent(
    order: list[tuple[int, int]], beside: list[str]
) -> None:
    check_beside([who for who, steps in order for _ in range(steps)], beside)


def test_rollback_that_sleeps_through_gc_does_not_move_the_tag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rollback that has looked, and then sleeps through a whole gc, must not move the tag."""
    run = by_name(str(tmp_path))
    real, done = objects.compare_and_swap, []

    def late(uri: str, data: bytes, version: str | None) -> str:
        if uri == run.tag("prod") and not done:
            done.append(True)
            assert collect_garbage(run.uri, NOW).commits == [0, 1, 2]
        return real(uri, data, version)

    monkeypatch.setattr(objects, "compare_and_swap", late)
    with pytest.raises(Removed):
        rollback(run, to=1)
    assert read_tag(run, "prod") == Tag(3)


def test_gc_on_s3_with_its_clock_its_leases_and_a_crash(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = upload(template(), f"{bucket}/run")
    objects.put(whole.run.path("probe", "left"), b"by a check that died")
    monkeypatch.setattr(gc, "LEFTOVER_SECONDS", 0)
    real = time.time
    with Searcher(whole.run.uri, commit=2), monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: real() + 10**7)  # this machine's clock is wrong
        assert collect_garbage(whole.run.uri, Rules(keep=1)).commits == []
        with dying(monkeypatch, 5), pytest.raises(Crash):
            collect_garbage(whole.run.uri, NOW)
        assert audit(whole.run.uri).problems == []
        found = collect_garbage(whole.run.uri, NOW)
    assert list_commits(whole.run) == [1, 2, LAST]
    assert (found.leftovers, found.leases) == (0, 0)  # what was left over went before the crash: gc frees first
    assert not objects.exists(whole.run.path("probe", "left"))
    assert segments(whole.run) == named(whole.run)
    assert_whole(whole)
    with pytest.raises(Removed):
        rollback(whole.run, to=3)
    start = time.monotonic()
    assert rollback(whole.run).commit == 1
    assert time.monotonic() - start < 1
    assert_whole(whole)


READ = """
import sys, logging, numpy as np
logging.basicConfig(level=logging.INFO)
from pipeline.serving.searcher import Searcher
with Searcher(sys.argv[1]) as searcher:
    print(searcher.search(np.zeros((1, 8)), 100).commit)
"""


def test_a_reader_that_may_not_write_reads_without_a_lease(seaweed: SeaweedFS) -> None:
    whole = upload(template(), f"s3://{READONLY}/run")
    environment = {**os.environ, **seaweed.environment(READONLY)}
    done = subprocess.run(
        [sys.executable, "-c", READ, whole.run.uri], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(LAST)
    assert "without a lease" in done.stderr
    assert objects.list_files(whole.run.path("index", "leases")) == []
    objects.delete(whole.run.uri)


def test_readers_hold_their_snapshot_while_gc_and_publishers_run(tmp_path: Path) -> None:
    whole = WholeRun(Run(str(tmp_path)), num=100, num_waves=WAVES).write_inputs()
    writer = whole.publish(0)
    tags.promote(whole.run, 0, blockers=[])
    done, wrong = threading.Event(), []

    def loop(step: Callable[[], object]) -> None:
        while not done.is_set():
            try:
                step()
            except Exception as error:  # noqa: BLE001 (any error is a finding)
                wrong.append(error)
                return

    def open_and_count() -> None:
        with Searcher(whole.run.uri) as searcher:
            found = searcher.search(np.zeros((1, DIM)), whole.num)
            assert set(found.ids[0].tolist()) == set(whole.ids.tolist())

    threads = [
        threading.Thread(target=loop, args=(step,))
        for step in (open_and_count, open_and_count, lambda: collect_garbage(whole.run.uri, NOW))
    ]
    for thread in threads:
        thread.start()
    for number in range(1, WAVES + 1):
        writer.publish(whole.draft(number))
        tags.auto_promote(whole.run, number)
        time.sleep(0.2)
    done.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    collect_garbage(whole.run.uri, NOW)
    assert set(list_commits(whole.run)) == {WAVES - 1, WAVES}
    assert_whole(whole)


def test_needed_keeps_pinned_and_newest_commits(tmp_path: Path) -> None:
    view = gc._look(published_run(tmp_path).run, Removals())
    kept = gc.needed(view, NOW, now_seconds=1e12, pins={LAST: ["prod"]})
    assert kept == {LAST: ["prod", "among the last 1"]}
