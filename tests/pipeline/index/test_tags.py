"""The commit protocol: commits are whole, published once and in order, whoever dies or wakes up when."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pipeline.errors import DataError, GateRefused, Refused, SnapshotConflict
from pipeline.index import commits
from pipeline.index.commits import Commit, SegmentCounts, read_commit
from pipeline.index.segment_files import SegmentRef
from pipeline.index.tags import Tag, auto_promote, list_commits, promote, read_tag, rollback
from pipeline.index.writer import Writer
from pipeline.models.calibration import Calibration
from pipeline.run import Run
from pipeline.storage import documents, interface, objects
from tests.support.commit_drafts import PROCESSOR, SALTS, SHARDS, WAVES, draft


def test_commit_of_an_older_version_without_log_digests_and_with_quality_can_be_read(run: Run) -> None:
    tree = json.loads(documents.encode(draft(2))) | {"quality": {"top1": 0.5}}
    del tree["log_digests"], tree["calibration"], tree["sha256"]
    tree["sha256"] = documents.digest(tree)
    found = documents.parse(Commit, json.dumps(tree).encode(), "old", must_be_checked=True)
    commits.check_commit(found, "old")
    assert found == draft(2)


def with_rejects_apart(commit: Commit, twice: bool = False) -> Commit:
    """The rejects of each embedded segment in a transformed one of the same (shard, wave)."""
    segments: list[SegmentRef] = []
    for ref in commit.segments:
        count = ref.rejected
        segments.append(replace(ref, vectors=ref.vectors - count, rejected=0))
        apart = replace(ref, kind="transformed", vectors=count, rejected=count, path=f"{ref.path}.rejects")
        segments += [apart, *([apart] if twice else [])] if count else []
    return replace(commit, segments=tuple(segments), counts=SegmentCounts.of(segments))


def test_commit_with_its_rejects_in_segments_of_their_own_has_the_same_counts(run: Run) -> None:
    writer = Writer.acquire(run)
    for number in range(3):
        commit = writer.publish(with_rejects_apart(draft(number)))
    assert commit.counts == draft(2).counts
    assert commit.counts.rejected == 2
    assert len(commit.segments) == WAVES * SHARDS + 2
    assert read_commit(run, 2) == commit


def test_commit_with_two_segments_of_the_same_rejects_is_refused() -> None:
    with pytest.raises(DataError, match="two segments of the rejects"):
        commits.check_commit(with_rejects_apart(draft(2), twice=True), "commit")


def test_commit_with_images_that_are_not_rejected_in_a_segment_of_rejects_is_refused() -> None:
    commit = with_rejects_apart(draft(2))
    segments = tuple(
        replace(ref, rejected=0) if ref.kind == "transformed" and ref.wave == 1 else ref for ref in commit.segments
    )
    with pytest.raises(DataError, match="does not belong in commit 2"):
        commits.check_commit(replace(commit, segments=segments, counts=SegmentCounts.of(segments)), "commit")


def test_commit_keeps_its_calibration_to_the_last_bit() -> None:
    calibration = Calibration((0.0, 0.1, 1 / 3), (0.0, 0.2, 2 / 3))
    commit = replace(with_rejects_apart(draft(2)), calibration=calibration)
    assert documents.parse(Commit, documents.encode(commit), "commit", must_be_checked=True) == commit
    commits.check_commit(commit, "commit")


def test_commit_with_a_calibration_and_two_kinds_in_one_segment_is_refused() -> None:
    commit = replace(draft(2), calibration=Calibration((0.0, 1.0), (0.0, 2.0)))
    with pytest.raises(DataError, match="does not belong in commit 2"):
        commits.check_commit(commit, "commit")


@pytest.mark.parametrize("digests", [("a",), ("a", "b", "c")])
def test_commit_with_another_number_of_log_digests_than_waves_is_refused(digests: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match="one digest of the vector log per embedded wave"):
        commits.check_commit(replace(draft(2), log_digests=digests), "commit")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(str(tmp_path))


def published(run: Run, last: int) -> Writer:
    writer = Writer.acquire(run)
    for number in range(last + 1):
        writer.publish(draft(number))
    return writer


def test_commits_are_numbered_and_counted(run: Run) -> None:
    writer = Writer.acquire(run)
    assert writer.latest is None
    assert list_commits(run) == []
    for number in range(WAVES + 1):
        commit = writer.publish(draft(number))
        assert read_commit(run, number) == commit
        assert commit.content() == draft(number).content()
        assert read_tag(run, "candidate") == Tag(number, epoch=1)
    assert list_commits(run) == list(range(WAVES + 1))
    counts = read_commit(run, 2).counts
    assert counts == SegmentCounts(gallery=60, transformed=36, embedded=24, rejected=2)
    assert counts.transformed + counts.embedded == counts.gallery


def test_a_commit_file_says_nothing_of_the_machine_and_has_its_format(run: Run) -> None:
    published(run, 0)
    tree = json.loads(objects.read_bytes(run.commit(0)))
    assert tree["format_version"] == 1
    assert run.uri not in json.dumps(tree)


def test_publishing_out_of_order_or_twice_is_refused(run: Run) -> None:
    writer = published(run, 1)
    for number in (0, 1, 3):
        with pytest.raises(SnapshotConflict, match="in order"):
            writer.publish(draft(number))
    assert list_commits(run) == [0, 1]


def test_the_last_to_acquire_is_the_only_writer(run: Run) -> None:
    old = published(run, 1)
    new = Writer.acquire(run)
    assert (new.epoch, new.latest) == (old.epoch + 1, 1)
    with pytest.raises(SnapshotConflict, match="took this run over"):
        old.publish(draft(2))
    assert not objects.exists(run.commit(2))
    new.publish(draft(2))
    with pytest.raises(SnapshotConflict, match="took this run over") as caught:
        old.publish(draft(2))
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), SnapshotConflict)  # noqa: S301  # our own bytes


def test_a_writer_notices_that_it_was_taken_over_before_it_publishes(run: Run) -> None:
    old = published(run, 1)
    old.check()
    new = Writer.acquire(run)
    new.check()
    with pytest.raises(SnapshotConflict, match="took this run over") as caught:
        old.check()
    assert f"found: epoch {new.epoch} at commit 1\n" in str(caught.value)
    assert "Tag(" not in str(caught.value)
    new.publish(draft(2))
    new.check()


def test_no_two_writes_of_a_tag_are_equal_and_tags_that_say_the_same_are(run: Run) -> None:
    published(run, 2)
    seen = set()
    for number in (1, 2):
        promote(run, number, blockers=[])
        seen.add(objects.read_bytes(run.tag("prod")))
    rollback(run, to=1)
    promote(run, 2, blockers=[])  # prod says again what it said before
    seen.add(objects.read_bytes(run.tag("prod")))
    assert len(seen) == 3
    tag = read_tag(run, "prod")
    assert tag == Tag(2, previous=1)
    assert promote(run, 2, blockers=[]) == tag  # nothing to move: nothing is written
    assert objects.read_bytes(run.tag("prod")) in seen


def test_a_commit_that_was_created_but_not_announced_is_adopted(run: Run) -> None:
    published(run, 1)
    orphan = replace(draft(2), attempt_id="dead", epoch=1)
    objects.put_if_absent(run.commit(2), documents.encode(orphan))
    assert list_commits(run) == [0, 1]
    with pytest.raises(DataError, match="no such commit"):
        promote(run, 2, blockers=[])

    writer = Writer.acquire(run)

    assert writer.latest == 2
    assert list_commits(run) == [0, 1, 2]
    assert read_commit(run, 2).attempt_id == "dead"


def test_an_orphan_that_appears_later_is_adopted_where_it_is_the_same(run: Run) -> None:
    writer = published(run, 1)
    objects.put_if_absent(run.commit(2), documents.encode(replace(draft(2), attempt_id="zombie")))
    assert writer.publish(draft(2)).attempt_id == "zombie"
    objects.put_if_absent(run.commit(3), documents.encode(replace(draft(3, salt="x"), attempt_id="zombie")))
    with pytest.raises(SnapshotConflict, match="other content"):
        writer.publish(draft(3))
    assert read_tag(run, "candidate") == Tag(2, epoch=1)
    assert Writer.acquire(run).latest == 3


@pytest.mark.parametrize("number", [0, 2])
def test_publish_adopts_a_late_commit_of_another_processor(run: Run, number: int) -> None:
    writer = published(run, number - 1)
    codebook = {"codebook_path": "index/codebook-def.faiss", "codebook_sha256": "def"} if number == 0 else {}
    late = replace(draft(number, PROCESSOR), attempt_id="late", **codebook)
    objects.put_if_absent(run.commit(number), documents.encode(late))

    stored = writer.publish(draft(number))

    assert stored == late == read_commit(run, number)
    assert stored.content() != draft(number).content()
    assert read_tag(run, "candidate") == Tag(number, epoch=1)


@pytest.mark.parametrize("change", [{"codebook_sha256": "def"}, {"dim": 9}, {"nprobe": 5}])
def test_publish_refuses_a_late_commit_that_is_no_other_processors(run: Run, change: dict[str, Any]) -> None:
    writer = published(run, 1)
    objects.put_if_absent(run.commit(2), documents.encode(replace(draft(2), attempt_id="late", **change)))
    with pytest.raises(SnapshotConflict, match=f"differs in {next(iter(change))}"):
        writer.publish(draft(2))


class LostAnswers:
    """A store that does what it is told and then loses the answer, as a retried request sees it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lost = 0
        put, swap = objects.put_if_absent, objects.compare_and_swap

        def lossy_put(uri: str, data: bytes) -> None:
            put(uri, data)
            self.lost += 1
            raise interface.AlreadyExists(uri)

        def lossy_swap(uri: str, data: bytes, version: str | None) -> str:
            swap(uri, data, version)
            self.lost += 1
            raise interface.Changed(uri)

        self.put, self.swap = lossy_put, lossy_swap
        self._patch = monkeypatch

    def break_store(self, *names: str) -> None:
        for name in names:
            self._patch.setattr(objects, name, self.put if name == "put_if_absent" else self.swap)


