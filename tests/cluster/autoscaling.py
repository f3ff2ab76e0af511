"""A Ray cluster on this machine whose nodes Ray's own autoscaler starts and ends, through its fake provider.

Each node is a raylet of its own; `GPU` is a word here, which decides where an actor goes and nothing else. Ray's
`AutoscalingCluster` does the same from a checkout of Ray, but not from the wheel, and ends every Ray of the machine.
Whatever is started here is marked, and only that is ended.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from ray._private.services import get_node_ip_address
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from tests.cluster.marked import Marked, children, descendants, title, variable
from tests.faults.scene import kill
from tests.support.seaweed import free_ports

NODE_ID = "RAY_OVERRIDE_NODE_ID_FOR_TESTING"
EMPTY = ["initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"]
EMPTY += [
    "head_start_ray_commands",
    "worker_start_ray_commands",
    "cluster_synced_files",
    "rsync_exclude",
    "rsync_filter",
]  # what the reader of the file wants to be there
FAKE = {
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
    NODE_ID: FAKE_HEAD_NODE_ID,
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
}  # of the head's environment
NODE = {"CPU": 3, "GPU": 1, "object_store_memory": 100 * 2**20}


@dataclass
class AutoscaledCluster:
    """A head without CPUs and GPUs, and 0 to `max_workers` nodes, each with one GPU that is none."""

    environment: dict[str, str]  # of its processes, on top of this one's
    max_workers: int = 3
    idle_minutes: float = 0.15
    folder: Path = field(init=False)  # its name is short: sockets lie in it
    port: int = field(init=False)
    marked: Marked = field(default_factory=Marked)

    def __enter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="ff", dir="/tmp"))
        self.port = free_ports(1)[0]
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    @property
    def address(self) -> str:
        return f"{get_node_ip_address()}:{self.port}"

    def nodes(self) -> dict[str, int]:
        """The raylet's process of each node but the head, by the node's id."""
        found = {variable(pid, NODE_ID): pid for pid in self.marked.processes("raylet/raylet")}
        found.pop(FAKE_HEAD_NODE_ID, None)
        return {node: pid for node, pid in found.items() if node}

    def actors(self) -> dict[str, int]:
        """How many embedding actors each node has."""
        family = children()
        return {
            node: sum("EmbedStage" in title(child) for child in family.get(pid, []))
            for node, pid in self.nodes().items()
        }

    def kill(self, node: str) -> None:
        """SIGKILL for everything that runs on a node, if it is still there: the machine has gone."""
        pid = self.nodes().get(node)
        kill(descendants(pid) if pid else [])

    def monitor_log(self) -> str:
        """What the autoscaler says."""
        logs = sorted((self.folder / "session_latest" / "logs").glob("monitor.*"))
        return "\n".join(log.read_text(errors="replace") for log in logs)

    def stop(self) -> None:
        """End what was started, and its folder."""
        self.marked.end()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self) -> None:
        config = self.folder / "cluster.yaml"
        config.write_text(json.dumps(self._config()))  # JSON is YAML
        head = ["--head", f"--port={self.port}", f"--temp-dir={self.folder}", f"--autoscaling-config={config}"]
        head += ["--num-cpus=0", "--num-gpus=0", "--include-dashboard=false", "--disable-usage-stats"]
        self.marked.ray_start(*head, environment=self.environment | FAKE)

    def _config(self) -> dict[str, Any]:
        head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
        worker = {"resources": NODE, "node_config": {}, "min_workers": 0, "max_workers": self.max_workers}
        provider = {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "gcs_address": self.address,
        }
        return {
            "cluster_name": "fake",
            "max_workers": self.max_workers,
            "idle_timeout_minutes": self.idle_minutes,
            "provider": provider,
            "available_node_types": {"ray.head.default": head, "gpu_spot": worker},
            "head_node_type": "ray.head.default",
            "auth": {},
            "docker": {},
            "file_mounts": {},
            "upscaling_speed": 1.0,
            **{name: [] for name in EMPTY},
        }
