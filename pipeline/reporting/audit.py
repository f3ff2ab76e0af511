"""Prove from storage alone that a run is whole: every commit, tag, file, checksum, id and vector.

Read-only and safe at any time. A report without problems means that every published commit that gc has not removed can
be opened, holds each id of the gallery exactly once, and agrees with the vector log. The ids of the gallery are those
of `transformed/`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from pipeline.arrays import Int64
from pipeline.config.identity import read_settings
from pipeline.embedding.vector_log import unit_of, wave_digest
from pipeline.errors import DataError
from pipeline.hashing import shard_of
from pipeline.index import commits, tags
from pipeline.index.codebook import Codebook
from pipeline.index.commits import Commit
from pipeline.index.leases import read_removals
from pipeline.index.segment import Segment, decode_segment
from pipeline.index.segment_files import SegmentRef, check_digest
from pipeline.index.tags import CANDIDATE
from pipeline.models.calibration import read_calibration
from pipeline.planning.plan import read_plan
from pipeline.reporting.audit_evidence import NO_IDS, Cell, Evidence, Notes, Problem, check_manifest_rows, filled
from pipeline.reporting.audit_inputs import check_inputs
from pipeline.run import Run
from pipeline.storage import objects, parquet

_TRIES = 3
_TAG_FILE = re.compile(r"/([^/]+)\.json$")


@dataclass(frozen=True, slots=True)
class AuditReport:
    """The result: `ok` if there are no problems; `checked` counts the checks by kind."""

    ok: bool
    problems: list[Problem]
    checked: dict[str, int]


def audit(run_uri: str) -> AuditReport:
    """Check a whole run; it holds the ids of one shard and the vectors of one (shard, wave) at a time.

    Raises:
        DataError: there is no run there.
        TransientError: the store kept failing.
        PermissionError: a file may not be read.
        IncompatibleRun: this version cannot follow the plan.
    """
    run = Run(run_uri)
    if not objects.exists(run.settings):
        read_settings(run)  # raises: there is no run
    notes = Notes()
    for _ in range(_TRIES):
        notes = Notes()
        before = _published(run, notes)
        _check_all(run, notes, _commits(run, notes, *before), before[0])
        if not notes.problems or before == _published(run, Notes()):
            break  # else commits were published or removed by gc during the audit
    return AuditReport(not notes.problems, notes.problems, dict(notes.checked))


def _check_all(run: Run, notes: Notes, commits: dict[int, Commit], latest: int | None) -> None:
    _check_tags(run, notes, commits)
    check_inputs(run, notes, latest)
    published = max(commits, default=0)
    check_manifest_rows(run, notes)
    if commits:
        evidence = Evidence.gather(run, notes, published, _drops_deleted(run))
        _check_steps(run, notes, commits)
        _check_calibration(run, notes, commits)
        _check_gallery(evidence, notes, _Files(run, notes), list(commits.values()))


def _published(run: Run, notes: Notes) -> tuple[int | None, set[int]]:
    """The number of the last published commit, and those of the commits that gc has removed."""
    candidate = notes.attempt("tag", run.tag(CANDIDATE), tags.read_tag, run, CANDIDATE)
    record = notes.attempt("removals", run.collected, read_removals, run)
    return candidate.commit if candidate else None, set(record.confirmed) if record else set()


def _commits(run: Run, notes: Notes, last: int | None, removed: set[int]) -> dict[int, Commit]:
    """The published commits by number; one that cannot be read and is not removed is a problem."""
    found = {}
    for number in range(0 if last is None else last + 1):
        if number in removed:
            notes.checked["removed_commits"] += 1
            continue
        commit = notes.attempt("commit", run.commit(number), commits.read_commit, run, number)
        if commit is not None:
            found[number] = commit
            notes.checked["commits"] += 1
    return found


def _drops_deleted(run: Run) -> bool:
    plan = Notes().attempt("plan", run.plan, read_plan, run)  # a damaged plan is noted by `check_inputs`
    return plan is not None and plan.deleted_images == "drop"


def _check_tags(run: Run, notes: Notes, commits: dict[int, Commit]) -> None:
    """Every tag points to a published commit, and there is a candidate if there is more than commit 0.

    A tag whose commit is damaged is no problem: the commit itself is noted already.
    """
    damaged = {item.where for item in notes.problems if item.kind == "commit"}
    if not objects.exists(run.tag(CANDIDATE)):
        files = objects.list_files(run.path("index", "commits"), ".json")
        if files and files[-1] != run.commit(0):
            notes.problem("tag", run.tag(CANDIDATE), "a tag: there are commits", "missing")
    for uri in objects.list_files(run.path("index", "tags"), ".json"):
        name = _TAG_FILE.search(uri)
        tag = notes.attempt("tag", uri, tags.read_tag, run, name[1]) if name else None
        notes.checked["tags"] += 1
        if (
            tag is not None
            and tag.commit is not None
            and tag.commit not in commits
            and run.commit(tag.commit) not in damaged
        ):
            notes.problem("tag", uri, f"one of the commits {sorted(commits)}", tag.commit)


def _check_steps(run: Run, notes: Notes, commits: dict[int, Commit]) -> None:
    """A commit differs from the one before only in the segments of the waves in between."""
    for (earlier, parent), (number, commit) in pairwise(sorted(commits.items())):
        waves = range(earlier + 1, number + 1)
        changed = {ref for ref in parent.segments if ref.wave not in waves}
        changed ^= {ref for ref in commit.segments if ref.wave not in waves}
        same = ("codebook_sha256", "metric", "dim", "first_wave", "num_waves", "num_shards", "calibration")
        others = [name for name in same if getattr(commit, name) != getattr(parent, name)]
        if commit.counts.gallery != parent.counts.gallery:
            others.append("counts.gallery")
        if changed or others:
            others += [f"segment (shard {ref.shard}, wave {ref.wave})" for ref in changed]
            expected = f"commit {earlier} except wave{'s' if len(waves) > 1 else ''} {', '.join(map(str, waves))}"
            notes.problem("commit", run.commit(number), expected, f"other: {', '.join(others[:5])}")


def _check_calibration(run: Run, notes: Notes, commits: dict[int, Commit]) -> None:
    """The first commit has the calibration of the transformation; `_check_steps` compares the others."""
    try:
        known = read_calibration(run)
    except DataError:
        return  # `check_inputs` notes it
    number, commit = min(commits.items())
    if commit.calibration != known:
        notes.problem("commit", run.commit(number), "the calibration of the run's transformation", "another one")


def _check_gallery(evidence: Evidence, notes: Notes, files: _Files, commits: list[Commit]) -> None:
    """Every segment of every commit agrees with the plan and the log."""
    last = commits[-1]
    codebook = files.codebook(last)
    segments = _segments(commits)
    _check_plan(evidence, notes, last)
    _check_log(evidence, notes, commits)
    etags: dict[str, set[str]] = {}
    for shard in range(last.num_shards):
        cells = _cells(evidence, shard, last)
        refs = [ref for cell in cells for ref in segments.get((shard, cell.wave), ())]
        files.look_at(("sidecar", ref.sidecar_path, ref.sidecar_sha256) for ref in refs)
        files.look_at(("segment", ref.path, ref.sha256) for ref in refs if codebook is not None)
        _check_shard(evidence, notes, shard, np.concatenate([cell.ids for cell in cells]), last.num_shards)
        for cell in cells:
            if cell.wave <= last.number:
                where = f"{evidence.run.path('embedded', f'wave-{cell.wave:03d}')}, shard {shard}"
                notes.compare("log", where, cell.ids, np.concatenate([cell.embedded, cell.rejected]))
                for row in evidence.container_etags(cell).to_pylist():
                    etags.setdefault(row["uri"], set()).add(row["source_etag"])
            for ref in segments.get((shard, cell.wave), ()):
                _check_sidecar(notes, files, ref, cell)
                if codebook is not None:
                    _check_segment(evidence, files, ref, cell, codebook)
    _check_containers(notes, etags)


def _check_plan(evidence: Evidence, notes: Notes, commit: Commit) -> None:
    lowest, highest = (commit.first_wave, 0), (commit.num_waves, commit.num_shards - 1)
    for part in evidence.plan:
        keys = filled(part)
        outside = keys[((keys < lowest) | (keys > highest)).any(axis=1)]
        if len(outside):
            notes.problem("plan", part.uri, f"(wave, shard) from {lowest} to {highest}", outside[:3].tolist())


def _check_containers(notes: Notes, etags: dict[str, set[str]]) -> None:
    """No container of images was replaced during the run: its images may have moved."""
    for uri, found in sorted(etags.items()):
        notes.checked["containers"] += 1
        if len(found) > 1:
            notes.problem("container", uri, "one etag for all images that were read from it", ", ".join(sorted(found)))


def _check_log(evidence: Evidence, notes: Notes, commits: list[Commit]) -> None:
    """Each wave was sealed from the parts that are in the log now."""
    for wave, parts in evidence.log.items():
        found = wave_digest({unit_of(part.uri): part.digest for part in parts})
        for commit in commits:
            place = wave - commit.first_wave
            known = commit.log_digests[place] if place < len(commit.log_digests) else ""
            if not known:
                continue
            notes.checked["log_digests"] += 1
            if known != found:
                where = evidence.run.commit(commit.number)
                notes.problem("log_digest", where, f"wave {wave} sealed from parts of digest {known}", found or "none")


def _cells(evidence: Evidence, shard: int, commit: Commit) -> list[Cell]:
    found = []
    for wave in range(commit.first_wave, commit.num_waves + 1):
        rejected = evidence.rejects.get(wave, NO_IDS)
        mine = rejected[shard_of(rejected, commit.num_shards) == shard]
        found.append(evidence.cell(shard, wave, mine))
    return found


def _check_shard(evidence: Evidence, notes: Notes, shard: int, ids: Int64, num_shards: int) -> None:
    """The images of a shard belong to it, and each is in one wave."""
    where = f"{evidence.run.transformed}, shard {shard}"
    astray = ids[shard_of(ids, num_shards) != shard]
    if len(astray):
        notes.problem("shard", where, f"only ids of shard {shard}", f"{len(astray)} others, such as {astray[0]}")
    notes.compare("plan", where, np.unique(ids), ids)
    notes.checked["ids"] += len(ids)


def _check_sidecar(notes: Notes, files: _Files, ref: SegmentRef, cell: Cell) -> None:
    """A sidecar lists the ids of its (shard, wave), and marks those of the log as embedded."""
    where = files.run.path(ref.sidecar_path)
    if not files.intact("sidecar", ref.sidecar_path, ref.sidecar_sha256):
        return
    table = notes.attempt("sidecar", where, parquet.read_parquet, where, ["id", "kind"])
    if table is None:
        return
    ids, is_embedded = table["id"].to_numpy(), table["kind"].to_numpy() == "embedded"
    notes.compare("sidecar", where, cell.held(ref), ids)
    notes.compare("kind", where, cell.embedded if ref.kind == "embedded" else NO_IDS, ids[is_embedded])
    rejected = int((~is_embedded).sum()) if ref.kind == "embedded" or ref.rejected else 0
    deleted = len(cell.dropped) if ref.kind == "embedded" else 0
    if (len(ids), rejected, deleted) != (ref.vectors, ref.rejected, ref.deleted):
        expected = f"{ref.vectors} vectors, {ref.rejected} rejected, {ref.deleted} deleted"
        notes.problem("count", where, expected, f"{len(ids)} vectors, {rejected} rejected, {deleted} deleted")


def _check_segment(evidence: Evidence, files: _Files, ref: SegmentRef, cell: Cell, codebook: Codebook) -> None:
    """A segment holds the ids of its (shard, wave), and exactly their vectors if the codec is exact."""
    notes, where = evidence.notes, files.run.path(ref.path)
    if not files.intact("segment", ref.path, ref.sha256):
        return
    segment = notes.attempt("segment", where, Segment.open, files.run, codebook, ref, verify=False)
    if segment is None:
        return
    ids, vectors = decode_segment(codebook, segment)
    if not notes.compare("segment", where, cell.held(ref), ids) or not codebook.exact or not len(ids):
        return
    expected = evidence.vectors(cell, ref)
    if expected is None:
        return
    if len(expected) != len(ids):  # an id is repeated; the check of the plan names it
        notes.problem("vector", where, f"one vector for each of {len(ids)} ids", f"{len(expected)} in log and plan")
        return
    wrong = ids[(vectors != expected).any(axis=1)]
    notes.checked["vectors"] += len(ids)
    if len(wrong):
        found = f"{len(wrong)} of {len(ids)} are others, such as that of id {wrong[0]}"
        notes.problem("vector", where, "the vectors of the log, or the transformed ones", found)


@dataclass(frozen=True, slots=True)
class _Files:
    """Checks the bytes of each file once."""

    run: Run
    notes: Notes
    seen: dict[tuple[str, str], bool] = field(default_factory=dict)

    def intact(self, kind: str, path: str, sha256: str) -> bool:
        """Whether a file has its sha256; else it is a problem."""
        self.look_at([(kind, path, sha256)])
        return self.seen[path, sha256]

    def look_at(self, files: Iterable[tuple[str, str, str]]) -> None:
        """Check files (kind, path, sha256) that are not checked yet, several at a time."""
        new = list(dict.fromkeys(file for file in files if file[1:] not in self.seen))
        for (_, path, sha256), intact in zip(new, self.notes.each(self._check, new), strict=True):
            self.seen[path, sha256] = intact

    def _check(self, notes: Notes, file: tuple[str, str, str]) -> bool:
        kind, path, sha256 = file
        notes.attempt(kind, self.run.path(path), check_digest, self.run.path(path), sha256)
        notes.checked[f"{kind}s"] += 1
        return not notes.problems

    def codebook(self, commit: Commit) -> Codebook | None:
        path, sha256 = commit.codebook_path, commit.codebook_sha256
        if not self.intact("codebook", path, sha256):
            return None
        return self.notes.attempt("codebook", self.run.path(path), Codebook.open, self.run, path, sha256, verify=False)


def _segments(commits: Iterable[Commit]) -> dict[tuple[int, int], list[SegmentRef]]:
    """The segments of all commits by (shard, wave), each once."""
    found: dict[tuple[int, int], dict[SegmentRef, None]] = {}
    for commit in commits:
        for ref in commit.segments:
            found.setdefault((ref.shard, ref.wave), {})[ref] = None
    return {cell: list(refs) for cell, refs in found.items()}
