"""A user's manifest, checked and brought into our own form: `<folder>/part-*.parquet`.

A manifest (of the gallery, or of the training pairs) is any set of Parquet files. It is cut into
partitions of whole row groups; one Ray task per partition checks its rows and writes one part: id,
where the image is, label, group, and the embeddings that came with it. `<folder>/manifest.json` is
written last: it says that all parts are there, and by digests what they were read from and how. Parts
that were read from something else, or otherwise, are never used: they are written again.

Guarantee: after `normalise`, ids are int64 and unique, every row says where its image is or has its
embeddings, and these are finite and of one width. It does not know what the embeddings are for.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from pipeline.arrays import Int64
from pipeline.config import tree as settings
from pipeline.errors import DataError
from pipeline.hashing import splitmix64
from pipeline.manifest.catalog import is_incomplete
from pipeline.manifest.columns import check_columns, check_content, check_ids
from pipeline.manifest.duplicates import find_repeats
from pipeline.manifest.partition import EMBEDDINGS, Partition, write_part
from pipeline.run import Run
from pipeline.schema import Unit, manifest_schema
from pipeline.storage import documents, objects, parquet

PARTITION_ROWS = 131_072
_HASHED_BYTES = 2**30  # a second of reading
_BUCKET_IDS = 50_000_000  # ids sorted in memory at once when looking for duplicates


@dataclass(frozen=True, slots=True)
class Manifest:
    """What was written: the number of parts and rows, and the embeddings that came with them.

    Attributes:
        rows: rows of each part.
        unit_rows: rows per row group of a part; a row group is a unit for the embedding stream.
        dims: embedding column -> width.
        digest: of the sources; changes with their content, not with their place.
        root: where the uris of images start that were relative; empty where there were none.
        sample: of a probe set, the digest of the sample that names its images; empty where they were drawn by chance.
        parts: sha256 of the file of each part; empty if an earlier version wrote this.
        reading: digest of how the sources were read (see `_reading`); empty if an earlier version wrote this.
    """

    rows: list[int]
    unit_rows: int
    dims: dict[str, int]
    digest: str
    root: str = ""
    sample: str = ""
    reading: str = ""
    parts: tuple[str, ...] = ()

    @property
    def num_rows(self) -> int:
        """Rows over all parts."""
        return sum(self.rows)


def scan(source: settings.ManifestSettings, dims: dict[str, int]) -> list[Partition]:
    """Cut a manifest into partitions, reading footers only.

    Args:
        source: the files and their columns.
        dims: the width that an embedding column must have, for those where it is known.

    Raises:
        DataError: a file is missing or not Parquet, a column is missing or of a wrong type or width, or
            there are no rows.
    """
    partitions: list[Partition] = []
    first_row = 0
    kinds: dict[bool, str] = {}
    uris = files(source.manifest)
    hashed = sum(objects.stat(uri).size_bytes for uri in uris) <= _HASHED_BYTES
    for uri in uris:
        tag = _tag(uri, hashed) if source.columns.image else ""
        with parquet.open_parquet(uri) as file:
            check_columns(file.schema_arrow, source.columns, dims, uri)
            check_content(file.schema_arrow, source.columns, uri)
            check_ids(file.schema_arrow, source.columns.id, kinds, uri)
            found = _cut(file.metadata, uri, first_row, tag)
        partitions += found
        first_row += sum(part.num_rows for part in found)
    if not partitions:
        raise DataError("the manifest has no rows", where=source.manifest)
    return partitions


def widths(source: settings.ManifestSettings) -> dict[str, int]:
    """The widths of its embedding columns that the first file's footer tells: of those that are fixed in size."""
    with parquet.open_parquet(files(source.manifest)[0]) as file:
        schema = file.schema_arrow
    columns = {role: getattr(source.columns, role) for role in EMBEDDINGS}
    kinds = {role: schema.field(name).type for role, name in columns.items() if name in schema.names}
    return {role: kind.list_size for role, kind in kinds.items() if pa.types.is_fixed_size_list(kind)}


def ids_are_integers(source: settings.ManifestSettings) -> bool:
    """Whether the manifest's ids are integers or strings, by the first file's footer; it names their column."""
    with parquet.open_parquet(files(source.manifest)[0]) as file:
        return bool(pa.types.is_integer(file.schema_arrow.field(source.columns.id).type))


