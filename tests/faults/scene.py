"""What the fault tests share: a gallery of real images in a real S3 server, backfilled on a real Ray cluster.

The images and the run lie behind a proxy, so that a test can strike at a precise moment of the run: each
moment is an S3 request. The cluster has a head without CPUs and two workers, all of them processes of
their own; the driver is the command that a user types.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from pipeline.index import commits, tags
from pipeline.run import Run
from pipeline.storage import objects
from tests.support.faulty_proxy import FaultyProxy
from tests.support.galleries import NEW_DIM, OLD_DIM, PREPROCESS, digits, export_encoder
from tests.support.seaweed import SeaweedFS, free_ports, s3_client

ROOT = Path(__file__).resolve().parents[2]
BUCKET = "gallery"
IMAGES = 320
WAVES = 8
UNIT_IMAGES = 10
NODE_CPUS = 3  # logical: one for an actor, the others free, so that a lost node's work finds a place


@dataclass
class Scene:
    """The server, the proxy in front of it, the data, and the cluster's address."""

    folder: Path
    server: SeaweedFS
    proxy: FaultyProxy
    address: str
    config: Path = field(init=False)
    prefix: list[str] = field(default_factory=list)  # of a driver's command: where it runs

    def __post_init__(self) -> None:
        self.config = self.folder / "run.yaml"

    def environment(self, **more: str) -> dict[str, str]:
        return {**os.environ, **self.server.environment(), "RAY_ADDRESS": self.address, **more}

    def run(self, name: str) -> Run:
        return Run(f"s3://{BUCKET}/runs/{name}")

    def start(self, name: str, *arguments: str, command: str = "backfill") -> subprocess.Popen[str]:
        """A command on a run, as a process; what it says comes as one stream."""
        words = [*self.prefix, sys.executable, "-m", f"jobs.{command}", "--config", str(self.config)]
        words += ["--set", f"run={self.run(name).uri}", *arguments]
        return subprocess.Popen(
            words, cwd=ROOT, env=self.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def finish(self, name: str, *arguments: str, command: str = "backfill", seconds: float = 240) -> str:
        """A command on a run that has to end well."""
        process = self.start(name, *arguments, command=command)
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(f"still running after {seconds} s:\n{process.communicate()[0]}") from None
        assert process.returncode == 0, output
        return output

    def finish_elsewhere(self, name: str, home: Path) -> None:
        """Finish a run on another machine: another home and folder, another Ray, only the config and credentials."""
        home.mkdir()
        config = home / self.config.name
        config.write_bytes(self.config.read_bytes())
        known = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(ROOT), **self.server.environment()}
        words = [sys.executable, "-m", "jobs.backfill", "--config", str(config), "--set", f"run={self.run(name).uri}"]
        done = subprocess.run(words, cwd=home, env=known, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr

    def write(self) -> None:
        """Images as objects, a manifest with old embeddings and etags, pairs as embeddings, encoders, config."""
        client = s3_client(self.server.environment())
        self.server.make_bucket(BUCKET)
        images, labels = digits(IMAGES)
        etags = []
        for row, image in enumerate(images):
            etags.append(client.put_object(Bucket=BUCKET, Key=f"images/{row:04d}.png", Body=image)["ETag"])
        rng = np.random.default_rng(0)
        table = {
            "id": np.arange(IMAGES),
            "uri": [f"s3://{BUCKET}/images/{row:04d}.png" for row in range(IMAGES)],
            "etag": etags,
            "digit": labels,
            "old": _vectors(rng.normal(size=(IMAGES, OLD_DIM))),
        }
        pq.write_table(pa.table(table), self.folder / "gallery.parquet")
        old = rng.normal(size=(200, OLD_DIM))
        pairs = {"id": np.arange(200), "old": _vectors(old), "new": _vectors(np.tile(old, 2)[:, :NEW_DIM])}
        pq.write_table(pa.table(pairs), self.folder / "training.parquet")
        for name in ("gallery", "training"):
            data = (self.folder / f"{name}.parquet").read_bytes()
            client.put_object(Bucket=BUCKET, Key=f"manifests/{name}.parquet", Body=data)
        export_encoder(self.folder / "new.pt2", NEW_DIM, seed=2)
        client.put_object(Bucket=BUCKET, Key="encoders/new.pt2", Body=(self.folder / "new.pt2").read_bytes())
        self.config.write_text(yaml.safe_dump(self._tree()))

    def _tree(self) -> dict[str, Any]:
        return {
            "run": f"s3://{BUCKET}/runs/unnamed",
            "data_root": f"s3://{BUCKET}",
            "device": "cpu",
            "encoders": {"new": {"export": "encoders/new.pt2", "dim": NEW_DIM, "preprocess": PREPROCESS}},
            "gallery": {
                "manifest": "manifests/gallery.parquet",
                "columns": {"id": "id", "uri": "uri", "etag": "etag", "old_embedding": "old", "label": "digit"},
            },
            "pairs": {
                "manifest": "manifests/training.parquet",
                "columns": {"id": "id", "old_embedding": "old", "new_embedding": "new"},
            },
            "fit": {
                "transformation": "fastfill",
                "loss": "alignment+uncertainty",
                "inner_width": 32,
                "epochs": 2,
                "batch_size": 64,
            },
            "plan": {"waves": [1 / WAVES] * WAVES, "unit_images": UNIT_IMAGES},
            "backfill": {"batch_size": 5, "min_actors": 1, "max_actors": 2},
            "index": {"factory": "Flat", "shards": 2},
            "evaluate": {"max_images": 1},
            "storage": {"endpoint_url": self.proxy.endpoint, "max_pause_seconds": 1.0, "read_timeout_seconds": 10},
        }

    def prepare(self, name: str, like: str) -> Run:
        """A run that has everything but its backfill, copied from one that has been finished."""
        source, run = self.run(like), self.run(name)
        for uri in objects.list_files(source.uri):
            inside = uri.removeprefix(source.uri)
            if not inside.startswith(("/index/", "/embedded/", "/rejects/", "/reports/", "/probe/")):
                objects.put(run.uri + inside, objects.read_bytes(uri))
        return run

    def published(self, name: str) -> dict[int, dict[str, object]]:
        """Each commit's content, by number."""
        run = self.run(name)
        return {number: commits.read_commit(run, number).content() for number in tags.list_commits(run)}

    def audit(self, name: str) -> dict[str, Any]:
        words = [sys.executable, "-m", "jobs.upkeep.audit", "--json", "--config", str(self.config)]
        words += ["--set", f"run={self.run(name).uri}"]
        done = subprocess.run(words, cwd=ROOT, env=self.environment(), capture_output=True, text=True, check=False)
        found: dict[str, Any] = json.loads(done.stdout)
        return found


def wait_for(proxy: FaultyProxy, method: str, path: str, driver: subprocess.Popen[str]) -> None:
    """Return when the driver has had such a request answered."""
    seen = threading.Event()

    def note(_: str) -> bool:
        seen.set()
        return True

    proxy.watch(note, method, path, after=True)
    if not seen.wait(120):
        driver.kill()
        raise AssertionError(f"it never came to {method} {path}:\n{driver.communicate()[0]}")


def image_reads(log: list[tuple[str, str, int]]) -> Counter[str]:
    """How often each image was asked for and given, from the proxy's log."""
    return Counter(
        path.partition("?")[0].rpartition("/")[2]
        for method, path, status in log
        if method == "GET" and "/images/" in path and status in (200, 206)
    )


def processes(title: str) -> list[int]:
    """The Ray processes of this machine whose title holds these words; Ray sets it to what they run."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                name = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue  # it has just ended
            if name.startswith("ray::") and title in name:
                found.append(int(folder.name))
    return found


def kill(pids: list[int]) -> int:
    """SIGKILL each of them; how many there were."""
    count = 0
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
            count += 1
        except ProcessLookupError:
            continue
    return count


@contextmanager
def ray_nodes(environment: dict[str, str], gpus: int = 0) -> Iterator[Any]:
    """A Ray cluster of separate processes: a head without CPUs, which takes jobs, and two workers.

    Args:
        gpus: of each worker; a word that decides where an actor goes, and nothing else.
    """
    from ray.cluster_utils import Cluster

    before = dict(os.environ)
    os.environ.update(environment | {"RAY_AUTH_MODE": "disabled"})
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # `python` of a job is this one
    dashboard_port, agent_port = free_ports(2)
    dashboard = {"include_dashboard": True, "dashboard_port": dashboard_port, "dashboard_agent_listen_port": agent_port}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **dashboard})
    try:
        for _ in range(2):
            add_worker(cluster, gpus)
        yield cluster
    finally:
        cluster.shutdown()
        os.environ.clear()
        os.environ.update(before)


def add_worker(cluster: Any, gpus: int = 0) -> Any:
    """One more worker node, with a folder of its own: of a shared one, each unpacks a job's code over the others'."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # the path of a socket must be short
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return cluster.add_node(num_cpus=NODE_CPUS, num_gpus=gpus, object_store_memory=100 * 2**20, temp_dir=folder)


def _vectors(values: np.ndarray[Any, Any]) -> pa.FixedSizeListArray:
    flat = np.ascontiguousarray(values, dtype=np.float32)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), flat.shape[1])


def created_commits(log: list[tuple[str, str, int]], name: str) -> Counter[str]:
    """How often the store said that it created each commit."""
    commit = re.compile(rf"/{name}/index/commits/(\d+)\.json")
    return Counter(
        found[1] for method, path, status in log if method == "PUT" and status == 200 and (found := commit.search(path))
    )
