"""The cluster, server and gallery of the fault tests."""

from tests.faults.conftest import calm, cluster, fault_server, proxy, scene

__all__ = ["calm", "cluster", "fault_server", "proxy", "scene"]