def digest(source: settings.ManifestSettings) -> str:
    """A digest of the manifest's content: of every byte where it is small, else of the Parquet footers.

    A footer has the sizes and the statistics of every column; in a manifest above 1 GiB a change that
    keeps all of these is not seen.
    """
    uris = files(source.manifest)
    sizes = [objects.stat(uri).size_bytes for uri in uris]
    if sum(sizes) <= _HASHED_BYTES:
        return hashlib.sha256("".join(objects.sha256(uri) for uri in uris).encode()).hexdigest()
    footers: list[object] = [sizes]
    for uri in uris:
        with parquet.open_parquet(uri) as file:
            groups = [file.metadata.row_group(index) for index in range(file.num_row_groups)]
            columns = [repr(column.to_dict()) for group in groups for column in _columns(group)]
            footers.append([file.schema_arrow.to_string(), [group.num_rows for group in groups], columns])
    return hashlib.sha256(json.dumps(footers).encode()).hexdigest()


def normalise(
    run: Run, folder: str, source: settings.ManifestSettings, dims: dict[str, int], unit_rows: int, root: str = "."
) -> Manifest:
    """Check a manifest and write it as `<folder>/part-*.parquet`, over Ray.

    Nothing is written if the parts are there and were read from the same content in the same way. Relative uris of
    images start at `root`. If only that has changed the parts are written again: they have the same rows, so
    everything made from them still fits.

    Raises:
        DataError: see `scan`; or a row without an image and embeddings, a null, an embedding of a wrong
            width or with a NaN, an id twice. The message names the file and the row.
    """
    done = read_manifest(run, folder)
    content, reading = digest(source), _reading(source, dims)
    if done is not None:
        same = (done.digest, done.unit_rows) == (content, unit_rows) and done.root in ("", root)
        if same and _was_read_so(run, done, reading):
            return done
    partitions = scan(source, dims)
    if done is not None:
        objects.delete_files([_marker(run, folder)])  # first: a half-replaced set of parts must not look whole
    task = ray.remote(num_cpus=0.5)(write_part)
    results = ray.get(
        [task.remote(run.part(folder, number), part, source, unit_rows, root) for number, part in enumerate(partitions)]
    )
    first = results[0].dims
    expected = first | {role: dims[role] for role in first if role in dims}
    for part, found in zip(partitions, results, strict=True):
        if found.dims != expected:
            raise DataError("an embedding has a wrong width", expected=expected, found=found.dims, where=part.uri)
    rows = [part.rows for part in results]
    _check_unique(run, folder, len(rows), sum(rows), source)
    _remove_parts_from(run, folder, len(rows))
    rooted = root if any(part.rooted for part in results) else ""
    digests = tuple(part.sha256 for part in results)
    manifest = Manifest(rows, unit_rows, first, content, rooted, reading=reading, parts=digests)
    objects.put(_marker(run, folder), documents.encode(manifest))
    return manifest


def read_manifest(run: Run, folder: str) -> Manifest | None:
    """What `normalise` wrote, or None if it has not finished.

    Raises:
        DataError: the file is damaged or of another format.
    """
    where = _marker(run, folder)
    found = objects.read_versioned(where)
    return documents.parse(Manifest, found[0], where, documents.REDO) if found else None


def ids_of(run: Run, folder: str) -> Int64:
    """The ids of a sample that was written as a normalised manifest, (n,) int64; none if there is no such manifest."""
    found = read_manifest(run, folder)
    parts = range(0 if found is None else len(found.rows))
    ids = [parquet.read_parquet(run.part(folder, part), ["id"])["id"].to_numpy() for part in parts]
    return np.concatenate([np.empty(0, np.int64), *ids])


def is_drawn_from(drawn: Manifest, gallery: Manifest) -> bool:
    """Whether a sample of the gallery was drawn from its parts as they are now."""
    return (drawn.digest, drawn.root, drawn.reading) == (gallery.digest, gallery.root, gallery.reading)


def write_drawn(run: Run, folder: str, gallery: Manifest, rows: pa.Table, sample: str = "") -> Manifest:
    """Write a sample of the gallery as a normalised manifest with one part.

    Args:
        run: the run.
        folder: of the sample.
        gallery: the manifest that the rows are from.
        rows: of its parts, in the order in which they are written.
        sample: the digest of what the rows were chosen by, if that was given.
    """
    groups = (rows.slice(start, gallery.unit_rows) for start in range(0, rows.num_rows, gallery.unit_rows))
    data = parquet.parquet_bytes(manifest_schema(gallery.dims), groups)
    objects.put(run.part(folder, 0), data)
    drawn = replace(gallery, rows=[rows.num_rows], sample=sample, parts=(hashlib.sha256(data).hexdigest(),))
    objects.put(_marker(run, folder), documents.encode(drawn))
    return drawn