def test_lost_answers_do_not_look_like_another_writer(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer.acquire(run)
    store = LostAnswers(monkeypatch)
    store.break_store("put_if_absent", "compare_and_swap")
    commit = writer.publish(draft(0))
    assert store.lost == 2
    assert commit.epoch == writer.epoch
    assert read_tag(run, "candidate") == Tag(0, epoch=writer.epoch)


def test_publishing_again_after_a_failure_goes_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer.acquire(run)
    with monkeypatch.context() as patch:
        patch.setattr(objects, "compare_and_swap", lambda *_: (_ for _ in ()).throw(OSError("gone")))
        with pytest.raises(OSError, match="gone"):
            writer.publish(draft(0))
    assert writer.latest is None
    first = read_commit(run, 0)
    assert writer.publish(draft(0)) == first
    assert writer.publish(draft(1)).number == 1


BROKEN = {
    "a segment is missing": lambda c: replace(c, segments=c.segments[1:]),
    "a segment comes twice": lambda c: replace(c, segments=(*c.segments[1:], c.segments[1])),
    "counts": lambda c: replace(c, counts=replace(c.counts, embedded=c.counts.embedded + 1)),
    "gallery": lambda c: replace(c, counts=replace(c.counts, gallery=c.counts.gallery + 1)),
    "parent": lambda c: replace(c, parent=0),
    "beyond the last wave": lambda c: replace(c, num_waves=1),
    "kind": lambda c: replace(c, segments=(replace(c.segments[0], kind="transformed"), *c.segments[1:])),
    "rejects": lambda c: replace(c, segments=(replace(c.segments[0], rejected=99), *c.segments[1:])),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_commit_that_is_not_whole_is_neither_written_nor_read(run: Run, name: str) -> None:
    writer = published(run, 1)
    broken = BROKEN[name](draft(2))
    with pytest.raises(DataError) as caught:
        writer.publish(broken)
    assert run.commit(2) in str(caught.value)
    assert not objects.exists(run.commit(2))
    objects.put(run.commit(2), documents.encode(broken))
    with pytest.raises(DataError) as caught:
        read_commit(run, 2)
    assert run.commit(2) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "another format"),
        ({"nprobe": "4"}, "nprobe"),
        ({"dim": None}, "dim"),
        ({"metric": "l3"}, "metric"),
        ({"segments": [{"shard": 0}]}, "segments.0.wave"),
        ({"number": 2, "parent": 1}, "another commit"),
    ],
)
def test_a_commit_file_of_another_program_is_refused(run: Run, changes: dict[str, object], message: str) -> None:
    published(run, 1)
    tree = json.loads(objects.read_bytes(run.commit(1))) | changes
    del tree["sha256"]
    tree["sha256"] = documents.digest(tree)
    objects.put(run.commit(1), json.dumps(tree).encode())
    with pytest.raises(DataError, match=message) as caught:
        read_commit(run, 1)
    assert run.commit(1) in str(caught.value)
    assert read_commit(run, 0).number == 0


