"""The S3 server is as strict as the real thing, and the proxy in front of it does what it says and nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import s3fs
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, IncompleteReadError

from tests.support.faulty_proxy import PER_REQUEST, Dice, Fault, FaultyProxy
from tests.support.seaweed import READONLY, SeaweedFS, s3_client

ROOT = Path(__file__).resolve().parents[1]


def code(error: pytest.ExceptionInfo[ClientError]) -> int:
    status = error.value.response["ResponseMetadata"]["HTTPStatusCode"]
    assert isinstance(status, int)
    return status


@pytest.fixture
def name(bucket: str) -> str:
    return bucket.removeprefix("s3://")


@pytest.fixture(scope="module")
def client(seaweed: SeaweedFS) -> Any:
    return s3_client(seaweed.environment())


@pytest.fixture
def through(faulty_s3: FaultyProxy, seaweed: SeaweedFS) -> Any:
    """A client behind the proxy that tries once."""
    faulty_s3.hang_seconds, faulty_s3.stall_seconds = 0.5, 0.3
    environment = {**seaweed.environment(), "AWS_ENDPOINT_URL": faulty_s3.endpoint}
    return s3_client(environment, max_pool_connections=32)


def winners(put: Any) -> int:
    """How many of eight threads that write the same key at once succeed; the others are told that they did not.

    Every body is one of a kind: an ETag is a digest of the content, so a writer that puts back what was there leaves
    the condition true for the next.
    """
    barrier = threading.Barrier(8)

    def race(_: int) -> int:
        barrier.wait()
        try:
            put(Body=uuid.uuid4().bytes)
        except ClientError as refused:
            return int(refused.response["ResponseMetadata"]["HTTPStatusCode"])
        return 200

    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(race, range(8)))
    assert set(statuses) <= {200, 409, 412}
    return statuses.count(200)


def test_a_conditional_put_has_one_winner(client: Any, name: str) -> None:
    """One race of each kind: this server makes writers that meet wait for a second or two."""
    assert winners(lambda **body: client.put_object(Bucket=name, Key="key", IfNoneMatch="*", **body)) == 1
    etag = client.head_object(Bucket=name, Key="key")["ETag"]
    assert winners(lambda **body: client.put_object(Bucket=name, Key="key", IfMatch=etag, **body)) == 1


def test_a_wrong_secret_is_refused(seaweed: SeaweedFS, name: str) -> None:
    stranger = s3_client({**seaweed.environment(), "AWS_SECRET_ACCESS_KEY": "wrong"})
    with pytest.raises(ClientError) as error:
        stranger.put_object(Bucket=name, Key="key", Body=b"body")
    assert code(error) == 403


def test_the_read_only_identity_reads_its_bucket_and_writes_nothing(seaweed: SeaweedFS, client: Any, name: str) -> None:
    key = f"{name}/key"  # others use this bucket too
    client.put_object(Bucket=READONLY, Key=key, Body=b"body")
    reader = s3_client(seaweed.environment("readonly"))
    assert reader.get_object(Bucket=READONLY, Key=key)["Body"].read() == b"body"
    assert [item["Key"] for item in reader.list_objects_v2(Bucket=READONLY, Prefix=f"{name}/")["Contents"]] == [key]
    for refused in (
        lambda: reader.put_object(Bucket=READONLY, Key=f"{name}/other", Body=b"body"),
        lambda: reader.delete_object(Bucket=READONLY, Key=key),
        lambda: reader.list_objects_v2(Bucket=name),
    ):
        with pytest.raises(ClientError) as error:
            refused()  # type: ignore[no-untyped-call]  # botocore's clients have no types
        assert code(error) == 403


def test_data_survives_a_kill(client: Any, seaweed: SeaweedFS, name: str) -> None:
    for number in range(50):
        client.put_object(Bucket=name, Key=f"{number}", Body=b"%d" % number)
    seaweed.kill()
    seaweed.start()
    for number in range(50):
        assert client.get_object(Bucket=name, Key=f"{number}")["Body"].read() == b"%d" % number
    client.put_object(Bucket=name, Key="after", Body=b"after")


def test_the_server_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    """A stand-in for `weed` is enough: what is tested is how it is started."""
    program = (
        "import subprocess, sys, tests.support.seaweed as s\n"
        "child = subprocess.Popen(['sleep', '60'], preexec_fn=s._die_with_parent())\n"
        "print(child.pid, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 5
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _runs(child)


def _runs(process_id: int) -> bool:
    """A zombie that nobody reaps does not run."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_disabled_proxy_changes_nothing(
    client: Any, through: Any, faulty_s3: FaultyProxy, bucket: str, name: str
) -> None:
    body = os.urandom(6 * 2**20)
    through.put_object(Bucket=name, Key="large", Body=body, ContentType="image/jpeg", Metadata={"attempt": "7"})
    assert client.get_object(Bucket=name, Key="large")["Body"].read() == body

    direct, proxied = (one.head_object(Bucket=name, Key="large") for one in (client, through))
    for answer in (direct, proxied):
        for header in ("date", "x-amz-request-id", "x-amz-id-2"):
            answer["ResponseMetadata"]["HTTPHeaders"].pop(header, None)
    assert direct["ResponseMetadata"]["HTTPHeaders"] == proxied["ResponseMetadata"]["HTTPHeaders"]

    ranged = through.get_object(Bucket=name, Key="large", Range="bytes=1000-1999")
    assert (ranged["Body"].read(), ranged["ResponseMetadata"]["HTTPStatusCode"]) == (body[1000:2000], 206)
    assert through.get_object(Bucket=name, Key="large")["Body"].read() == body
    through.put_object(Bucket=name, Key="a name with spaces+ü", Body=b"body")
    through.put_object(Bucket=name, Key="large", Body=b"new", IfMatch=direct["ETag"])
    with pytest.raises(ClientError) as error:
        through.put_object(Bucket=name, Key="large", Body=body, IfNoneMatch="*")
    assert code(error) == 412
    assert sorted(s3fs.S3FileSystem(skip_instance_cache=True).find(name)) == [
        f"{name}/a name with spaces+ü",
        f"{name}/large",
    ]
    assert not faulty_s3.counts


