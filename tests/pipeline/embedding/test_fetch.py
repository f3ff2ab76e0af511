"""Fetching: few requests, the same bytes as one read per image, and only an image's own faults are its rejects."""

from __future__ import annotations

import io
import os
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.embedding.fetch import WAITED, Place, Reject, coalesce, fetch
from pipeline.errors import DataError, TransientError
from pipeline.storage import objects
from pipeline.storage.rate_limit import BURST_SECONDS, RateLimit
from pipeline.storage.settings import FetchSettings, StorageSettings
from tests.support.faulty_proxy import Fault, FaultyProxy
from tests.support.seaweed import READONLY, SeaweedFS, s3_client

MOST = 100_000


def places(uri: str, spans: list[tuple[int, int]], etag: str | None = None) -> list[Place]:
    return [Place(uri, offset, length, None, etag) for offset, length in spans]


def whole(uri: str, etag: str | None = None) -> Place:
    return Place(uri, None, None, None, etag)


def get(wanted: list[Place], most: int = MOST, **changes: Any) -> list[bytes | str]:
    """What comes for each place: bytes, or what its reject says."""
    found = fetch(wanted, most, FetchSettings(**changes))
    return [str(data) if isinstance(data, Reject) else data for data, _ in found]


def spent(wanted: list[Place], **changes: Any) -> Counter[str]:
    """What a fetch that rejects nothing counts, but for the time."""
    before = objects.counts()
    assert all(isinstance(data, bytes) for data in get(wanted, **changes))
    return untimed(objects.counts() - before)


def untimed(counts: Counter[str]) -> Counter[str]:
    """Without what differs each time."""
    return Counter({name: count for name, count in counts.items() if name != WAITED})


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def tar_places(uri: str, count: int, size: int, fraction: float, seed: int = 0) -> list[Place]:
    """Some of the images of a tar of `count` images of `size` bytes, chosen at random, in order of their offset."""
    chosen = np.random.default_rng(seed).choice(count, max(1, round(fraction * count)), replace=False)
    return places(uri, [(512 + int(number) * (size + 512), size) for number in np.sort(chosen)])


# ---- where to cut


SPANS = st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 700)), max_size=40)
CUTS = st.fixed_dictionaries(
    {"max_gap_bytes": st.integers(0, 900), "max_request_bytes": st.integers(1, 2500), "concurrency": st.integers(1, 4)}
)


@settings(max_examples=150, deadline=None)
@given(SPANS, CUTS)
def test_coalesced_reading_gives_the_bytes_of_one_read_per_image(
    spans: list[tuple[int, int]], cuts: dict[str, int]
) -> None:
    content = noise(2500)
    with tempfile.TemporaryDirectory() as folder:
        uri = f"{folder}/container"
        Path(uri).write_bytes(content)
        found = get(places(uri, spans), **cuts)
    for (offset, length), data in zip(spans, found, strict=True):
        expected = content[offset : offset + length]
        whole_one = len(expected) == length
        assert data == (expected if whole_one else f"fetch: truncated: {len(expected)} of {length} bytes are there")


@given(SPANS, CUTS)
def test_requests_cover_what_is_wanted_within_the_limits(spans: list[tuple[int, int]], cuts: dict[str, int]) -> None:
    limits = FetchSettings(**cuts)
    wanted = {row: (offset, offset + length) for row, (offset, length) in enumerate(spans)}
    pieces = coalesce(wanted.items(), limits)
    assert sorted(row for piece in pieces for row in piece.rows) == list(wanted)
    spans_of_all = list(wanted.values()) or [(0, 0)]
    whole = max(stop for _, stop in spans_of_all) - min(start for start, _ in spans_of_all)
    mostly = 2 * sum(stop - start for start, stop in spans_of_all) >= whole  # then gaps do not count
    for piece in pieces:
        first, last = piece.span
        mine = [wanted[row] for row in piece.rows]
        assert first == min(start for start, _ in mine)
        assert last == max(stop for _, stop in mine)
        longest = max(stop - start for start, stop in mine)
        assert last - first <= max(limits.max_request_bytes, longest)
        needed = sum(stop - start for start, stop in mine)
        most_gap = limits.max_request_bytes if mostly else limits.max_gap_bytes
        assert last - first <= needed + most_gap * (len(mine) - 1)


