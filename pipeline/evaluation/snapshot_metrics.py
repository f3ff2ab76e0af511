"""The quality of a run's own snapshots, measured on the vectors that their segments really hold.

After snapshot and index, beside the simulated curve. Guarantee: each stored segment is decoded once,
for only one wave changes from one commit to the next. Distances are exact over the decoded vectors, so
the metrics tell what the codec and the rejects cost; what `nprobe` leaves out is told by the recall.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from pipeline.arrays import Bools, Float32, Int64
from pipeline.equality import ROUNDING
from pipeline.errors import DataError, Removed
from pipeline.evaluation.gallery_arrays import GalleryArrays, check_known, find_rows, load_gallery, query_rows
from pipeline.evaluation.metrics import evaluate
from pipeline.evaluation.ranks import calibrate
from pipeline.index import retention
from pipeline.index.codebook import Codebook
from pipeline.index.commits import Commit, read_commit
from pipeline.index.segment import Segment, decode_segment
from pipeline.index.segment_files import SegmentKind, SegmentRef
from pipeline.index.tags import PROD, list_commits, read_commits, read_tag
from pipeline.run import Run
from pipeline.serving.searcher import Searcher

SnapshotPoint = dict[str, int | float]
_Cell = tuple[int, int, SegmentKind]

_RECALL_QUERIES = 1000
_RECALL_NEIGHBOURS = 10
_SCORES_AT_ONCE = 2**24  # 64 MB


def published_points(
    run: Run, gallery: GalleryArrays | None = None, on_progress: Callable[[int, int], None] | None = None
) -> list[SnapshotPoint]:
    """`{"commit":, "fraction":, "top1":, "top5":, "map":}` of each published commit that is left, ascending.

    Args:
        run: with a finished vector log: queries are the new embeddings of all images.
        gallery: the run's, where it is loaded already.
        on_progress: called with (commits done, commits).

    Raises:
        DataError: a segment is missing or damaged, or no image is embedded and labelled.
    """
    gallery = gallery or load_gallery(run)
    snapshots = _Snapshots(run, gallery)
    commits = read_commits(run)
    points: list[SnapshotPoint] = []
    for done, commit in enumerate(commits, start=1):
        with contextlib.suppress(Removed), retention.hold(run, commit.number):
            points.append(_measure(snapshots, gallery, commit))
        if on_progress is not None:
            on_progress(done, len(commits))
    return points


def published_point(run: Run, commit: int | None = None) -> SnapshotPoint:
    """The point of one commit; that which `prod` serves, else the last one, where none is given.

    Beside the metrics it has `num_queries`, and `recall10`: of the 10 nearest by exact search over the vectors
    that the index holds, the per cent that the index finds with its nprobe, over at most 1,000 of the queries.

    Raises:
        DataError: there is no such commit, new embeddings of labelled images are not known yet, or as
            `published_points`.
    """
    if commit is None:
        tag = read_tag(run, PROD)
        commit = tag.commit if tag is not None else max(list_commits(run), default=None)
    if commit is None:
        raise DataError("nothing is published yet", where=run.path("index"), remedy="run `fastfill backfill`")
    found = read_commit(run, commit)
    gallery = load_gallery(run)
    check_known(gallery, run, labelled_only=True)
    snapshots = _Snapshots(run, gallery)
    with retention.hold(run, commit):
        point = _measure(snapshots, gallery, found)
        return point | {"num_queries": len(query_rows(gallery)), "recall10": _recall(snapshots, gallery, found)}


def _measure(snapshots: _Snapshots, gallery: GalleryArrays, commit: Commit) -> SnapshotPoint:
    rows = query_rows(gallery)
    vectors, held = snapshots.vectors_of(commit)
    metrics = evaluate(
        gallery.embedded[rows],
        vectors[held],
        gallery.labels[rows],
        gallery.labels[held],
        metric=commit.metric,
        query_ids=gallery.ids[rows],
        gallery_ids=gallery.ids[held],
        transformed=snapshots.transformed[held],
        calibration=commit.calibration,
    )
    counts = commit.counts  # rejects and deleted images are done, as in the simulated orders
    fraction = (counts.embedded + counts.rejected + counts.deleted) / counts.gallery
    return {"commit": commit.number, "fraction": fraction, **metrics.as_dict()}


def _recall(snapshots: _Snapshots, gallery: GalleryArrays, commit: Commit) -> float:
    """How many of the nearest stored vectors the index finds, in per cent; one as near as the last counts as it."""
    rows = query_rows(gallery)
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, _RECALL_QUERIES).astype(np.int64))]
    vectors, held = snapshots.vectors_of(commit)
    vectors, k = vectors[held], min(_RECALL_NEIGHBOURS, len(held))
    with Searcher(snapshots.run.uri, commit=commit.number) as searcher:
        ids = searcher.search(gallery.embedded[rows], k).ids
    places = np.searchsorted(gallery.ids[held], ids)
    offset = np.einsum("nd,nd->n", vectors, vectors) / 2 if commit.metric == "l2" else np.float32(0)
    transformed, queries = snapshots.transformed[held], gallery.embedded[rows]
    if commit.metric == "cosine":
        queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    found, size = 0, max(1, _SCORES_AT_ONCE // len(vectors))
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        scores = queries[part] @ vectors.T - offset
        if commit.calibration is not None:
            scores = -calibrate(-scores, queries[part], transformed, commit.metric, commit.calibration)
        last = np.partition(scores, -k, axis=1)[:, -k] - ROUNDING * np.abs(scores).max(axis=1)
        there = ids[part] >= 0
        found += int((there & (np.take_along_axis(scores, places[part] * there, axis=1) >= last[:, None])).sum())
    return 100 * found / ids.size


def _cell(ref: SegmentRef) -> _Cell:
    return (ref.shard, ref.wave, ref.kind)


@dataclass(slots=True)
class _Snapshots:
    """The vectors of one commit after the other, in the rows of the gallery.

    Attributes:
        applied: by (shard, wave, kind), the sha256 of the segment whose vectors are in place.
        rows: by (shard, wave, kind), the rows of these vectors.
        transformed: (N,) bool, which rows are in a transformed segment.
    """

    run: Run
    gallery: GalleryArrays
    vectors: Float32 = field(init=False)
    transformed: Bools = field(init=False)
    applied: dict[_Cell, str] = field(default_factory=dict)
    rows: dict[_Cell, Int64] = field(default_factory=dict)
    codebooks: dict[str, Codebook] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.vectors = np.empty_like(self.gallery.transformed)
        self.transformed = np.ones(len(self.vectors), np.bool_)

    def vectors_of(self, commit: Commit) -> tuple[Float32, Int64]:
        """(N, d_new) float32 as the commit's segments hold them, overwritten by the next call; and which rows are held.

        Raises:
            DataError: the commit does not hold exactly the gallery, but for deleted images.
        """
        codebook = self._codebook(commit)
        for gone in self.applied.keys() - {_cell(ref) for ref in commit.segments}:
            del self.applied[gone], self.rows[gone]
        for ref in commit.segments:
            cell = _cell(ref)
            if self.applied.get(cell) != ref.sha256:
                ids, vectors = decode_segment(codebook, Segment.open(self.run, codebook, ref))
                self.rows[cell] = find_rows(self.gallery.ids, ids, self.run.path(ref.path))
                self.vectors[self.rows[cell]] = vectors
                self.transformed[self.rows[cell]] = ref.kind == "transformed"
                self.applied[cell] = ref.sha256
        held = np.unique(np.concatenate(list(self.rows.values())))
        if len(held) != len(self.gallery.ids) - commit.counts.deleted:
            raise DataError(
                "a commit does not hold the gallery",
                expected=f"{len(self.gallery.ids) - commit.counts.deleted} vectors",
                found=len(held),
                where=self.run.commit(commit.number),
            )
        return self.vectors, held

    def _codebook(self, commit: Commit) -> Codebook:
        sha256 = commit.codebook_sha256
        if sha256 not in self.codebooks:
            self.codebooks[sha256] = Codebook.open(self.run, commit.codebook_path, sha256)
        return self.codebooks[sha256]
