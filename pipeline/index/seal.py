"""Seal a wave: its vectors, from the plan or the vector log, become segments, one per shard and kind.

A segment is a function of the plan, the log and the codebook, so it can be sealed again anywhere: to the same bytes on
equal processors, else to vectors equal within rounding (`equality`). Rejected images keep their transformed vectors,
in a transformed segment. Sealing runs as Ray tasks, which return references, never vectors.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import ray
import ray.exceptions
from numpy.typing import NDArray

from pipeline.arrays import Int64, vectors_from_arrow
from pipeline.embedding import vector_log
from pipeline.embedding.vector_log import VectorLog
from pipeline.errors import DataError, TransientError
from pipeline.index.codebook import Codebook, set_threads
from pipeline.index.segment import write_segment
from pipeline.index.segment_files import Rows, SegmentKind, SegmentRef
from pipeline.planning import plan as plans
from pipeline.planning.plan import Plan
from pipeline.run import Run
from pipeline.schema import Unit
from pipeline.storage import parquet

logger = logging.getLogger(__name__)

T = TypeVar("T")
_TASK_CPUS = 0.25
_RETRIES = 20  # of a task whose worker or node dies: sealing again is harmless
_MAX_PAUSE_SECONDS = 10.0
_BYTES_AT_ONCE = 2**27  # of vectors that one task seals: several small shards of a wave together
_KILLED = (  # Ray's errors if a worker or node dies, or the node that held the result
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,
)


@dataclass(frozen=True, slots=True)
class Sealer:
    """The arguments of a sealing task."""

    run: Run
    plan: Plan
    codebook_path: str
    codebook_sha256: str

    def transformed(self, waves: list[int]) -> list[SegmentRef]:
        """Seal waves before any of their images is embedded; sorted by wave and shard.

        Raises:
            TransientError: a task is killed every time.
        """
        return [ref for refs in _run(_seal_transformed, self._tasks(waves)) for ref in refs]

    def embedded(self, wave: int, acknowledged: dict[int, str] | None = None) -> tuple[list[SegmentRef], str]:
        """Seal a wave whose units are all in the log; `acknowledged` has the parts' digests, if this driver has them.

        Returns:
            an embedded segment per shard, and a transformed one if images were rejected, sorted by shard; and the
            digest of the wave's parts, empty if parts of older versions have none.

        Raises:
            DataError: an image of the wave is neither in the log nor rejected, or a part is not the acknowledged one.
            TransientError: a task is killed every time.
        """
        first, *others = self._tasks([wave])  # one task checks: all have to find the same parts
        tasks = [(first[0], (*first[1], acknowledged)), *others]
        found = _run(_seal_embedded, tasks)
        digests = sorted({digest for _, digest in found})
        if len(digests) > 1:
            raise DataError(
                "the vector log changed while a wave was sealed",
                expected="the same parts for all shards",
                found=f"digests {', '.join(digests)}",
                where=f"{self.plan.log(self.run).parts_uri}, wave {wave}",
                remedy="make sure that nothing else writes to the run, then repeat this command",
            )
        refs = [ref for refs, _ in found for ref in refs]
        return sorted(refs, key=lambda ref: (ref.shard, ref.kind)), digests[0]

    def _tasks(self, waves: list[int]) -> list[tuple[str, tuple[object, ...]]]:
        """One task per shard of each wave, or per several small shards."""
        return [
            (f"wave {wave}, {_text(shards)}", (self, wave, shards)) for wave in waves for shards in self.together(wave)
        ]

    def together(self, wave: int) -> list[range]:
        """The shards of a wave that one task seals together, so that it opens each part once."""
        num_shards = self.plan.num_shards
        wave_bytes = self.plan.wave(wave).images * self.plan.dim * 4
        step = max(1, num_shards * _BYTES_AT_ONCE // wave_bytes)
        return [range(first, min(first + step, num_shards)) for first in range(0, num_shards, step)]

    def codebook(self) -> Codebook:
        """The run's codebook, for a task with one thread."""
        set_threads(1)
        return Codebook.open(self.run, self.codebook_path, self.codebook_sha256)


def seal_again(sealer: Sealer, ref: SegmentRef) -> SegmentRef:
    """Seal one segment again in this process: to the bytes that its commit names, on equal processors.

    Raises:
        DataError: the plan or the log is damaged.
    """
    shards = range(ref.shard, ref.shard + 1)
    if ref.kind == "transformed" and not ref.rejected:
        return _seal_transformed(sealer, ref.wave, shards)[0]
    mixed = ref.kind == "embedded" and ref.rejected > 0
    found = _seal_embedded(sealer, ref.wave, shards, mixed=mixed)[0]
    again = next((some for some in found if some.kind == ref.kind), None)
    if again is None:
        raise DataError(
            "the vector log has no rejects of this wave, but its commit names some",
            expected=f"{ref.rejected} rejects",
            found=0,
            where=f"{sealer.plan.log(sealer.run).rejects_uri}, wave {ref.wave}, {_text(shards)}",
        )
    return again