def json_or_none(data: bytes) -> object:
    try:
        return json.loads(data)
    except ValueError:
        return None


@pytest.mark.parametrize("what", ["commit", "tag"])
def test_any_flipped_bit_and_any_truncation_is_noticed(run: Run, what: str) -> None:
    writer = Writer.acquire(run)
    writer.publish(draft(0, waves=1))
    uri = run.commit(0) if what == "commit" else run.tag("candidate")
    good = objects.read_bytes(uri)

    def read() -> object:
        return read_commit(run, 0) if what == "commit" else read_tag(run, "candidate")

    expected = read()
    for position in range(0, len(good), 23):
        for bad in (good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :], good[:position]):
            Path(uri).write_bytes(bad)
            if json_or_none(bad) == json.loads(good):  # only white space was hit
                assert read() == expected
            else:
                with pytest.raises(DataError, match=uri):
                    read()


def test_promote_moves_prod_and_remembers_where_it_was(run: Run) -> None:
    with pytest.raises(DataError, match="no such commit"):
        promote(run, None, blockers=[])
    published(run, 3)
    assert promote(run, 1, blockers=[]) == Tag(1)
    assert promote(run, None, blockers=[]) == Tag(3, previous=1)
    assert promote(run, 3, blockers=[]) == Tag(3, previous=1)
    with pytest.raises(DataError, match="no such commit"):
        promote(run, 4, blockers=[])
    with pytest.raises(Refused, match="rollback --to 2"):
        promote(run, 2, blockers=[])
    assert read_tag(run, "prod") == Tag(3, previous=1)


