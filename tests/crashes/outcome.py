"""What is left of a run, so that two runs can be compared; on any store."""

from __future__ import annotations

import hashlib
import re

from pipeline.index import commits
from pipeline.index import tags as snapshot
from pipeline.index.gc import Rules, collect_garbage
from pipeline.reporting.audit import audit
from pipeline.run import Run
from pipeline.storage import interface, objects, parquet

_OF_ITS_OWN = re.compile(
    r"^/(reports|index/(commits|tags|leases)|probe)/|^/((index/(gc|collected)|run)\.json|index/reserve)$"
)
"""What differs between two equal runs: times, attempt ids, the run's place, notes of gc, and its reserve."""

_ONCE = ("embedded", "index/segments", "index/commits")

Outcome = dict[str, object]


def outcome(run: Run) -> Outcome:
    """All that must be equal in two runs that have ended: commits, tags, the bytes of every file, the audit."""
    tags = {name: snapshot.read_tag(run, name) for name in ("candidate", "prod")}
    return {
        "commits": {number: commits.read_commit(run, number).content() for number in snapshot.list_commits(run)},
        "tags": {name: None if tag is None else tag.commit for name, tag in tags.items()},
        "files": digests(run),
        "problems": audit(run.uri).problems,
    }


def digests(run: Run) -> dict[str, str]:
    """By name in the run, the sha256 of each file that equal runs have in common, once gc has removed leftovers."""
    collect_garbage(run.uri, Rules(keep=100))
    names = {uri.removeprefix(run.uri): uri for uri in objects.list_files(run.uri)}
    return {
        name: hashlib.sha256(objects.read_bytes(uri)).hexdigest()
        for name, uri in names.items()
        if not _OF_ITS_OWN.search(name)
    }


def differences(found: Outcome, expected: Outcome) -> list[str]:
    """In words, where two outcomes differ."""
    wrong = []
    for name, value in expected.items():
        other = found[name]
        if isinstance(value, dict) and isinstance(other, dict):
            keys = sorted({*value, *other}, key=str)
            wrong += [f"{name}: {key} differs" for key in keys if value.get(key) != other.get(key)]
        elif value != other:
            wrong.append(f"{name}: {other}")
    return wrong


def written_once(run: Run) -> dict[str, interface.Stat]:
    """The stat of each file that is durable, and must never be written again: parts, segments, commits."""
    return {uri: stat for folder in _ONCE for uri, stat in objects.list_stats(run.path(folder))}


def durable_images(run: Run) -> set[int]:
    """The ids of the images that are in the vector log or its rejects."""
    parts = objects.list_files(run.path("embedded"), ".parquet")
    units = {uri.removeprefix(run.path("embedded")).removesuffix(".parquet") for uri in parts}
    for uri in objects.list_files(run.path("rejects"), ".parquet"):
        if uri.removeprefix(run.path("rejects")).rpartition("-")[0] in units:
            parts.append(uri)
    return {number for uri in parts for number in parquet.read_parquet(uri, ["id"])["id"].to_pylist()}
