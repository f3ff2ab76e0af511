"""The vector log: one immutable Parquet part per unit, and what it says about progress.

Guarantee: a unit is done when its part exists, and then all its images are in the part or in its
rejects, whoever else writes the unit at the same time: the rejects are written first, into a file that is
named by its content, and the part, which is created once, names that file. Other reject files of the unit
are of writers that lost or died, and do not count. Writing a unit again leaves the first part as it is.
Segments are read from here by (wave, shard): each part has one row group per shard, rows sorted by id. It
does not know which encoder made the vectors.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.arrays import Float32, Int64, vectors_from_arrow, vectors_to_arrow
from pipeline.errors import DataError
from pipeline.hashing import shard_of
from pipeline.schema import DELETED, REJECTS, UNITS, Unit, embedded_schema
from pipeline.storage import objects, parquet
from pipeline.storage.checksums import Content, digest_of, together

logger = logging.getLogger(__name__)

_PART = re.compile(r"wave-(\d+)/unit-(\d+)\.parquet$")
_REJECTS = re.compile(r"wave-(\d+)/unit-(\d+)-([0-9a-f]{16})\.parquet$")
_NAMED = b"rejects"  # the part's metadata of this key is the digest in the name of its reject file
_DIGITS = 16


@dataclass(frozen=True, slots=True)
class VectorLog:
    """Where a stream of embeddings is kept.

    Attributes:
        parts_uri: folder of the parts, `wave-WWW/unit-UUUUU.parquet` below it.
        rejects_uri: folder of the rejects, `wave-WWW/unit-UUUUU-<digest>.parquet` below it.
        dim: width of the vectors.
        num_shards: row groups per part.
    """

    parts_uri: str
    rejects_uri: str
    dim: int
    num_shards: int

    def part(self, wave: int, unit: int) -> str:
        """The URI of a unit's vectors."""
        return objects.join(self.parts_uri, _name(wave, unit))

    def rejects(self, wave: int, unit: int, digest: str) -> str:
        """The URI of rejects of a unit; they are the unit's where its part names this digest."""
        return objects.join(self.rejects_uri, _name(wave, unit, f"-{digest}"))


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


def write_unit(log: VectorLog, unit: Unit, embedded: EmbeddedUnit) -> tuple[int, int, str]:
    """Make a unit durable; where it is, nothing is written.

    Returns:
        the size of its part in bytes, the number of its rejects, and the part's digest.
    """
    part = log.part(unit.wave, unit.unit)
    if objects.exists(part):  # done before, by this driver or another one: the first part stays, with its rejects
        return _as_it_is(log, unit)
    good = np.array([not stage for stage in embedded.reject_stages.to_pylist()], dtype=bool)
    schema = embedded_schema(log.dim)
    rejects = b""
    if not good.all():
        rejects = parquet.parquet_bytes(REJECTS, [_reject_rows(unit, embedded, ~good)])
        digest = content_digest(rejects)
        schema = naming(schema, digest)
        rejects_uri = log.rejects(unit.wave, unit.unit, digest)
        objects.put(rejects_uri, rejects)
    order = np.argsort(embedded.ids[good], kind="stable")
    ids = embedded.ids[good][order]
    shards = shard_of(ids, log.num_shards)
    rows = pa.table(
        {
            "id": ids,
            "shard": shards,
            "source_etag": embedded.etags.filter(pa.array(good)).take(pa.array(order)),
            "vector": vectors_to_arrow(embedded.vectors[good][order]),
        }
    )
    row_groups = (rows.filter(pa.array(shards == shard)) for shard in range(log.num_shards))
    data = parquet.parquet_bytes(schema, row_groups)
    try:
        objects.put_if_absent(part, data)
    except objects.AlreadyExists:  # another driver was faster; its part stays, and names its rejects
        return _as_it_is(log, unit)
    if rejects and not objects.exists(rejects_uri):  # whoever forgot the unit meanwhile took them for a loser's
        objects.put(rejects_uri, rejects)
    return len(data), int((~good).sum()), digest_of(data)


def finished_units(log: VectorLog) -> dict[int, list[int]]:
    """The units that are durable, by wave, sorted; found by listing, without opening a file."""
    found: dict[int, list[int]] = {}
    for (wave, unit), _, _ in _list_parts(log):
        found.setdefault(wave, []).append(unit)
    return found


def part_times(log: VectorLog) -> dict[tuple[int, int], float]:
    """When each unit (wave, unit) became durable, in seconds since the epoch."""
    return {unit: stat.modified_seconds for unit, _, stat in _list_parts(log)}