def test_blockers_refuse_a_promotion_unless_forced(run: Run) -> None:
    published(run, 2)
    promote(run, 1, blockers=[])
    with pytest.raises(GateRefused, match="worse than before"):
        promote(run, 2, blockers=["it is worse than before"])
    assert not auto_promote(run, 2, blockers=["it is worse than before"])
    assert read_tag(run, "prod") == Tag(1)
    assert promote(run, 2, blockers=["it is worse than before"], force=True) == Tag(2, previous=1)


def test_rollback_pins_prod_until_the_next_promote(run: Run) -> None:
    with pytest.raises(Refused):
        rollback(run)
    writer = published(run, 0)
    for number in (1, 2):
        writer.publish(draft(number))
        assert auto_promote(run, number)
    assert rollback(run) == Tag(1, pinned=True)
    writer.publish(draft(3))
    assert not auto_promote(run, 3)
    assert read_tag(run, "prod") == Tag(1, pinned=True)
    with pytest.raises(Refused, match="one of the commits 0"):
        rollback(run)
    assert rollback(run, to=0) == Tag(0, pinned=True)
    for to in (0, 3):
        with pytest.raises(Refused):
            rollback(run, to=to)
    assert promote(run, 2, blockers=[]) == Tag(2, previous=0)
    assert auto_promote(run, 3)


def test_auto_promote_never_moves_prod_to_an_earlier_commit(run: Run) -> None:
    published(run, 2)
    assert auto_promote(run, 2)
    assert not auto_promote(run, 1)
    assert read_tag(run, "prod") == Tag(2)


def test_prod_never_points_to_a_commit_that_cannot_be_read(run: Run) -> None:
    published(run, 2)
    promote(run, 1, blockers=[])
    objects.put(run.commit(2), b"{}")
    for move in (lambda: promote(run, 2, blockers=[]), lambda: auto_promote(run, 2)):
        with pytest.raises(DataError):
            move()
    assert read_tag(run, "prod") == Tag(1)


class Crash(BaseException):
    """The process is gone; nothing may catch it."""


