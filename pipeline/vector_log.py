"""The vector log: one immutable Parquet part per unit, and what it says about progress.

Guarantee: a unit is done when its part exists, and then all its images are in the part or in its
rejects; the rejects are written first. Writing a unit again leaves the first part as it is. Segments
are read from here by (wave, shard): each part has one row group per shard, rows sorted by id. It does
not know which encoder made the vectors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.schema import (
    DELETED,
    REJECTS,
    UNITS,
    Float32,
    Int64,
    Unit,
    embedded_schema,
    shard_of,
    vectors_from_arrow,
    vectors_to_arrow,
)

_PART = re.compile(r"wave-(\d+)/unit-(\d+)\.parquet$")


@dataclass(frozen=True, slots=True)
class VectorLog:
    """Where a stream of embeddings is kept.

    Attributes:
        parts_uri: folder of the parts, `wave-WWW/unit-UUUUU.parquet` below it.
        rejects_uri: folder of the rejects, named like the parts.
        dim: width of the vectors.
        num_shards: row groups per part.
    """

    parts_uri: str
    rejects_uri: str
    dim: int
    num_shards: int

    def part(self, wave: int, unit: int) -> str:
        """The URI of a unit's vectors."""
        return storage.join(self.parts_uri, _name(wave, unit))

    def rejects(self, wave: int, unit: int) -> str:
        """The URI of a unit's rejects; there is such a file only where it has some."""
        return storage.join(self.rejects_uri, _name(wave, unit))


@dataclass(frozen=True, slots=True)
class EmbeddedUnit:
    """What a unit's embedding came to.

    Attributes:
        ids: (B,) int64, in the order of the units file.
        vectors: (B, d) float32; anything for rejects.
        etags: per image, the etag of the object it was read from.
        reject_stages: per image, empty where it is embedded.
        reject_reasons: per image, empty where it is embedded.
    """

    ids: Int64
    vectors: Float32
    etags: pa.Array
    reject_stages: pa.Array
    reject_reasons: pa.Array


def write_unit(log: VectorLog, unit: Unit, embedded: EmbeddedUnit) -> tuple[int, int]:
    """Make a unit durable; where it is, nothing is written.

    Returns:
        the size of its part in bytes, and the number of its rejects.
    """
    part = log.part(unit.wave, unit.unit)
    if storage.exists(part):  # done before, by this driver or another one: the first part stays, with its rejects
        return storage.stat(part).size_bytes, _rejects_beside(log, unit)
    good = np.array([not stage for stage in embedded.reject_stages.to_pylist()], dtype=bool)
    rejects = log.rejects(unit.wave, unit.unit)
    if good.all():
        storage.delete_files([rejects])  # of an attempt that died before its part, when an image could not be had
    else:
        storage.put(rejects, storage.parquet_bytes(REJECTS, [_reject_rows(unit, embedded, ~good)]))
    order = np.argsort(embedded.ids[good], kind="stable")
    ids = embedded.ids[good][order]
    shards = shard_of(ids, log.num_shards)
    schema = embedded_schema(log.dim)
    rows = pa.table(
        {
            "id": ids,
            "shard": shards,
            "source_etag": embedded.etags.filter(pa.array(good)).take(pa.array(order)),
            "vector": vectors_to_arrow(embedded.vectors[good][order]),
        }
    )
    row_groups = (rows.filter(pa.array(shards == shard)) for shard in range(log.num_shards))
    data = storage.parquet_bytes(schema, row_groups)
    try:
        storage.put_if_absent(part, data)
    except storage.AlreadyExists:  # another driver was faster; its part stays, and says what its rejects are
        return storage.stat(part).size_bytes, _settle_rejects(log, unit, embedded)
    return len(data), int((~good).sum())


def finished_units(log: VectorLog) -> dict[int, list[int]]:
    """The units that are durable, by wave, sorted; found by listing, without opening a file."""
    found: dict[int, list[int]] = {}
    for uri in storage.list_files(log.parts_uri, ".parquet"):
        wave, unit = _parse(uri)
        found.setdefault(wave, []).append(unit)
    return found


def part_times(log: VectorLog) -> dict[tuple[int, int], float]:
    """When each unit (wave, unit) became durable, in seconds since the epoch."""
    return {_parse(uri): stat.modified_seconds for uri, stat in storage.list_stats(log.parts_uri, ".parquet")}


def read_shard(log: VectorLog, wave: int, shard: int) -> tuple[Int64, Float32]:
    """The embedded images of a wave that belong to a shard: ids (n,), sorted, and vectors (n, d)."""
    uris = storage.list_files(storage.join(log.parts_uri, f"wave-{wave:03d}"), ".parquet")
    tables = [storage.read_parquet(uri, ["id", "vector"], [shard]) for uri in uris]
    return _sorted_vectors(tables, log.dim)


