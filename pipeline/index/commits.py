"""The commit: the file that names all segments of a snapshot; its content, checks and JSON.

In commit n the waves up to n are embedded and the others transformed. It names one segment per (shard, wave), and one
more for rejects: a segment holds one kind, so rejected images of an embedded wave have a transformed segment. Segments
of earlier versions hold these images beside the embedded ones; they are still read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Self

from pipeline.config.tree import Metric
from pipeline.errors import DataError
from pipeline.index.leases import read_removals, removed
from pipeline.index.segment_files import SegmentRef
from pipeline.models.calibration import Calibration
from pipeline.run import Run
from pipeline.storage import documents, objects

_WHO_PUBLISHED = {"attempt_id", "epoch", "created_unix_seconds"}


@dataclass(frozen=True, slots=True)
class SegmentCounts:
    """Images of a snapshot: transformed + embedded + deleted = gallery; rejected images are among the transformed."""

    gallery: int
    transformed: int
    embedded: int
    rejected: int
    deleted: int = 0

    @property
    def vectors(self) -> int:
        """The number of vectors in the index."""
        return self.transformed + self.embedded

    @classmethod
    def of(cls, segments: Sequence[SegmentRef]) -> Self:
        """The counts of a snapshot of these segments."""
        vectors = sum(segment.vectors for segment in segments)
        deleted = sum(segment.deleted for segment in segments)
        rejected = sum(segment.rejected for segment in segments)
        embedded = sum(segment.vectors - segment.rejected for segment in segments if segment.kind == "embedded")
        return cls(vectors + deleted, vectors - embedded, embedded, rejected, deleted)


@dataclass(frozen=True, slots=True)
class Commit:
    """One snapshot: the waves up to `number` are embedded, the others transformed.

    `Writer.publish` fills in the last three fields.
    """

    number: int
    parent: int | None  # number - 1, or None for commit 0
    codebook_path: str
    codebook_sha256: str
    metric: Metric
    nprobe: int
    dim: int
    num_waves: int
    num_shards: int
    segments: tuple[SegmentRef, ...]  # one per (shard, wave), and one more for rejected images of an embedded wave
    counts: SegmentCounts
    # For each embedded wave, the digest of the vector log's parts that it was sealed from; empty if not known (waves
    # sealed by older versions)
    log_digests: tuple[str, ...] = ()
    first_wave: int = 1  # 0 if commit 0 holds a wave that was embedded for the fit, else 1
    calibration: Calibration | None = None  # maps the keys of transformed hits; the same in all commits of a run
    attempt_id: str = ""
    epoch: int = 0
    created_unix_seconds: float = 0.0

    def content(self) -> dict[str, object]:
        """Everything except who published it and when: equal for two attempts on equal processors."""
        return {key: value for key, value in asdict(self).items() if key not in _WHO_PUBLISHED}

    def held(self) -> dict[str, object]:
        """`content` without the names of files that hold vectors: equal for two attempts on any processors.

        On another processor a segment may have other bytes, hence another name (`equality`); so may the codebook,
        which is trained before commit 0. The kind of each image is in the sidecars, whose bytes are equal.
        """
        content = self.content()
        if self.number == 0:
            content = {key: value for key, value in content.items() if not key.startswith("codebook_")}
        named = {"path", "sha256", "bytes"}
        segments = [{key: value for key, value in asdict(item).items() if key not in named} for item in self.segments]
        return content | {"segments": segments}


def read_commit(run: Run, number: int) -> Commit:
    """Read a commit, and check that it names a whole snapshot.

    Raises:
        DataError: it is missing, damaged, of another format, or its segments or counts do not add up.
        Removed: gc has removed it.
    """
    where = run.commit(number)
    try:
        commit = documents.parse(Commit, objects.read_bytes(where), where, must_be_checked=True)
    except FileNotFoundError:
        if number in read_removals(run).confirmed:
            raise removed(run, number) from None
        raise DataError("there is no such commit", found=number, where=where) from None
    if commit.number != number:
        raise DataError("the commit file holds another commit", expected=number, found=commit.number, where=where)
    check_commit(commit, where)
    return commit


def file_sizes(run: Run) -> dict[str, int]:
    """The size of each file of the index, by its path below `index`; one listing."""
    return {uri.rpartition("/index/")[2]: stat.size_bytes for uri, stat in objects.list_stats(run.path("index"))}


def check_files(run: Run, number: int, sizes: dict[str, int] | None = None) -> None:
    """Check that a commit's files exist with their sizes, by few requests and without reading them.

    `sizes` is the result of `file_sizes`, if already known.

    Raises:
        DataError: the commit cannot be read, or a file is missing or has another size.
    """
    commit = read_commit(run, number)
    sizes = file_sizes(run) if sizes is None else sizes
    wanted: list[tuple[str, int | None]] = [(commit.codebook_path, None)]
    for ref in commit.segments:
        wanted += [(ref.path, ref.bytes), (ref.sidecar_path, None)]
    for path, num_bytes in wanted:
        found = sizes.get(path.removeprefix("index/"))
        if found is None or num_bytes not in (None, found):
            raise DataError(
                f"commit {number} names a file that is {'missing' if found is None else 'damaged'}",
                expected="a file" if num_bytes is None else f"{num_bytes} bytes",
                found="none" if found is None else f"{found} bytes",
                where=run.path(path),
                remedy="`fastfill repair` makes it again; `fastfill audit` lists all damaged files",
            )


def check_commit(commit: Commit, where: str) -> None:
    """Check that a commit names a whole snapshot; raises DataError, naming `where`, if it does not."""
    parent = commit.number - 1 if commit.number else None
    if commit.first_wave not in (0, 1):
        raise DataError("a commit begins with an unknown wave", expected="0 or 1", found=commit.first_wave, where=where)
    if not 0 <= commit.number <= commit.num_waves or commit.parent != parent:
        raise DataError(
            "a commit's number does not match its parent or its waves",
            expected=f"0..{commit.num_waves}, with parent {parent}",
            found=f"{commit.number}, with parent {commit.parent}",
            where=where,
        )
    rejects = [segment for segment in commit.segments if _is_of_rejects(segment, commit.number)]
    cells = sorted((segment.wave, segment.shard) for segment in commit.segments if segment not in rejects)
    planned = list(product(range(commit.first_wave, commit.num_waves + 1), range(commit.num_shards)))
    if cells != planned:
        raise DataError(
            "a commit does not name exactly one segment per (wave, shard)",
            expected=f"{commit.num_waves} waves x {commit.num_shards} shards",
            found=f"{len(cells)} segments; missing {sorted(set(planned) - set(cells))[:3]}",
            where=where,
        )
    others = sorted({(segment.wave, segment.shard) for segment in rejects})
    if len(others) != len(rejects):
        raise DataError(
            "a commit names two segments of the rejects of one (wave, shard)",
            expected=f"{len(others)} segments",
            found=len(rejects),
            where=where,
        )
    for segment in commit.segments:
        _check_segment(segment, commit, where)
    counts = SegmentCounts.of(commit.segments)
    if counts != commit.counts:
        raise DataError("the counts of a commit do not add up", expected=counts, found=commit.counts, where=where)
    embedded = commit.number - commit.first_wave + 1
    if len(commit.log_digests) not in (0, embedded):
        raise DataError(
            "a commit does not name exactly one digest of the vector log per embedded wave",
            expected=embedded,
            found=len(commit.log_digests),
            where=where,
        )


def _is_of_rejects(segment: SegmentRef, number: int) -> bool:
    """Whether a segment of commit `number` holds rejects of an embedded wave."""
    return segment.kind == "transformed" and segment.wave <= number


def _check_segment(segment: SegmentRef, commit: Commit, where: str) -> None:
    if _is_of_rejects(segment, commit.number):
        kind, least, most = "transformed", max(1, segment.vectors), segment.vectors
    elif segment.wave <= commit.number:
        kind, least, most = "embedded", 0, segment.vectors if commit.calibration is None else 0
    else:
        kind, least, most = "transformed", 0, 0
    deleted = segment.deleted < 0 or (segment.deleted > 0 and kind == "transformed")
    if least:
        expected = "a transformed segment in which all images are rejected"
    elif most:
        expected = "an embedded segment"
    else:
        expected = f"{'an embedded' if kind == 'embedded' else 'a transformed'} segment without rejects"
    if segment.kind != kind or segment.vectors < 0 or deleted or not least <= segment.rejected <= most:
        raise DataError(
            f"segment (shard {segment.shard}, wave {segment.wave}) does not belong in commit {commit.number}",
            expected=expected,
            found=f"{segment.kind}, {segment.rejected} of {segment.vectors} rejected, {segment.deleted} deleted",
            where=where,
        )
