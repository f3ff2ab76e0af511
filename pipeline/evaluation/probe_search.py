"""Search for each probe image's nearest: among the old embeddings of the whole gallery, and in a snapshot.

A snapshot gives the hits that its readers get, and the vectors stored under the probe images' own ids. It is searched
wave by wave, in tasks. One wave differs between a commit and the next, so only that wave is searched; its hits are
kept beside the probe set. The driver holds Q x NEIGHBOURS numbers per wave and Q vectors in all.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import reduce

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import parallel
from pipeline.arrays import Float32, Int64, vectors_from_arrow, vectors_to_arrow
from pipeline.config.tree import Metric
from pipeline.embedding.precompute import read_embeddings
from pipeline.embedding.vector_log import VectorLog
from pipeline.evaluation.probe_set import ProbeSet
from pipeline.evaluation.ranks import TOP_K
from pipeline.index import segment as index
from pipeline.index.codebook import Codebook
from pipeline.index.commits import Commit
from pipeline.index.segment import Segment
from pipeline.index.segment_files import KINDS, SegmentRef
from pipeline.knn import nearest
from pipeline.models.calibration import Calibration
from pipeline.planning import plan as plans
from pipeline.planning.plan import Plan
from pipeline.run import PROBE_SET, Run
from pipeline.storage import objects, parquet

NEIGHBOURS = TOP_K + 1  # one may be the image itself

_FORMAT = 2  # of the file of a wave; 1 had no vectors
_BYTES_AT_ONCE = 2**30  # segment bytes per task


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The k nearest of each of Q images, best first."""

    ids: Int64  # (Q, k) int64; -1 if there are fewer
    keys: Float32  # (Q, k) float32, the smaller the nearer, not calibrated; inf if there are fewer
    labels: Int64  # (Q, k) int64 into the probe set's `label_names`; -1 for any other label and for none
    transformed: NDArray[np.bool_]  # (Q, k) bool, whether the hit is a transformed vector

    @classmethod
    def none(cls, num_queries: int, k: int = NEIGHBOURS) -> Neighbours:
        """No neighbours at all."""
        shape = (num_queries, k)
        return cls(
            np.full(shape, -1, np.int64),
            np.full(shape, np.inf, np.float32),
            np.full(shape, -1, np.int64),
            np.zeros(shape, np.bool_),
        )

    def merge(self, other: Neighbours, calibration: Calibration | None = None) -> Neighbours:
        """The k nearest of both; equal ones in the order of `index.segment.search_by_kind`."""
        both = [np.concatenate([getattr(self, item.name), getattr(other, item.name)], axis=1) for item in fields(self)]
        ids, keys, transformed = both[0], both[1], both[3]
        by = [ids, keys]
        if calibration is not None:
            by += [transformed, np.where(transformed, calibration.apply(keys), keys)]
        order = np.lexsort(by, axis=1)[:, : self.ids.shape[1]]
        return Neighbours(*(np.take_along_axis(values, order, axis=1) for values in both))

    def without(self, own: Int64) -> Neighbours:
        """(Q, k - 1): without each image's own id (Q,), or without the last if that is not found."""
        k = self.ids.shape[1]
        mine = self.ids == own[:, None]
        mine[~mine.any(axis=1), -1] = True
        order = np.argsort(mine, axis=1, kind="stable")[:, : k - 1]
        return Neighbours(*(np.take_along_axis(getattr(self, item.name), order, axis=1) for item in fields(self)))


@dataclass(frozen=True, slots=True)
class Found:
    """The result of searching a wave or a whole snapshot."""

    nearest: Neighbours  # the hits
    embedded: NDArray[np.bool_]  # (Q,) bool, the probe images whose embedded vector it holds
    rows: Int64  # (n,) int64, the probe images of which it holds a vector of either kind
    stored: Float32  # (n, d) float32, that vector, decoded
    kept: Float32  # (n, d) float32, the image's new embedding after the codec

    def merge(self, other: Found, calibration: Calibration | None = None) -> Found:
        """Both together; the calibration is that of the commit."""
        both = ((getattr(self, name), getattr(other, name)) for name in ("rows", "stored", "kept"))
        return Found(
            self.nearest.merge(other.nearest, calibration),
            self.embedded | other.embedded,
            *(np.concatenate(pair) for pair in both),
        )


