"""The embedding stream: units in, durable parts out, in one Ray Data execution.

    units -> load (tasks: fetch, decode, preprocess) -> embed (actors) -> write (tasks) -> UnitAck

A unit is acknowledged once its part is durable; acknowledgements come in any order. Batches are cut inside a unit, so
a unit gives the same vectors whatever Ray does. Does not know waves, plans or snapshots: the backfill, the pairs and
missing old embeddings all use it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy

from pipeline.arrays import vectors_from_arrow
from pipeline.config.tree import BackfillSettings, Config, EncoderSettings
from pipeline.embedding import decode, vector_log, worker_metrics
from pipeline.embedding.actor_pool import LOAD_CPUS, WRITE_CPUS, actor_pool
from pipeline.embedding.decode import Limits, LoadedUnit
from pipeline.embedding.reject_rules import count_rejects
from pipeline.embedding.vector_log import EmbeddedUnit, VectorLog
from pipeline.schema import Unit, UnitAck
from pipeline.storage import objects
from pipeline.storage.retry import count_retries
from pipeline.storage.settings import FetchSettings

_UNITS_PER_ACTOR = 4  # queued or in work
_RETRIES = 20  # of a task; a lost machine counts as one retry, so Ray's default of 3 is too few for spot machines


@dataclass(frozen=True, slots=True)
class Work:
    """Units to embed with one encoder into one log."""

    encoder: EncoderSettings
    log: VectorLog
    units: list[Unit]


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """How images are read and embedded, whatever the encoder."""

    backfill: BackfillSettings
    fetch: FetchSettings
    limits: Limits
    device: str

    @classmethod
    def of(cls, config: Config) -> Self:
        """The settings of a run."""
        limits = decode.image_limits(config.backfill, config.data_root, config.allow_outside)
        return cls(config.backfill, config.fetch, limits, config.device)


def embed_stream(work: list[Work], settings: StreamSettings) -> Iterator[tuple[int, UnitAck]]:
    """Embed units roughly in their order, all in one stream.

    Yields:
        the index into `work`, and a unit's acknowledgement once the unit is durable.

    Raises:
        ConfigError, TransientError: the cluster is too small for the smallest actor pool and one task beside it.
    """
    count = sum(len(item.units) for item in work)
    if not count:
        return
    from pipeline.embedding.embedder import EmbedStage  # here: the tasks of this module must not wait for torch

    pool = actor_pool(settings.backfill, settings.device)
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = None  # a block is a unit: never split, never merged
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    targets = [(item.encoder, item.log) for item in work]
    job = _Job(targets, settings.limits, settings.fetch, ray.put(_units_table(work)))
    acks = (
        ray.data.range(count, override_num_blocks=count)
        .map_batches_internal(
            partial(_load, job=job),
            batch_size=None,
            batch_format="numpy",
            num_cpus=LOAD_CPUS,
            max_retries=_RETRIES,
        )
        .map_batches_internal(  # the public one refuses whole blocks on GPUs; ours are cut to size
            EmbedStage,
            fn_constructor_args=([item.encoder for item in work], settings.backfill, settings.device),
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                min_size=pool.smallest,
                initial_size=pool.first,
                max_size=pool.largest,
                max_tasks_in_flight_per_actor=_UNITS_PER_ACTOR,
            ),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus or None,
        )
        .map_batches_internal(
            partial(_write, job=job),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=WRITE_CPUS,
            max_retries=_RETRIES,
        )
    )
    batches: Iterable[pa.Table] = acks.iter_batches(batch_size=None, batch_format="pyarrow")
    for batch in batches:
        for row in batch.to_pylist():
            yield row.pop("work"), UnitAck(**row)


@dataclass(frozen=True, slots=True)
class _Job:
    """What the tasks of a stream need; `units` maps each number to its work and unit."""

    targets: list[tuple[EncoderSettings, VectorLog]]
    limits: Limits
    fetch: FetchSettings
    units: ray.ObjectRef[pa.Table]

    def unit(self, number: int) -> tuple[int, Unit]:
        row = ray.get(self.units).slice(number, 1).to_pylist()[0]
        return row.pop("work"), Unit(**row)


def _load(batch: Any, job: _Job) -> pa.Table:  # Any: Ray's batch of numpy columns
    start, before = time.perf_counter(), objects.counts()
    number = int(batch["id"][0])
    work, unit = job.unit(number)
    loaded = decode.load_unit(unit, job.targets[work][0].preprocess, job.limits, job.fetch)
    count = len(loaded.ids)
    spent = {name: getattr(loaded, name) for name in ("requests", "bytes_fetched", "bytes_needed", "changed")}
    asked, seconds = objects.counts() - before, time.perf_counter() - start
    spent |= {"retry_counts": count_retries(asked), "load_seconds": seconds, "fetch_seconds": loaded.fetch_seconds}
    worker_metrics.observe("load", count, seconds, asked)
    return pa.table(
        {
            "number": np.full(count, number, dtype=np.int64),
            "work": np.full(count, work, dtype=np.int64),
            "id": loaded.ids,
            "etag": pa.array(loaded.etags, pa.string()),
            "stage": pa.array(_texts(loaded, "stage"), pa.string()),
            "reason": pa.array(_texts(loaded, "reason"), pa.string()),
            "load": pa.repeat(pa.scalar(spent), count),  # read again in _write
            **_content(loaded),
        }
    )


def _write(block: Any, job: _Job) -> pa.Table:  # Any: Ray's batch as an Arrow table
    start, before = time.perf_counter(), objects.counts()
    work, unit = job.unit(block["number"][0].as_py())
    embedded = EmbeddedUnit(
        ids=block["id"].to_numpy(),
        vectors=vectors_from_arrow(block["vector"]),
        etags=block["etag"].combine_chunks(),
        reject_stages=block["stage"].combine_chunks(),
        reject_reasons=block["reason"].combine_chunks(),
    )
    part_bytes, rejected, digest = vector_log.write_unit(job.targets[work][1], unit, embedded)
    spent, asked = block["load"][0].as_py(), objects.counts() - before
    retries = [sum(both) for both in zip(spent.pop("retry_counts"), count_retries(asked), strict=True)]
    ack = UnitAck(
        wave=unit.wave,
        unit=unit.unit,
        embedded=len(embedded.ids) - rejected,
        rejected=rejected,
        part_bytes=part_bytes,
        embed_seconds=block["embed_seconds"][0].as_py(),
        write_seconds=time.perf_counter() - start,
        retries=sum(retries),
        actor=block["actor"][0].as_py(),
        retry_counts=retries,
        reject_counts=count_rejects(embedded.reject_stages, embedded.reject_reasons),
        part_digest=digest,
        **spent,
    )
    worker_metrics.observe("write", len(embedded.ids), ack.write_seconds, asked)
    return pa.table({"work": [work]} | {name: [getattr(ack, name)] for name in UnitAck.__slots__})


def _content(loaded: LoadedUnit) -> dict[str, pa.Array]:
    """The column for the embedding actor: `pixels`, or `encoded` images."""
    if loaded.pixels is None:
        return {"encoded": pa.array(loaded.encoded, pa.large_binary())}
    width = int(np.prod(loaded.pixels.shape[1:]))
    return {"pixels": pa.FixedSizeListArray.from_arrays(pa.array(loaded.pixels.reshape(-1)), width)}


def _units_table(work: list[Work]) -> pa.Table:
    units = [unit for item in work for unit in item.units]
    columns = {name: [getattr(unit, name) for unit in units] for name in Unit.__slots__}
    return pa.table({"work": np.repeat(np.arange(len(work)), [len(item.units) for item in work])} | columns)


def _texts(loaded: LoadedUnit, field: str) -> list[str]:
    return [getattr(loaded.rejects[row], field) if row in loaded.rejects else "" for row in range(len(loaded.ids))]
