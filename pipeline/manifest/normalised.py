"""A user's manifest in our own form: checked and written as `<folder>/part-*.parquet`.

A manifest (of the gallery or of pairs) is any set of Parquet files. It is cut into partitions of whole row groups, and
one Ray task per partition checks its rows and writes one part: id, place of the image, label, group, and embeddings.
`<folder>/manifest.json` is written last. It says by digests what the parts were read from and how, so parts of other
sources or settings are written again. Afterwards ids are int64 and unique, each row has a place or embeddings, and
embeddings are finite and of one width.
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
    """The content of `manifest.json`."""

    rows: list[int]  # rows of each part
    unit_rows: int  # rows per row group of a part; a row group is a unit for the embedding stream
    dims: dict[str, int]  # embedding column -> width
    digest: str  # digest of the sources' content; independent of their place
    root: str = ""  # folder at which relative uris of images start; empty if there were none
    sample: str = ""  # for a probe set, the digest of the user's sample; empty if the images were drawn at random
    reading: str = ""  # digest of how the sources were read (see `_reading`); empty in files of older versions
    parts: tuple[str, ...] = ()  # sha256 of each part's file; empty in files of older versions

    @property
    def num_rows(self) -> int:
        """Rows over all parts."""
        return sum(self.rows)


def scan(source: settings.ManifestSettings, dims: dict[str, int]) -> list[Partition]:
    """Cut a manifest into partitions, reading footers only.

    Args:
        source: the files and their columns.
        dims: the required widths of embedding columns, if known.

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
    """The widths of the fixed-size embedding columns, from the first file's footer."""
    with parquet.open_parquet(files(source.manifest)[0]) as file:
        schema = file.schema_arrow
    columns = {role: getattr(source.columns, role) for role in EMBEDDINGS}
    kinds = {role: schema.field(name).type for role, name in columns.items() if name in schema.names}
    return {role: kind.list_size for role, kind in kinds.items() if pa.types.is_fixed_size_list(kind)}


def ids_are_integers(source: settings.ManifestSettings) -> bool:
    """Whether the ids are integers rather than strings, from the first file's footer. `columns.id` must be given."""
    with parquet.open_parquet(files(source.manifest)[0]) as file:
        return bool(pa.types.is_integer(file.schema_arrow.field(source.columns.id).type))


def digest(source: settings.ManifestSettings) -> str:
    """A digest of the manifest's content: of all bytes, or above 1 GiB of the Parquet footers.

    A footer has the sizes and statistics of every column. A change that keeps all of these is not noticed.
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
    """Check a manifest and write it as `<folder>/part-*.parquet`, with Ray.

    Existing parts of the same content, settings and `root` are kept. If only `root` has changed, the parts are written
    again with the same rows, so files that were made from them stay valid.

    Args:
        run: the run.
        folder: name of the folder in the run.
        source: the files and their columns.
        dims: the required widths of embedding columns, if known.
        unit_rows: rows per row group.
        root: folder at which relative uris of images start.

    Raises:
        DataError: see `scan`; or a null, a row without image and embeddings, an embedding of a wrong
            width or with a NaN, or a repeated id. The message names the file and the row.
    """
    done = read_manifest(run, folder)
    content, reading = digest(source), _reading(source, dims)
    if done is not None:
        same = (done.digest, done.unit_rows) == (content, unit_rows) and done.root in ("", root)
        if same and _was_read_so(run, done, reading):
            return done
    partitions = scan(source, dims)
    if done is not None:
        objects.delete_files([_marker(run, folder)])  # first, so that half-replaced parts do not look complete
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
    """The manifest that `normalise` wrote; None if it has not finished."""
    where = _marker(run, folder)
    found = objects.read_versioned(where)
    return documents.parse(Manifest, found[0], where, documents.REDO) if found else None


def ids_of(run: Run, folder: str) -> Int64:
    """The ids of a normalised manifest, (n,) int64; empty if there is no such manifest."""
    found = read_manifest(run, folder)
    parts = range(0 if found is None else len(found.rows))
    ids = [parquet.read_parquet(run.part(folder, part), ["id"])["id"].to_numpy() for part in parts]
    return np.concatenate([np.empty(0, np.int64), *ids])


def is_drawn_from(drawn: Manifest, gallery: Manifest) -> bool:
    """Whether a sample was drawn from the gallery's present parts."""
    return (drawn.digest, drawn.root, drawn.reading) == (gallery.digest, gallery.root, gallery.reading)


