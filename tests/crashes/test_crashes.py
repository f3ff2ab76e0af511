"""A driver that dies at any moment: the next one ends with the same commits and bytes, and does nothing twice."""

from __future__ import annotations

import pytest

from tests.crashes import cases
from tests.crashes.conftest import World


def test_backfill_killed_before_or_after_any_storage_call_ends_with_the_same_bytes(world: World) -> None:
    """The state of the disk is all that a crash leaves, so each different state is one crash; with torn files."""
    states = world.home.parent / "states"
    (count,) = world.run(cases.record, [(world.home, states)])
    assert count > 100
    wrong = world.run(cases.go_on, [(world.home, states / str(number), world.expected) for number in range(count)])
    assert {number: found for number, found in enumerate(wrong) if found} == {}