def test_the_order_of_places_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "tar").write_bytes(noise(50_000))
    wanted = tar_places(str(tmp_path / "tar"), 40, 700, 0.5)
    order = np.random.default_rng(1).permutation(len(wanted))
    straight, shuffled = get(wanted), get([wanted[number] for number in order])
    assert [straight[number] for number in order] == shuffled


def test_an_object_that_two_images_share_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    wanted = [whole(f"{tmp_path}/a")] * 3
    assert get(wanted) == [b"abc"] * 3
    assert spent(wanted) == {"requests:image": 1, "bytes:image": 3, "bytes:needed": 9}


def test_the_bytes_of_a_parquet_column_are_counted_by_row_group(tmp_path: Path) -> None:
    images = [noise(1000, number) for number in range(12)]
    table = pa.table({"other": images, "picture": images})
    pq.write_table(
        table,
        tmp_path / "a.parquet",
        row_group_size=4,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
    )
    wanted = [Place(f"{tmp_path}/a.parquet#picture", None, None, row) for row in (9, 1, 2)]
    counts = spent(wanted)
    assert counts["requests:image"] == 2  # row groups 0 and 2
    assert counts["bytes:needed"] == 3000
    assert 8000 < counts["bytes:image"] < 9000  # four images of each, of one column


def test_a_column_that_is_not_there_is_a_reject(tmp_path: Path) -> None:
    pq.write_table(pa.table({"picture": [b"x"]}), tmp_path / "a.parquet")
    assert get([Place(f"{tmp_path}/a.parquet#pictures", None, None, 0)])[0] == (
        "fetch: damaged: a Parquet file lacks a column"
    )


# ---- how fast


@dataclass
class Clock:
    """Time that passes only in `sleep`."""

    now: float = 100.0
    sleeps: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.sleeps.append(seconds)
        self.now += seconds


def test_rate_limit_keeps_its_rate_after_a_short_burst() -> None:
    clock = Clock()
    pace = RateLimit(50.0, 10.0, clock, clock.sleep)
    times = []
    for _ in range(200):
        pace.wait()
        times.append(clock.now - 100.0)
    for first in range(0, 200, 7):
        for last in range(first, 200, 11):
            assert last - first + 1 <= (times[last] - times[first]) * 50.0 + BURST_SECONDS * 50.0 + 1 + 1e-6
    assert times[-1] == pytest.approx(199 / 50, abs=0.2)


def test_rate_limit_does_not_accumulate_unused_time() -> None:
    clock = Clock()
    pace = RateLimit(50.0, 10.0, clock, clock.sleep)
    clock.now += 1000.0
    for _ in range(60):
        pace.wait()
    assert clock.now - 1100.0 == pytest.approx((59 - BURST_SECONDS * 50) / 50, abs=0.03)


def test_a_prefix_that_asks_to_slow_down_is_left_alone_longer_each_time() -> None:
    clock = Clock()
    pace = RateLimit(1e6, 3.0, clock, clock.sleep)
    waits = []
    for _ in range(6):
        pace.slow_down()
        pace.slow_down()  # the other answers to the same burst change nothing
        start = clock.now
        pace.wait()
        waits.append(clock.now - start)
    for wait, most in zip(waits, [0.5, 1.0, 2.0, 3.0, 3.0, 3.0], strict=True):
        assert most / 2 <= wait <= most + 0.001
    clock.now += 60.0  # calm
    pace.slow_down()
    start = clock.now
    pace.wait()
    assert clock.now - start <= 0.501


def test_rate_limit_pause_also_holds_back_waiting_requests() -> None:
    pace = RateLimit(20.0, 10.0)
    for _ in range(3):
        pace.wait()  # the burst
    went: list[float] = []

    def go() -> None:
        pace.wait()
        went.append(time.monotonic())

    threads = [threading.Thread(target=go) for _ in range(4)]
    for thread in threads:
        thread.start()
    pace.slow_down()
    paused = time.monotonic()
    for thread in threads:
        thread.join()
    assert sum(moment - paused < 0.2 for moment in went) == 0


