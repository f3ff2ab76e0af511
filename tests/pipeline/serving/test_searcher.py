"""Readers: one commit per call, a new one only whole, the old one on any error."""

from __future__ import annotations

import atexit
import copy
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.tree import Metric
from pipeline.errors import DataError
from pipeline.index import commits, tags
from pipeline.index.leases import Lease
from pipeline.index.writer import Writer
from pipeline.models.calibration import Calibration
from pipeline.run import Run
from pipeline.serving.searcher import Searcher
from pipeline.storage import documents, objects
from tests.support.whole_run import DIM, WholeRun


def make(tmp_path: Path, metric: Metric = "l2") -> WholeRun:
    """Commit 0 is published and promoted."""
    return template(metric).copy_to(tmp_path)


@cache
def template(metric: Metric) -> WholeRun:
    whole = WholeRun(Run(tempfile.mkdtemp()), metric=metric, num=120)
    whole.publish(0)
    tags.promote(whole.run, 0, blockers=[])
    atexit.register(shutil.rmtree, whole.run.uri)
    return whole


def publish_next(whole: WholeRun) -> int:
    writer = Writer.acquire(whole.run)
    assert writer.latest is not None
    number = writer.publish(whole.draft(writer.latest + 1)).number
    tags.auto_promote(whole.run, number)
    return number


def exact_order(whole: WholeRun, number: int, queries: np.ndarray) -> np.ndarray:
    vectors = whole.vectors(number).astype(np.float64)
    if whole.metric == "l2":
        scores = ((queries[:, None] - vectors[None]) ** 2).sum(-1)
    else:
        scores = -(queries @ (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).T)
    return whole.ids[np.argsort(scores, axis=1)]


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_search_of_each_commit_finds_the_whole_gallery(tmp_path: Path, metric: Metric, in_memory: bool) -> None:
    whole = make(tmp_path, metric)
    queries = np.random.default_rng(1).standard_normal((7, DIM))
    with Searcher(whole.run.uri, in_memory=in_memory) as searcher:
        for number in range(whole.num_waves + 1):
            assert searcher.commit.number == number
            assert searcher.num_vectors == whole.num
            result = searcher.search(queries, whole.num)
            assert result.commit == number
            np.testing.assert_array_equal(result.ids, exact_order(whole, number, queries))
            if number < whole.num_waves:
                assert not searcher.refresh()
                publish_next(whole)
                assert searcher.refresh()


CALIBRATION = Calibration((-1.0, 0.0, 1.0, 40.0), (-1.2, 0.1, 3.0, 30.0))


def calibrated_order(whole: WholeRun, number: int, queries: np.ndarray) -> np.ndarray:
    """Ids by calibrated key, (Q, N), by a sort of all of them."""
    vectors, left = whole.vectors(number).astype(np.float64), whole.rejected | (whole.waves > number)
    if whole.metric == "l2":
        keys = ((queries[:, None] - vectors[None]) ** 2).sum(-1)
    else:
        queries, vectors = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (queries, vectors))
        keys = -(queries @ vectors.T)
    keys[:, left] = CALIBRATION.apply_exactly(keys[:, left])
    return np.argsort(keys, axis=1)


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_search_of_a_calibrated_commit_ranks_by_calibrated_distance_and_tells_the_kinds(
    tmp_path: Path, metric: Metric, in_memory: bool
) -> None:
    whole = WholeRun(Run(str(tmp_path)), metric=metric, num=120, calibration=CALIBRATION)
    whole.publish(whole.num_waves)
    queries = np.random.default_rng(1).standard_normal((7, DIM))
    for number in range(whole.num_waves + 1):
        with Searcher(whole.run.uri, commit=number, in_memory=in_memory) as searcher:
            result = searcher.search(queries, whole.num)
        rows = calibrated_order(whole, number, queries)
        np.testing.assert_array_equal(result.ids, whole.ids[rows])
        left = whole.rejected | (whole.waves > number)
        assert result.kinds.tolist() == np.where(left[rows], "transformed", "embedded").tolist()


def test_search_of_a_commit_of_an_earlier_version_tells_the_kinds_of_its_rejects(tmp_path: Path) -> None:
    whole = WholeRun(Run(str(tmp_path)), num=120, mixed=True)
    whole.publish(2)
    assert any(ref.kind == "embedded" and ref.rejected for ref in commits.read_commit(whole.run, 2).segments)
    queries = np.random.default_rng(1).standard_normal((7, DIM))
    with Searcher(whole.run.uri, commit=2) as searcher:
        result = searcher.search(queries, whole.num)
    np.testing.assert_array_equal(result.ids, exact_order(whole, 2, queries))
    left = set(whole.ids[whole.rejected | (whole.waves > 2)].tolist())
    assert [[item in left for item in row] for row in result.ids.tolist()] == (result.kinds == "transformed").tolist()