def _run(function: Callable[..., T], tasks: Sequence[tuple[str, tuple[object, ...]]]) -> list[T]:
    """The results for the arguments of each task, in order; killed tasks are repeated here.

    Ray's own retries are off: Ray repeats a task that runs out of memory forever, whatever its limit.
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
        f"the task that seals a segment was killed on all {_RETRIES + 1} attempts, probably for lack of memory",
        expected="a segment",
        found=f"the last attempt ended with {type(error).__name__}: {error}",
        where=where,
        remedy="give the nodes more memory, or find the cause in Ray's logs (`ray logs`); then repeat this command: it "
        "continues with this wave. If a shard does not fit into memory, start a new run with more index.shards",
    )


def _text(shards: range) -> str:
    return f"shard {shards[0]}" if len(shards) == 1 else f"shards {shards[0]} to {shards[-1]}"


def _seal_transformed(sealer: Sealer, wave: int, shards: range) -> list[SegmentRef]:
    return _write(sealer, wave, shards, *_planned(sealer, wave, shards), "transformed")


def _seal_embedded(
    sealer: Sealer, wave: int, shards: range, acknowledged: dict[int, str] | None = None, mixed: bool = False
) -> tuple[list[SegmentRef], str]:
    """Seal an embedded wave; `mixed` puts rejects into the embedded segments, as earlier versions did."""
    rows, shard_of_row = _planned(sealer, wave, shards)
    log = sealer.plan.log(sealer.run)
    embedded_ids, embedded_vectors, digests = vector_log.read_parts(log, wave, shards)
    _check_acknowledged(log, wave, digests, acknowledged or {})
    is_embedded = np.isin(rows.ids, embedded_ids)
    rejected = vector_log.read_rejects(log, wave)["id"].to_numpy()
    lost = rows.ids[~is_embedded & ~np.isin(rows.ids, rejected)]
    others = len(embedded_ids) - int(is_embedded.sum())
    if len(lost) or others:
        units = _units_of(sealer, wave, lost)
        move = f"Move the parts of units {units} out of the run and repeat this command: they are embedded again"
        raise DataError(
            f"the stored vectors of wave {wave} differ from the plan: {len(lost)} images are missing, {others} are "
            "extra or double",
            expected=f"{len(rows.ids)} images, each embedded once or rejected",
            found=f"missing images in units {units}" if units else "no missing images",
            where=f"{log.parts_uri}, wave {wave}, {_text(shards)}",
            remedy="`fastfill audit` lists damaged files" + (f". {move}" if units else ""),
        )
    vectors = rows.vectors.copy()
    vectors[is_embedded] = embedded_vectors  # both sides are sorted by id
    kinds = np.where(is_embedded, "embedded", "transformed")
    sealed = replace(rows, vectors=vectors, kinds=kinds)
    whole = vector_log.wave_digest(digests)
    kept = np.ones(len(rows.ids), np.bool_)
    if sealer.plan.deleted_images == "drop":
        kept = ~np.isin(rows.ids, vector_log.read_deleted(log, wave))
    of_wave, left = (kept, kept & False) if mixed else (kept & is_embedded, kept & ~is_embedded)
    refs = _write(sealer, wave, shards, sealed.take(of_wave), shard_of_row[of_wave], "embedded")
    refs = [replace(ref, deleted=int((shard_of_row[~kept] == ref.shard).sum())) for ref in refs]
    of_rejects = [shard for shard in shards if (shard_of_row[left] == shard).any()]
    more = _write(sealer, wave, of_rejects, sealed.take(left), shard_of_row[left], "transformed") if of_rejects else []
    return refs + [replace(ref, rejected=ref.vectors) for ref in more], whole


def _check_acknowledged(log: VectorLog, wave: int, found: dict[int, str], acknowledged: dict[int, str]) -> None:
    for unit, digest in found.items():
        if acknowledged.get(unit, digest) != digest:
            raise DataError(
                "a part of the vector log has changed since it was written",
                expected=f"digest {acknowledged[unit]}",
                found=digest or "a file without digests",
                where=log.part(wave, unit),
                remedy="delete this file, then repeat this command: its unit is embedded again",
            )


def _write(
    sealer: Sealer, wave: int, shards: Iterable[int], rows: Rows, shard_of_row: NDArray[np.int32], kind: SegmentKind
) -> list[SegmentRef]:
    codebook = sealer.codebook()
    each = ((shard, rows.take(shard_of_row == shard)) for shard in shards)
    return [write_segment(sealer.run, codebook, mine, shard, wave, kind) for shard, mine in each]


def _units_of(sealer: Sealer, wave: int, ids: Int64) -> str:
    units = [unit for unit in sealer.plan.units(sealer.run) if len(ids) and unit.wave == wave]
    found = [unit for unit in units if np.isin(_ids_of(unit), ids).any()]
    return ", ".join(str(unit.unit) for unit in found[:5])


def _ids_of(unit: Unit) -> Int64:
    ids: Int64 = parquet.read_parquet(unit.rows_uri, ["id"], [unit.row_group])["id"].to_numpy()
    return ids


def _planned(sealer: Sealer, wave: int, shards: range) -> tuple[Rows, NDArray[np.int32]]:
    """The rows of some shards of a wave from the plan, sorted by id, and the shard of each, (n,)."""
    columns = ["id", "shard", "uncertainty", "group", "vector"]
    table = plans.read_transformed(sealer.run, sealer.plan, wave, columns, shards).sort_by("id")
    rows = Rows(
        ids=table["id"].to_numpy(),
        vectors=vectors_from_arrow(table["vector"]),
        kinds=np.full(table.num_rows, "transformed"),
        uncertainties=table["uncertainty"].to_numpy(),
        groups=table["group"],
    )
    return rows, table["shard"].to_numpy()
