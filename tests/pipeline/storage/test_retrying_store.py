"""Object storage: what is retried and for how long, what a lost answer comes to, and which stores are refused.

Over a store in memory where the point is one precise answer, over a real S3 server where it is what S3 does.
"""

from __future__ import annotations

import io
import logging
import os
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError, DataError, TransientError
from pipeline.storage import objects, parquet, retry, retrying_store
from pipeline.storage.interface import AlreadyExists, Changed
from pipeline.storage.retry import Again, Precondition, Retry
from pipeline.storage.retrying_store import Blob, ObjectStore, Page
from pipeline.storage.settings import StorageSettings
from tests.support.faulty_proxy import Fault as Break
from tests.support.faulty_proxy import FaultyProxy
from tests.support.seaweed import READONLY, SeaweedFS
from tests.support.unreliable_store import FakeTime, Fault, Program, UnreliableStore

NAME = "bucket/run/object.json"
HARD_KEYS = ["a b", "a+b", "a%2Fb", "a%b", "ü/ß/日本", "a&b=c?d#e", "a'b\"c", "~a.b_c-d", "$a,b;c:d@e"]


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    """Pauses take no time; the clock of the module goes on one second for each."""
    fake = FakeTime()
    monkeypatch.setattr(retry, "time", fake)
    return fake


class Failing(UnreliableStore):
    """Raises these, one per request, before it does what it is asked for."""

    def __init__(self, *errors: Exception) -> None:
        super().__init__()
        self.errors = list(errors)

    def _request(self, apply, **_):  # type: ignore[no-untyped-def]
        if self.errors:
            raise self.errors.pop(0)
        return apply()


def counted(before: Counter[str]) -> dict[str, int]:
    return {name: count for name, count in (objects.counts() - before).items() if not name.startswith("bytes:")}


# Retries


def test_a_request_is_repeated_while_it_may_succeed_and_each_cause_is_counted(time: FakeTime) -> None:
    client = Failing(Again("SlowDown"), Again("ReadTimeoutError"), Again("SlowDown"))
    client.objects[NAME] = b"here"
    before = objects.counts()
    assert ObjectStore(client, Retry(60)).read(NAME, None, None)[0] == b"here"
    assert counted(before) == {"requests:get": 4, "retries:SlowDown": 2, "retries:ReadTimeoutError": 1}
    assert len(time.pauses) == 3