def test_search_with_fewer_hits_than_columns_has_empty_kinds_there(tmp_path: Path) -> None:
    whole = make(tmp_path)
    with Searcher(whole.run.uri) as searcher:
        result = searcher.search(np.zeros((1, DIM)), 200)
    assert result.kinds[0].tolist() == ["transformed"] * whole.num + [""] * (200 - whole.num)


def test_a_given_commit_stays_and_another_tag_is_followed(tmp_path: Path) -> None:
    whole = make(tmp_path)
    fixed, candidate = Searcher(whole.run.uri, commit=0), Searcher(whole.run.uri, tag="candidate")
    writer = Writer.acquire(whole.run)
    writer.publish(whole.draft(1))
    assert not fixed.refresh()
    assert not Searcher(whole.run.uri).refresh()
    assert candidate.refresh()
    assert [item.search(np.zeros((1, DIM)), 1).commit for item in (fixed, candidate)] == [0, 1]


def test_a_rollback_is_followed(tmp_path: Path) -> None:
    whole = make(tmp_path)
    publish_next(whole)
    searcher = Searcher(whole.run.uri)
    tags.rollback(whole.run)
    assert searcher.refresh()
    assert searcher.commit.number == 0


def test_segments_that_stay_are_not_opened_again(tmp_path: Path) -> None:
    whole = make(tmp_path)
    searcher = Searcher(whole.run.uri)
    before = searcher._pinned().segments
    publish_next(whole)
    searcher.refresh()
    after = searcher._pinned().segments
    assert sum(after[sha256] is before.get(sha256) for sha256 in after) == (whole.num_waves - 1) * whole.num_shards


def damage(uri: str, how: str, other: str) -> None:
    data = bytearray(Path(uri).read_bytes())
    if how == "flipped bit":
        data[-3] ^= 1
    elif how == "truncated":
        del data[-8:]
    elif how == "swapped":
        data[:] = Path(other).read_bytes()
    if how == "missing":
        Path(uri).unlink()
    else:
        Path(uri).write_bytes(data)


@pytest.mark.parametrize("how", ["flipped bit", "truncated", "swapped", "missing"])
def test_a_damaged_segment_is_named_and_the_old_commit_stays(tmp_path: Path, how: str) -> None:
    whole = make(tmp_path)
    queries = np.ones((2, DIM))
    searcher = Searcher(whole.run.uri)
    before = searcher.search(queries, 5)
    publish_next(whole)
    bad, other = (whole.run.path(whole.segment(shard, 1, "embedded").path) for shard in (0, 1))
    good = Path(bad).read_bytes()
    damage(bad, how, other)

    for _ in range(2):
        with pytest.raises(DataError) as caught:
            searcher.refresh()
        assert bad in str(caught.value)
        np.testing.assert_array_equal(searcher.search(queries, 5).ids, before.ids)
        assert searcher.commit.number == 0
    with pytest.raises(DataError):
        Searcher(whole.run.uri)

    Path(bad).write_bytes(good)
    assert searcher.refresh()
    assert searcher.commit.number == 1


def test_damaged_codebook_commit_or_tag_is_refused(tmp_path: Path) -> None:
    whole = make(tmp_path)
    publish_next(whole)
    for uri in (whole.run.path(whole.codebook_path), whole.run.commit(1), whole.run.tag("prod")):
        good = Path(uri).read_bytes()
        damage(uri, "truncated", uri)
        with pytest.raises(DataError) as caught:
            Searcher(whole.run.uri)
        assert uri in str(caught.value)
        Path(uri).write_bytes(good)
    assert Searcher(whole.run.uri).commit.number == 1


def test_searcher_without_a_tag_or_commit_is_refused_with_the_existing_ones(tmp_path: Path) -> None:
    whole = WholeRun(Run(str(tmp_path)), num=60)
    with pytest.raises(DataError, match="no tag 'prod'"):
        Searcher(whole.run.uri)
    whole.publish(0)
    with pytest.raises(DataError, match=r"existing commit: 0") as caught:
        Searcher(whole.run.uri)
    assert "candidate" in str(caught.value)
    with pytest.raises(DataError, match=r"(?s)no tag 'live'.*found: candidate"):
        Searcher(whole.run.uri, tag="live")
    with pytest.raises(DataError, match="no such commit"):
        Searcher(whole.run.uri, commit=1)


