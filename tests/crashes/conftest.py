"""One home and one undisturbed run for all crash tests."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.crashes import cases
from tests.crashes.forks import Run, servers
from tests.crashes.outcome import Outcome

MEMORY = Path("/dev/shm")  # a disk that is synced in no time: what is written is what counts here


@dataclass(frozen=True)
class World:
    """Where the crash tests work.

    Attributes:
        home: images, manifests, the config, and the run before its first driver.
        run: runs cases in processes of their own.
        expected: what an undisturbed run comes to.
    """

    home: Path
    run: Run
    expected: Outcome

    def folder(self, name: str) -> Path:
        """A place for a run, of which there is nothing yet."""
        return self.home.parent / name


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """Shared by all: a case works in a folder of its own."""
    home = Path(tempfile.mkdtemp(prefix="crashes-", dir=MEMORY if MEMORY.is_dir() else None)) / "home"
    try:
        with servers() as run:
            yield World(home, run, run(cases.make, [(home,)])[0])
    finally:
        shutil.rmtree(home.parent)