def in_old_gallery(metric: Metric, run: Run, plan: Plan, probe: ProbeSet, log: VectorLog) -> tuple[Neighbours, Int64]:
    """Exact search with the probe's old embeddings in those of the whole gallery, part by part.

    Args:
        log: old embeddings of the gallery that did not come with its manifest.

    Returns:
        the nearest, and how many images have each of the probe's labels, (num_labels,) int64.
    """
    shared = (run, log, probe, metric)
    found, counts = Neighbours.none(len(probe.ids)), np.zeros(len(probe.label_names), np.int64)
    for some, in_part in parallel.each(_in_old_part, shared, range(plan.num_parts), plan.num_gallery):
        found, counts = found.merge(some), counts + in_part
    return found, counts


def in_snapshot(run: Run, plan: Plan, probe: ProbeSet, commit: Commit, known: dict[str, Found]) -> Found:
    """Search a commit with the probe's new embeddings; waves that were searched before are not searched again.

    Args:
        commit: it may be a draft.
        known: the waves that this process has searched, by file; afterwards it holds those of this commit.

    Raises:
        DataError: a segment is missing or damaged.
    """
    waves: dict[int, list[SegmentRef]] = defaultdict(list)
    for ref in commit.segments:
        waves[ref.wave].append(ref)
    stored = {_uri(run, commit, refs): refs for refs in waves.values()}
    for uri in known.keys() - stored.keys():
        del known[uri]
    known |= {uri: _from_parquet(uri) for uri in stored.keys() - known.keys() if objects.exists(uri)}
    missing = {uri: refs for uri, refs in stored.items() if uri not in known}
    pieces = [(uri, some) for uri, refs in missing.items() for some in _portions(refs)]
    images = sum(ref.vectors for refs in missing.values() for ref in refs)
    found: dict[str, Found] = {}
    each = parallel.each(_in_segments, (run, plan, probe, commit), [refs for _, refs in pieces], images)
    for (uri, _), some in zip(pieces, each, strict=True):
        found[uri] = found[uri].merge(some, commit.calibration) if uri in found else some
    for uri, some in found.items():
        objects.put(uri, _to_parquet(some))
    known |= found
    return reduce(lambda one, other: one.merge(other, commit.calibration), known.values())


def _in_old_part(run: Run, log: VectorLog, probe: ProbeSet, metric: Metric, part: int) -> tuple[Neighbours, Int64]:
    table, old = read_embeddings(run, "gallery", part, "old_embedding", log)
    labels = _codes(table, probe)
    counts = np.bincount(labels[labels >= 0], minlength=len(probe.label_names))
    ids: Int64 = table["id"].to_numpy()
    if not len(ids):
        return Neighbours.none(len(probe.ids)), counts
    keys, rows = nearest(probe.old, old, min(NEIGHBOURS, len(ids)), metric=metric)
    few = Neighbours(ids[rows], keys, labels[rows], np.zeros(rows.shape, np.bool_))
    return Neighbours.none(len(probe.ids)).merge(few), counts


def _in_segments(run: Run, plan: Plan, probe: ProbeSet, commit: Commit, refs: Sequence[SegmentRef]) -> Found:
    codebook = Codebook.open(run, commit.codebook_path, commit.codebook_sha256)
    segments = [Segment.open(run, codebook, ref) for ref in refs]
    kinds = {kind: [item for item, ref in zip(segments, refs, strict=True) if ref.kind == kind] for kind in KINDS}
    hits = index.search_by_kind(codebook, kinds, probe.new, NEIGHBOURS, commit.nprobe, commit.calibration)
    ids = hits.ids
    keys = np.where(ids < 0, np.float32(np.inf), hits.raw if commit.metric == "l2" else -hits.raw)
    shards = range(min(ref.shard for ref in refs), max(ref.shard for ref in refs) + 1)
    planned = plans.read_transformed(run, plan, refs[0].wave, ["id", "label"], shards)
    sidecars = pa.concat_tables([parquet.read_parquet(run.path(ref.sidecar_path), ["id", "kind"]) for ref in refs])
    new = sidecars.filter(pa.compute.equal(sidecars["kind"], "embedded"))["id"].to_numpy()
    labels = _look_up(ids, planned["id"].to_numpy(), _codes(planned, probe))
    own_ids, stored = (
        np.concatenate(some)
        for some in zip(*(index.decode_segment(codebook, segment, probe.ids) for segment in segments), strict=True)
    )
    rows = np.searchsorted(probe.ids, own_ids)
    return Found(
        Neighbours(ids, keys, labels, (ids >= 0) & ~np.isin(ids, new)),
        np.isin(probe.ids, new),
        rows,
        stored,
        index.as_stored(codebook, probe.new[rows]),
    )


