"""The commit protocol, model-checked: drivers, an operator and a reader over a store that fails at any request.

`test_snapshot` checks what each call does; here the calls of all are cut into requests that hypothesis interleaves and
breaks. What must hold is checked at each single write, by whom it comes from.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from pipeline.errors import ConfigError, DataError, Refused, SnapshotConflict, TransientError
from pipeline.index import tags
from pipeline.index import writer as writers
from pipeline.index.commits import Commit, check_commit, read_commit
from pipeline.index.tags import Tag, auto_promote, list_commits, promote, read_tag, rollback
from pipeline.index.writer import Writer
from pipeline.run import Run
from pipeline.storage import documents, objects, retry
from pipeline.storage.retry import Retry
from pipeline.storage.retrying_store import ObjectStore
from tests.support.commit_drafts import OTHER, PROCESSOR, SALTS, SAME, draft
from tests.support.unreliable_store import FakeTime, Fault, Program, UnreliableStore

WAVES = 3
RUN = Run("s3://bucket/run")
CANDIDATE, PROD = (RUN.tag(name).removeprefix("s3://") for name in ("candidate", "prod"))
COMMITS = RUN.path("index", "commits", "").removeprefix("s3://")
OPERATIONS: dict[str, Callable[[int | None], object]] = {
    "promote": lambda number: promote(RUN, number, blockers=[]),
    "auto_promote": lambda number: auto_promote(RUN, number or 0),
    "rollback": lambda number: rollback(RUN, number),
}


class Protocol(RuleBasedStateMachine):
    """Up to three drivers publish one run, while prod is moved and read."""

    client: UnreliableStore  # of the machine that runs: what storage talks to
    honours_conditions = True
    tags_are_told_apart = True

    def __init__(self) -> None:
        super().__init__()
        self.client = Protocol.client = UnreliableStore(self.honours_conditions)
        self.client.watch = self.judge
        self.programs: list[Program] = []
        self.owners: dict[int, Program | None] = {}  # whose write made an epoch
        self.held: set[int] = set()  # epochs that a driver was told it has
        self.attempts: set[str] = set()
        self.published: set[int] = set()  # numbers whose publication a driver was told of

    # What programs do

    def drive(self, program: Program, salt: str, patience: int) -> None:
        """As the backfill does: acquire, publish wave by wave, let prod follow; stop when another took over."""
        try:
            writer = Writer.acquire(RUN)
            assert writer.epoch not in self.held, "two writers hold one epoch"
            self.held.add(writer.epoch)
            while (number := -1 if writer.latest is None else writer.latest) < WAVES:
                try:
                    self.publish(writer, draft(number + 1, salt, WAVES))
                except TransientError:
                    if not patience:
                        raise
                    patience, program.gone = patience - 1, False  # "safe to call again after any failure"
                    continue
                auto_promote(RUN, number + 1)
                writer.check()
        except (SnapshotConflict, TransientError):
            return  # as a driver does: it stops

    def publish(self, writer: Writer, commit: Commit) -> None:
        try:
            stored = writer.publish(commit)
        except SnapshotConflict as error:
            candidate = documents.parse(Tag, self.client.objects[CANDIDATE], CANDIDATE, must_be_checked=True)
            if candidate.epoch == writer.epoch and "other content" not in str(error):
                raise AssertionError("the owner was refused") from error
            raise
        assert commit.number not in self.published, "two writers published one number"
        self.published.add(commit.number)
        assert stored.held() == commit.held()
        assert read_stored(self.client, commit.number) == stored

    def operate(self, program: Program, number: int | None) -> None:
        try:
            OPERATIONS[program.kind](number)
        except (DataError, Refused, TransientError):
            return

    def read(self, program: Program) -> None:
        """A reader never meets anything but whole, published commits."""
        while True:
            try:
                tag = read_tag(RUN, "prod")
                if tag is not None:
                    assert tag.commit is not None
                    assert read_commit(RUN, tag.commit) == read_stored(self.client, tag.commit)
                found = list_commits(RUN)  # may lack what is new where the listing is stale
                assert set(found) <= set(numbers(self.client))
            except TransientError:
                program.gone = False

    # What is done to them

    @initialize(count=st.integers(1, 3), published=st.integers(-1, 1), last=st.sampled_from(SALTS))
    def start(self, count: int, published: int, last: str) -> None:
        """Some drivers at once, maybe on a run that is under way."""
        writer = Writer.acquire(RUN)
        for number in range(published + 1):
            writer.publish(draft(number, waves=WAVES))
            auto_promote(RUN, number)
        for salt in [SAME, SAME, last][-count:]:
            self.start_driver(salt, patience=1)

    @rule(salt=st.sampled_from([SAME, SAME, PROCESSOR, OTHER]), patience=st.integers(0, 2))
    def start_driver(self, salt: str, patience: int) -> None:
        if sum(program.kind == "driver" for program in self.running()) < 3:
            self.launch("driver", lambda program: self.drive(program, salt, patience))

    @rule(kind=st.sampled_from(sorted(OPERATIONS)), number=st.none() | st.integers(0, WAVES))
    def start_operation(self, kind: str, number: int | None) -> None:
        if sum(program.kind in OPERATIONS for program in self.running()) < 2:
            self.launch(kind, lambda program: self.operate(program, number))

    @precondition(lambda self: not any(program.kind == "reader" for program in self.running()))
    @rule()
    def start_reader(self) -> None:
        self.launch("reader", self.read)

    @precondition(lambda self: self.running())
    @rule(who=st.integers(0, 5), fault=st.sampled_from(Fault), requests=st.integers(1, 4))
    def meet(self, who: int, fault: Fault, requests: int) -> None:
        """The next request of a program meets a fault, those after it do not."""
        self.step(who, [fault, *[Fault.NONE] * (requests - 1)])

    @precondition(lambda self: self.running())
    @rule(who=st.integers(0, 5), requests=st.sampled_from([1, 2, 3, 4, 5, 8, 12]))
    def go_on(self, who: int, requests: int) -> None:
        self.step(who, [Fault.NONE] * requests)

    @precondition(lambda self: len(self.running()) > 1)
    @rule(order=st.lists(st.integers(0, 5), min_size=5, max_size=20))
    def take_turns(self, order: list[int]) -> None:
        """Request by request, of one program and another."""
        for who in order:
            self.step(who, [Fault.NONE])

    def step(self, who: int, faults: list[Fault]) -> None:
        running = self.running()
        program = running[who % len(running)] if running else None
        for fault in faults:
            if program is not None and not program.done:
                program.step(fault)

    @precondition(lambda self: self.client.delayed)
    @rule(which=st.integers(0, 9))
    def deliver(self, which: int) -> None:
        self.client.deliver(which % len(self.client.delayed))

    def teardown(self) -> None:
        """All die, what is under way arrives, and a driver that starts on its own finishes the run."""
        for program in self.running():
            program.step(Fault.CRASH)
        while self.client.delayed:
            self.client.deliver(0)
        writer = Writer.acquire(RUN)
        for number in range(0 if writer.latest is None else writer.latest + 1, WAVES + 1):
            writer.publish(draft(number, "last", WAVES))
        assert list_commits(RUN) == numbers(self.client) == list(range(WAVES + 1))

    def running(self) -> list[Program]:
        return [program for program in self.programs if not program.done]

    def launch(self, kind: str, main: Callable[[Program], None]) -> None:
        self.programs.append(Program(kind, main))
        self.programs[-1].start()

    # What must hold, at each write that is done

    def judge(self, name: str, before: bytes | None, after: bytes, program: Program | None) -> None:
        if name.startswith(COMMITS):
            self.judge_commit(name, before, after)
            return
        old = documents.parse(Tag, before, name, must_be_checked=True) if before is not None else None
        new = documents.parse(Tag, after, name, must_be_checked=True)
        assert not (self.tags_are_told_apart and new.attempt_id in self.attempts), "a tag was written twice"
        self.attempts.add(new.attempt_id)
        assert new.commit is None or new.commit in numbers(self.client), "a tag points to nothing"
        {CANDIDATE: self.judge_candidate, PROD: self.judge_prod}[name](old, new, program)

    def judge_commit(self, name: str, before: bytes | None, after: bytes) -> None:
        assert before is None, "a commit was replaced"
        commit = documents.parse(Commit, after, name, must_be_checked=True)
        check_commit(commit, name)
        candidate = self.tag(CANDIDATE)
        last = -1 if candidate is None or candidate.commit is None else candidate.commit
        assert numbers(self.client) == list(range(commit.number + 1)), "a number was skipped"
        assert commit.number == last + 1, "a commit was made before the one before it was announced"

    def judge_candidate(self, old: Tag | None, new: Tag, program: Program | None) -> None:
        old = old or Tag(None, 0)
        assert old.epoch is not None
        assert new.epoch is not None
        step = (-1 if new.commit is None else new.commit) - (-1 if old.commit is None else old.commit)
        assert step in (0, 1), "the candidate went back, or skipped a number"
        assert new.epoch in (old.epoch, old.epoch + 1), "epochs do not grow one by one"
        assert self.owners.setdefault(new.epoch, program) is program, "a writer that was taken over moved the tag"

    def judge_prod(self, old: Tag | None, new: Tag, program: Program | None) -> None:
        candidate = self.tag(CANDIDATE)
        assert candidate is not None
        assert candidate.commit is not None
        assert new.commit is not None
        assert new.commit <= candidate.commit, "prod points to what is not announced"
        if old is None or old.commit is None:
            return
        is_rollback = program is not None and program.kind == "rollback"
        assert new.commit < old.commit if is_rollback else new.commit >= old.commit, "prod moved the wrong way"
        if old.pinned:
            assert program is not None
            assert program.kind in ("promote", "rollback"), "a driver moved prod although it was pinned"

    def tag(self, name: str) -> Tag | None:
        return (
            documents.parse(Tag, self.client.objects[name], name, must_be_checked=True)
            if name in self.client.objects
            else None
        )


class IgnoresConditions(Protocol):
    """Over a store that answers each conditional put with 200."""

    honours_conditions = False


def numbers(client: UnreliableStore) -> list[int]:
    """Of the commits that are stored, announced or not."""
    return sorted(int(name.removeprefix(COMMITS)[:20]) for name in client.objects if name.startswith(COMMITS))


def read_stored(client: UnreliableStore, number: int) -> Commit:
    name = RUN.commit(number).removeprefix("s3://")
    return documents.parse(Commit, client.objects[name], name, must_be_checked=True)


@pytest.fixture(autouse=True)
def model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage over the machine's store; a request is tried three times, and no pause takes any time."""
    monkeypatch.setattr(objects, "_store", lambda *_: ObjectStore(Protocol.client, Retry(seconds=2.0)))
    monkeypatch.setattr(retry, "time", FakeTime())


