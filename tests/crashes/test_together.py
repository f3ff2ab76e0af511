"""Three drivers beside gc and a reader, in orders of their storage calls that seeds choose."""

from __future__ import annotations

import pytest

from tests.crashes import together
from tests.crashes.conftest import World


def try_seeds(world: World, seeds: range) -> None:
    """A run for each seed."""
    cases = [(world.home, world.folder(f"together-{seed}"), seed, world.expected) for seed in seeds]
    found = world.run(together.all_at_once, cases)
    assert {seed: wrong for seed, (wrong, _, _) in zip(seeds, found, strict=True) if wrong} == {}
    assert len({commit for _, seen, _ in found for commit in seen}) > 1, "the reader should have met the drivers"
    assert sum(removed for _, _, removed in found) > 0, "gc should have had something to do"


def test_backfill_by_three_drivers_beside_gc_and_a_reader_ends_as_by_one(world: World) -> None:
    try_seeds(world, range(12))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_backfill_by_three_drivers_beside_gc_and_a_reader_ends_as_by_one_in_many_orders(world: World) -> None:
    try_seeds(world, range(12, 200))
