"""Transform and score the gallery: `gallery/part-*` in, scored parts out, a Ray Data map over parts.

Scored part k has the transformed embedding, uncertainty and priority of each image of gallery part k that has an old
embedding. Images that were embedded for the fit have the highest priority.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy

from pipeline.arrays import Float32, Int64, vectors_from_arrow, vectors_to_arrow
from pipeline.config.method import PlanSettings
from pipeline.config.tree import BackfillSettings, EncodersSettings
from pipeline.embedding.actor_pool import actor_pool
from pipeline.embedding.precompute import embedding_log, read_embeddings
from pipeline.errors import DataError
from pipeline.manifest import normalised
from pipeline.models.device import resolve_device
from pipeline.models.offset import PART, Offset
from pipeline.models.transformation import APPLY_BATCH, apply, load_transformation, read_part
from pipeline.planning import policies
from pipeline.planning.policies import Policy
from pipeline.planning.policy_inputs import load_policy_inputs
from pipeline.planning.selection_result import resolve_policy
from pipeline.planning.signals import Scored
from pipeline.run import Run
from pipeline.sampling.pair_sample import embedded_ids
from pipeline.schema import transformed_schema
from pipeline.storage import interface, objects, parquet


@dataclass(frozen=True, slots=True)
class ScoredPart:
    """The number of images of a scored part, the sha256 of its bytes, and how many images were embedded for the fit."""

    images: int
    sha256: str
    from_pairs: int = 0


@dataclass(frozen=True, slots=True)
class ScoreSettings:
    """The settings that scores depend on, and the device."""

    plan: PlanSettings
    seed: int
    encoders: EncodersSettings
    device: str


class Scorer:
    """The actor: writes one scored part per call; the first version of a part is kept."""

    def __init__(self, run: Run, folder: str, settings: ScoreSettings) -> None:
        self._run, self._folder, self._settings = run, folder, settings
        self._device = resolve_device(settings.device)
        self._network, self._info = load_transformation(run, self._device)
        offset = read_part(run, PART)
        self._offset = None if offset is None else Offset.from_bytes(offset)
        self._policy = load_run_policy(run, settings)
        self._from_pairs = embedded_ids(run)

    def __call__(self, batch: dict[str, Int64]) -> dict[str, list[int] | list[str]]:
        """Score the part of this number; returns its number and the fields of its `ScoredPart`."""
        part = int(batch["id"][0])
        uri = self._run.part(self._folder, part)
        data = self._stored(part, uri)
        digest = hashlib.sha256(data).hexdigest()
        known = self._num_from_pairs(uri)
        return {"part": [part], "images": [_num_rows(data, uri)], "sha256": [digest], "from_pairs": [known]}

    def _num_from_pairs(self, uri: str) -> int:
        if not len(self._from_pairs):
            return 0  # a policy may give infinite priorities, so they cannot be counted
        return int(np.isposinf(parquet.read_parquet(uri, ["priority"])["priority"].to_numpy()).sum())

    def _stored(self, part: int, uri: str) -> bytes:
        """The bytes of the scored part; another driver's if it wrote first."""
        while (found := objects.read_versioned(uri)) is None:
            data = self._score(part)
            with contextlib.suppress(interface.AlreadyExists):
                objects.put_if_absent(uri, data)
                return data
        return found[0]

    def _score(self, part: int) -> bytes:
        log = embedding_log(self._settings.encoders, self._run, "gallery", "old")
        rows, old = read_embeddings(self._run, "gallery", part, "old_embedding", log)
        if old.shape[1] != self._info.d_old:
            raise DataError(
                "the gallery's old embeddings do not fit the transformation",
                expected=f"width {self._info.d_old}",
                found=f"width {old.shape[1]}",
                where=self._run.part("gallery", part),
            )
        transformed, uncertainty = apply(self._network, old, _side(rows), self._device, APPLY_BATCH)
        columns = {name: rows[name].to_numpy() for name in ("id", "label", "group")}
        traffic = rows["traffic"].to_numpy() if "traffic" in rows.schema.names else None
        scored = Scored(columns["id"], uncertainty, transformed, old, columns["label"], columns["group"], traffic)
        priority = policies.prioritise(self._policy, scored, where=f"plan.policy: {self._settings.plan.policy}")
        if len(self._from_pairs):
            priority = first(priority, np.isin(columns["id"], self._from_pairs))
        table = rows.append_column("uncertainty", pa.array(uncertainty))
        table = table.append_column("priority", pa.array(priority))
        served = transformed if self._offset is None else self._offset.apply(transformed, uncertainty)
        table = table.append_column("vector", vectors_to_arrow(served))
        schema = pa.schema([f for f in transformed_schema(transformed.shape[1]) if f.name not in ("wave", "shard")])
        return parquet.parquet_bytes(schema, [table])


def score_gallery(run: Run, folder: str, settings: ScoreSettings, backfill: BackfillSettings) -> list[ScoredPart]:
    """Transform and score every part of the gallery into a folder of the run.

    Raises:
        ConfigError: the policy raised an exception, or the cluster has no room for an actor.
        DataError: the old embeddings do not fit the transformation, or the policy gave a NaN.
    """
    gallery = normalised.read_manifest(run, "gallery")
    assert gallery is not None, "the gallery is normalised before it is scored"
    load_run_policy(run, settings)  # raises on a misspelled name, before any work
    parts = len(gallery.rows)
    pool = actor_pool(backfill, settings.device)
    scored = (
        ray.data.range(parts, override_num_blocks=parts)
        .map_batches(
            Scorer,
            fn_constructor_args=(run, folder, settings),
            batch_size=1,
            batch_format="numpy",
            compute=ActorPoolStrategy(min_size=1, max_size=pool.largest),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus or None,
        )
        .take_all()
    )
    rows = sorted(scored, key=lambda row: row["part"])
    return [ScoredPart(row["images"], row["sha256"], row["from_pairs"]) for row in rows]


def load_run_policy(run: Run, settings: ScoreSettings) -> Policy:
    """The plan's policy with its inputs.

    Raises:
        ConfigError: it cannot be found, or needs an input that the transformation lacks.
        DataError: there is no transformation, or a file of it is missing or damaged.
    """
    plan, name = settings.plan, resolve_policy(run, settings.plan.policy)
    return policies.load_policy(name, settings.seed, load_policy_inputs(run), plan.traffic, plan.group_boost)


def first(priority: Float32, known: NDArray[np.bool_]) -> Float32:
    """Priorities, (N,) float32, with `known` images above all others."""
    return np.where(known, np.float32(np.inf), np.minimum(priority, np.finfo(np.float32).max))


def _num_rows(data: bytes, uri: str) -> int:
    try:
        return int(pq.read_metadata(pa.BufferReader(data)).num_rows)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError("not a readable Parquet file", found=error, where=uri) from error


def _side(rows: pa.Table) -> Float32 | None:
    return vectors_from_arrow(rows["side"]) if "side" in rows.schema.names else None
