"""Read the plan and the vector log for the audit, by (shard, wave).

A damaged file becomes a problem in the notes, not an exception, so that it does not hide others. A store that fails or
refuses is an exception, not a problem of a file. Row groups are found by their statistics.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.arrays import Float32, Int64, vectors_from_arrow
from pipeline.embedding import vector_log
from pipeline.embedding.reject_rules import gallery_log, manifest_log
from pipeline.embedding.vector_log import VectorLog
from pipeline.errors import FastfillError, IncompatibleRun, TransientError
from pipeline.index.segment_files import SegmentRef
from pipeline.planning.plan import read_plan
from pipeline.run import Run
from pipeline.schema import DELETED
from pipeline.storage import objects, parquet
from pipeline.storage.part_files import list_parts

P = ParamSpec("P")
T = TypeVar("T")
U = TypeVar("U")
_EMPTY = -1  # the key of a row group without rows
NO_IDS: Int64 = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Problem:
    """A fault: its kind, the file, and the expected and found state."""

    kind: str
    where: str
    expected: str
    found: str


@dataclass(frozen=True, slots=True)
class Notes:
    """The problems of an audit, and the number of checks by kind."""

    problems: list[Problem] = field(default_factory=list)
    checked: Counter[str] = field(default_factory=Counter)

    def problem(self, kind: str, where: str, expected: object, found: object) -> None:
        """Note a problem."""
        self.problems.append(Problem(kind, where, str(expected), str(found)))

    def attempt(self, kind: str, where: str, read: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """The result of `read`; None, with a problem, if it fails.

        Raises:
            TransientError, PermissionError: the store fails or refuses.
            IncompatibleRun: the run is one of another version.
        """
        try:
            return read(*args, **kwargs)
        except (TransientError, PermissionError, IncompatibleRun):
            raise
        except FastfillError as error:
            expected = error.details["expected"] or "a whole file"
            found = error.details["found"]
            self.problem(kind, where, expected, error.summary if found is None else f"{error.summary}: {found}")
        except (OSError, pa.ArrowException, ValueError) as error:
            self.problem(kind, where, "a readable file", error)
        return None

    def each(self, check: Callable[[Notes, T], U], items: Iterable[T]) -> list[U]:
        """The results of `check` for each item, several at a time; its notes are added here in order."""
        listed = list(items)
        own = [Notes() for _ in listed]
        found = objects.at_once(lambda pair: check(*pair), zip(own, listed, strict=True))
        for notes in own:
            self.problems.extend(notes.problems)
            self.checked.update(notes.checked)
        return found

    def compare(self, kind: str, where: str, expected: Int64, found: Int64) -> bool:
        """Whether the ids `found` (any order) equal `expected` (sorted); else a problem is noted."""
        found = np.sort(found)
        if np.array_equal(expected, found):
            return True
        missing, unknown = np.setdiff1d(expected, found), np.setdiff1d(found, expected)
        repeated = found[1:][found[1:] == found[:-1]]
        counts = [
            f"{len(ids)} {what}, such as {ids[0]}"
            for ids, what in ((missing, "missing"), (unknown, "unknown"), (repeated, "repeated"))
            if len(ids)
        ]
        self.problem(kind, where, f"{len(expected)} ids, each once", "; ".join(counts))
        return False


@dataclass(frozen=True, slots=True)
class PlannedPart:
    """A Parquet file, the value of each key column in each of its row groups, and the file's digest."""

    uri: str
    keys: NDArray[np.int64]  # (row groups, key columns)
    digest: str


@dataclass(frozen=True, slots=True)
class Cell:
    """The expected content of a (shard, wave); all ids are sorted."""

    shard: int
    wave: int
    ids: Int64  # its images, by the plan
    embedded: Int64  # those in the log
    rejected: Int64  # those in the rejects
    dropped: Int64  # those of the rejected that are deleted and in no segment of an embedded wave

    def held(self, ref: SegmentRef) -> Int64:
        """The expected ids of a segment of this (shard, wave), sorted.

        Earlier versions sealed rejects together with the embedded images of their wave.
        """
        if ref.kind == "embedded":
            left_out = self.dropped if ref.rejected else self.rejected
            return np.setdiff1d(self.ids, left_out, assume_unique=True)
        return np.setdiff1d(self.rejected, self.dropped, assume_unique=True) if ref.rejected else self.ids