@pytest.mark.parametrize(
    ("queries", "found"),
    [
        (np.zeros((2, DIM + 1)), f"(2, {DIM + 1})"),
        (np.zeros(DIM), f"({DIM},)"),
        (np.full((1, DIM), np.nan), "1 bad rows"),
        (np.full((1, DIM), 1e300), "1 bad rows"),
        ([["a"] * DIM], "could not convert"),
        ([[1.0], [1.0, 2.0]], "inhomogeneous"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_bad_queries_are_refused(tmp_path: Path, queries: object, found: str) -> None:
    with Searcher(make(tmp_path).run.uri) as searcher, pytest.raises(DataError) as caught:
        searcher.search(queries, 3)  # type: ignore[arg-type]
    assert found in str(caught.value)


def test_k_is_checked_and_may_exceed_the_gallery(tmp_path: Path) -> None:
    whole = make(tmp_path)
    searcher = Searcher(whole.run.uri)
    with pytest.raises(DataError, match="at least 1"):
        searcher.search(np.zeros((1, DIM)), 0)
    result = searcher.search(np.zeros((1, DIM)), whole.num + 2)
    assert result.ids[0, -2:].tolist() == [-1, -1]
    assert searcher.search(np.zeros((0, DIM)), 4).ids.shape == (0, 4)
    searcher.close()
    with pytest.raises(ValueError, match="closed"):
        searcher.search(np.zeros((1, DIM)), 1)


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("k", [10**9, 2**63 - 1, 2**70])
def test_search_with_k_far_above_the_gallery_takes_memory_by_what_is_there(
    tmp_path: Path, k: int, in_memory: bool
) -> None:
    whole = make(tmp_path)
    queries = np.random.default_rng(4).standard_normal((3, DIM))
    with Searcher(whole.run.uri, in_memory=in_memory) as searcher:
        result = searcher.search(queries, k)
    assert result.ids.shape == result.distances.shape == (3, 1024)
    np.testing.assert_array_equal(result.ids[:, : whole.num], exact_order(whole, 0, queries))
    assert (result.ids[:, whole.num :] == -1).all()
    assert np.isposinf(result.distances[:, whole.num :]).all()


@pytest.mark.parametrize("k", [np.int64(5), np.int32(5), np.uint8(5)])
def test_search_with_k_of_numpy_is_a_whole_number(tmp_path: Path, k: int) -> None:
    with Searcher(make(tmp_path).run.uri) as searcher:
        assert searcher.search(np.zeros((1, DIM)), k).ids.shape == (1, 5)


@pytest.mark.parametrize("k", [2.5, 5.0, "3", None, np.float32(2), [1]])
def test_search_with_k_that_is_no_whole_number_is_refused(tmp_path: Path, k: object) -> None:
    with Searcher(make(tmp_path).run.uri) as searcher, pytest.raises(DataError, match="k is not a whole number"):
        searcher.search(np.zeros((1, DIM)), k)  # type: ignore[arg-type]


@pytest.mark.parametrize("commit", [-1, 2.5, "0", 10**30])
def test_searcher_of_a_commit_that_cannot_be_is_refused(tmp_path: Path, commit: int) -> None:
    with pytest.raises(DataError, match="commit"):
        Searcher(make(tmp_path).run.uri, commit=commit)


def test_search_of_string_ids_gives_them_as_keys(tmp_path: Path) -> None:
    whole = make(tmp_path)
    keys = whole.write_gallery(with_keys=True)
    with Searcher(whole.run.uri) as searcher:
        result = searcher.search(np.zeros((2, DIM)), whole.num + 3)
    expected = [[keys.get(item, item) if item >= 0 else None for item in row] for row in result.ids.tolist()]
    assert result.keys.tolist() == expected
    assert copy.deepcopy(result).keys.tolist() == expected  # as when it goes to another process
    assert sum(isinstance(item, str) for item in result.keys[0]) == len(keys)


def test_search_of_integer_ids_gives_them_as_keys(tmp_path: Path) -> None:
    whole = make(tmp_path)
    whole.write_gallery()
    with Searcher(whole.run.uri) as searcher:
        result = searcher.search(np.zeros((1, DIM)), whole.num + 1)
        assert searcher.search(np.zeros((0, DIM)), 3).keys.shape == (0, 3)
    assert result.keys.tolist() == [[*result.ids[0, :-1].tolist(), None]]
    assert all(type(item) is int for item in result.keys[0, :-1])


def test_search_keys_without_a_gallery_are_an_error_and_not_row_numbers(tmp_path: Path) -> None:
    with Searcher(make(tmp_path).run.uri) as searcher:
        result = searcher.search(np.zeros((1, DIM)), 3)
    with pytest.raises(DataError, match="no gallery"):
        _ = result.keys


def test_readers_see_one_whole_commit_while_it_is_switched(tmp_path: Path) -> None:
    whole = make(tmp_path)
    queries = np.random.default_rng(2).standard_normal((3, DIM))
    expected = {number: exact_order(whole, number, queries) for number in range(whole.num_waves + 1)}
    searcher = Searcher(whole.run.uri)
    done, wrong, seen = threading.Event(), [], set()

    def read() -> None:
        while not done.is_set():
            result = searcher.search(queries, whole.num)
            seen.add(result.commit)
            if not np.array_equal(result.ids, expected[result.commit]):
                wrong.append(result.commit)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(whole.num_waves):
            publish_next(whole)
            searcher.refresh()
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not wrong
    assert max(seen) > 0


def test_a_codebook_of_another_metric_is_refused(tmp_path: Path) -> None:
    whole = make(tmp_path)
    commit = replace(commits.read_commit(whole.run, 0), metric="ip")
    objects.put(whole.run.commit(0), documents.encode(commit))
    with pytest.raises(DataError, match="codebook is not the commit's"):
        Searcher(whole.run.uri)


def leases_of(whole: WholeRun) -> set[str]:
    return set(objects.list_files(whole.run.path("index", "leases")))


def in_child(work: Callable[[], bool]) -> bool:
    """What `work` says in a forked child; False if it fails or takes more than half a minute."""
    child = os.fork()
    if not child:
        code = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the child, whatever it is in
            signal.alarm(30)
            code = 0 if work() else 1
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1] == 0


def test_searcher_forked_child_that_closes_leaves_the_lease_of_its_parent(tmp_path: Path) -> None:
    whole = make(tmp_path)
    with Searcher(whole.run.uri) as searcher:
        mine = leases_of(whole)

        def close() -> bool:
            searcher.close()
            return True

        assert len(mine) == 1
        assert in_child(close)
        assert leases_of(whole) == mine
    assert leases_of(whole) == set()


@pytest.mark.parametrize("in_memory", [True, False])
def test_searcher_forked_child_that_searches_holds_and_renews_a_lease_of_its_own(
    tmp_path: Path, in_memory: bool
) -> None:
    whole = make(tmp_path)
    query = whole.embedded[:3]
    with Searcher(whole.run.uri, in_memory=in_memory) as searcher:
        mine, found = leases_of(whole), searcher.search(query, 5).ids

        def search() -> bool:
            before = threading.active_count()
            same = np.array_equal(searcher.search(query, 5).ids, found)
            both, renewed = leases_of(whole), threading.active_count() > before
            publish_next(whole)
            moved = searcher.refresh() and searcher.search(query, 5).commit == 1
            searcher.close()
            return same and renewed and mine < both and len(both) == 2 and moved and leases_of(whole) == mine

        assert in_child(search)
        assert leases_of(whole) == mine


def test_searcher_forked_child_that_cannot_take_a_lease_searches_without_one(tmp_path: Path) -> None:
    whole = make(tmp_path)
    with Searcher(whole.run.uri) as searcher:
        Path(whole.run.collected).write_bytes(b"{")  # damaged: nobody can say which commits are removed
        assert in_child(lambda: searcher.search(whole.embedded[:1], 1).commit == 0)


def test_searcher_forked_while_another_thread_refreshes_does_not_wait_for_it(tmp_path: Path) -> None:
    whole = make(tmp_path)
    with Searcher(whole.run.uri) as searcher, searcher._refreshing:
        assert in_child(lambda: searcher.search(whole.embedded[:1], 1).commit == 0)


def test_lease_forked_while_its_thread_holds_a_lock_can_be_forgotten_in_the_child(tmp_path: Path) -> None:
    leases = [Lease(make(tmp_path).run, 0)]

    def forget() -> bool:
        leases.clear()
        return True

    with leases[0]._released._cond:
        assert in_child(forget)
    leases[0].release()
