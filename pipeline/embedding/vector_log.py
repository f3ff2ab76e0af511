"""The vector log: one immutable Parquet part per unit; the parts that exist are the progress.

A unit is done once its part exists; then each of its images is in the part or in its rejects file. Two writers may
race on a unit. Each first writes its rejects file (named by its hash), then tries to create the part, which names that
file. The first part wins; rejects files that no part names are ignored. A part has one row group per shard, sorted by
id, so that segments read it by (wave, shard).
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
from pipeline.storage import interface, objects, parquet
from pipeline.storage.checksums import Content, digest_of, together

logger = logging.getLogger(__name__)

_PART = re.compile(r"wave-(\d+)/unit-(\d+)\.parquet$")
_REJECTS = re.compile(r"wave-(\d+)/unit-(\d+)-([0-9a-f]{16})\.parquet$")
_NAMED = b"rejects"  # metadata key of a part: the digest in the name of its rejects file
_DIGITS = 16


@dataclass(frozen=True, slots=True)
class VectorLog:
    """Where a stream of embeddings is kept."""

    parts_uri: str  # folder of `wave-WWW/unit-UUUUU.parquet`
    rejects_uri: str  # folder of `wave-WWW/unit-UUUUU-<digest>.parquet`
    dim: int  # width of the vectors
    num_shards: int  # row groups per part

    def part(self, wave: int, unit: int) -> str:
        """The URI of a unit's part."""
        return objects.join(self.parts_uri, _name(wave, unit))

    def rejects(self, wave: int, unit: int, digest: str) -> str:
        """The URI of a rejects file of a unit; it is valid if the unit's part names this digest."""
        return objects.join(self.rejects_uri, _name(wave, unit, f"-{digest}"))


@dataclass(frozen=True, slots=True)
class EmbeddedUnit:
    """The outcome of embedding a unit."""

    ids: Int64  # (B,), in the order of the units file
    vectors: Float32  # (B, d); undefined for rejects
    etags: pa.Array  # (B,) of the objects that were read
    reject_stages: pa.Array  # (B,) strings, empty if embedded
    reject_reasons: pa.Array  # (B,) strings, empty if embedded


def write_unit(log: VectorLog, unit: Unit, embedded: EmbeddedUnit) -> tuple[int, int, str]:
    """Make a unit durable; if it is already, nothing is written.

    Returns:
        the size of its part in bytes, the number of its rejects, and the part's digest.
    """
    part = log.part(unit.wave, unit.unit)
    if objects.exists(part):  # done before, by this driver or another: the first part and its rejects are kept
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
    except interface.AlreadyExists:  # another driver was faster; its part and its rejects are kept
        return _as_it_is(log, unit)
    if rejects and not objects.exists(rejects_uri):  # a concurrent `forget_rejects` took the file for unnamed
        objects.put(rejects_uri, rejects)
    return len(data), int((~good).sum()), digest_of(data)


def finished_units(log: VectorLog) -> dict[int, list[int]]:
    """The durable units by wave, sorted; found by listing alone."""
    found: dict[int, list[int]] = {}
    for (wave, unit), _, _ in _list_parts(log):
        found.setdefault(wave, []).append(unit)
    return found


def part_times(log: VectorLog) -> dict[tuple[int, int], float]:
    """When each (wave, unit) became durable, in seconds since the epoch."""
    return {unit: stat.modified_seconds for unit, _, stat in _list_parts(log)}


def part_files(parts_uri: str, wave: int | None = None) -> dict[tuple[int, int], str]:
    """The URIs of the parts in a log's folder, or of one wave, by (wave, unit), sorted."""
    folder = parts_uri if wave is None else objects.join(parts_uri, f"wave-{wave:03d}")
    return {unit: uri for unit, uri, _ in _parts_among(objects.list_stats(folder, ".parquet"))}


def read_wave(log: VectorLog, wave: int, shards: range | None = None) -> tuple[Int64, Float32]:
    """The embedded images of a wave, or of some shards: ids (n,), sorted, and vectors (n, d)."""
    return read_parts(log, wave, shards)[:2]


def read_parts(log: VectorLog, wave: int, shards: range | None = None) -> tuple[Int64, Float32, dict[int, str]]:
    """As `read_wave`, and the digest of each unit's part; empty for parts of versions that made none."""

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
            remedy="run `fastfill repair`, which embeds its images again; then repeat this command",
        ) from error


def unit_of(part: str) -> int:
    """The unit number in a part's name."""
    match = _PART.search(part)
    assert match is not None, part
    return int(match[2])


