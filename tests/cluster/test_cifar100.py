"""The CIFAR-100 backfill as a job of a cluster, from images to the report: the bytes that this machine makes alone.

The head takes jobs and has no CPUs; each of the two workers has one GPU that is none, so that each has one embedding
actor. Few pairs and epochs: how well the transformation fits does not matter here, both runs fit it alike.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline import snapshot, storage
from pipeline.audit import audit
from pipeline.run import Run
from tests.cluster.jobs import STOP_SECONDS, Jobs
from tests.faults.scene import ROOT, ray_nodes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CONFIG = Path("jobs/configs/cifar100.yaml")  # of the working folder that is sent along
PAIRS, WAVES = 4000, 8
ON_GPUS = ("backfill.gpus_per_actor=1", "backfill.min_actors=2", "backfill.max_actors=2")
DATA = (".parquet", ".faiss", ".safetensors")  # files without a time, an attempt or a place in them


@pytest.fixture(scope="module")
def settings(cifar100: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """What differs from the shipped config, but the run."""
    pairs = tmp_path_factory.mktemp("pairs") / "train.parquet"
    pq.write_table(pq.read_table(cifar100 / "train.parquet").slice(0, PAIRS), pairs)
    few = ("fit.epochs=5", f"plan.waves={WAVES}", "evaluate.max_images=1")
    return (f"data_root={cifar100}", f"pairs.manifest={pairs}", "device=cpu", *few)


@pytest.fixture(scope="module")
def local(settings: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of this machine alone."""
    run = Run(str(tmp_path_factory.mktemp("local") / "run"))
    words = [word for setting in (f"run={run.uri}", *settings) for word in ("--set", setting)]
    command = [sys.executable, "-m", "jobs.backfill", "--config", str(CONFIG), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(scope="module")
def gpu_cluster(local: Run) -> Iterator[Any]:
    """Not up while the local run is made: two cores are few."""
    with ray_nodes({}, gpus=1) as cluster:
        yield cluster


def test_a_submitted_cifar100_backfill_that_was_stopped_once_gives_the_bytes_of_a_local_run(
    local: Run, settings: tuple[str, ...], gpu_cluster: Any, tmp_path: Path
) -> None:
    jobs, run = Jobs(f"http://{gpu_cluster.head_node.webui_url}", dict(os.environ)), Run(str(tmp_path / "run"))
    submitted = (f"run={run.uri}", *settings, *ON_GPUS)
    jobs.submit("cifar100-1", CONFIG, *submitted)
    wait_for_pairs(run, jobs, "cifar100-1")
    jobs.job("stop", "cifar100-1")
    assert jobs.wait("cifar100-1", STOP_SECONDS) == "stopped"
    assert "what is durable is kept" in jobs.job("logs", "cifar100-1")
    assert not storage.exists(run.plan), "it was stopped too late to leave anything to do"

    jobs.submit("cifar100-2", CONFIG, *submitted)
    assert jobs.wait("cifar100-2", 400) == "succeeded", jobs.job("logs", "cifar100-2")
    assert f"wave {WAVES} of {WAVES} published" in jobs.job("logs", "cifar100-2")
    assert set(jobs.nodes_of_actors("EmbedStage").values()) == {node.node_id for node in gpu_cluster.worker_nodes}

    assert content(run) == content(local)
    assert snapshot.list_commits(run) == snapshot.list_commits(local) == list(range(WAVES + 1))
    for number in snapshot.list_commits(run):
        assert snapshot.read_commit(run, number).content() == snapshot.read_commit(local, number).content()
    report = audit(run.uri)
    assert report.ok, report.problems


def wait_for_pairs(run: Run, jobs: Jobs, job: str) -> None:
    """Return when the first embeddings of the pairs are durable."""
    deadline = time.monotonic() + 180
    while not storage.list_files(run.path("pairs", "old")):
        assert jobs.status(job) in ("PENDING", "RUNNING"), jobs.job("logs", job)
        assert time.monotonic() < deadline, jobs.job("logs", job)


def content(run: Run) -> dict[str, str]:
    """The sha256 of every file of data, by its place in the run."""
    files = [uri for uri in storage.list_files(run.uri) if uri.endswith(DATA)]
    return {uri.removeprefix(run.uri): storage.sha256(uri) for uri in files}
