"""The daemon of spot machines, against a fake metadata service that speaks as EC2 does, and a fake `ray`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.support.seaweed import free_ports

ROOT = Path(__file__).resolve().parents[2]
NODE = "0badc0de" * 7
ADDRESS = "192.0.2.9:6379"  # of documentation: nothing can be there
FIRST_TOKEN, SECOND_TOKEN = "first", "second"


class FakeMetadata(ThreadingHTTPServer):
    """EC2's answers: a token for a PUT with a lifetime, 401 without a good one, 404 where there is no notice."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.token = FIRST_TOKEN
        self.notice: dict[str, str] | None = None
        self.looks: list[int] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: FakeMetadata

    def do_PUT(self) -> None:
        good = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self._answer(200 if good else 400, self.server.token)

    def do_GET(self) -> None:
        notice, status = self.server.notice, 200
        if self.headers["X-aws-ec2-metadata-token"] != self.server.token:
            status = 401
        elif self.path != "/latest/meta-data/spot/instance-action" or notice is None:
            status = 404
        self.server.looks.append(status)
        self._answer(status, json.dumps(notice))

    def _answer(self, status: int, body: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def metadata() -> Iterator[FakeMetadata]:
    with FakeMetadata() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def raylet() -> Iterator[None]:
    """A process that is called as a raylet is, and sleeps."""
    words = ["/opt/ray/raylet", "-c", "import time; time.sleep(60)", f"--node_id={NODE}", f"--gcs-address={ADDRESS}"]
    process = subprocess.Popen(words, executable=sys.executable)
    yield
    process.kill()
    process.wait()


def start(folder: Path, url: str, ray: str) -> subprocess.Popen[str]:
    """The daemon, with a shell script as its `ray`."""
    (folder / "ray").write_text(f'#!/bin/sh\necho "$@" >> {folder}/words\n{ray}\n')
    (folder / "ray").chmod(0o755)
    command = [sys.executable, "-S", str(ROOT / "infra" / "spot_notice.py"), "--metadata", url, "--poll-seconds", "0.1"]
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def calls(folder: Path) -> list[list[str]]:
    """The words of each call of `ray` for our node; other Rays of this machine are asked for as well."""
    words = folder / "words"
    found = [line.split() for line in words.read_text().splitlines()] if words.exists() else []
    return [call for call in found if NODE in call]


def notice(seconds: float) -> dict[str, str]:
    at = datetime.now(UTC) + timedelta(seconds=seconds)
    return {"action": "terminate", "time": at.strftime("%Y-%m-%dT%H:%M:%SZ")}


def wait_until_it_looked(metadata: FakeMetadata, status: int) -> None:
    deadline = time.monotonic() + 10
    while status not in metadata.looks:
        assert time.monotonic() < deadline, metadata.looks
        time.sleep(0.02)


def test_a_notice_drains_the_node_once_with_the_time_that_is_left(
    tmp_path: Path, metadata: FakeMetadata, raylet: None
) -> None:
    daemon = start(tmp_path, metadata.url, "exit 0")
    wait_until_it_looked(metadata, 404)
    assert not calls(tmp_path), "it drained without a notice"
    metadata.notice = notice(120)
    output, _ = daemon.communicate(timeout=30)
    assert daemon.returncode == 0, output
    (call,) = calls(tmp_path)
    *words, seconds = call
    assert words == [
        *("drain-node", "--address", ADDRESS, "--node-id", NODE, "--reason", "DRAIN_NODE_REASON_PREEMPTION"),
        *("--reason-message", "spot:", "terminate", "--deadline-remaining-seconds"),
    ]
    assert 100 <= int(seconds) <= 110
    assert f"node {NODE}: draining" in output


def test_a_token_that_has_run_out_is_asked_for_again(tmp_path: Path, metadata: FakeMetadata, raylet: None) -> None:
    daemon = start(tmp_path, metadata.url, "exit 0")
    wait_until_it_looked(metadata, 404)
    metadata.token = SECOND_TOKEN
    wait_until_it_looked(metadata, 401)
    metadata.notice = notice(120)
    output, _ = daemon.communicate(timeout=30)
    assert daemon.returncode == 0, output
    assert len(calls(tmp_path)) == 1


def test_a_metadata_service_that_is_away_is_waited_for(tmp_path: Path, raylet: None) -> None:
    daemon = start(tmp_path, f"http://127.0.0.1:{free_ports(1)[0]}", "exit 0")
    assert daemon.stdout is not None
    assert "does not answer, trying on" in daemon.stdout.readline()
    time.sleep(0.5)
    assert daemon.poll() is None
    daemon.kill()
    assert daemon.communicate()[0] == "", "it says so once, not at each look"


def test_a_request_that_ray_does_not_take_is_repeated_until_the_machine_is_gone(
    tmp_path: Path, metadata: FakeMetadata, raylet: None
) -> None:
    metadata.notice = notice(3)
    daemon = start(tmp_path, metadata.url, "echo no route >&2; exit 1")
    output, _ = daemon.communicate(timeout=30)
    assert daemon.returncode == 0, output
    assert len(calls(tmp_path)) >= 2
    assert "no route" in output