def part_files(parts_uri: str, wave: int | None = None) -> dict[tuple[int, int], str]:
    """The URIs of the parts below a log's folder, or of one wave, by (wave, unit), sorted; no other files."""
    folder = parts_uri if wave is None else objects.join(parts_uri, f"wave-{wave:03d}")
    return {unit: uri for unit, uri, _ in _parts_among(objects.list_stats(folder, ".parquet"))}


def read_wave(log: VectorLog, wave: int, shards: range | None = None) -> tuple[Int64, Float32]:
    """The embedded images of a wave, or of some of its shards: ids (n,), sorted, and vectors (n, d)."""
    return read_parts(log, wave, shards)[:2]


def read_parts(log: VectorLog, wave: int, shards: range | None = None) -> tuple[Int64, Float32, dict[int, str]]:
    """As `read_wave`, and the digest of the part of each unit; empty for parts of versions that made none."""

    def read(uri: str) -> tuple[pa.Table, str]:
        with _open_part(uri) as file:
            groups = range(file.num_row_groups) if shards is None else shards
            return file.read_row_groups(list(groups), columns=["id", "vector"]), file.digest

    parts = part_files(log.parts_uri, wave)
    found = objects.at_once(read, parts.values())
    digests = {unit: digest for (_, unit), (_, digest) in zip(parts, found, strict=True)}
    return *_sorted_vectors([table for table, _ in found], log.dim), digests


def read_ids(log: VectorLog, wave: int) -> Int64:
    """The ids of the embedded images of a wave, (n,) int64, sorted."""
    files = part_files(log.parts_uri, wave).values()
    tables = objects.at_once(partial(parquet.read_parquet, columns=["id"]), files)
    return np.sort(np.concatenate([np.empty(0, np.int64), *(table["id"].to_numpy() for table in tables)]))


def read_unit(log: VectorLog, wave: int, unit: int) -> pa.Table:
    """The `id`, `source_etag` and `vector` of a unit's embedded images.

    Raises:
        DataError: its part is missing or damaged.
    """
    try:
        with _open_part(log.part(wave, unit)) as file:
            return file.read(["id", "source_etag", "vector"])
    except DataError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        raise DataError(
            "a part of the vector log is missing",
            where=log.part(wave, unit),
            remedy="run `fastfill repair`, which embeds its images again; then run the same command again",
        ) from error


def unit_of(part: str) -> int:
    """The unit of a part, by its name."""
    match = _PART.search(part)
    assert match is not None, part
    return int(match[2])


def wave_digest(digests: dict[int, str]) -> str:
    """One digest of the parts of a wave, by their units; empty if a part has none."""
    whole = all(digests.values())
    return together([f"{unit} {digest}" for unit, digest in sorted(digests.items())]) if whole else ""


def reject_files(log: VectorLog, wave: int | None = None, skip_unreadable: bool = False) -> dict[tuple[int, int], str]:
    """The reject files of a wave, or of all waves, that count: URIs by (wave, unit), sorted.

    A file counts if the part of its unit is there and names it. Only parts of units that have a reject file are
    opened.

    Args:
        log: the log.
        wave: None for all waves.
        skip_unreadable: leave out the rejects of parts that cannot be read, for who reports these elsewhere.

    Raises:
        DataError: such a part cannot be read.
    """
    found = _all_reject_files(log, wave)

    def valid(unit: tuple[int, int]) -> str | None:
        try:
            return found[unit].get(_named(log.part(*unit)))
        except DataError:
            if skip_unreadable:
                return None
            raise

    return {unit: uri for unit, uri in zip(found, objects.at_once(valid, found), strict=True) if uri is not None}


def read_rejects(log: VectorLog, wave: int | None = None) -> pa.Table:
    """The rejects of a wave, or of all waves, as REJECTS rows."""
    tables = objects.at_once(parquet.read_parquet, reject_files(log, wave).values())
    return pa.concat_tables([REJECTS.empty_table(), *tables])


def read_deleted(log: VectorLog, wave: int) -> Int64:
    """The ids of a wave whose images were deleted since the manifest was made, (n,) int64."""
    rejects = read_rejects(log, wave)
    ids: Int64 = rejects.filter(pc.starts_with(rejects["reason"], DELETED))["id"].to_numpy()
    return ids


def count_log_rejects(log: VectorLog) -> dict[int, int]:
    """The number of rejects of finished units by wave, from the footers of the few files there are."""
    files = reject_files(log)
    counts: dict[int, int] = {}
    for (wave, _), rows in zip(files, objects.at_once(_num_rows, files.values()), strict=True):
        counts[wave] = counts.get(wave, 0) + rows
    return counts