def test_pauses_are_drawn_from_twice_the_range_each_time_up_to_a_bound(
    time: FakeTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges: list[tuple[float, float]] = []
    monkeypatch.setattr(retry.random, "uniform", lambda low, high: ranges.append((low, high)) or 0.0)
    client = Failing(*[Again("SlowDown")] * 12)
    client.objects[NAME] = b""
    ObjectStore(client, Retry(60, most_pause_seconds=5)).read(NAME, None, None)
    assert {low for low, _ in ranges} == {0}  # full jitter: many clients that failed together do not come back together
    highs = [high for _, high in ranges]
    assert highs[:3] == [0.1, 0.2, 0.4]
    assert all(second == min(2 * first, 5) for first, second in pairwise(highs))
    assert highs[-1] == 5


def test_after_its_time_an_error_says_what_where_and_for_how_long(time: FakeTime) -> None:
    client = Failing(*[Again("EndpointConnectionError", "connection refused")] * 100)
    with pytest.raises(TransientError) as caught:
        ObjectStore(client, Retry(20)).read(NAME, None, None)
    for part in (f"s3://{NAME}", "20 seconds", "connection refused", "run the same command again"):
        assert part in str(caught.value)
    assert time.now == 20
    assert len(client.errors) == 100 - 21


def test_long_wait_is_logged_once(time: FakeTime) -> None:
    client = Failing(*[Again("SlowDown")] * 15)
    client.objects[NAME] = b""
    said: list[str] = []
    listener = logging.Handler()  # of this logger itself: commands that ran in this process reset the root's handlers
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    retry.logger.addHandler(listener)
    try:
        ObjectStore(client, Retry(20)).read(NAME, None, None)
    finally:
        retry.logger.removeHandler(listener)
    assert len(said) == 1
    assert f"s3://{NAME}: SlowDown" in said[0]


@pytest.mark.parametrize("error", [FileNotFoundError(NAME), PermissionError(NAME), OSError(NAME), ConfigError("x")])
def test_permanent_error_is_not_retried(error: Exception) -> None:
    client = Failing(error)
    before = objects.counts()
    with pytest.raises(type(error)):
        ObjectStore(client, Retry(60)).read(NAME, None, None)
    assert counted(before) == {"requests:get": 1}


# Conditional writes


def during(fault: Fault, client: UnreliableStore, call: Callable[[], object], *before: Fault) -> object:
    """Make a call whose first requests meet these faults; its result, or what it raised."""
    result: list[object] = []

    def main(_: Program) -> None:
        try:
            result.append(call())
        except Exception as error:  # noqa: BLE001 (it is the result)
            result.append(error)

    program = Program("one call", main)
    program.start()
    for item in [*before, fault]:
        program.step(item)
    while not program.done:
        program.step(Fault.NONE)
    return result[0]


@pytest.mark.parametrize("fault", [Fault.NONE, Fault.FAILED, Fault.BUSY, Fault.LOST, Fault.DELAYED, Fault.DUPLICATED])
def test_conditional_write_with_any_fault_is_applied_once(time: FakeTime, fault: Fault) -> None:
    client = UnreliableStore()
    store = ObjectStore(client, Retry(60))
    assert during(fault, client, lambda: store.put_if_absent(NAME, b"one")) is None
    first = store.read_versioned(NAME)
    assert first is not None
    version = during(fault, client, lambda: store.compare_and_swap(NAME, b"two", first[1]))
    while client.delayed:
        client.deliver(0)
    assert store.read_versioned(NAME) == (b"two", version)


@pytest.mark.parametrize("fault", [Fault.NONE, Fault.FAILED, Fault.BUSY, Fault.LOST])
def test_conditional_write_refused_by_another_writers_object_is_not_taken_for_a_lost_answer(
    time: FakeTime, fault: Fault
) -> None:
    client = UnreliableStore()
    store = ObjectStore(client, Retry(60))
    store.put_if_absent(NAME, b"theirs")
    assert isinstance(during(fault, client, lambda: store.put_if_absent(NAME, b"ours")), AlreadyExists)
    for version in (None, "older"):
        assert isinstance(during(fault, client, lambda v=version: store.compare_and_swap(NAME, b"ours", v)), Changed)
    assert client.objects == {NAME: b"theirs"}


def test_a_write_whose_answer_is_lost_and_that_is_then_replaced_has_lost(time: FakeTime) -> None:
    client = UnreliableStore()
    store = ObjectStore(client, Retry(60))
    version = store.compare_and_swap(NAME, b"one", None)
    result: list[object] = []

    def main(_: Program) -> None:
        with pytest.raises(Changed):
            store.compare_and_swap(NAME, b"ours", version)
        result.append("lost")

    program = Program("swap", main)
    program.start()
    program.step(Fault.LOST)
    client.objects[NAME] = b"theirs"
    while not program.done:
        program.step(Fault.NONE)
    assert result == ["lost"]
    assert client.objects == {NAME: b"theirs"}


def test_compare_and_swap_of_a_deleted_object_loses(time: FakeTime) -> None:
    store = ObjectStore(UnreliableStore(), Retry(60))
    with pytest.raises(Changed):
        store.compare_and_swap(NAME, b"ours", "a version that was there")


# The probe


class NotFound(UnreliableStore):
    """Has no bucket."""

    def listing(self, prefix: str, token: str | None, deep: bool = True) -> Page:
        raise FileNotFoundError(2, "NoSuchBucket", prefix)


class NotImplemented501(UnreliableStore):
    """Knows no conditional writes, and says so."""

    def put(self, name: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        raise OSError(5, "NotImplemented: a header you provided", name)


class IgnoresIfMatch(UnreliableStore):
    def put(self, name: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        return super().put(name, data, if_absent=if_absent)


class RefusesAll(UnreliableStore):
    """Answers each condition with 412."""

    def put(self, name: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        if if_match is not None:
            raise Precondition(name)
        return super().put(name, data, if_absent=if_absent)


class LagsInListings(UnreliableStore):
    def listing(self, prefix: str, token: str | None, deep: bool = True) -> Page:
        return Page([], None)


class LagsInReads(UnreliableStore):
    """Shows the first thing that was written under a name."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, bytes] = {}
        self.watch = lambda name, before, after, _: self.first.setdefault(name, after)

    def get(self, name: str, start: int | None, stop: int | None, if_match: str | None) -> Blob:
        blob = super().get(name, start, stop, if_match)
        return Blob(self.first[name], blob.etag)


class MayNotDelete(UnreliableStore):
    def delete(self, names: list[str]) -> None:
        raise PermissionError(13, "AccessDenied", names[0])


REFUSED = [
    (NotFound(), DataError, "the bucket does not exist"),
    (NotImplemented501(), DataError, "lacks an operation that a run needs"),
    (UnreliableStore(honours_conditions=False), ConfigError, "ignored `If-None-Match`"),
    (IgnoresIfMatch(), ConfigError, "ignored `If-Match`"),
    (RefusesAll(), ConfigError, "a PUT with a valid `If-Match` was refused"),
    (LagsInListings(), ConfigError, "not visible at once"),
    (LagsInReads(), ConfigError, "not visible at once"),
    (MayNotDelete(), DataError, "not let these credentials write"),
]


@pytest.mark.parametrize(("client", "kind", "message"), REFUSED)
def test_capability_check_of_an_unsuitable_store_is_refused(
    client: UnreliableStore, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        ObjectStore(client, Retry(0)).check("bucket/run")
    assert "s3://bucket/run" in str(caught.value)
    assert getattr(caught.value, "exit_code", None) == 2


def test_capability_check_with_lost_answers_passes_and_leaves_no_object(time: FakeTime) -> None:
    client = UnreliableStore()
    for run in ("bucket/run", "bucket"):
        store = ObjectStore(client, Retry(60))
        for lost in range(12):
            faults = [Fault.NONE] * lost
            assert during(Fault.LOST, client, lambda store=store, run=run: store.check(run), *faults) is None
    assert client.objects == {}


# Files


def test_put_of_more_than_one_request_allows_is_refused_before_it_is_sent() -> None:
    class Huge(bytes):
        def __len__(self) -> int:  # without the memory
            return 5 * 2**30 + 1

    with pytest.raises(DataError, match="too large"):
        ObjectStore(Failing(AssertionError("sent")), Retry(0)).put(NAME, Huge())


def test_deletes_go_a_thousand_at_a_time_and_bucket_by_bucket() -> None:
    asked: list[list[str]] = []
    client = UnreliableStore()
    client.delete = asked.append  # type: ignore[method-assign]
    names = [f"one/{number}" for number in range(2001)] + ["two/1"]
    ObjectStore(client, Retry(0)).delete(names)
    assert [len(some) for some in asked] == [1000, 1000, 1, 1]
    assert [name for some in asked for name in some] == names


def test_a_local_copy_is_made_in_pieces_of_one_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying_store, "_COPY_BYTES", 10)
    for size in (0, 1, 9, 10, 11, 20, 25):
        client = UnreliableStore()
        client.objects[NAME] = data = os.urandom(size)
        with ObjectStore(client, Retry(0)).local_file(NAME) as path:
            assert path.read_bytes() == data
        assert not path.exists()


def test_an_object_that_is_replaced_while_it_is_read_is_noticed() -> None:
    client = UnreliableStore()
    client.objects[NAME] = b"a" * 200_000
    file = ObjectStore(client, Retry(0)).open(NAME)
    assert file.read(10) == b"a" * 10
    client.objects[NAME] = b"b" * 200_000
    file.seek(150_000)
    with pytest.raises(OSError, match="replaced while it was read"):
        file.read(10)


def test_markers_of_folders_are_no_objects() -> None:
    client = UnreliableStore()
    client.objects |= {"bucket/a/": b"", "bucket/a/1": b"x", "bucket/a/b/": b""}
    store = ObjectStore(client, Retry(0))
    assert [name for name, _ in store.listing("bucket/a")] == ["bucket/a/1"]
    assert not store.exists("bucket/a/")
    store.delete_folder("bucket/a")
    assert client.objects == {}


@given(st.binary(max_size=100), st.integers(0, 120), st.integers(0, 120))
def test_a_file_reads_and_seeks_like_one_on_disk(data: bytes, offset: int, length: int) -> None:
    client = UnreliableStore()
    client.objects[NAME] = data
    file, expected = ObjectStore(client, Retry(0)).open(NAME), io.BytesIO(data)
    assert file.seek(offset) == expected.seek(offset)
    assert file.read(length) == expected.read(length)
    assert file.seek(-min(offset, len(data)), io.SEEK_END) == expected.seek(-min(offset, len(data)), io.SEEK_END)
    assert file.read() == expected.read()
    assert file.tell() == expected.tell()


# The same behaviour on disk and on a real server


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder of a store, not there yet."""
    return f"{request.getfixturevalue('bucket')}/some/run" if request.param == "s3" else str(tmp_path / "run")


def test_put_object_can_be_read_and_replaced(root: str) -> None:
    uri = objects.join(root, "object")
    assert not objects.exists(uri)
    assert objects.read_versioned(uri) is None
    for read in (objects.read_bytes, objects.stat, objects.sha256, objects.open_input):
        with pytest.raises(FileNotFoundError):
            read(uri)
    objects.put(uri, b"one")
    objects.put(uri, b"three")
    assert objects.exists(uri)
    assert objects.read_bytes(uri) == b"three"
    assert objects.stat(uri).size_bytes == 5
    assert objects.read_with_etag(uri)[1] == objects.stat(uri).etag == dict(objects.list_stats(root))[uri].etag


def test_a_range_is_that_slice_of_the_whole(root: str) -> None:
    uri = objects.join(root, "object")
    for data in (b"", b"x", b"0123456789"):
        objects.put(uri, data)
        for offset in (None, 0, 1, 9, 10, 11):
            for length in (None, 0, 1, 5, 100):
                start = offset or 0
                expected = data[start:] if length is None else data[start : start + length]
                assert objects.read_bytes(uri, offset, length) == expected, (data, offset, length)


def test_object_name_may_have_any_characters(root: str) -> None:
    uris = [objects.join(root, key) for key in HARD_KEYS]
    for uri in uris:
        objects.put(uri, uri.encode())
    assert [objects.read_bytes(uri) for uri in uris] == [uri.encode() for uri in uris]
    assert objects.list_files(root) == sorted(uris)
    objects.delete_files(uris)
    assert objects.list_files(root) == []


def test_a_folder_is_no_object(root: str) -> None:
    objects.put(objects.join(root, "a", "b", "1"), b"")
    objects.put(objects.join(root, "ab"), b"")
    for name in ("a", "a/", "a/b", "a/b/"):
        assert not objects.exists(objects.join(root, name)), name
    assert objects.list_files(objects.join(root, "a")) == [objects.join(root, "a", "b", "1")]
    assert objects.expand(f"{root}/a/", "1") == [objects.join(root, "a", "b", "1")]
    objects.delete(objects.join(root, "a"))
    assert objects.list_files(root) == [objects.join(root, "ab")]


def try_to(write: Callable[[], object]) -> bool:
    try:
        write()
    except (AlreadyExists, Changed):
        return False
    return True


def test_create_and_swap_by_many_threads_have_one_winner_each(root: str) -> None:
    writers = 16 if root.startswith("/") else 6  # this server lets each loser wait for a second
    uri, start = objects.join(root, "object"), threading.Barrier(writers)

    def race(write: Callable[[], object]) -> bool:
        start.wait()
        return try_to(write)

    with ThreadPoolExecutor(writers) as pool:
        won = list(pool.map(race, [lambda n=n: objects.put_if_absent(uri, b"%d" % n) for n in range(writers)]))
        assert sum(won) == 1
        assert objects.read_bytes(uri) == b"%d" % won.index(True)
        _, version = objects.read_versioned(uri) or (b"", "")
        swaps = [lambda n=n: objects.compare_and_swap(uri, b"new %d" % n, version) for n in range(writers)]
        won = list(pool.map(race, swaps))
        assert sum(won) == 1
        assert objects.read_bytes(uri) == b"new %d" % won.index(True)


def test_a_swap_wins_only_against_the_version_that_was_read(root: str) -> None:
    uri = objects.join(root, "object")
    first = objects.compare_and_swap(uri, b"first", None)
    assert objects.read_versioned(uri) == (b"first", first)
    second = objects.compare_and_swap(uri, b"second", first)
    for version in (first, None, '"0123"'):
        with pytest.raises(Changed):
            objects.compare_and_swap(uri, b"third", version)
    assert objects.read_versioned(uri) == (b"second", second)
    objects.delete(uri)
    with pytest.raises(Changed):
        objects.compare_and_swap(uri, b"third", second)
    assert not objects.exists(uri)


def test_parquet_is_read_by_ranges(root: str) -> None:
    uri, rows = objects.join(root, "rows.parquet"), 50_000
    table = pa.table({"id": range(rows), "other": [os.urandom(20) for _ in range(rows)]})
    groups = [table.slice(start, 10_000) for start in range(0, rows, 10_000)]
    data = parquet.parquet_bytes(table.schema, groups)
    objects.put(uri, data)
    before = objects.counts()
    assert parquet.read_parquet(uri, ["id"], [3]).equals(groups[3].select(["id"]))
    assert (objects.counts() - before)["bytes:get"] < len(data) / 4
    assert parquet.read_parquet(uri).equals(table)
    with objects.local_file(uri) as path:
        assert path.read_bytes() == data


def test_capability_check_of_a_sound_bucket_passes_and_leaves_no_object(root: str) -> None:
    objects.check(root)
    assert objects.list_files(root) == []
    assert not os.path.exists(root)


# What only a real server shows


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch, seaweed: SeaweedFS) -> Iterator[Callable[..., None]]:
    """Storage with other settings, or other variables of the environment, for the length of a test."""
    kept = os.environ.get("FASTFILL_STORAGE")

    def configure(environment: dict[str, str] | None = None, **settings: object) -> None:
        for name, value in (environment or {}).items():
            monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
        objects._store.cache_clear()
        objects.configure(StorageSettings(**settings))  # type: ignore[arg-type]

    yield configure
    objects._store.cache_clear()
    os.environ.pop("FASTFILL_STORAGE")
    if kept is not None:
        os.environ["FASTFILL_STORAGE"] = kept


@pytest.mark.parametrize("case", ["wrong secret", "wrong key", "no credentials", "missing bucket", "read-only bucket"])
def test_request_with_bad_credentials_or_bucket_is_refused_with_the_remedy(
    case: str, seaweed: SeaweedFS, bucket: str, configured: Callable[..., None]
) -> None:
    changes = {
        "wrong secret": {"AWS_SECRET_ACCESS_KEY": "wrong"},
        "wrong key": {"AWS_ACCESS_KEY_ID": "nobody"},
        "no credentials": {"AWS_SECRET_ACCESS_KEY": "", "AWS_ACCESS_KEY_ID": ""},
        "read-only bucket": seaweed.environment(READONLY),
    }
    configured(changes.get(case, {}))
    uri = {"missing bucket": f"s3://missing-{uuid.uuid4().hex}", "read-only bucket": f"s3://{READONLY}"}.get(
        case, bucket
    )
    before = objects.counts()
    with pytest.raises(DataError, match="does not exist" if case == "missing bucket" else "these credentials"):
        objects.check(f"{uri}/run")
    assert not [name for name in counted(before) if name.startswith("retries")]
    if case in ("wrong secret", "wrong key", "no credentials"):
        for ask in (objects.exists, objects.read_bytes, objects.list_files):
            with pytest.raises(PermissionError):
                ask(f"{uri}/run")


@pytest.mark.parametrize(
    ("endpoint", "kind", "found"),
    [
        ("not a url", ConfigError, "endpoint_url"),
        ("http://127.0.0.1:1", TransientError, "EndpointConnectionError"),
        ("http://name.invalid", TransientError, "EndpointConnectionError"),
    ],
)
def test_an_address_without_a_store_is_named(
    endpoint: str, kind: type[Exception], found: str, configured: Callable[..., None]
) -> None:
    configured(endpoint_url=endpoint, retry_seconds=0.2)
    with pytest.raises(kind, match=found):
        objects.read_bytes("s3://bucket/object")


CAUSES = {
    Break.ERROR_BEFORE: "InternalError",
    Break.ERROR_AFTER: "InternalError",
    Break.SLOW_DOWN: "SlowDown",
    Break.RESET: "",
    Break.RESET_AFTER: "",
    Break.HANG_AFTER: "",
    Break.TRUNCATED: "",
}


@pytest.mark.parametrize("fault", CAUSES)
def test_network_fault_is_retried_and_counted_by_cause(
    fault: Break, faulty_s3: FaultyProxy, bucket: str, configured: Callable[..., None]
) -> None:
    faulty_s3.hang_seconds = 0.2
    configured(endpoint_url=faulty_s3.endpoint, read_timeout_seconds=5.0, max_pause_seconds=0.1)
    uri, before = f"{bucket}/object", objects.counts()
    if fault is not Break.TRUNCATED:  # of an answer's body
        faulty_s3.inject(fault, method="PUT", times=2)
    objects.put_if_absent(uri, b"first")
    faulty_s3.inject(fault, method="GET", times=2)
    _, version = objects.read_versioned(uri) or (b"", "")
    if fault is not Break.TRUNCATED:
        faulty_s3.inject(fault, method="PUT", times=2)
    assert objects.compare_and_swap(uri, b"second", version)
    assert objects.read_bytes(uri) == b"second"
    retries = {name: count for name, count in counted(before).items() if name.startswith("retries:")}
    if CAUSES[fault]:
        assert retries == {f"retries:{CAUSES[fault]}": 6}
    else:  # a request over a connection that was kept is sent once more by aiohttp itself
        assert 1 <= sum(retries.values()) <= 6, retries


def test_a_silent_server_is_asked_again(faulty_s3: FaultyProxy, bucket: str, configured: Callable[..., None]) -> None:
    faulty_s3.stall_seconds = 2.0
    quick = {"connect_timeout_seconds": 0.3, "read_timeout_seconds": 0.5, "max_pause_seconds": 0.1}
    configured(endpoint_url=faulty_s3.endpoint, **quick)
    faulty_s3.inject(Break.STALL, method="PUT")
    faulty_s3.inject(Break.STALL, method="GET")
    before = objects.counts()
    objects.put_if_absent(f"{bucket}/object", b"data")
    assert counted(before).get("retries:TimeoutError", 0) >= 1
    assert objects.read_bytes(f"{bucket}/object") == b"data"
    assert counted(before).get("retries:ReadTimeoutError", 0) >= 1


def test_an_outage_is_waited_out(faulty_s3: FaultyProxy, bucket: str, configured: Callable[..., None]) -> None:
    configured(endpoint_url=faulty_s3.endpoint, max_pause_seconds=0.2)
    objects.put(f"{bucket}/object", b"data")
    faulty_s3.outage(1.5)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(objects.read_bytes, [f"{bucket}/object"] * 16)) == {b"data"}


def test_a_bucket_alone_is_a_folder(bucket: str) -> None:
    for uri in (bucket, f"{bucket}/", "s3://no-such-bucket-here/a", "s3://Not_A_Bucket!/a", "s3:///a"):
        assert not objects.exists(uri), uri
    objects.put(f"{bucket}/a", b"")
    assert objects.list_files(bucket) == [f"{bucket}/a"]
    objects.check(bucket)
    objects.delete(bucket)
    assert objects.list_files(bucket) == []


def test_more_than_a_page_is_listed_and_deleted(bucket: str) -> None:
    uris = [f"{bucket}/many/{number:05d}" for number in range(1203)]
    with ThreadPoolExecutor(32) as pool:
        list(pool.map(lambda uri: objects.put(uri, b""), uris))
    before = objects.counts()
    assert objects.list_files(f"{bucket}/many") == uris
    assert counted(before) == {"requests:list": 2}
    objects.delete_files(uris)
    assert counted(before) == {"requests:list": 2, "requests:delete": 2}
    assert objects.list_files(f"{bucket}/many") == []


def read_in_child(uri: str) -> bytes:
    return objects.read_bytes(uri)


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_another_process_talks_to_the_store_on_its_own(method: str, bucket: str) -> None:
    objects.put(f"{bucket}/object", b"data")  # this process has a connection, and a thread that serves it
    with get_context(method).Pool(1) as pool:
        assert pool.apply_async(read_in_child, [f"{bucket}/object"]).get(timeout=60) == b"data"
    assert objects.read_bytes(f"{bucket}/object") == b"data"


def test_errors_of_the_store_come_through_parquet_as_they_are(
    faulty_s3: FaultyProxy, bucket: str, configured: Callable[..., None]
) -> None:
    """A footer that cannot be read now is no damaged file."""
    uri = f"{bucket}/rows.parquet"
    table = pa.table({"id": range(10)})
    objects.put(uri, parquet.parquet_bytes(table.schema, [table]))
    configured(endpoint_url=faulty_s3.endpoint, retry_seconds=0.1)
    faulty_s3.inject(Break.ERROR_BEFORE, method="GET", times=100)
    with pytest.raises(TransientError):
        parquet.read_parquet(uri)
