"""The CIFAR-100 backfill as a job of a cluster, from images to the report: the bytes that this machine makes alone.

The head takes jobs and has no CPUs; each of the two workers has one GPU that is none, so that each has one embedding
actor. Both runs fit their transformation themselves.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.index import commits, tags
from pipeline.reporting.audit import audit
from pipeline.run import Run
from pipeline.storage import objects
from tests.cluster.jobs import STOP_SECONDS, Jobs
from tests.faults.scene import ray_nodes
from tests.support.cifar100 import WAVES, pairs_of, settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CONFIG = Path("jobs/configs/cifar100.yaml")  # of the working folder that is sent along
ON_GPUS = ("backfill.gpus_per_actor=1", "backfill.min_actors=2", "backfill.max_actors=2")
DATA = (".parquet", ".faiss", ".safetensors")  # files without a time, an attempt or a place in them


@pytest.fixture(scope="module")
def gpu_cluster(local_cifar100: Run) -> Iterator[Any]:
    """Not up while the local run is made: two cores are few."""
    with ray_nodes({}, gpus=1) as cluster:
        yield cluster


def test_a_submitted_cifar100_backfill_that_was_stopped_once_gives_the_bytes_of_a_local_run(
    local_cifar100: Run, cifar100: Path, gpu_cluster: Any, tmp_path: Path
) -> None:
    jobs, run = Jobs(f"http://{gpu_cluster.head_node.webui_url}", dict(os.environ)), Run(str(tmp_path / "run"))
    submitted = (*settings(run.uri, cifar100, pairs_of(local_cifar100)), *ON_GPUS)
    jobs.submit("cifar100-1", CONFIG, *submitted)
    wait_for_pairs(run, jobs, "cifar100-1")
    jobs.job("stop", "cifar100-1")
    assert jobs.wait("cifar100-1", STOP_SECONDS) == "stopped"
    assert "finished work is kept" in jobs.job("logs", "cifar100-1")
    assert not objects.exists(run.plan), "it was stopped too late to leave anything to do"

    jobs.submit("cifar100-2", CONFIG, *submitted)
    assert jobs.wait("cifar100-2", 400) == "succeeded", jobs.job("logs", "cifar100-2")
    assert f"wave {WAVES} of {WAVES} published" in jobs.job("logs", "cifar100-2")
    assert set(jobs.nodes_of_actors("EmbedStage").values()) == {node.node_id for node in gpu_cluster.worker_nodes}

    assert content(run) == content(local_cifar100)
    assert tags.list_commits(run) == tags.list_commits(local_cifar100) == list(range(WAVES + 1))
    for number in tags.list_commits(run):
        found, expected = (commits.read_commit(item, number) for item in (run, local_cifar100))
        assert found.content() == expected.content()
    report = audit(run.uri)
    assert report.ok, report.problems


def wait_for_pairs(run: Run, jobs: Jobs, job: str) -> None:
    """Return when the first embeddings of the pairs are durable."""
    deadline = time.monotonic() + 180
    while not objects.list_files(run.path("pairs", "old")):
        assert jobs.status(job) in ("PENDING", "RUNNING"), jobs.job("logs", job)
        assert time.monotonic() < deadline, jobs.job("logs", job)


def content(run: Run) -> dict[str, str]:
    """The sha256 of every file of data, by its place in the run."""
    files = [uri for uri in objects.list_files(run.uri) if uri.endswith(DATA)]
    return {uri.removeprefix(run.uri): objects.sha256(uri) for uri in files}