class TwoWriters(RuleBasedStateMachine):
    """Two drivers publish the same run, take it over, stall between any two steps and die.

    Contents may differ between them (two GPUs do not round alike). Whatever they do: commits never
    change once announced, the candidate never goes back, no number is skipped, prod is always readable,
    and a driver that starts on its own afterwards finishes the run.
    """

    @initialize()
    def start(self) -> None:
        # In memory where that can be: this is about the order of steps, and each one waits for the disk.
        self.folder = tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        self.run = Run(self.folder)
        self.writers: dict[str, Writer] = {}
        self.owner = ""  # whoever acquired the run last
        self.announced: dict[int, bytes] = {}
        self.candidate = Tag(None, epoch=0)

    def teardown(self) -> None:
        if not hasattr(self, "run"):
            return
        writer = Writer.acquire(self.run)
        for number in range(0 if writer.latest is None else writer.latest + 1, WAVES + 1):
            writer.publish(draft(number, salt="last"))
        assert list_commits(self.run) == list(range(WAVES + 1))
        shutil.rmtree(self.folder)

    @rule(name=st.sampled_from("ab"))
    def acquire(self, name: str) -> None:
        self.writers[name] = Writer.acquire(self.run)
        self.owner = name

    @rule(name=st.sampled_from("ab"), salt=st.sampled_from(SALTS), ahead=st.sampled_from([1, 1, 1, 2]))
    def publish(self, name: str, salt: str, ahead: int) -> None:
        self._publish(name, salt, ahead)

    @rule(name=st.sampled_from("ab"), salt=st.sampled_from(SALTS), step=st.sampled_from(["put", "swap"]))
    def die_after(self, name: str, salt: str, step: str) -> None:
        """The driver's last act is to create the commit, or to announce it."""
        called = {"put": "put_if_absent", "swap": "compare_and_swap"}[step]
        real = getattr(objects, called)

        def last_act(*arguments: object) -> None:
            real(*arguments)
            raise Crash

        setattr(objects, called, last_act)
        try:
            self._publish(name, salt, 1)
        except Crash:
            del self.writers[name]
        finally:
            setattr(objects, called, real)

    @rule(name=st.sampled_from("ab"), salt=st.sampled_from(SALTS), step=st.sampled_from(["put", "swap"]))
    def stall_before(self, name: str, salt: str, step: str) -> None:
        """The other driver takes over, and maybe publishes, just before a step of this one."""
        other = "b" if name == "a" else "a"
        called = {"put": "put_if_absent", "swap": "compare_and_swap"}[step]
        real = getattr(objects, called)

        def stalled(*arguments: object) -> object:
            setattr(objects, called, real)
            self.acquire(other)
            self._publish(other, "other", 1)
            return real(*arguments)

        setattr(objects, called, stalled)
        try:
            self._publish(name, salt, 1)
        finally:
            setattr(objects, called, real)

    @rule(number=st.none() | st.integers(0, WAVES), how=st.sampled_from(["promote", "auto", "rollback"]))
    def move_prod(self, number: int | None, how: str) -> None:
        try:
            if how == "promote":
                promote(self.run, number, blockers=[])
            elif how == "auto":
                auto_promote(self.run, number or 0)
            else:
                rollback(self.run, number)
        except (DataError, Refused):
            pass

    @invariant()
    def nothing_announced_ever_changes(self) -> None:
        if not hasattr(self, "run"):
            return
        tag = read_tag(self.run, "candidate") or self.candidate
        before = -1 if self.candidate.commit is None else self.candidate.commit
        now = -1 if tag.commit is None else tag.commit
        assert now >= before
        assert (tag.epoch or 0) >= (self.candidate.epoch or 0)
        self.candidate = tag
        assert list_commits(self.run) == list(range(now + 1))
        for number in range(now + 1):
            assert read_commit(self.run, number).number == number
            data = objects.read_bytes(self.run.commit(number))
            assert self.announced.setdefault(number, data) == data
        prod = read_tag(self.run, "prod")
        assert prod is None or (prod.commit is not None and prod.commit <= now)

    def _publish(self, name: str, salt: str, ahead: int) -> None:
        writer = self.writers.get(name)
        if writer is None:
            return
        number = (-1 if writer.latest is None else writer.latest) + ahead
        if number > WAVES:
            return
        try:
            commit = writer.publish(draft(number, salt))
        except SnapshotConflict:
            del self.writers[name]  # as a driver does: it stops
        else:
            assert self.owner == name
            assert read_tag(self.run, "candidate") == Tag(number, epoch=writer.epoch)
            assert ahead == 1
            assert commit.held() == draft(number, salt).held()
            assert writer.latest == number


TwoWriters.TestCase.settings = settings(max_examples=40, stateful_step_count=16, deadline=None)
TestTwoWriters = TwoWriters.TestCase