def _codes(images: pa.Table, probe: ProbeSet) -> Int64:
    """(N,) labels as indices into the probe set's names, -1 for others; probe images have the probe set's labels."""
    found = pa.compute.index_in(images["label"], value_set=pa.array(probe.label_names, pa.string()), skip_nulls=True)
    codes: Int64 = found.fill_null(-1).to_numpy().astype(np.int64)
    ids: Int64 = images["id"].to_numpy()
    places = np.minimum(np.searchsorted(probe.ids, ids), len(probe.ids) - 1)
    return np.where(probe.ids[places] == ids, probe.labels[places], codes)


def _look_up(ids: Int64, known: Int64, values: Int64) -> Int64:
    """The value of each id, in the shape of `ids`; -1 for an unknown id."""
    if not len(known):
        return np.full(ids.shape, -1, np.int64)
    order = np.argsort(known)
    places = order[np.minimum(np.searchsorted(known[order], ids), len(known) - 1)]
    return np.where(known[places] == ids, values[places], -1)


def _portions(refs: list[SegmentRef]) -> list[list[SegmentRef]]:
    """A wave's segments by shard, one list per task."""
    refs = sorted(refs, key=lambda ref: ref.shard)
    step = max(1, len(refs) * _BYTES_AT_ONCE // max(1, sum(ref.bytes for ref in refs)))
    return [refs[first : first + step] for first in range(0, len(refs), step)]


def _uri(run: Run, commit: Commit, refs: list[SegmentRef]) -> str:
    """The file of a wave's hits, named by the content of its segments and the settings of the search."""
    content: list[object] = [_FORMAT, commit.codebook_sha256, commit.nprobe]
    content.append(sorted((ref.shard, ref.sha256) for ref in refs))
    content += [] if commit.calibration is None else [commit.calibration]
    digest = hashlib.sha256(repr(content).encode()).hexdigest()
    return run.path(PROBE_SET, "neighbours", f"wave-{refs[0].wave:03d}-{digest[:16]}.parquet")


def _to_parquet(found: Found) -> bytes:
    """One row per probe image; its vectors are null if the wave does not hold it."""
    k, count = found.nearest.ids.shape[1], len(found.embedded)
    places = np.full(count, -1)
    places[found.rows] = np.arange(len(found.rows))
    taken = pa.array(places, mask=places < 0)
    vectors = {name: vectors_to_arrow(getattr(found, name)).take(taken) for name in ("stored", "kept")}
    columns = {
        item.name: pa.FixedSizeListArray.from_arrays(pa.array(getattr(found.nearest, item.name).reshape(-1)), k)
        for item in fields(Neighbours)
    }
    table = pa.table({**columns, "embedded": pa.array(found.embedded), **vectors})
    return parquet.parquet_bytes(table.schema, [table])


def _from_parquet(uri: str) -> Found:
    table = parquet.read_parquet(uri)
    columns = [table[item.name].combine_chunks() for item in fields(Neighbours)]
    values = [column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1) for column in columns]
    there = table["stored"].is_valid()
    stored, kept = (vectors_from_arrow(table[name].filter(there)) for name in ("stored", "kept"))
    return Found(Neighbours(*values), table["embedded"].to_numpy(), np.flatnonzero(there.to_numpy()), stored, kept)