def read_wave(log: VectorLog, wave: int) -> tuple[Int64, Float32]:
    """All embedded images of a wave: ids (n,), sorted, and vectors (n, d)."""
    uris = storage.list_files(storage.join(log.parts_uri, f"wave-{wave:03d}"), ".parquet")
    return _sorted_vectors([storage.read_parquet(uri, ["id", "vector"]) for uri in uris], log.dim)


def read_rejects(log: VectorLog, wave: int | None = None) -> pa.Table:
    """The rejects of a wave, or of all waves, as REJECTS rows."""
    folder = log.rejects_uri if wave is None else storage.join(log.rejects_uri, f"wave-{wave:03d}")
    tables = [storage.read_parquet(uri) for uri in storage.list_files(folder, ".parquet")]
    return pa.concat_tables([REJECTS.empty_table(), *tables])


def read_deleted(log: VectorLog, wave: int) -> Int64:
    """The ids of a wave whose images were deleted since the manifest was made, (n,) int64."""
    rejects = read_rejects(log, wave)
    ids: Int64 = rejects.filter(pc.starts_with(rejects["reason"], DELETED))["id"].to_numpy()
    return ids


def count_rejects(log: VectorLog) -> dict[int, int]:
    """The number of rejects of finished units by wave, from the footers of the few files there are."""
    finished = {(wave, unit) for wave, units in finished_units(log).items() for unit in units}
    counts: dict[int, int] = {}
    for uri in storage.list_files(log.rejects_uri, ".parquet"):
        wave, unit = _parse(uri)
        if (wave, unit) in finished:  # a unit that died before its part is counted when it is done again
            counts[wave] = counts.get(wave, 0) + _num_rows(uri)
    return counts


def forget_rejects(log: VectorLog, after_wave: int) -> int:
    """Undo the units that have rejects in waves above `after_wave`, so that they are embedded again.

    Returns:
        the number of units that will be done again.
    """
    uris = [uri for uri in storage.list_files(log.rejects_uri, ".parquet") if _parse(uri)[0] > after_wave]
    for uri in uris:
        storage.delete_files([log.part(*_parse(uri))])  # the part first: without it the unit is not done
        storage.delete_files([uri])
    return len(uris)


def _name(wave: int, unit: int) -> str:
    return f"wave-{wave:03d}/unit-{unit:05d}.parquet"


def _parse(uri: str) -> tuple[int, int]:
    match = _PART.search(uri)
    assert match is not None, uri
    return int(match[1]), int(match[2])


def _rejects_beside(log: VectorLog, unit: Unit) -> int:
    uri = log.rejects(unit.wave, unit.unit)
    return _num_rows(uri) if storage.exists(uri) else 0


def _num_rows(uri: str) -> int:
    with storage.open_parquet(uri) as file:
        return int(file.metadata.num_rows)


def _settle_rejects(log: VectorLog, unit: Unit, embedded: EmbeddedUnit) -> int:
    """Make the rejects those that the unit's part leaves out: two drivers may find different images bad."""
    there = storage.read_parquet(log.part(unit.wave, unit.unit), ["id"])["id"].to_numpy()
    rejected = ~np.isin(embedded.ids, there)
    uri = log.rejects(unit.wave, unit.unit)
    if not rejected.any():
        storage.delete_files([uri])
        return 0
    words = [
        [text or unknown for text in texts.to_pylist()]
        for texts, unknown in (
            (embedded.reject_stages, "fetch"),
            (embedded.reject_reasons, "rejected by another driver"),
        )
    ]
    settled = replace(embedded, reject_stages=pa.array(words[0]), reject_reasons=pa.array(words[1]))
    storage.put(uri, storage.parquet_bytes(REJECTS, [_reject_rows(unit, settled, rejected)]))
    return int(rejected.sum())


def _reject_rows(unit: Unit, embedded: EmbeddedUnit, bad: np.typing.NDArray[np.bool_]) -> pa.Table:
    places = storage.read_parquet(unit.rows_uri, UNITS.names, [unit.row_group])
    rows = places.append_column("stage", embedded.reject_stages).append_column("reason", embedded.reject_reasons)
    return rows.filter(pa.array(bad))


def _sorted_vectors(tables: list[pa.Table], dim: int) -> tuple[Int64, Float32]:
    table = pa.concat_tables([embedded_schema(dim).empty_table().select(["id", "vector"]), *tables])
    ids = table["id"].to_numpy()
    order = np.argsort(ids, kind="stable")
    return ids[order], vectors_from_arrow(table["vector"])[order]
