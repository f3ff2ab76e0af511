"""A small run on disk, made without Ray: plan, vector log, segments; for the tests of what comes after them."""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.arrays import Float32, Int64, vectors_to_arrow
from pipeline.config.tree import IndexSettings, Metric
from pipeline.embedding import vector_log
from pipeline.embedding.vector_log import VectorLog, content_digest, naming
from pipeline.hashing import shard_of
from pipeline.index import segment as index
from pipeline.index import train_codebook
from pipeline.index.codebook import Codebook
from pipeline.index.commits import Commit, SegmentCounts
from pipeline.index.segment_files import Rows, SegmentKind, SegmentRef
from pipeline.index.writer import Writer
from pipeline.models.calibration import Calibration
from pipeline.run import Run
from pipeline.schema import REJECTS, embedded_schema, transformed_schema
from pipeline.storage import objects, parquet
from tests.support.run_inputs import write_manifest_part, write_other_inputs

DIM = 8
UNITS = 2


def put_rejects(folder: str, wave: int, unit: int, rows: pa.Table, schema: pa.Schema) -> pa.Schema:
    """Write the rejects of a unit, and give the schema for its part, which names them."""
    data = parquet.parquet_bytes(rows.schema if rows.schema.names == ["id"] else REJECTS, [rows])
    digest = content_digest(data)
    objects.put(VectorLog("", folder, 1, 1).rejects(wave, unit, digest), data)
    return naming(schema, digest)