def test_requests_keep_the_rate_of_their_prefix(bucket: str) -> None:
    uris = [put(f"{bucket}/{prefix}/{number}", b"x") for prefix in "ab" for number in range(20)]
    get([whole(uri) for uri in uris])  # connections
    start = time.monotonic()
    get([whole(uri) for uri in uris], requests_per_second=20.0)
    assert 0.85 <= time.monotonic() - start < 1.7  # 20 requests of each prefix, two of which are a burst


# ---- on S3


def put(uri: str, data: bytes) -> str:
    """Write an object as a user would; returns its URI."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    s3_client(os.environ).put_object(Bucket=bucket, Key=key, Body=data)
    return uri


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up soon."""
    settings = StorageSettings(retry_seconds=1.0, max_pause_seconds=0.2, connect_timeout_seconds=2.0)
    monkeypatch.setenv("FASTFILL_STORAGE", settings.model_dump_json())


def test_every_kind_of_place_is_read_from_s3(bucket: str) -> None:
    data = [noise(900 + number, number) for number in range(9)]
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": data}), sink, row_group_size=2)
    rows = put(f"{bucket}/rows.parquet", sink.getvalue())
    tar = put(f"{bucket}/shards/a.tar", b"".join(data))
    starts = np.cumsum([0, *map(len, data)])
    wanted = [whole(put(f"{bucket}/objects/{number}.png", item)) for number, item in enumerate(data)]
    wanted += places(tar, [(int(starts[number]), len(item)) for number, item in enumerate(data)])
    wanted += [Place(f"{rows}#image", None, None, row) for row in range(len(data))]
    order = np.random.default_rng(0).permutation(len(wanted))
    assert get([wanted[number] for number in order]) == [(data * 3)[number] for number in order]


@pytest.mark.parametrize("key", ["a b/ü+%20~.png", "x?y#z=1&2.png", "a//b.png", "(1)[2]{3}'.png", "a./.b"])
def test_any_name_of_an_object_is_asked_for_as_it_is(bucket: str, key: str) -> None:
    uri = put(f"{bucket}/{key}", b"0123456789")
    assert get([whole(uri), *places(uri, [(2, 3)])]) == [b"0123456789", b"234"]


def test_fetch_of_a_bad_image_on_s3_is_a_reject_with_its_reason(bucket: str) -> None:
    tar = put(f"{bucket}/a.tar", noise(1000))
    cases = [
        (whole(f"{bucket}/gone.png"), "fetch: missing"),
        (whole(f"{bucket}/gone.png", '"abc"'), "fetch: deleted: was there when the manifest was made"),
        (Place(f"{bucket}/gone.tar", 3, 4, None, '"abc"'), "fetch: deleted: was there when the manifest was made"),
        (
            Place(f"{bucket}/gone.parquet#a", None, None, 0, "abc"),
            "fetch: deleted: was there when the manifest was made",
        ),
        (whole(bucket), "fetch: missing"),
        (whole(put(f"{bucket}/large.png", bytes(MOST + 1))), "fetch: too large: 100001 bytes, at most 100000"),
        (whole(put(f"{bucket}/empty.png", b"")), b""),
        (Place(tar, 900, 200, None), "fetch: truncated: 100 of 200 bytes are there"),
        (Place(tar, 1000, 200, None), "fetch: truncated: 0 of 200 bytes are there"),
        (Place(tar, 10**7, 200, None), "fetch: truncated: 0 of 200 bytes are there"),
        (Place(tar, 0, MOST + 1, None), "fetch: too large: 100001 bytes, at most 100000"),
        (Place(tar, 5, 0, None), b""),
        (Place(tar, 0, 1000, None), noise(1000)),
    ]
    assert get([place for place, _ in cases]) == [wanted for _, wanted in cases]


