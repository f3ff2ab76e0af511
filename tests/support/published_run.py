"""A run with published commits and moved tags, copied for each test, for tests of what comes after publishing."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from pipeline.index import tags
from pipeline.run import Run
from pipeline.storage import objects
from tests.support.interleave import CHANGES
from tests.support.whole_run import WholeRun

WAVES, LAST = 5, 4


def published_run(tmp_path: Path) -> WholeRun:
    """Waves 1 to 4 of 5 are published; prod serves commit 4 and served 1 before."""
    return template().copy_to(tmp_path / "run")


@cache
def template() -> WholeRun:
    whole = WholeRun(Run(tempfile.mkdtemp()), num=100, num_waves=WAVES).write_inputs()
    whole.publish(LAST)
    tags.promote(whole.run, 1, blockers=[])
    tags.promote(whole.run, LAST, blockers=[])
    atexit.register(shutil.rmtree, whole.run.uri)
    return whole


def upload(whole: WholeRun, uri: str) -> WholeRun:
    """The same run in an object store."""
    other = whole.copy_to(Path(tempfile.mkdtemp(dir=whole.run.uri)))  # for its references
    other.run = Run(uri)
    for path in objects.list_files(whole.run.uri):
        objects.put(uri + path.removeprefix(whole.run.uri), objects.read_bytes(path))
    return other


class Crash(BaseException):
    """The process is gone; nothing may catch it."""


@contextmanager
def dying(patch: pytest.MonkeyPatch, survived: int) -> Iterator[None]:
    """The process ends in its first change of storage after `survived` ones; a deletion is half done then."""
    left = [survived]

    def dies(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            if left[0] == 0:
                if name == "delete_files":
                    uris = arguments[0]
                    assert isinstance(uris, list)
                    real(uris[: len(uris) // 2])
                raise Crash
            left[0] -= 1
            return real(*arguments)

        return call

    with patch.context() as context:
        for name in CHANGES:
            context.setattr(objects, name, dies(name, getattr(objects, name)))
        yield