def wave_digest(digests: dict[int, str]) -> str:
    """One digest of a wave's parts in the order of their units; empty if a part has none."""
    whole = all(digests.values())
    return together([f"{unit} {digest}" for unit, digest in sorted(digests.items())]) if whole else ""


def reject_files(log: VectorLog, wave: int | None = None, skip_unreadable: bool = False) -> dict[tuple[int, int], str]:
    """The valid rejects files of a wave, or of all waves: URIs by (wave, unit), sorted.

    A file is valid if its unit's part exists and names it. With `skip_unreadable` parts that cannot be read are left
    out.

    Raises:
        DataError: a part of a unit with a rejects file cannot be read.
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
    """The ids of a wave whose images were deleted after the manifest was made, (n,) int64."""
    rejects = read_rejects(log, wave)
    ids: Int64 = rejects.filter(pc.starts_with(rejects["reason"], DELETED))["id"].to_numpy()
    return ids


def count_log_rejects(log: VectorLog) -> dict[int, int]:
    """The number of rejects of finished units by wave, read from file footers."""
    files = reject_files(log)
    counts: dict[int, int] = {}
    for (wave, _), rows in zip(files, objects.at_once(_num_rows, files.values()), strict=True):
        counts[wave] = counts.get(wave, 0) + rows
    return counts


def forget_rejects(log: VectorLog, after_wave: int) -> int:
    """Undo the units above `after_wave` that have rejects, so that they are embedded again; returns their number.

    Rejects files that no part names are removed as well.
    """
    there = {unit: files for unit, files in _all_reject_files(log).items() if unit[0] > after_wave}
    undone = [unit for unit in reject_files(log) if unit in there]
    for unit in undone:
        objects.delete_files([log.part(*unit)])  # parts first: a unit without a part is not done
    for files in there.values():
        objects.delete_files(list(files.values()))
    return len(undone)


def content_digest(rejects: bytes) -> str:
    """The digest in the name of a rejects file with these bytes."""
    return hashlib.sha256(rejects).hexdigest()[:_DIGITS]


def naming(schema: pa.Schema, digest: str) -> pa.Schema:
    """The schema of a part that names the rejects file of this digest."""
    return schema.with_metadata({_NAMED: digest.encode()})


def _list_parts(log: VectorLog) -> list[tuple[tuple[int, int], str, interface.Stat]]:
    """(wave, unit), URI and stat of all parts, sorted; the folders of several waves are listed at once."""
    try:
        waves = objects.folders(log.parts_uri)
    except FileNotFoundError:
        return []
    each = objects.at_once(partial(objects.list_stats, suffix=".parquet"), waves)
    return _parts_among([part for parts in each for part in parts])


def _parts_among(files: list[tuple[str, interface.Stat]]) -> list[tuple[tuple[int, int], str, interface.Stat]]:
    """The files that are named like a part. A copy beside a part is not one."""
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
    """Once per process: the log is listed often."""
    logger.warning("%s is not a part of the vector log and is ignored. Move it out of the run.", uri)


def _name(wave: int, unit: int, end: str = "") -> str:
    return f"wave-{wave:03d}/unit-{unit:05d}{end}.parquet"


def _all_reject_files(log: VectorLog, wave: int | None = None) -> dict[tuple[int, int], dict[str | None, str]]:
    """Every rejects file, valid or not, by (wave, unit) and digest."""
    folder = log.rejects_uri if wave is None else objects.join(log.rejects_uri, f"wave-{wave:03d}")
    found: dict[tuple[int, int], dict[str | None, str]] = {}
    for uri in objects.list_files(folder, ".parquet"):
        if match := _REJECTS.search(uri):
            found.setdefault((int(match[1]), int(match[2])), {})[match[3]] = uri
    return found


@contextmanager
def _open_part(uri: str) -> Iterator[Content]:
    """Raises DataError if the part is missing or damaged."""
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
            remedy="`fastfill audit` lists all damaged files. If the wave is not published yet, move this file out of "
            "the run and repeat this command: the unit is embedded again. If it is published, run `fastfill repair`",
        ) from error


def _named(part: str) -> str | None:
    """The digest of the rejects file that a part names; None without a part or without rejects."""
    try:
        with _open_part(part) as file:
            digest = (file.schema_arrow.metadata or {}).get(_NAMED)
    except DataError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise
    return digest.decode() if digest else None


def _as_it_is(log: VectorLog, unit: Unit) -> tuple[int, int, str]:
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
