"""Fixtures that every test may use; nothing here needs the network or `../shared/data`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray for the whole session; four logical CPUs, so that placement has room on two cores."""
    import ray

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=512 * 2**20)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def cifar100() -> Path:
    """The folder of real data, where it is there."""
    folder = SHARED_DATA / "cifar100"
    if not folder.is_dir():
        pytest.skip(f"needs the CIFAR-100 data and encoders in {folder}")
    return folder