def test_a_disabled_proxy_serves_many_connections(through: Any, faulty_s3: FaultyProxy, name: str) -> None:
    def round_trip(number: int) -> bool:
        through.put_object(Bucket=name, Key=f"{number}", Body=b"%d" % number)
        return bool(through.get_object(Bucket=name, Key=f"{number}")["Body"].read() == b"%d" % number)

    with ThreadPoolExecutor(32) as pool:
        assert all(pool.map(round_trip, range(128)))
    assert (faulty_s3.requests["PUT"], faulty_s3.requests["GET"]) == (128, 128)


@pytest.mark.parametrize(
    ("fault", "applied", "error"),
    [
        (Fault.ERROR_BEFORE, False, ClientError),
        (Fault.ERROR_AFTER, True, ClientError),
        (Fault.HANG_AFTER, True, HTTPClientError),
        (Fault.RESET_AFTER, True, HTTPClientError),
        (Fault.RESET, False, HTTPClientError),
        (Fault.SLOW_DOWN, False, ClientError),
    ],
)
def test_a_put_that_meets_a_fault_is_applied_or_not(
    client: Any,
    through: Any,
    faulty_s3: FaultyProxy,
    name: str,
    fault: Fault,
    applied: bool,
    error: type[Exception],
) -> None:
    faulty_s3.inject(fault, method="PUT", path=r"/tags/latest$")
    through.put_object(Bucket=name, Key="other", Body=b"body")
    with pytest.raises(error) as raised:
        through.put_object(Bucket=name, Key="tags/latest", Body=b"body")
    if isinstance(raised.value, ClientError):
        assert raised.value.response["Error"]["Code"] == ("SlowDown" if fault is Fault.SLOW_DOWN else "InternalError")
    assert ("Contents" in client.list_objects_v2(Bucket=name, Prefix="tags/")) is applied
    assert faulty_s3.counts == {fault: 1}
    through.put_object(Bucket=name, Key="tags/latest", Body=b"body")  # once, as asked for


def test_a_truncated_answer_ends_early(through: Any, faulty_s3: FaultyProxy, name: str) -> None:
    through.put_object(Bucket=name, Key="key", Body=bytes(100_000))
    faulty_s3.inject(Fault.TRUNCATED, method="GET")
    with pytest.raises((IncompleteReadError, BotoCoreError)):
        through.get_object(Bucket=name, Key="key")["Body"].read()
    assert faulty_s3.counts == {Fault.TRUNCATED: 1}
    assert len(through.get_object(Bucket=name, Key="key")["Body"].read()) == 100_000


def test_proxy_stall_delays_an_answer_and_keeps_its_bytes(through: Any, faulty_s3: FaultyProxy, name: str) -> None:
    faulty_s3.inject(Fault.STALL)
    started = time.monotonic()
    through.put_object(Bucket=name, Key="key", Body=b"body")
    assert time.monotonic() - started >= faulty_s3.stall_seconds


def test_proxy_outage_ends_after_its_time(through: Any, faulty_s3: FaultyProxy, name: str) -> None:
    faulty_s3.outage(0.5)
    with pytest.raises(BotoCoreError):  # reset before or after it was accepted
        through.put_object(Bucket=name, Key="key", Body=b"body")
    time.sleep(0.5)
    through.put_object(Bucket=name, Key="key", Body=b"body")
    assert faulty_s3.counts[Fault.OUTAGE] >= 1


def test_proxy_faults_of_a_seed_keep_their_rate() -> None:
    def drawn(seed: int, seconds_apart: float) -> list[Fault | None]:
        dice = Dice(rate=0.05, seed=seed, now=0.0)
        return [dice.draw("GET", number * seconds_apart) for number in range(40_000)]

    assert drawn(1, 0.01) == drawn(1, 0.01) != drawn(2, 0.01)
    faults = drawn(1, 0.01)
    per_request = [fault for fault in faults if fault not in (None, Fault.SLOW_DOWN)]
    assert set(per_request) == set(PER_REQUEST)
    assert 0.04 < len(per_request) / len(faults) < 0.06
    assert 0.02 < faults.count(Fault.SLOW_DOWN) / len(faults) < 0.08


def test_the_proxy_runs_as_a_process(seaweed: SeaweedFS, name: str) -> None:
    command = [sys.executable, "-m", "tests.support.faulty_proxy", "--upstream", seaweed.endpoint, "--rate", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        endpoint = process.stdout.readline().strip()
        s3_client({**seaweed.environment(), "AWS_ENDPOINT_URL": endpoint}).put_object(Bucket=name, Key="key", Body=b"")
    finally:
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=10)
    assert json.loads(out) == {"requests": {"PUT": 1}, "faults": {}}
