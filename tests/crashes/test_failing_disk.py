"""A disk that is full, or damaged, at any one operation: one error in plain words, and the next driver ends well."""

from __future__ import annotations

import errno
from collections import Counter

import pytest

from tests.crashes import cases
from tests.crashes.conftest import World

Failure = tuple[str, int, int]  # the kind of an operation, which of them, the error


def try_each(world: World, name: str, failures: list[Failure]) -> None:
    """A run for each failure, and then a driver that goes on from it."""
    runs = [world.folder(f"{name}-{number}") for number in range(len(failures))]
    ends = world.run(cases.fail, [(world.home, run, *item) for run, item in zip(runs, failures, strict=True)])
    assert [end for end in ends if end != "completed" and not end.startswith("refused: ")] == []
    assert sum(end != "completed" for end in ends) > 0.8 * len(ends)
    wrong = world.run(cases.go_on, [(world.home, run, world.expected) for run in runs])
    found = {failure: lines for failure, lines in zip(failures, wrong, strict=True) if lines}
    assert found == {}


@pytest.fixture(scope="module")
def kinds(world: World) -> Counter[str]:
    """How many operations of each kind a run does."""
    (found,) = world.run(cases.operations, [(world.home, world.folder("operations"))])
    return Counter(found)


CREATES = ("create", "os.link", "os.rename")


def code(kind: str) -> int:
    """A full disk takes no new file, folder or name; everything else fails as a damaged disk does."""
    return errno.ENOSPC if kind.startswith((*CREATES, "os.mkdir")) else errno.EIO


def test_backfill_with_an_error_at_one_operation_of_each_kind_is_refused_and_resumed_to_the_same_bytes(
    world: World, kinds: Counter[str]
) -> None:
    """Of the kinds that create, publish or read a file; folders and removals come with the slow test."""
    of_files = [kind for kind in kinds if kind.startswith(CREATES) or (kind.startswith("open ") and "." in kind)]
    which = [(kind, 1 + number % kinds[kind], code(kind)) for number, kind in enumerate(of_files)]
    try_each(world, "kind", which)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_backfill_with_an_error_at_any_operation_is_refused_and_resumed_to_the_same_bytes(
    world: World, kinds: Counter[str]
) -> None:
    each = [(kind, number) for kind, count in kinds.items() for number in range(1, count + 1)]
    try_each(world, "each", [(*item, error) for item in each for error in {code(item[0]), errno.EIO}])