@pytest.mark.parametrize("etag", [None, '"abc"'])
@pytest.mark.parametrize("kind", ["whole", "range", "row"])
def test_fetch_from_a_missing_bucket_is_an_error_and_no_reject(bucket: str, kind: str, etag: str | None) -> None:
    gone = {
        "whole": whole(f"{bucket}-gone/a.png", etag),
        "range": Place(f"{bucket}-gone/a.tar", 3, 4, None, etag),
        "row": Place(f"{bucket}-gone/a.parquet#image", None, None, 0, etag),
    }
    here = put(f"{bucket}/a.png", b"x")
    with pytest.raises(DataError, match="bucket does not exist") as caught:
        get([whole(here), gone[kind]])
    assert caught.value.details["where"] == f"{bucket}-gone"


def test_a_container_on_s3_that_was_made_anew_gives_rejects(bucket: str) -> None:
    first, second = noise(600, 1), noise(600, 2)

    def write(parts: list[bytes]) -> list[Place]:
        sink = io.BytesIO()
        pq.write_table(pa.table({"image": parts}), sink)
        tar, rows = put(f"{bucket}/a.tar", b"".join(parts)), put(f"{bucket}/a.parquet", sink.getvalue())
        etag = objects.stat(rows).etag
        found = places(tar, [(0, 600), (600, 600)], objects.stat(tar).etag.strip('"'))
        return [*found, *(Place(f"{rows}#image", None, None, row, etag) for row in range(2))]

    alone = put(f"{bucket}/a.png", first)
    planned = [*write([first, second]), whole(alone, objects.stat(alone).etag)]
    assert get(planned) == [first, second, first, second, first]
    write([second, first])
    put(alone, second)
    remedy = "make the manifest again, and start a new run with --new-run"
    assert get(planned) == [f"fetch: container changed: {remedy}"] * 4 + [second]


def parquet_place(path: Path, images: list[bytes]) -> list[Place]:
    """The images of a Parquet file as a manifest with the images inside has them."""
    pq.write_table(pa.table({"image": images}), path)
    tag = f"{objects.stat(str(path)).etag} {objects.sha256(str(path))}"
    return [Place(f"{path}#image", None, None, row, tag) for row in range(len(images))]


def test_fetch_from_a_parquet_file_that_was_replaced_by_the_same_rows_in_another_order_gives_rejects(
    tmp_path: Path,
) -> None:
    images = [noise(600, 1), noise(600, 2)]
    planned = parquet_place(tmp_path / "a.parquet", images)
    assert get(planned) == images
    parquet_place(tmp_path / "a.parquet", images[::-1])
    os.utime(tmp_path / "a.parquet", ns=(1, 1))
    remedy = "make the manifest again, and start a new run with --new-run"
    assert get(planned) == [f"fetch: container changed: {remedy}"] * 2


def test_fetch_from_a_parquet_file_that_was_only_touched_gives_its_images_and_the_planned_etag(tmp_path: Path) -> None:
    images = [noise(600, 1), noise(600, 2)]
    planned = parquet_place(tmp_path / "a.parquet", images)
    etag = objects.stat(str(tmp_path / "a.parquet")).etag
    os.utime(tmp_path / "a.parquet", ns=(1, 1))
    assert objects.stat(str(tmp_path / "a.parquet")).etag != etag
    assert list(fetch(planned, MOST, FetchSettings())) == [(image, etag) for image in images]


def test_fetch_from_a_row_group_of_more_than_two_gibibytes_gives_its_images(tmp_path: Path) -> None:
    """Few images many times, which make a small file; read into one column they do not fit Arrow's offsets."""
    size, count = 2**20, 2100
    few = pa.array([noise(100, number) + bytes(size - 100) for number in range(3)], pa.binary())
    images = pa.DictionaryArray.from_arrays(pa.array(np.arange(count) % 3, pa.int32()), few)
    uri = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": images}), uri, row_group_size=count, store_schema=False, compression="zstd")
    assert (pq.read_metadata(uri).num_row_groups, pq.read_schema(uri).field("image").type) == (1, pa.binary())
    wanted = [0, 1000, count - 1]
    found = get([Place(f"{uri}#image", None, None, row) for row in wanted], most=2 * size)
    assert found == [few[row % 3].as_py() for row in wanted]


def test_an_object_that_is_too_large_is_not_downloaded(bucket: str) -> None:
    uri = put(f"{bucket}/large.png", bytes(5 * 2**20))
    before = objects.counts()
    get([whole(uri)])
    assert untimed(objects.counts() - before) == {"requests:image": 1}


