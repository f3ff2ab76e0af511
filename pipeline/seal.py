"""Seal a wave: its vectors, from the plan or from the vector log, become one segment per shard.

Guarantee: a segment is a function of the plan and the log alone, so it can be sealed again anywhere,
by anyone, to the same bytes. Images that were rejected keep their transformed vectors. The functions
here run as Ray tasks; they give back references, never vectors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import ray

from pipeline import plan as plans
from pipeline import vector_log
from pipeline.codebook import Codebook, set_threads
from pipeline.errors import DataError
from pipeline.index import write_segment
from pipeline.plan import Plan
from pipeline.run import Run
from pipeline.schema import vectors_from_arrow
from pipeline.segments import Rows
from pipeline.snapshot import SegmentRef

_TASK_CPUS = 0.25
_FOREVER = -1  # retries where its worker or node dies: sealing again gives the same bytes


@dataclass(frozen=True, slots=True)
class Sealer:
    """What a sealing task needs to know."""

    run: Run
    plan: Plan
    codebook_path: str
    codebook_sha256: str

    def transformed(self, waves: list[int]) -> list[SegmentRef]:
        """Seal waves as they are before any image is embedded; one task per wave."""
        task = ray.remote(num_cpus=_TASK_CPUS, max_retries=_FOREVER)(_seal_transformed)
        return [ref for refs in ray.get([task.remote(self, wave) for wave in waves]) for ref in refs]

    def embedded(self, wave: int) -> list[SegmentRef]:
        """Seal a wave whose units are all in the log; one task per shard.

        Raises:
            DataError: an image of the wave is neither in the log nor rejected.
        """
        task = ray.remote(num_cpus=_TASK_CPUS, max_retries=_FOREVER)(_seal_embedded)
        return ray.get([task.remote(self, wave, shard) for shard in range(self.plan.num_shards)])

    def codebook(self) -> Codebook:
        """The run's frozen codebook, for a task that has one thread."""
        set_threads(1)
        return Codebook.open(self.run, self.codebook_path, self.codebook_sha256)


def _seal_transformed(sealer: Sealer, wave: int) -> list[SegmentRef]:
    codebook = sealer.codebook()
    refs = []
    for shard in range(sealer.plan.num_shards):
        rows = _transformed(sealer, wave, shard)
        refs.append(write_segment(sealer.run, codebook, rows, shard, wave, "transformed"))
    return refs


def _seal_embedded(sealer: Sealer, wave: int, shard: int) -> SegmentRef:
    rows = _transformed(sealer, wave, shard)
    log = sealer.plan.log(sealer.run)
    embedded_ids, embedded_vectors = vector_log.read_shard(log, wave, shard)
    is_embedded = np.isin(rows.ids, embedded_ids)
    rejected = vector_log.read_rejects(log, wave)["id"].to_numpy()
    lost = rows.ids[~is_embedded & ~np.isin(rows.ids, rejected)]
    if len(lost) or is_embedded.sum() != len(embedded_ids):
        raise DataError(
            "the vector log does not hold exactly this wave",
            expected=f"{len(rows.ids)} images, each embedded once or rejected",
            found=f"{len(lost)} neither, {len(embedded_ids) - int(is_embedded.sum())} of other waves or twice",
            where=f"{log.parts_uri}, wave {wave}, shard {shard}",
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


def _transformed(sealer: Sealer, wave: int, shard: int) -> Rows:
    """The rows of a (shard, wave) as the plan has them, sorted by id."""
    columns = ["id", "uncertainty", "group", "vector"]
    rows = plans.read_transformed(sealer.run, sealer.plan, wave, columns, shard).sort_by("id")
    return Rows(
        ids=rows["id"].to_numpy(),
        vectors=vectors_from_arrow(rows["vector"]),
        kinds=np.full(rows.num_rows, "transformed"),
        uncertainties=rows["uncertainty"].to_numpy(),
        groups=rows["group"],
    )
