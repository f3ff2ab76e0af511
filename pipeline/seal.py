"""Seal a wave: its vectors, from the plan or from the vector log, become one segment per shard.

Guarantee: a segment is a function of the plan and the log alone, so it can be sealed again anywhere,
by anyone, to the same bytes. Images that were rejected keep their transformed vectors. The functions
here run as Ray tasks; they give back references, never vectors.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import ray
import ray.exceptions

from pipeline import plan as plans
from pipeline import storage, vector_log
from pipeline.codebook import Codebook, set_threads
from pipeline.errors import DataError, TransientError
from pipeline.index import write_segment
from pipeline.plan import Plan
from pipeline.run import Run
from pipeline.schema import Int64, Unit, vectors_from_arrow
from pipeline.segments import Rows
from pipeline.snapshot import SegmentRef

logger = logging.getLogger(__name__)

T = TypeVar("T")
_TASK_CPUS = 0.25
_RETRIES = 20  # of a task whose worker or node dies: sealing again gives the same bytes
_MAX_PAUSE_SECONDS = 10.0
_BYTES_AT_ONCE = 2**27  # of vectors that one task reads: shards of a wave together, as far as they are small
_KILLED = (  # what Ray says then, or where what the task gave back died with its node
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,
)


@dataclass(frozen=True, slots=True)
class Sealer:
    """What a sealing task needs to know."""

    run: Run
    plan: Plan
    codebook_path: str
    codebook_sha256: str

    def transformed(self, waves: list[int]) -> list[SegmentRef]:
        """Seal waves as they are before any image is embedded; one task per wave.

        Raises:
            TransientError: the tasks of a wave are killed every time.
        """
        tasks = [(f"wave {wave}", (self, wave)) for wave in waves]
        return [ref for refs in _run(_seal_transformed, tasks) for ref in refs]

    def embedded(self, wave: int) -> list[SegmentRef]:
        """Seal a wave whose units are all in the log; one task per shard.

        Raises:
            DataError: an image of the wave is neither in the log nor rejected.
            TransientError: the task of a shard is killed every time.
        """
        shards = range(self.plan.num_shards)
        return _run(_seal_embedded, [(f"wave {wave}, shard {shard}", (self, wave, shard)) for shard in shards])

    def codebook(self) -> Codebook:
        """The run's frozen codebook, for a task that has one thread."""
        set_threads(1)
        return Codebook.open(self.run, self.codebook_path, self.codebook_sha256)


def _run(function: Callable[..., T], tasks: Sequence[tuple[str, tuple[object, ...]]]) -> list[T]:
    """What the function gives for the arguments of each task, in order.

    Ray is not asked to repeat a task: it repeats one that runs out of memory for ever, whatever number it is given.
    """
    task = ray.remote(num_cpus=_TASK_CPUS, max_retries=0)(function)
    found: dict[int, T] = {}
    for attempt in range(_RETRIES + 1):
        running = {number: task.remote(*tasks[number][1]) for number in range(len(tasks)) if number not in found}
        killed: dict[int, Exception] = {}
        for number, reference in running.items():
            try:
                found[number] = ray.get(reference)
            except _KILLED as error:
                killed[number] = error
        if not killed:
            break
        where, reason = next((tasks[number][0], reason) for number, reason in killed.items())
        if attempt == _RETRIES:
            raise _killed(where, reason) from reason
        logger.warning("sealing %s was killed, and is repeated: %s", where, type(reason).__name__)
        time.sleep(min(_MAX_PAUSE_SECONDS, 0.5 * 2**attempt))
    return [found[number] for number in range(len(tasks))]


def _killed(where: str, error: Exception) -> TransientError:
    return TransientError(
        "the task that seals a segment is killed every time",
        expected="a segment",
        found=f"{_RETRIES + 1} attempts, the last of which ended with {type(error).__name__}: {error}",
        where=where,
        remedy="give the nodes more memory, or see in Ray's logs (`ray logs`) why the worker dies; then run the same "
        "command again: it goes on from this wave. A shard that does not fit needs a new run with more index.shards",
    )