EFFORT = settings(
    max_examples=150,
    stateful_step_count=50,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def find_a_violation(machine: type[Protocol]) -> None:
    """The first one; the same each time, and not made smaller: nobody reads it."""
    effort = settings(EFFORT, max_examples=2000, derandomize=True, phases=[Phase.generate])
    run_state_machine_as_test(machine, settings=settings(effort, report_multiple_bugs=False))


def test_any_order_of_requests_with_any_fault_keeps_the_protocol() -> None:
    run_state_machine_as_test(Protocol, settings=EFFORT)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_any_order_of_requests_with_any_fault_keeps_the_protocol_in_a_long_search() -> None:
    """Two minutes by default; FASTFILL_MODEL_EXAMPLES=10000 for a search of a quarter of an hour."""
    examples = int(os.environ.get("FASTFILL_MODEL_EXAMPLES", "1500"))
    run_state_machine_as_test(Protocol, settings=settings(EFFORT, max_examples=examples, stateful_step_count=80))


def no_attempt_ids(patch: pytest.MonkeyPatch) -> None:
    """Two drivers may write the same bytes; commits are told apart by their time."""
    patch.setattr(tags, "uuid", SimpleNamespace(uuid4=lambda: SimpleNamespace(hex="")))
    patch.setattr(Protocol, "tags_are_told_apart", False)


def no_epochs(patch: pytest.MonkeyPatch) -> None:
    """A driver does not look whether the run is still its own."""
    patch.setattr(Writer, "_version_while_ours", lambda *_: (objects.read_versioned(RUN.tag("candidate")) or "?")[1])


def no_condition_on_commits(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(objects, "put_if_absent", objects.put)


def no_commit_before_its_announcement(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(writers, "_create", lambda run, commit: commit)


@pytest.mark.parametrize(
    ("broken", "found"),
    [
        (no_attempt_ids, "two writers hold one epoch"),
        (no_epochs, "taken over moved the tag"),
        (no_condition_on_commits, "a commit was replaced"),
        (no_commit_before_its_announcement, "points to nothing"),
    ],
)
def test_model_check_finds_seeded_bugs(
    broken: Callable[[pytest.MonkeyPatch], None], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch)
    with pytest.raises(AssertionError, match=found):
        find_a_violation(Protocol)


def test_the_model_finds_that_a_store_ignores_conditions_and_the_probe_refuses_it() -> None:
    with pytest.raises(AssertionError):
        find_a_violation(IgnoresConditions)
    Protocol.client = UnreliableStore(honours_conditions=False)
    with pytest.raises(ConfigError, match="ignores conditional writes"):
        objects.check(RUN.uri)
    Protocol.client = UnreliableStore()
    objects.check(RUN.uri)
    assert Protocol.client.objects == {}


def test_acquire_by_drivers_at_the_same_moment_gives_each_its_own_epoch() -> None:
    """All read the same tag, then all write: the losers' read-back must not take the winner's bytes for theirs."""
    Protocol.client = UnreliableStore()
    epochs: list[int] = []
    programs = [Program("driver", lambda _: epochs.append(Writer.acquire(RUN).epoch)) for _ in range(3)]
    for program in programs:
        program.start()
    while running := [program for program in programs if not program.done]:
        for program in running:
            program.step(Fault.NONE)
    assert sorted(epochs) == [1, 2, 3]


def stop_before(request: int) -> tuple[Program, list[str]]:
    """A driver that owns the run, has published commit 0, and is suspended before a request of its next publication.

    The requests: 1 reads the tag, 2 creates the commit, 3 announces it.
    """
    Protocol.client = UnreliableStore()
    outcome: list[str] = []

    def drive(_: Program) -> None:
        writer = Writer.acquire(RUN)
        writer.publish(draft(0, waves=WAVES))
        try:
            writer.publish(draft(1, waves=WAVES))
        except SnapshotConflict as error:
            outcome.append(str(error))

    program = Program("driver", drive)
    program.start()
    while CANDIDATE not in Protocol.client.objects or read_tag(RUN, "candidate") != Tag(0, epoch=1):
        program.step(Fault.NONE)
    for _ in range(request - 1):
        program.step(Fault.NONE)
    return program, outcome


@pytest.mark.parametrize("request_number", [1, 2, 3])
@pytest.mark.parametrize("salt", SALTS)
def test_a_driver_that_wakes_up_after_it_was_taken_over_cannot_publish(request_number: int, salt: str) -> None:
    program, outcome = stop_before(request_number)
    new = Writer.acquire(RUN)
    for number in range((new.latest or 0) + 1, WAVES + 1):
        new.publish(draft(number, salt, WAVES))
    stored = dict(Protocol.client.objects)
    while not program.done:
        program.step(Fault.NONE)
    assert len(outcome) == 1
    assert Protocol.client.objects == stored


def test_a_commit_that_a_late_driver_creates_is_adopted_or_noticed() -> None:
    for salt in SALTS:
        program, outcome = stop_before(2)
        new = Writer.acquire(RUN)
        program.step(Fault.NONE)  # creates the commit, though it is not the owner any more
        assert list_commits(RUN) == [0]
        if salt == OTHER:
            with pytest.raises(SnapshotConflict, match="other content"):
                new.publish(draft(1, salt, WAVES))
            new = Writer.acquire(RUN)
        else:
            new.publish(draft(1, salt, WAVES))
        assert new.latest == 1
        while not program.done:
            program.step(Fault.NONE)
        assert "took this run over" in outcome[0]
        new.publish(draft(2, salt, WAVES))
        assert list_commits(RUN) == [0, 1, 2]