@dataclass(frozen=True, slots=True)
class Evidence:
    """The parts of the plan, and those of the log by wave."""

    run: Run
    notes: Notes
    plan: list[PlannedPart]
    log: dict[int, list[PlannedPart]]
    rejects: dict[int, Int64]
    dropped: Int64

    @classmethod
    def gather(cls, run: Run, notes: Notes, published: int, drops_deleted: bool) -> Evidence:
        """Read the footers of the plan, and those of the log up to wave `published`."""
        place = notes.attempt("plan", run.plan, _laid_out, run) or run
        plan = _parquet_in(place.transformed)
        log = {wave: uris for wave, uris in unit_files(run.path("embedded")).items() if wave <= published}
        plan_parts = _parts(notes, "plan_part", plan, ["wave", "shard"])
        log_parts = {wave: _parts(notes, "log_part", uris, ["shard"]) for wave, uris in log.items()}
        rejects = {wave: uris for wave, uris in reject_files(gallery_log(run)).items() if wave <= published}
        return cls(
            place,
            notes,
            plan_parts,
            log_parts,
            {wave: _ids(notes, "reject_part", uris) for wave, uris in rejects.items()},
            _deleted([uri for uris in rejects.values() for uri in uris]) if drops_deleted else NO_IDS,
        )

    def cell(self, shard: int, wave: int, rejected: Int64) -> Cell:
        """Read the ids of a (shard, wave); `rejected` are its own."""
        ids = self._rows(self.plan, [wave, shard], ["id"])
        embedded = self._rows(self.log.get(wave, []), [shard], ["id"])
        return Cell(
            shard,
            wave,
            NO_IDS if ids is None else np.sort(ids["id"].to_numpy()),
            NO_IDS if embedded is None else np.sort(embedded["id"].to_numpy()),
            np.sort(rejected),
            np.intersect1d(rejected, self.dropped),
        )

    def vectors(self, cell: Cell, ref: SegmentRef) -> Float32 | None:
        """The expected vectors of `cell.held(ref)` in order, (n, d).

        None if a part cannot be read, or plan and log do not fit together.
        """
        rows = self._rows(self.plan, [cell.wave, cell.shard], ["id", "vector"])
        if rows is None:
            return None
        vectors, held = vectors_from_arrow(rows.sort_by("id")["vector"]), np.isin(cell.ids, cell.held(ref))
        if ref.kind == "transformed" or not len(cell.embedded):
            return vectors[held]
        logged = self._rows(self.log[cell.wave], [cell.shard], ["id", "vector"])
        if logged is None or not np.isin(cell.embedded, cell.ids).all():
            return None
        vectors = vectors.copy()
        vectors[np.searchsorted(cell.ids, cell.embedded)] = vectors_from_arrow(logged.sort_by("id")["vector"])
        return vectors[held]

    def container_etags(self, cell: Cell) -> pa.Table:
        """Each container (`uri`) with each `source_etag` that its images were read with."""
        place = ["uri", "offset", "length", "row"]
        rows = self._rows(self.plan, [cell.wave, cell.shard], ["id", *place])
        logged = self._rows(self.log.get(cell.wave, []), [cell.shard], ["id", "source_etag"])
        if rows is None or logged is None:
            return pa.table({"uri": pa.array([], pa.string()), "source_etag": pa.array([], pa.string())})
        begins = pc.greater(pc.fill_null(rows["offset"], 0), 0)
        inside = pc.or_(begins, pc.or_(rows["length"].is_valid(), rows["row"].is_valid()))
        known = logged.filter(logged["source_etag"].is_valid())
        return rows.filter(inside).join(known, "id", join_type="inner").group_by(["uri", "source_etag"]).aggregate([])

    def _rows(self, parts: list[PlannedPart], key: list[int], columns: list[str]) -> pa.Table | None:
        """The rows of all row groups of a key; None if there are none, or one cannot be read."""
        groups = {part.uri: np.flatnonzero((part.keys == key).all(axis=1)).tolist() for part in parts}

        def read(notes: Notes, uri: str) -> pa.Table | None:
            return notes.attempt("part", uri, parquet.read_parquet, uri, columns, groups[uri])

        tables = self.notes.each(read, (uri for uri, some in groups.items() if some))
        whole = [table for table in tables if table is not None]
        return pa.concat_tables(whole) if whole and len(whole) == len(tables) else None