def _seal_transformed(sealer: Sealer, wave: int) -> list[SegmentRef]:
    codebook = sealer.codebook()
    plan, shards = sealer.plan, range(sealer.plan.num_shards)
    wave_bytes = plan.waves[wave - 1].images * plan.dim * 4
    step = max(1, len(shards) * _BYTES_AT_ONCE // wave_bytes)
    some = (shards[first : first + step] for first in range(0, len(shards), step))
    return [
        write_segment(sealer.run, codebook, rows, shard, wave, "transformed")
        for together in some
        for shard, rows in zip(together, _transformed(sealer, wave, together), strict=True)
    ]


def _seal_embedded(sealer: Sealer, wave: int, shard: int) -> SegmentRef:
    (rows,) = _transformed(sealer, wave, range(shard, shard + 1))
    log = sealer.plan.log(sealer.run)
    embedded_ids, embedded_vectors = vector_log.read_shard(log, wave, shard)
    is_embedded = np.isin(rows.ids, embedded_ids)
    rejected = vector_log.read_rejects(log, wave)["id"].to_numpy()
    lost = rows.ids[~is_embedded & ~np.isin(rows.ids, rejected)]
    others = len(embedded_ids) - int(is_embedded.sum())
    if len(lost) or others:
        raise DataError(
            "the vector log does not hold exactly this wave",
            expected=f"{len(rows.ids)} images, each embedded once or rejected",
            found=f"{len(lost)} neither{_units_of(sealer, wave, lost)}, {others} of other waves or twice",
            where=f"{log.parts_uri}, wave {wave}, shard {shard}",
            remedy="`fastfill audit` names the files that are damaged; move the part of the unit that does not "
            "fit out of the run, and run the same command again: the unit is embedded again",
        )
    vectors = rows.vectors.copy()
    vectors[is_embedded] = embedded_vectors  # both sides are sorted by id
    kinds = np.where(is_embedded, "embedded", "transformed")
    sealed = replace(rows, vectors=vectors, kinds=kinds)
    if sealer.plan.deleted_images == "keep":
        return write_segment(sealer.run, sealer.codebook(), sealed, shard, wave, "embedded")
    kept = ~np.isin(rows.ids, vector_log.read_deleted(log, wave))
    ref = write_segment(sealer.run, sealer.codebook(), sealed.take(kept), shard, wave, "embedded")
    return replace(ref, deleted=int((~kept).sum()))


def _units_of(sealer: Sealer, wave: int, ids: Int64) -> str:
    """Which units some images belong to, in words."""
    units = [unit for unit in sealer.plan.units(sealer.run) if len(ids) and unit.wave == wave]
    found = [unit for unit in units if np.isin(_ids_of(unit), ids).any()]
    return f" (of unit {', '.join(str(unit.unit) for unit in found[:5])})" if found else ""


def _ids_of(unit: Unit) -> Int64:
    ids: Int64 = storage.read_parquet(unit.rows_uri, ["id"], [unit.row_group])["id"].to_numpy()
    return ids


def _transformed(sealer: Sealer, wave: int, shards: range) -> Iterator[Rows]:
    """The rows of each of some shards of a wave as the plan has them, sorted by id; every part is opened once."""
    columns = ["id", "shard", "uncertainty", "group", "vector"]
    table = plans.read_transformed(sealer.run, sealer.plan, wave, columns, shards).sort_by("id")
    shard_of_row = table["shard"].to_numpy()
    rows = Rows(
        ids=table["id"].to_numpy(),
        vectors=vectors_from_arrow(table["vector"]),
        kinds=np.full(table.num_rows, "transformed"),
        uncertainties=table["uncertainty"].to_numpy(),
        groups=table["group"],
    )
    return (rows.take(shard_of_row == shard) for shard in shards)
