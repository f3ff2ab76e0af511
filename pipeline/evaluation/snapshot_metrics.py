"""The quality of a run's published snapshots, measured on the vectors of their segments.

Distances are exact over the decoded vectors, so the metrics include the loss by codec and rejects; index_recall10
measures the loss by `nprobe`. One wave changes from a commit to the next, so each segment is decoded once.
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
from pipeline.evaluation.knn_by_kind import CalibratedRows, nearest_by_kind
from pipeline.evaluation.metrics import EvaluateOptions, evaluate
from pipeline.evaluation.ranks import TOP_K
from pipeline.index import leases
from pipeline.index.codebook import Codebook
from pipeline.index.commits import Commit, read_commit
from pipeline.index.segment import Segment, decode_segment
from pipeline.index.segment_files import SegmentKind, SegmentRef
from pipeline.index.tags import PROD, list_commits, read_commits, read_tag
from pipeline.knn import paired_keys
from pipeline.run import Run
from pipeline.serving.searcher import Searcher

SnapshotPoint = dict[str, int | float]
_Cell = tuple[int, int, SegmentKind]

_RECALL_QUERIES = 1000


def published_points(
    run: Run, gallery: GalleryArrays | None = None, on_progress: Callable[[int, int], None] | None = None
) -> list[SnapshotPoint]:
    """`{"commit":, "fraction":, "top1":, "top5":, "map":}` of each stored commit, ascending.

    Args:
        run: its vector log is finished: queries are the new embeddings of all images.
        gallery: the run's, if it is loaded already.

    Raises:
        DataError: a segment is missing or damaged, or no image is embedded and labelled.
    """
    gallery = gallery or load_gallery(run)
    snapshots = _Snapshots(run, gallery)
    commits = read_commits(run)
    points: list[SnapshotPoint] = []
    for done, commit in enumerate(commits, start=1):
        with contextlib.suppress(Removed), leases.hold(run, commit.number):
            points.append(_measure(snapshots, gallery, commit))
        if on_progress is not None:
            on_progress(done, len(commits))
    return points


def published_point(run: Run, commit: int | None = None) -> SnapshotPoint:
    """The point of one commit; by default of the one that `prod` serves, else of the last one.

    It also has `num_queries`, and under `recall10` the index_recall10: of the 10 nearest by exact search in the stored
    vectors, the per cent that the index finds with its nprobe, over at most 1,000 queries.

    Raises:
        DataError: there is no such commit, labelled images are not embedded yet, or as `published_points`.
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
    with leases.hold(run, commit):
        point = _measure(snapshots, gallery, found)
        return point | {"num_queries": len(query_rows(gallery)), "recall10": _index_recall10(snapshots, gallery, found)}


def _measure(snapshots: _Snapshots, gallery: GalleryArrays, commit: Commit) -> SnapshotPoint:
    rows = query_rows(gallery)
    vectors, held = snapshots.vectors_of(commit)
    metrics = evaluate(
        gallery.embedded[rows],
        vectors[held],
        gallery.labels[rows],
        gallery.labels[held],
        EvaluateOptions(
            metric=commit.metric,
            query_ids=gallery.ids[rows],
            gallery_ids=gallery.ids[held],
            transformed=snapshots.transformed[held],
            calibration=commit.calibration,
        ),
    )
    counts = commit.counts  # rejects and deleted images count as done, as in simulated curves
    fraction = (counts.embedded + counts.rejected + counts.deleted) / counts.gallery
    return {"commit": commit.number, "fraction": fraction, **metrics.as_dict()}


def _index_recall10(snapshots: _Snapshots, gallery: GalleryArrays, commit: Commit) -> float:
    """The per cent of the 10 nearest stored vectors that the index finds; one as near as the tenth counts as it."""
    rows = query_rows(gallery)
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, _RECALL_QUERIES).astype(np.int64))]
    vectors, held = snapshots.vectors_of(commit)
    k = min(TOP_K, len(held))
    with Searcher(snapshots.run.uri, commit=commit.number) as searcher:
        ids = searcher.search(gallery.embedded[rows], k).ids
    queries, vectors, transformed = gallery.embedded[rows], vectors[held], snapshots.transformed[held]
    if commit.metric == "cosine":  # stored vectors have length 1, or what the codec leaves of it
        queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    metric = "l2" if commit.metric == "l2" else "ip"
    nobody = np.full(len(rows), -1)
    mapped_rows = CalibratedRows(transformed, commit.calibration)
    last = nearest_by_kind(queries, vectors, k, nobody, metric, mapped_rows)[0][:, -1:]
    places = np.searchsorted(gallery.ids[held], ids) * (ids >= 0)
    keys = paired_keys(queries, vectors[places], metric)
    if commit.calibration is not None:
        keys = np.where(transformed[places], commit.calibration.apply(keys), keys)
    lengths = np.linalg.norm(queries, axis=1) + np.linalg.norm(vectors, axis=1).max()
    found = (ids >= 0) & (keys <= last + ROUNDING * np.square(lengths)[:, None])
    return 100 * float(found.mean())


def _cell(ref: SegmentRef) -> _Cell:
    return (ref.shard, ref.wave, ref.kind)


@dataclass(slots=True)
class _Snapshots:
    """The vectors of one commit after another, in the rows of the gallery."""

    run: Run
    gallery: GalleryArrays
    vectors: Float32 = field(init=False)
    transformed: Bools = field(init=False)  # (N,) bool, in a transformed segment
    applied: dict[_Cell, str] = field(default_factory=dict)  # the sha256 of the segment whose vectors are loaded
    rows: dict[_Cell, Int64] = field(default_factory=dict)  # the rows of these vectors
    codebooks: dict[str, Codebook] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.vectors = np.empty_like(self.gallery.transformed)
        self.transformed = np.ones(len(self.vectors), np.bool_)

    def vectors_of(self, commit: Commit) -> tuple[Float32, Int64]:
        """(N, d_new) float32 from the commit's segments, and the rows that they hold; overwritten by the next call.

        Raises:
            DataError: the commit does not hold exactly the gallery without deleted images.
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