def write_drawn(run: Run, folder: str, gallery: Manifest, rows: pa.Table, sample: str = "") -> Manifest:
    """Write a sample of the gallery as a normalised manifest with one part.

    Args:
        run: the run.
        folder: name of the sample's folder in the run.
        gallery: the manifest from which the rows are.
        rows: rows of its parts, in the order of writing.
        sample: the digest of the user's sample, if there is one.
    """
    groups = (rows.slice(start, gallery.unit_rows) for start in range(0, rows.num_rows, gallery.unit_rows))
    data = parquet.parquet_bytes(manifest_schema(gallery.dims), groups)
    objects.put(run.part(folder, 0), data)
    drawn = replace(gallery, rows=[rows.num_rows], sample=sample, parts=(hashlib.sha256(data).hexdigest(),))
    objects.put(_marker(run, folder), documents.encode(drawn))
    return drawn


def units(run: Run, folder: str, manifest: Manifest) -> list[Unit]:
    """The row groups of all parts as units of the embedding stream, with the part's number as `wave`."""
    found = []
    for number, rows in enumerate(manifest.rows):
        for row_group, start in enumerate(range(0, rows, manifest.unit_rows)):
            images = min(manifest.unit_rows, rows - start)
            found.append(Unit(number, row_group, run.part(folder, number), row_group, images))
    return found


def files(given: str | tuple[str, ...]) -> list[str]:
    """The files of a manifest setting: a path, a folder, a glob, or several.

    Raises:
        DataError: there are no files, or the manifest is incomplete.
    """
    found = []
    for pattern in (given,) if isinstance(given, str) else given:
        if is_incomplete(pattern):
            raise DataError(
                "the manifest is incomplete",
                expected="a finished `fastfill manifest`",
                where=pattern,
                remedy="run that command again; it continues where it was stopped",
            )
        uris = objects.expand(pattern, ".parquet")
        if not uris:
            raise DataError("there is no manifest file", expected="Parquet files", where=pattern)
        found += uris
    return found


def _reading(source: settings.ManifestSettings, dims: dict[str, int]) -> str:
    """A digest of how rows are read: columns by role, expected widths, and the files if they hold the images."""
    columns = source.columns.model_dump(exclude_none=True)
    expected = {role: width for role, width in dims.items() if role in columns}
    places = files(source.manifest) if source.columns.image is not None else []
    return hashlib.sha256(json.dumps([columns, expected, places], sort_keys=True).encode()).hexdigest()


def _was_read_so(run: Run, done: Manifest, reading: str) -> bool:
    """Whether the parts were read with the present settings.

    Older versions did not store these. In a started run their parts are kept, because the config was compared with
    run.json. Otherwise they may come from a refused command, so they are read again.
    """
    return done.reading == reading if done.reading else objects.exists(run.settings)


def _remove_parts_from(run: Run, folder: str, number: int) -> None:
    """Remove the surplus parts of an earlier, longer manifest, because readers list the folder."""
    kept, start = {run.part(folder, part) for part in range(number)}, run.path(folder, "part-")
    found = (uri for uri, _ in objects.iter_stats(run.path(folder), deep=False))
    objects.delete_files([uri for uri in found if uri.startswith(start) and uri not in kept])


def _columns(group: pq.RowGroupMetaData) -> list[pq.ColumnChunkMetaData]:
    return [group.column(index) for index in range(group.num_columns)]


def _tag(uri: str, hashed: bool) -> str:
    """A file's etag, and for a local file its sha256 too, because its etag changes if it is touched or copied."""
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
            "an id occurs more than once",
            expected="unique ids",
            found=found,
            where=f"{', '.join(source.manifest)}: column {source.columns.id}",
        )


def _first_duplicate(run: Run, folder: str, num_parts: int, num_rows: int) -> str | None:
    """The first repeated id, or repeated key if the user's ids are strings; ids are compared in buckets."""
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