def test_etags_are_those_of_the_moment_of_reading(bucket: str) -> None:
    uri = put(f"{bucket}/a.png", b"first")
    (_, first), (_, ranged) = fetch([whole(uri), *places(uri, [(0, 2)])], MOST, FetchSettings())
    assert first == ranged == objects.stat(uri).etag
    put(uri, b"second")
    ((data, second),) = fetch([whole(uri)], MOST, FetchSettings())
    assert data == b"second"
    assert second == objects.stat(uri).etag != first


@pytest.mark.parametrize(
    ("fraction", "size", "requests", "over"),
    [
        (0.01, 3_000, (5, 10), 20.0),  # ten images 350 kB apart: as good as one request each
        (0.25, 3_000, (1, 1), 5.0),  # gaps of 10 kB: the whole tar
        (1.0, 3_000, (1, 1), 1.3),
        (0.01, 30_000, (10, 10), 1.0),
        (0.25, 30_000, (20, 90), 4.0),
        (1.0, 30_000, (4, 5), 1.1),  # 30 MB in requests of 8 MiB
    ],
)
def test_fetch_from_a_tar_takes_few_requests_and_no_more_bytes_than_the_gaps_allow(
    bucket: str, fraction: float, size: int, requests: tuple[int, int], over: float
) -> None:
    count = 1000
    tar = put(f"{bucket}/a.tar", bytes(512 + count * (size + 512)))
    wanted = tar_places(tar, count, size, fraction)
    counts = spent(wanted)
    assert requests[0] <= counts["requests:image"] <= requests[1]
    assert counts["bytes:needed"] == len(wanted) * size
    assert counts["bytes:image"] <= over * counts["bytes:needed"]
    assert counts["bytes:image"] <= counts["bytes:needed"] + (len(wanted) - 1) * FetchSettings().max_gap_bytes


def test_fetch_of_whole_objects_is_one_get_each(bucket: str, faulty_s3: FaultyProxy) -> None:
    uris = [put(f"{bucket}/{number}.png", noise(50, number)) for number in range(20)]
    faulty_s3.requests.clear()
    assert get([whole(uri) for uri in uris]) == [noise(50, number) for number in range(20)]
    assert faulty_s3.requests == {"GET": 20}


@pytest.mark.parametrize(
    ("fault", "causes"),
    [
        (Fault.ERROR_BEFORE, {"InternalError"}),
        (Fault.RESET, {"Request", "Connect", "Interrupted", "Unknown"}),
        (Fault.TRUNCATED, {"Interrupted", "Decode", "Body", "Request", "Unknown"}),
        (Fault.HANG_AFTER, {"Timeout"}),
        (Fault.SLOW_DOWN, {"SlowDown"}),
    ],
)
def test_a_request_that_fails_is_repeated_and_counted_by_its_cause(
    bucket: str, faulty_s3: FaultyProxy, fault: Fault, causes: set[str]
) -> None:
    uris = [put(f"{bucket}/{number}.png", noise(5000, number)) for number in range(5)]
    wanted = [whole(uri) for uri in uris]
    wanted += places(uris[0], [(10, 100)])
    get(wanted)
    faulty_s3.inject(fault, "GET", times=3)
    before = objects.counts()
    expected = [noise(5000, number) for number in range(5)] + [noise(5000)[10:110]]
    assert get(wanted, timeout_seconds=1.0) == expected
    counts = objects.counts() - before
    found = {name.removeprefix("retries:"): count for name, count in counts.items() if name.startswith("retries:")}
    assert sum(found.values()) == 3
    assert set(found) <= causes
    assert counts["requests:image"] == 6 + 3


