"""Readers during everything, on local disk and on S3: publishes, rollbacks, gc, and files that get damaged."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.index import leases, tags
from pipeline.index.gc import Rules, collect_garbage
from pipeline.index.tags import list_commits
from pipeline.reporting.audit import audit
from pipeline.run import Run
from pipeline.serving.searcher import Searcher
from pipeline.storage import objects
from tests.support.faulty_proxy import FaultyProxy
from tests.support.whole_run import DIM, WholeRun

PUBLISHES = 20
RULES = Rules(keep=2, grace_seconds=0)


@pytest.fixture(params=["local", "s3"])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a run lives."""
    if request.param == "local":
        return str(tmp_path / "run")
    return f"{request.getfixturevalue('bucket')}/run"


def exact(whole: WholeRun, queries: np.ndarray) -> dict[int, np.ndarray]:
    """By commit, the ids of the whole gallery in the order that a query has to find them."""
    found = {}
    for number in range(whole.num_waves + 1):
        vectors = whole.vectors(number).astype(np.float64)
        found[number] = whole.ids[((queries[:, None] - vectors[None]) ** 2).sum(-1).argsort(axis=1)]
    return found


class Readers:
    """Threads that search without a pause; anything but a whole answer of one commit is a finding."""

    def __init__(self, whole: WholeRun) -> None:
        self.whole = whole
        self.queries = np.random.default_rng(5).standard_normal((2, DIM))
        self.expected = exact(whole, self.queries)
        self.seen: Counter[int] = Counter()
        self.wrong: list[object] = []
        self._done = threading.Event()
        steps = [self._following("prod"), self._following("candidate"), self._opening]
        self._threads = [threading.Thread(target=self._loop, args=(step,)) for step in steps]

    def __enter__(self) -> Readers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()

    def _following(self, tag: str) -> Callable[[], None]:
        searcher = Searcher(self.whole.run.uri, tag=tag)

        def step() -> None:
            searcher.refresh()
            self._check(searcher)

        return step

    def _opening(self) -> None:
        with Searcher(self.whole.run.uri) as searcher:
            self._check(searcher)

    def _check(self, searcher: Searcher) -> None:
        found = searcher.search(self.queries, self.whole.num)
        self.seen[found.commit] += 1
        if not np.array_equal(found.ids, self.expected[found.commit]):
            self.wrong.append(found)

    def _loop(self, step: Callable[[], None]) -> None:
        while not self._done.is_set() and not self.wrong:
            try:
                step()
            except Exception as error:  # noqa: BLE001 (any error is a finding)
                self.wrong.append(error)


def test_readers_see_one_whole_commit_through_twenty_publishes_two_rollbacks_and_gc(home: str) -> None:
    whole = WholeRun(Run(home), num=160, num_waves=PUBLISHES, seed=1).write_inputs()
    writer = whole.publish(0)
    tags.promote(whole.run, 0, blockers=[])
    removed: list[int] = []
    with Readers(whole) as readers:
        for number in range(1, PUBLISHES + 1):
            writer.publish(whole.draft(number))
            tags.auto_promote(whole.run, number)
            if number in (6, 13):
                assert tags.rollback(whole.run).commit == number - 1
            if number in (7, 14):
                removed += collect_garbage(whole.run.uri, RULES).commits
                tags.promote(whole.run, number, blockers=[])
            time.sleep(0.1)
    assert readers.wrong == []
    assert sum(readers.seen.values()) >= PUBLISHES
    assert max(readers.seen) == PUBLISHES
    assert len(removed) >= 8
    assert list_commits(whole.run) == sorted(set(range(PUBLISHES + 1)) - set(removed))
    report = audit(whole.run.uri)
    assert report.problems == []
    assert report.checked["removed_commits"] == len(removed)


DAMAGES = ["a flipped bit", "a truncation", "two segments swapped", "a missing object"]