def units(run: Run, folder: str, manifest: Manifest) -> list[Unit]:
    """The row groups of all parts as units of the embedding stream; the part's number stands for the wave."""
    found = []
    for number, rows in enumerate(manifest.rows):
        for row_group, start in enumerate(range(0, rows, manifest.unit_rows)):
            images = min(manifest.unit_rows, rows - start)
            found.append(Unit(number, row_group, run.part(folder, number), row_group, images))
    return found


def files(given: str | tuple[str, ...]) -> list[str]:
    """The files that a manifest's setting stands for.

    Raises:
        DataError: there are none, or they are not complete yet.
    """
    found = []
    for pattern in (given,) if isinstance(given, str) else given:
        if is_incomplete(pattern):
            raise DataError(
                "the manifest is not complete",
                expected="the end of `fastfill manifest`",
                where=pattern,
                remedy="run that command again: it goes on where it was stopped",
            )
        uris = objects.expand(pattern, ".parquet")
        if not uris:
            raise DataError("no manifest file is there", expected="Parquet files", where=pattern)
        found += uris
    return found


def _reading(source: settings.ManifestSettings, dims: dict[str, int]) -> str:
    """A digest of all that decides how rows are read: columns by role, expected widths, and where embedded images lie.

    Only if the images are in the manifest does its place count, because the parts then refer to its files.
    """
    columns = source.columns.model_dump(exclude_none=True)
    expected = {role: width for role, width in dims.items() if role in columns}
    places = files(source.manifest) if source.columns.image is not None else []
    return hashlib.sha256(json.dumps([columns, expected, places], sort_keys=True).encode()).hexdigest()


def _was_read_so(run: Run, done: Manifest, reading: str) -> bool:
    """Whether parts were read as they would be now.

    Earlier versions did not store how. In a run that has started they are kept, because its config was compared with
    run.json. Before that they may come from a command that was refused, so they are read again.
    """
    return done.reading == reading if done.reading else objects.exists(run.settings)


def _remove_parts_from(run: Run, folder: str, number: int) -> None:
    """Remove parts that an earlier, longer manifest left behind: readers list the folder."""
    kept, start = {run.part(folder, part) for part in range(number)}, run.path(folder, "part-")
    found = (uri for uri, _ in objects.iter_stats(run.path(folder), deep=False))
    objects.delete_files([uri for uri in found if uri.startswith(start) and uri not in kept])


def _columns(group: pq.RowGroupMetaData) -> list[pq.ColumnChunkMetaData]:
    return [group.column(index) for index in range(group.num_columns)]


def _tag(uri: str, hashed: bool) -> str:
    """A file's etag; of a local file, whose etag has its time, the sha256 as well: it may be touched or copied."""
    etag = objects.stat(uri).etag
    return f"{etag} {objects.sha256(uri)}" if hashed and objects.is_local(uri) else etag


def _cut(metadata: pq.FileMetaData, uri: str, first_row: int, tag: str) -> list[Partition]:
    partitions: list[Partition] = []
    groups: list[int] = []
    rows = start = 0
    for group in range(metadata.num_row_groups):
        groups.append(group)
        rows += metadata.row_group(group).num_rows
        if rows >= PARTITION_ROWS or group == metadata.num_row_groups - 1:
            if rows:
                partitions.append(Partition(uri, groups, first_row + start, start, rows, tag))
            start += rows
            groups, rows = [], 0
    return partitions


def _check_unique(run: Run, folder: str, num_parts: int, num_rows: int, source: settings.ManifestSettings) -> None:
    if source.columns.id is None:
        return  # row numbers
    found = ray.get(ray.remote(num_cpus=0.5)(_first_duplicate).remote(run, folder, num_parts, num_rows))
    if found is not None:
        raise DataError(
            "an id is there more than once",
            expected="unique ids",
            found=found,
            where=f"{', '.join(source.manifest)}: column {source.columns.id}",
        )


def _first_duplicate(run: Run, folder: str, num_parts: int, num_rows: int) -> str | None:
    """Among the ids, a bucket of them at a time, and among the keys that stand for them where they are strings."""
    parts = [run.part(folder, number) for number in range(num_parts)]
    buckets = -(-num_rows // _BUCKET_IDS)
    for bucket in range(buckets):
        ids = (parquet.read_parquet(part, ["id"])["id"].to_numpy() for part in parts)
        mine = np.concatenate([some[splitmix64(some, seed=1) % np.uint64(buckets) == bucket] for some in ids])
        mine.sort()
        same = np.flatnonzero(mine[1:] == mine[:-1])
        if len(same):
            return str(mine[same[0]])
    keys = find_repeats(parts, ["key"], [], num_rows)
    return str(keys.examples[0][0]["key"]) if keys.examples else None


def _marker(run: Run, folder: str) -> str:
    return run.path(folder, "manifest.json")