def test_a_parquet_file_that_is_replaced_while_it_is_read_is_read_as_it_is_then(
    bucket: str, faulty_s3: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = StorageSettings(endpoint_url=faulty_s3.endpoint)
    monkeypatch.setenv("FASTFILL_STORAGE", settings.model_dump_json())

    def write(seed: int) -> str:
        sink = io.BytesIO()
        pq.write_table(pa.table({"image": [noise(1000, seed)]}), sink)
        return put(f"{bucket}/rows.parquet", sink.getvalue())

    place = Place(f"{write(1)}#image", None, None, 0)
    faulty_s3.watch(lambda _: bool(write(2)), "GET", "rows.parquet")
    ((data, etag),) = fetch([place], MOST, FetchSettings())
    assert data == noise(1000, 2)
    assert etag == objects.stat(f"{bucket}/rows.parquet").etag


def test_credentials_that_cannot_be_renewed_for_a_moment_are_asked_for_again(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake in botocore's place: no machine here has a role."""
    uri = put(f"{bucket}/a.png", b"a")
    answers = iter([RuntimeError("the role's endpoint is busy")])

    class Role:
        def get_frozen_credentials(self) -> Any:
            for error in answers:
                raise error
            key, secret = os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
            return SimpleNamespace(access_key=key, secret_key=secret, token=None)

    monkeypatch.setattr("botocore.session.Session.get_credentials", lambda _: Role())
    before = objects.counts()
    with fresh_clients():
        assert get([whole(uri)]) == [b"a"]
    assert (objects.counts() - before)["retries:Credentials"] == 1


def test_a_503_holds_back_the_whole_prefix_and_no_other(bucket: str, faulty_s3: FaultyProxy) -> None:
    slow = [whole(put(f"{bucket}/slow/{number}", b"x")) for number in range(60)]
    quick = [whole(put(f"{bucket}/quick/{number}", b"x")) for number in range(60)]
    get(slow + quick, concurrency=4)
    faulty_s3.slow_down(1.0)
    start = time.monotonic()
    assert get(slow, concurrency=4) == [b"x"] * 60
    assert time.monotonic() - start > 0.9
    # Each of four threads without a pause of its prefix: 100 ms, 200 ms, ... at most on average; with it fewer.
    assert faulty_s3.counts[Fault.SLOW_DOWN] <= 4 * 5
    faulty_s3.inject(Fault.SLOW_DOWN, "GET", path="slow", times=4)
    begun = threading.Thread(target=get, args=[slow[:4]])
    begun.start()
    time.sleep(0.1)
    start = time.monotonic()
    get(quick)
    assert time.monotonic() - start < 0.4
    begun.join()


def test_a_store_that_keeps_failing_stops_the_job_and_rejects_nothing(
    bucket: str, faulty_s3: FaultyProxy, quick: None
) -> None:
    uris = [put(f"{bucket}/{number}.png", b"x") for number in range(50)]
    faulty_s3.outage(60)
    start = time.monotonic()
    with pytest.raises(TransientError, match="object storage keeps failing"):
        get([whole(uri) for uri in uris])
    assert 1.0 <= time.monotonic() - start < 6.0


@pytest.mark.parametrize(
    ("fault", "code"), [(Fault.UNREADABLE, "InvalidRequest"), (Fault.NO_KEY, "KMS.DisabledException")]
)
def test_an_object_that_the_store_refuses_for_ever_is_a_reject(
    bucket: str, faulty_s3: FaultyProxy, fault: Fault, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = StorageSettings(endpoint_url=faulty_s3.endpoint)
    monkeypatch.setenv("FASTFILL_STORAGE", settings.model_dump_json())
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": [b"x"]}), sink)
    rows = put(f"{bucket}/bad.parquet", sink.getvalue())
    bad, good = put(f"{bucket}/bad.png", b"x"), put(f"{bucket}/good.png", b"good")
    faulty_s3.inject(fault, path=r"bad\.", times=10**6)
    wanted = [whole(bad), whole(good), *places(bad, [(0, 1)]), Place(f"{rows}#image", None, None, 0)]
    no = f"fetch: unreadable: {code}"
    assert get(wanted) == [no, b"good", no, no]


def test_an_object_that_fails_while_others_come_is_a_reject(bucket: str, faulty_s3: FaultyProxy, quick: None) -> None:
    bad, good = put(f"{bucket}/bad.png", b"x"), put(f"{bucket}/good.png", b"good")
    faulty_s3.inject(Fault.ERROR_BEFORE, "GET", "bad", times=10**6)
    no = "fetch: unreadable: InternalError for 1 seconds"
    assert get([whole(bad), whole(good)]) == [no, b"good"]
    assert get([whole(good), whole(bad)], concurrency=1) == [b"good", no]  # asked for again, after the failures
    tar = put(f"{bucket}/bad.tar", bytes(100))
    assert get(places(tar, [(0, 10)]), concurrency=1) == [no]


@pytest.mark.parametrize("fault", [Fault.SLOW_DOWN, Fault.RESET])
def test_an_object_that_is_held_back_or_not_answered_for_is_no_reject(
    bucket: str, faulty_s3: FaultyProxy, quick: None, fault: Fault
) -> None:
    bad, good = put(f"{bucket}/bad/a.png", b"x"), put(f"{bucket}/good/a.png", b"good")
    faulty_s3.inject(fault, "GET", "bad", times=10**6)
    with pytest.raises(TransientError, match="object storage keeps failing"):
        get([whole(bad), whole(good)])


def test_an_outage_rejects_nothing_though_others_came_after_the_first_failure(
    bucket: str, faulty_s3: FaultyProxy, quick: None
) -> None:
    first, second = put(f"{bucket}/first.png", b"x"), put(f"{bucket}/second.png", b"x")
    get([whole(second)])
    faulty_s3.delays["second"] = 0.3
    faulty_s3.inject(Fault.ERROR_BEFORE, "GET", "first", times=10**6)

    def go_away(_: str) -> bool:
        faulty_s3.inject(Fault.ERROR_BEFORE, "GET", times=10**6)
        return True

    faulty_s3.watch(go_away, "GET", "second", after=True)
    with pytest.raises(TransientError, match="object storage keeps failing"):
        get([whole(first), whole(second)])


def test_an_object_that_fails_where_nothing_else_comes_is_no_reject(
    bucket: str, faulty_s3: FaultyProxy, quick: None
) -> None:
    uris = [put(f"{bucket}/{number}.png", b"x") for number in range(2)]
    get([whole(uri) for uri in uris])
    faulty_s3.inject(Fault.ERROR_BEFORE, "GET", times=10**6)
    with pytest.raises(TransientError, match="object storage keeps failing"):
        get([whole(uri) for uri in uris])


def test_an_image_that_may_not_be_read_is_a_reject_and_wrong_credentials_are_not(
    bucket: str, seaweed: SeaweedFS, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = put(f"{bucket}/closed.png", b"x")
    open_one = put(f"s3://{READONLY}/open.png", b"open")
    for name, value in seaweed.environment("readonly").items():
        monkeypatch.setenv(name, value)
    with fresh_clients():
        assert get([whole(closed), whole(open_one), *places(closed, [(0, 1)])]) == [
            "fetch: forbidden",
            b"open",
            "fetch: forbidden",
        ]
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with fresh_clients(), pytest.raises(DataError, match="refuses these credentials"):
        get([whole(closed)])
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with fresh_clients(), pytest.raises(DataError, match="refuses these credentials"):
        get([whole(closed)])


class fresh_clients:  # noqa: N801 - a context manager
    """Clients keep the credentials that they were made with."""

    def __enter__(self) -> None:
        objects._reader.cache_clear()

    def __exit__(self, *_: object) -> None:
        objects._reader.cache_clear()


@pytest.mark.parametrize(("every", "requests"), [(1, 36), (5, 36), (2, 500)])
def test_a_container_that_is_mostly_wanted_is_read_in_whole_pieces(every: int, requests: int) -> None:
    """1,000 images of 300 kB with 512 bytes before each, without each `every`-th one, or each second alone."""
    size, step = 300_000, 300_512
    rows = [row for row in range(1000) if every == 1 or row % every]
    wanted = [(row, (row * step, row * step + size)) for row in rows]
    if every == 2:
        wanted = [(row, (start, start + size - 1000)) for row, (start, _) in wanted]  # a little less than half
    pieces = coalesce(wanted, FetchSettings())
    assert len(pieces) <= requests + 2
    assert sorted(row for piece in pieces for row in piece.rows) == rows
    if every != 2:
        assert (
            max(stop - start for start, stop in (piece.span for piece in pieces)) <= FetchSettings().max_request_bytes
        )
    else:
        assert len(pieces) == requests