@dataclass
class WholeRun:
    """A gallery in `num_waves` waves; every 50th image is a reject.

    `mixed`: rejects are in the embedded segments of their waves, as earlier versions sealed them.
    """

    run: Run
    metric: Metric = "l2"
    factory: str = "IVF4,Flat"
    num: int = 240
    num_waves: int = 3
    num_shards: int = 2
    seed: int = 0
    mixed: bool = False
    calibration: Calibration | None = None
    refs: dict[tuple[int, int, SegmentKind, bool], SegmentRef] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.ids: Int64 = rng.permutation(self.num * 7)[: self.num].astype(np.int64)
        self.waves = np.arange(self.num) % self.num_waves + 1
        self.shards = shard_of(self.ids, self.num_shards)
        self.transformed: Float32 = rng.standard_normal((self.num, DIM)).astype(np.float32)
        self.embedded: Float32 = self.transformed + rng.standard_normal((self.num, DIM)).astype(np.float32) / 4
        self.rejected = np.arange(self.num) % 50 == 1
        settings = IndexSettings(factory=self.factory)
        data = train_codebook.train_codebook(self.embedded, settings, self.metric, self.num, device="cpu", seed=0)
        self.codebook = Codebook(data)
        self.codebook_path, self.codebook_sha256 = train_codebook.write_codebook(self.run, data)

    def copy_to(self, folder: Path) -> WholeRun:
        """The same run elsewhere: cheaper than making it again."""
        shutil.copytree(self.run.uri, folder, dirs_exist_ok=True)
        other = copy.copy(self)
        other.run, other.refs = Run(str(folder)), dict(self.refs)
        return other

    def write_inputs(self) -> WholeRun:
        """All that a resume reads: the transformed gallery in two parts, the whole vector log, and `run_inputs`."""
        write_other_inputs(self, UNITS, DIM)
        for part in range(2):
            rows = np.flatnonzero(np.arange(self.num) // 2 % 2 == part)
            cells = [(wave, shard) for wave in range(1, self.num_waves + 1) for shard in range(self.num_shards)]
            groups = (
                self._plan_rows(rows[(self.waves[rows] == wave) & (self.shards[rows] == shard)])
                for wave, shard in cells
            )
            uri = self.run.part("transformed", part)
            objects.put(uri, parquet.parquet_bytes(transformed_schema(DIM), groups))
        for wave in range(1, self.num_waves + 1):
            self.write_log(wave)
        return self

    def write_gallery(self, with_keys: bool = False) -> dict[int, str]:
        """The two parts of the gallery; the ids of the first one have keys, or none has any."""
        keys: dict[int, str] = {}
        for part in range(2):
            ids = [int(item) for item in self.ids[np.arange(self.num) // 2 % 2 == part]]
            if with_keys and part == 0:
                keys = {item: f"image/{item}.jpg" for item in ids}
            write_manifest_part(self.run, part, ids, [keys[item] for item in ids] if keys and part == 0 else None)
        objects.put(self.run.path("gallery", "old", "part-00000.parquet"), b"not a part of the gallery")
        return keys

    def write_log(self, wave: int) -> None:
        """The units of a wave and their rejects."""
        for unit in range(UNITS):
            rows = np.flatnonzero((self.waves == wave) & (np.arange(self.num) // self.num_waves % UNITS == unit))
            good, bad = rows[~self.rejected[rows]], rows[self.rejected[rows]]
            groups = (self._log_rows(good[self.shards[good] == shard]) for shard in range(self.num_shards))
            name = f"wave-{wave:03d}/unit-{unit:05d}.parquet"
            schema = embedded_schema(DIM)
            if len(bad):
                columns = {"id": pa.array(self.ids[bad])} | {
                    name: pa.nulls(len(bad), REJECTS.field(name).type) for name in REJECTS.names[1:]
                }
                schema = put_rejects(self.run.path("rejects"), wave, unit, pa.table(columns), schema)
            objects.put(self.run.path("embedded", name), parquet.parquet_bytes(schema, groups))

    def _plan_rows(self, at: NDArray[np.intp]) -> pa.Table:
        schema = transformed_schema(DIM)
        known = {
            "id": pa.array(self.ids[at]),
            "wave": pa.array(self.waves[at]),
            "shard": pa.array(self.shards[at]),
            "vector": vectors_to_arrow(self.transformed[at]),
        }
        return pa.table({name: known.get(name, pa.nulls(len(at), schema.field(name).type)) for name in schema.names})

    def _log_rows(self, at: NDArray[np.intp]) -> pa.Table:
        at = at[np.argsort(self.ids[at])]
        return pa.table(
            {
                "id": self.ids[at],
                "shard": self.shards[at],
                "source_etag": pa.nulls(len(at), pa.string()),
                "vector": vectors_to_arrow(self.embedded[at]),
            }
        )

    def rows(self, shard: int, wave: int, kind: SegmentKind, rejects: bool = False) -> Rows:
        """What the segment of a (shard, wave, kind) has to hold; `rejects`: that of the rejects of an embedded wave."""
        mine = (self.shards == shard) & (self.waves == wave)
        if not self.mixed and (kind == "embedded" or rejects):
            mine &= self.rejected == rejects
        at = np.flatnonzero(mine)
        new = ~self.rejected[at] & (kind == "embedded")
        return Rows(
            self.ids[at],
            np.where(new[:, None], self.embedded[at], self.transformed[at]),
            np.where(new, "embedded", "transformed"),
            np.zeros(len(at), dtype=np.float32),
            pa.nulls(len(at), pa.string()),
        )

    def segment(self, shard: int, wave: int, kind: SegmentKind, rejects: bool = False) -> SegmentRef:
        """Written when first asked for."""
        key = (shard, wave, kind, rejects)
        if key not in self.refs:
            ref = index.write_segment(self.run, self.codebook, self.rows(shard, wave, kind, rejects), shard, wave, kind)
            self.refs[key] = replace(ref, rejected=ref.vectors) if rejects else ref
        return self.refs[key]

    def sealed(self, shard: int, wave: int) -> list[SegmentRef]:
        """The segments of a (shard, wave) that is embedded."""
        rejects = self.rejected & (self.shards == shard) & (self.waves == wave)
        left = [self.segment(shard, wave, "transformed", rejects=True)] if rejects.any() and not self.mixed else []
        return [self.segment(shard, wave, "embedded"), *left]

    def draft(self, number: int) -> Commit:
        """Commit `number`, not published."""
        segments = tuple(
            ref
            for wave in range(1, self.num_waves + 1)
            for shard in range(self.num_shards)
            for ref in (self.sealed(shard, wave) if wave <= number else [self.segment(shard, wave, "transformed")])
        )
        return Commit(
            number=number,
            parent=number - 1 if number else None,
            codebook_path=self.codebook_path,
            codebook_sha256=self.codebook_sha256,
            metric=self.metric,
            nprobe=4,
            dim=DIM,
            num_waves=self.num_waves,
            num_shards=self.num_shards,
            segments=segments,
            counts=SegmentCounts.of(segments),
            log_digests=tuple(map(self.log_digest, range(1, number + 1))),
            calibration=self.calibration,
        )

    def log_digest(self, wave: int) -> str:
        """What a commit says of the parts of a wave."""
        log = VectorLog(self.run.path("embedded"), self.run.path("rejects"), DIM, self.num_shards)
        return vector_log.wave_digest(vector_log.read_parts(log, wave)[2])

    def publish(self, last: int) -> Writer:
        """Publish the commits up to `last`."""
        writer = Writer.acquire(self.run)
        for number in range(0 if writer.latest is None else writer.latest + 1, last + 1):
            writer.publish(self.draft(number))
        return writer

    def vectors(self, number: int) -> Float32:
        """The vectors of commit `number`, row i that of ids[i]."""
        new = ~self.rejected & (self.waves <= number)
        return np.where(new[:, None], self.embedded, self.transformed)
