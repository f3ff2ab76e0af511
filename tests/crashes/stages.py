"""Ray's tasks and actors in this process, one after the other: a driver then takes a tenth of a second.

A fake of the few functions of Ray that our stages call, not a patch of our own code: the driver, the stages and the
order in which they are chained are the real ones. Ray starts in seconds and cannot be forked; crash tests need
hundreds of drivers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

Block = Any  # a batch as Ray gives it to a stage: numpy columns or an Arrow table


class _Stored:
    """What `ray.put` gives."""

    def __init__(self, value: object) -> None:
        self.value = value


class _Task:
    """What `remote` gives: the task runs as soon as its result is asked for, and once."""

    def __init__(self, function: Callable[..., object], arguments: tuple[object, ...]) -> None:
        self._call, self._done, self._value = (function, arguments), False, None

    def result(self) -> object:
        if not self._done:
            function, arguments = self._call
            self._value, self._done = function(*map(_value, arguments)), True
        return self._value


class Blocks:
    """`ray.data.range` with stages after it; block n passes all of them before block n + 1 starts."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._stages: list[Callable[[], Callable[[Block], Block]]] = []

    def map_batches(self, stage: Any, *, fn_constructor_args: tuple[object, ...] = (), **_: object) -> Blocks:
        """Add a function, or a class that is made when the first block comes."""
        self._stages.append(lambda: stage(*fn_constructor_args) if isinstance(stage, type) else stage)
        return self

    map_batches_internal = map_batches

    def iter_batches(self, **_: object) -> Iterator[Block]:
        """The blocks that come out of the last stage."""
        stages = [make() for make in self._stages]
        for number in range(self._count):
            block: Block = {"id": np.array([number])}
            for stage in stages:
                block = stage(block)
            yield block

    def take_all(self) -> list[dict[str, object]]:
        """The rows of all blocks."""
        return [row for block in self.iter_batches() for row in pa.table(block).to_pylist()]


def install() -> None:
    """From now on this process runs stages itself; for a process that is used for nothing else."""
    ray.remote = _remote
    ray.put = _Stored
    ray.get = lambda asked: [_value(item) for item in asked] if isinstance(asked, list) else _value(asked)
    ray.wait = lambda waiting: (waiting[:1], waiting[1:])
    ray.cluster_resources = lambda: {"CPU": 4.0}
    ray.data.range = lambda count, override_num_blocks: Blocks(count)


def _remote(*function: Callable[..., object], **_: object) -> Any:
    """Ray's own modules say `@ray.remote`, ours `ray.remote(num_cpus=...)(function)`."""
    if not function:
        return _remote
    return SimpleNamespace(remote=lambda *arguments: _Task(function[0], arguments))


def _value(item: object) -> object:
    if isinstance(item, _Task):
        return item.result()
    return item.value if isinstance(item, _Stored) else item