def forget_rejects(log: VectorLog, after_wave: int) -> int:
    """Undo the units that have rejects in waves above `after_wave`, so that they are embedded again.

    What losers and the dead have left there goes too.

    Returns:
        the number of units that will be done again.
    """
    there = {unit: files for unit, files in _all_reject_files(log).items() if unit[0] > after_wave}
    undone = [unit for unit in reject_files(log) if unit in there]
    for unit in undone:
        objects.delete_files([log.part(*unit)])  # the parts first: without its part a unit is not done
    for files in there.values():
        objects.delete_files(list(files.values()))
    return len(undone)


def content_digest(rejects: bytes) -> str:
    """What a reject file with these bytes has in its name."""
    return hashlib.sha256(rejects).hexdigest()[:_DIGITS]


def naming(schema: pa.Schema, digest: str) -> pa.Schema:
    """The schema of a part whose rejects are in the file of this digest."""
    return schema.with_metadata({_NAMED: digest.encode()})


def _list_parts(log: VectorLog) -> list[tuple[tuple[int, int], str, objects.Stat]]:
    """The (wave, unit), URI and stat of all parts, sorted.

    The folders of several waves are listed at once, a page of names after the other in each.
    """
    try:
        waves = objects.folders(log.parts_uri)
    except FileNotFoundError:
        return []
    each = objects.at_once(partial(objects.list_stats, suffix=".parquet"), waves)
    return _parts_among([part for parts in each for part in parts])


def _parts_among(files: list[tuple[str, objects.Stat]]) -> list[tuple[tuple[int, int], str, objects.Stat]]:
    """Those of some files that have the name of a part; a copy that somebody made beside one is no part."""
    found = []
    for uri, stat in files:
        match = _PART.search(uri)
        unit = (int(match[1]), int(match[2])) if match else None
        if unit is not None and uri.endswith("/" + _name(*unit)):
            found.append((unit, uri, stat))
        else:
            _warn(uri)
    return found


@functools.cache
def _warn(uri: str) -> None:
    """Once in a process: the log is listed often."""
    logger.warning("%s is not a part of the vector log: it is ignored. Move it out of the run.", uri)


def _name(wave: int, unit: int, end: str = "") -> str:
    return f"wave-{wave:03d}/unit-{unit:05d}{end}.parquet"


def _all_reject_files(log: VectorLog, wave: int | None = None) -> dict[tuple[int, int], dict[str | None, str]]:
    """Every reject file, by (wave, unit) and digest, whether it counts or not."""
    folder = log.rejects_uri if wave is None else objects.join(log.rejects_uri, f"wave-{wave:03d}")
    found: dict[tuple[int, int], dict[str | None, str]] = {}
    for uri in objects.list_files(folder, ".parquet"):
        if match := _REJECTS.search(uri):
            found.setdefault((int(match[1]), int(match[2])), {})[match[3]] = uri
    return found


@contextmanager
def _open_part(uri: str) -> Iterator[Content]:
    """A part for reading.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        with parquet.open_parquet(uri) as file:
            yield file
    except DataError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise
        raise DataError(
            "a part of the vector log is damaged",
            found=f"{error.summary}: {error.details['found']}",
            where=uri,
            remedy="if its wave is not published yet, move this file out of the run, and run the same command again: "
            "the unit is embedded again. `fastfill audit` lists all damaged files",
        ) from error


def _named(part: str) -> str | None:
    """The digest of the rejects that a part names; None where there is no part, or it has no rejects."""
    try:
        with _open_part(part) as file:
            digest = (file.schema_arrow.metadata or {}).get(_NAMED)
    except DataError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise
    return digest.decode() if digest else None


def _as_it_is(log: VectorLog, unit: Unit) -> tuple[int, int, str]:
    """What `write_unit` gives of a unit whose part is there."""
    part = log.part(unit.wave, unit.unit)
    with _open_part(part) as file:
        named, digest = (file.schema_arrow.metadata or {}).get(_NAMED), file.digest
    rejected = _num_rows(log.rejects(unit.wave, unit.unit, named.decode())) if named else 0
    return objects.stat(part).size_bytes, rejected, digest


def _num_rows(uri: str) -> int:
    with parquet.open_parquet(uri) as file:
        return int(file.metadata.num_rows)


def _reject_rows(unit: Unit, embedded: EmbeddedUnit, bad: np.typing.NDArray[np.bool_]) -> pa.Table:
    places = parquet.read_parquet(unit.rows_uri, UNITS.names, [unit.row_group])
    rows = places.append_column("stage", embedded.reject_stages).append_column("reason", embedded.reject_reasons)
    return rows.filter(pa.array(bad))


def _sorted_vectors(tables: list[pa.Table], dim: int) -> tuple[Int64, Float32]:
    table = pa.concat_tables([embedded_schema(dim).empty_table().select(["id", "vector"]), *tables])
    ids = table["id"].to_numpy()
    order = np.argsort(ids, kind="stable")
    return ids[order], vectors_from_arrow(table["vector"])[order]
