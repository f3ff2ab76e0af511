"""Export a snapshot for other programs: plain FAISS indexes per shard, or Parquet files.

A folder with an `export.json` is a whole export of one commit, with checksums. An interrupted export continues, and
other files in the folder are never overwritten. Memory holds one shard at a time; a lease keeps the commit from gc.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from pipeline.arrays import vector_type, vectors_to_arrow
from pipeline.errors import DataError, Refused
from pipeline.index import commits, leases, segment, tags
from pipeline.index.codebook import Codebook
from pipeline.index.commits import Commit
from pipeline.index.segment import Segment
from pipeline.index.segment_files import KINDS, SegmentKind, SegmentRef, check_digest
from pipeline.index.tags import PROD
from pipeline.readable import counted
from pipeline.run import Run
from pipeline.schema import FORMAT_VERSION
from pipeline.serving.user_keys import UserKeys
from pipeline.storage import objects, parquet

Format = Literal["faiss", "parquet"]
Tree = dict[str, Any]  # Any: what JSON can hold

_MARKER, _STARTED = "export.json", "export.started.json"
_HOW_TO_MERGE = (
    "Search both kinds for k neighbours each. Replace the key of each transformed hit by map(key), and take the k "
    "smallest keys of both. A key is the squared distance for l2, and minus the similarity for ip and cosine. The map "
    "is linear between the knots (observed[i], expected[i]), and has slope 1 below the first and above the last. "
    "Equal keys: embedded first, then by the key before the map, then by id."
)
_SUFFIX = {"faiss": "faiss", "parquet": "parquet"}


def export(
    run_uri: str,
    out_uri: str,
    form: Format,
    *,
    tag: str = PROD,
    commit: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Tree:
    """Write a snapshot as files of another format, one per shard; returns the content of `export.json`.

    `faiss`: each file is an IVF index (after its transforms, if any) with the gallery's ids, and finds what the
    snapshot finds in that shard. With a calibration each shard has one file per kind of vector: distances of the two
    kinds are only comparable after the map in `export.json`. If the users' ids are strings, `shard-*.ids.parquet` has
    `id` and `key` of each vector. `parquet`: `id`, `key` (the user's string id), `vector` and `kind`, one row group
    per wave.

    Args:
        run_uri: the run.
        out_uri: an empty or missing folder, or an interrupted export of the same commit and format.
        form: of the files.
        tag: which snapshot, if no commit is given.
        commit: its number.
        on_progress: called with (shards done, shards).

    Raises:
        DataError: there is no such commit, or one of its files is missing or damaged.
        Refused: the folder has other files, or gc has removed the commit.
    """
    run = Run(run_uri)
    found = commits.read_commit(run, tags.tagged(run, tag) if commit is None else commit)
    with leases.hold(run, found.number):
        codebook = Codebook.open(run, found.codebook_path, found.codebook_sha256)
        writer = _Writer(run, out_uri, form, found, codebook, UserKeys(run))
        finished = writer.begin()
        if finished is not None:
            return finished
        files = []
        for shard in range(found.num_shards):
            files += writer.write(shard)
            if on_progress is not None:
                on_progress(shard + 1, found.num_shards)
        return writer.finish(files)


@dataclass(frozen=True, slots=True)
class _Writer:
    run: Run
    out_uri: str
    form: Format
    commit: Commit
    codebook: Codebook
    keys: UserKeys

    def facts(self) -> Tree:
        """The identity of an export: equal for two attempts at the same."""
        content = json.dumps(self.commit.content(), sort_keys=True, default=str)
        return {
            "format_version": FORMAT_VERSION,
            "format": self.form,
            "commit": self.commit.number,
            "commit_sha256": hashlib.sha256(content.encode()).hexdigest(),
            "metric": self.commit.metric,
            "nprobe": self.commit.nprobe,
            "dim": self.commit.dim,
            "codec": self.codebook.codec,
            "vectors": "exact" if self.codebook.exact else "decoded",
            "counts": asdict(self.commit.counts),
            "calibration": self._calibration(),
        }

    def _calibration(self) -> Tree | None:
        if self.commit.calibration is None:
            return None
        knots = {name: list(values) for name, values in asdict(self.commit.calibration).items()}
        return knots | {"how_to_merge": _HOW_TO_MERGE}

    def _kinds(self) -> tuple[SegmentKind | None, ...]:
        """The content of each file of a shard: one kind, or both (None)."""
        return (None,) if self.form == "parquet" or self.commit.calibration is None else KINDS

    def begin(self) -> Tree | None:
        """Check that the folder is ours; returns the marker's content if the export is finished."""
        facts = self.facts()
        probes = {uri for uri, _ in objects.list_leftovers(self.out_uri)}
        there = {uri.rpartition("/")[2]: uri for uri in objects.list_files(self.out_uri) if uri not in probes}
        for name in (_MARKER, _STARTED):
            if name in there:
                known: Tree = _read_json(there[name])
                if {key: known.get(key) for key in facts} != facts:
                    raise self._in_the_way(f"an export of {known.get('format')} of commit {known.get('commit')}")
                if name == _MARKER:
                    objects.delete_files([objects.join(self.out_uri, _STARTED)])
                    return known
        shards = range(self.commit.num_shards)
        names = {self._name(shard, kind) for shard in shards for kind in self._kinds()}
        strangers = there.keys() - {_STARTED, *names, *map(self._ids_name, shards)}
        if there and (_STARTED not in there or strangers):
            raise self._in_the_way(f"{counted(len(there), 'file')}, such as {min(strangers or there)}")
        if not there:
            objects.put(objects.join(self.out_uri, _STARTED), json.dumps(facts, indent=1).encode())
        return None

    def write(self, shard: int) -> list[Tree]:
        """Write the files of a shard that are missing; returns their entries for the marker."""
        files = []
        refs = sorted((ref for ref in self.commit.segments if ref.shard == shard), key=lambda ref: ref.wave)
        ids = self._put(self._ids_name(shard), partial(self._ids, refs)) if self._has_ids_files() else None
        for kind in self._kinds():
            mine = [ref for ref in refs if kind in (None, ref.kind)]
            num_vectors = sum(ref.vectors for ref in mine)
            if kind is not None and not num_vectors:
                continue
            form = self._faiss if self.form == "faiss" else partial(self._parquet, shard=shard)
            found = self._put(self._name(shard, kind), partial(form, mine))
            found |= {"shard": shard, "vectors": num_vectors}
            found |= {} if kind is None else {"kind": kind}
            files.append(found | ({} if ids is None else {"ids": ids}))
        return files

    def _has_ids_files(self) -> bool:
        return self.form == "faiss" and self.keys.exist

    def _put(self, name: str, make: Callable[[], bytes]) -> Tree:
        """Write a file unless it exists; returns its name, size and checksum."""
        uri = objects.join(self.out_uri, name)
        if objects.exists(uri):
            return {"path": name, "bytes": objects.stat(uri).size_bytes, "sha256": objects.sha256(uri)}
        data = make()
        objects.put(uri, data)
        return {"path": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def finish(self, files: list[Tree]) -> Tree:
        marker = self.facts() | {"files": files}
        objects.put(objects.join(self.out_uri, _MARKER), json.dumps(marker, indent=1).encode())
        objects.delete_files([objects.join(self.out_uri, _STARTED)])
        return marker

    def _faiss(self, refs: list[SegmentRef]) -> bytes:
        segments = (Segment.open(self.run, self.codebook, ref) for ref in refs)
        return segment.merge(self.codebook, segments, self.commit.nprobe)

    def _parquet(self, refs: list[SegmentRef], shard: int) -> bytes:
        facts = self.facts() | {"shard": shard}
        schema = pa.schema(
            [
                pa.field("id", pa.int64(), nullable=False),
                pa.field("key", pa.string()),
                pa.field("vector", vector_type(self.commit.dim)),
                pa.field("kind", pa.string()),
            ],
            metadata={"fastfill": json.dumps(facts)},
        )
        return parquet.parquet_bytes(schema, self._row_groups(refs))

    def _row_groups(self, refs: list[SegmentRef]) -> Iterator[pa.Table]:
        sidecars = [_sidecar(self.run, ref) for ref in refs]
        keys = self.keys.strings(pa.concat_tables(sidecars)["id"].to_numpy())  # once: it reads the whole gallery
        done = 0
        for ref, sidecar in zip(refs, sidecars, strict=True):
            ids, vectors = segment.decode_segment(self.codebook, Segment.open(self.run, self.codebook, ref))
            if not pa.array(ids).equals(sidecar["id"].combine_chunks()):
                raise DataError("a segment and its sidecar differ in ids", where=self.run.path(ref.sidecar_path))
            columns = {"id": pa.array(ids), "key": keys.slice(done, len(ids)), "vector": vectors_to_arrow(vectors)}
            yield pa.table(columns | {"kind": sidecar["kind"]})
            done += len(ids)

    def _ids(self, refs: list[SegmentRef]) -> bytes:
        """The ids in a shard's FAISS file, and the users' own."""
        ids = np.sort(pa.concat_tables([_sidecar(self.run, ref) for ref in refs])["id"].to_numpy())
        schema = pa.schema([pa.field("id", pa.int64(), nullable=False), pa.field("key", pa.string())])
        return parquet.parquet_bytes(schema, [pa.table({"id": pa.array(ids), "key": self.keys.strings(ids)})])

    def _name(self, shard: int, kind: SegmentKind | None) -> str:
        return f"shard-{shard:05d}{'' if kind is None else f'-{kind}'}.{_SUFFIX[self.form]}"

    def _ids_name(self, shard: int) -> str:
        return f"shard-{shard:05d}.ids.parquet"

    def _in_the_way(self, found: str) -> Refused:
        return Refused(
            "the folder to export to is not empty",
            expected=f"nothing, or an unfinished export of {self.form} of commit {self.commit.number}",
            found=found,
            where=self.out_uri,
            remedy="choose another folder, or empty this one",
        )


def _read_json(uri: str) -> Tree:
    try:
        tree = json.loads(objects.read_bytes(uri))
    except ValueError as error:
        raise DataError("not a JSON file", found=error, where=uri, remedy="give another folder") from error
    return tree if isinstance(tree, dict) else {}


def _sidecar(run: Run, ref: SegmentRef) -> pa.Table:
    """`id` and `kind` of a segment's rows, sorted by id."""
    where = run.path(ref.sidecar_path)
    check_digest(where, ref.sidecar_sha256)
    return parquet.read_parquet(where, ["id", "kind"])