def damage(how: str, uri: str, other: str) -> None:
    data = objects.read_bytes(uri)
    if how == "a flipped bit":
        middle = len(data) // 2
        objects.put(uri, data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    elif how == "a truncation":
        objects.put(uri, data[:-8])
    elif how == "two segments swapped":
        objects.put(uri, objects.read_bytes(other))
        objects.put(other, data)
    else:
        objects.delete_files([uri])


def test_a_reader_stays_on_the_last_good_commit_and_the_audit_names_the_file(home: str) -> None:
    whole = WholeRun(Run(home), num=60, num_waves=2).write_inputs()
    whole.publish(0)
    tags.promote(whole.run, 0, blockers=[])
    queries = np.random.default_rng(6).standard_normal((2, DIM))
    expected = exact(whole, queries)
    with Searcher(whole.run.uri) as searcher:
        whole.publish(1)
        tags.promote(whole.run, 1, blockers=[])
        bad, other = (whole.run.path(whole.segment(shard, 1, "embedded").path) for shard in (0, 1))
        good = {uri: objects.read_bytes(uri) for uri in (bad, other)}
        for how in DAMAGES:
            damage(how, bad, other)
            with pytest.raises(DataError) as caught:
                searcher.refresh()
            assert any(uri in str(caught.value) for uri in good), how
            np.testing.assert_array_equal(searcher.search(queries, whole.num).ids, expected[0])
            assert leases.find_leases(whole.run, 0.0)[0] == {0}
            with pytest.raises(DataError):
                Searcher(whole.run.uri)
            named = {item.where for item in audit(whole.run.uri).problems}
            assert named == ({bad, other} if how == "two segments swapped" else {bad}), how
            for uri, data in good.items():
                objects.put(uri, data)
        assert searcher.refresh()
        np.testing.assert_array_equal(searcher.search(queries, whole.num).ids, expected[1])
    assert audit(whole.run.uri).problems == []


def test_other_damaged_files_are_named_too(home: str) -> None:
    whole = WholeRun(Run(home), num=60, num_waves=2).write_inputs()
    whole.publish(1)
    tags.promote(whole.run, 1, blockers=[])
    sidecar = whole.run.path(whole.segment(0, 1, "embedded").sidecar_path)
    part = objects.list_files(whole.run.path("embedded", "wave-001"), ".parquet")[0]
    for uri in (whole.run.path(whole.codebook_path), whole.run.commit(1), whole.run.tag("prod"), sidecar, part):
        good = objects.read_bytes(uri)
        for how in ("a truncation", "a flipped bit"):
            damage(how, uri, uri)
            if uri != part or how == "a truncation":
                assert uri in {item.where for item in audit(whole.run.uri).problems}, (uri, how)
            if uri not in (sidecar, part):  # which a search does not read
                with pytest.raises(DataError, match=uri):
                    Searcher(whole.run.uri)
            objects.put(uri, good)
    assert audit(whole.run.uri).problems == []


def test_a_commit_that_names_an_object_that_never_existed_is_refused(home: str) -> None:
    whole = WholeRun(Run(home), num=60, num_waves=2).write_inputs()
    writer = whole.publish(0)
    tags.promote(whole.run, 0, blockers=[])
    queries = np.random.default_rng(6).standard_normal((2, DIM))
    expected = exact(whole, queries)
    with Searcher(whole.run.uri) as searcher:
        draft, digest = whole.draft(1), "0" * 64
        invented = whole.segment(0, 1, "embedded")
        invented = replace(invented, path=invented.path.replace(invented.sha256, digest), sha256=digest)
        segments = [invented if (ref.shard, ref.wave) == (0, 1) else ref for ref in draft.segments]
        writer.publish(replace(draft, segments=tuple(segments)))
        tags.promote(whole.run, 1, blockers=[])
        where = whole.run.path(invented.path)
        assert digest in where
        assert not objects.exists(where)
        with pytest.raises(DataError, match="missing") as caught:
            searcher.refresh()
        assert where in str(caught.value)
        assert searcher.commit.number == 0
        np.testing.assert_array_equal(searcher.search(queries, whole.num).ids, expected[0])
    with pytest.raises(DataError, match=where):
        Searcher(whole.run.uri)
    assert [item.where for item in audit(whole.run.uri).problems] == [where]


@pytest.fixture
def proxy(faulty_s3: FaultyProxy) -> Iterator[FaultyProxy]:
    """What this process asks of S3 comes through here, whatever client an earlier test has left."""
    objects._store.cache_clear()
    yield faulty_s3
    objects._store.cache_clear()


def tag_writes(proxy: FaultyProxy) -> list[tuple[str, int]]:
    """The requests that could change something, and how they were answered."""
    return [
        (target.rpartition("/")[2].partition("?")[0], code) for method, target, code in proxy.log if method != "GET"
    ]


def test_a_rollback_on_s3_is_one_conditional_put_and_under_a_second(bucket: str, proxy: FaultyProxy) -> None:
    whole = WholeRun(Run(f"{bucket}/run"), num=60, num_waves=2).write_inputs()
    whole.publish(2)
    for number in (0, 1, 2):
        tags.promote(whole.run, number, blockers=[])

    proxy.log.clear()
    start = time.monotonic()
    assert tags.rollback(whole.run).commit == 1
    assert time.monotonic() - start < 1.0
    assert tag_writes(proxy) == [("prod.json", 200)]
    assert len(proxy.log) <= 6  # the tags, the removals and the commit

    def meanwhile(_: str) -> bool:
        tags.promote(whole.run, 2, blockers=[])
        return True

    proxy.watch(meanwhile, "PUT", "/tags/prod")  # between the rollback's look at the tag and its write
    proxy.log.clear()
    assert tags.rollback(whole.run, to=0).commit == 0
    assert tag_writes(proxy) == [("prod.json", 200), ("prod.json", 412), ("prod.json", 200)]
