"""The cluster, server and gallery of the fault tests, and Ray's job commands for that cluster."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cluster.jobs import Jobs
from tests.faults.conftest import calm, cluster, fault_server, proxy, scene
from tests.faults.scene import Scene

__all__ = ["calm", "cluster", "fault_server", "jobs", "proxy", "scene"]


@pytest.fixture(scope="session")
def jobs(scene: Scene, cluster: Any) -> Jobs:
    return Jobs(f"http://{cluster.head_node.webui_url}", scene.environment())