def check_manifest_rows(run: Run, notes: Notes) -> None:
    """Each image of the manifest is in the plan, or the old encoder could not read it; checked part by part."""
    if not objects.exists(run.plan) or not objects.exists(run.path("gallery", "manifest.json")):
        return
    rejects = reject_files(manifest_log(run, "gallery", "old"))
    place = notes.attempt("plan", run.plan, _laid_out, run) or run
    parts = {"gallery": list_parts(run.path("gallery")), "transformed": list_parts(place.transformed)}

    def check(notes: Notes, number: int) -> None:
        given, planned = (
            _ids(notes, kind, [parts[folder][number]] if number in parts[folder] else [])
            for folder, kind in (("gallery", "manifest_part"), ("transformed", "planned_part"))
        )
        rejected = _ids(notes, "reject_part", rejects.get(number, []))
        notes.compare("manifest", run.part("gallery", number), np.sort(given), np.concatenate([planned, rejected]))
        notes.checked["manifest_ids"] += len(given)

    notes.each(check, sorted(parts["gallery"].keys() | parts["transformed"].keys()))


def _laid_out(run: Run) -> Run:
    """The run as the plan laid it out.

    Raises:
        DataError: the plan is damaged.
        IncompatibleRun: only an earlier version can follow it.
    """
    plan = read_plan(run)
    return run if plan is None else plan.laid_out(run)


def _parquet_in(folder: str) -> list[str]:
    """The Parquet files directly in a folder, sorted; a dropped plan is in a folder below it."""
    return sorted(uri for uri, _ in objects.iter_stats(folder, deep=False) if uri.endswith(".parquet"))


def unit_files(folder: str) -> dict[int, list[str]]:
    """The parts below the folder of a log, by wave."""
    found: dict[int, list[str]] = {}
    for (wave, _), uri in vector_log.part_files(folder).items():
        found.setdefault(wave, []).append(uri)
    return found


def reject_files(log: VectorLog) -> dict[int, list[str]]:
    """The reject files by wave that parts name; a part that cannot be read is noted elsewhere."""
    found: dict[int, list[str]] = {}
    for (wave, _), uri in vector_log.reject_files(log, skip_unreadable=True).items():
        found.setdefault(wave, []).append(uri)
    return found


def filled(part: PlannedPart) -> NDArray[np.int64]:
    """The keys of the row groups that have rows."""
    keys: NDArray[np.int64] = part.keys[part.keys[:, 0] != _EMPTY]
    return keys


def _parts(notes: Notes, kind: str, uris: list[str], columns: list[str]) -> list[PlannedPart]:
    def read(notes: Notes, uri: str) -> PlannedPart | None:
        part = notes.attempt(kind, uri, _part, uri, columns)
        notes.checked[f"{kind}s"] += 1
        return part

    return [part for part in notes.each(read, uris) if part is not None]


def _ids(notes: Notes, kind: str, uris: list[str]) -> Int64:
    def read(notes: Notes, uri: str) -> Int64:
        table = notes.attempt(kind, uri, parquet.read_parquet, uri, ["id"])
        notes.checked[f"{kind}s"] += 1
        return NO_IDS if table is None else table["id"].to_numpy()

    return np.concatenate([NO_IDS, *notes.each(read, uris)])


def _deleted(uris: list[str]) -> Int64:
    found: list[Int64] = [NO_IDS]
    for uri in uris:
        try:
            table = parquet.read_parquet(uri, ["id", "reason"])
        except (TransientError, PermissionError):
            raise
        except (FastfillError, OSError, pa.ArrowException, ValueError):
            continue  # a problem already
        found.append(table.filter(pc.starts_with(table["reason"], DELETED))["id"].to_numpy())
    return np.concatenate(found)


def _part(uri: str, columns: list[str]) -> PlannedPart:
    """The value of each key column in each row group, from the statistics in the footer.

    Raises:
        ValueError: a row group has several values, or a column is missing.
    """
    with parquet.open_parquet(uri) as file:
        metadata = file.metadata
        names = [file.schema.column(position).path for position in range(metadata.num_columns)]
        keys = np.full((metadata.num_row_groups, len(columns)), _EMPTY, dtype=np.int64)
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            for place, column in enumerate(columns if group.num_rows else []):
                values = group.column(names.index(column)).statistics
                if values is None or values.null_count or values.min is None or values.min != values.max:
                    raise ValueError(f"row group {number} has more than one value of {column}")
                keys[number, place] = values.min
        return PlannedPart(uri, keys, file.digest)
