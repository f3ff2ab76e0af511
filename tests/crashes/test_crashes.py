"""A driver that dies at any moment: the next one ends with the same commits and bytes, and does nothing twice."""

from __future__ import annotations

from tests.crashes import cases
from tests.crashes.conftest import World


def test_backfill_killed_before_or_after_any_storage_call_ends_with_the_same_bytes(world: World) -> None:
    """A crash leaves what is on the disk, so each state of the disk is a crash; temporary files are cut in half."""
    states = world.folder("states")
    (count,) = world.run(cases.record, [(world.home, states)])
    assert count > 100
    wrong = world.run(cases.go_on, [(world.home, states / str(number), world.expected) for number in range(count)])
    assert {number: found for number, found in enumerate(wrong) if found} == {}


def test_backfill_whose_process_ends_at_an_operation_ends_with_the_same_bytes(world: World) -> None:
    """Real deaths, of which there are few here: that the states above are what they leave."""
    (kinds,) = world.run(cases.operations, [(world.home, world.folder("counted"))])
    changes = sum(count for kind, count in kinds.items() if not kind.startswith("open "))
    assert changes > 200
    runs = {number: world.folder(f"dead-{number}") for number in range(changes // 16, changes, changes // 8)}
    ends = world.run(cases.die, [(world.home, run, number) for number, run in runs.items()])
    assert ends == ["died with status 9"] * len(runs)
    wrong = world.run(cases.go_on, [(world.home, run, world.expected) for run in runs.values()])
    assert {number: found for number, found in zip(runs, wrong, strict=True) if found} == {}


def test_backfill_killed_before_or_after_any_write_to_an_object_store_ends_with_the_same_bytes(world: World) -> None:
    writes = world.folder("writes")
    (count,) = world.run(cases.record_writes, [(world.home, writes)])
    assert count > 60
    numbers = range(0, count + 1, 3)
    wrong = world.run(cases.go_on_in_memory, [(world.home, writes, number, world.expected) for number in numbers])
    assert {number: found for number, found in zip(numbers, wrong, strict=True) if found} == {}


def test_backfill_over_an_object_store_that_loses_the_answer_of_each_write_ends_with_the_same_bytes(
    world: World,
) -> None:
    assert world.run(cases.lose_answers, [(world.home, world.expected)]) == [[]]
