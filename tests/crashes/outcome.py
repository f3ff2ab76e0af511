"""What is left of a run, so that two runs can be compared."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pyarrow.parquet as pq

from pipeline import snapshot
from pipeline.audit import audit
from pipeline.run import Run

_OF_ITS_OWN = re.compile(r"/(\.tmp-|\.lock-)|^/(reports/|index/commits/|index/tags/|index/leases/|run\.json)")
"""What differs between two runs: times, attempt ids, the run's own place."""


def outcome(run: Run) -> dict[str, object]:
    """All that must be equal in two runs that have ended: commits, tags, the bytes of every file, the audit."""
    tags = {name: snapshot.read_tag(run, name) for name in ("candidate", "prod")}
    return {
        "commits": {number: snapshot.read_commit(run, number).content() for number in snapshot.list_commits(run)},
        "tags": {name: None if tag is None else tag.commit for name, tag in tags.items()},
        "files": digests(Path(run.uri)),
        "problems": audit(run.uri).problems,
    }


def digests(folder: Path) -> dict[str, str]:
    """By name below the folder, the sha256 of each file that equal runs have in common."""
    names = {str(path).removeprefix(str(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in sorted(names.items())
        if not _OF_ITS_OWN.search(name)
    }


def written_once(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of what is durable and must never be written again: parts, segments, commits."""
    found = {}
    for place in ("embedded", "index/segments", "index/commits"):
        for path in (folder / place).rglob("*"):
            if path.suffix in (".parquet", ".faiss", ".json") and not path.name.startswith("."):
                found[str(path)] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


def durable_images(folder: Path) -> set[int]:
    """The ids of the images that are in the vector log or its rejects."""
    files = [path for path in (folder / "embedded").rglob("unit-*.parquet")]
    found = {number for path in files for number in pq.read_table(path)["id"].to_pylist()}
    parts = {path.stem for path in files}
    for path in (folder / "rejects").rglob("unit-*.parquet"):
        if path.stem.rpartition("-")[0] in parts:
            found |= set(pq.read_table(path)["id"].to_pylist())
    return found
