"""Audit the files that a resumed run reads besides the index.

These are settings, manifests, embeddings, the transformation, units and the vector log. Each file is read as the run
would read it, and compared with other files that describe it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np

from pipeline.arrays import Int64, vectors_from_arrow
from pipeline.config.identity import STAGES, read_settings, read_stage_settings
from pipeline.embedding import vector_log
from pipeline.embedding.reject_rules import gallery_log, manifest_log
from pipeline.embedding.vector_log import VectorLog
from pipeline.evaluation import quality
from pipeline.evaluation.quality import read_promotion_status
from pipeline.manifest import normalised
from pipeline.planning import plan as plans
from pipeline.planning.plan import FROM_PAIRS, Plan, read_plan
from pipeline.reporting.audit_evidence import NO_IDS, Notes
from pipeline.run import GALLERY_PAIRS, PROBE_SET, Run
from pipeline.schema import Unit
from pipeline.storage import documents, objects, parquet
from pipeline.storage.part_files import list_parts

_FOLDERS = ("gallery", "pairs", GALLERY_PAIRS, PROBE_SET)
_WHOLE = {"gallery": "old", GALLERY_PAIRS: "new"}  # the embeddings that the plan and its log are made from
NOTHING = -1
"""The last published wave if nothing is published; then all waves are checked."""
_LATEST = 2**62  # a commit number above all others


def check_inputs(run: Run, notes: Notes, published: int | None) -> None:
    """Check the inputs of a run and its vector log.

    Args:
        notes: takes the problems.
        published: the last published commit; None before the first.
    """
    found = notes.attempt("plan", run.plan, read_plan, run)
    if found is None and published is not None and not objects.exists(run.plan):
        notes.problem("plan", run.plan, "a plan", "missing")
    _check_settings(run, notes)
    for folder in _FOLDERS:
        _check_manifest(run, notes, folder, planned=found is not None)
    _check_pairs(run, notes)
    _check_probe_set(run, notes)
    _check_reports(run, notes)
    _check_transformation(run, notes, needed=found is not None)
    if found is not None:
        _check_transformed(run, found, notes)
        _check_units(run, found, notes, quietly=published is not None)
        check_log(found.log(run), list(found.units(run)), notes, NOTHING if published is None else published)
        _check_first_wave(run, found, notes)
    elif published is None:
        check_log(gallery_log(run), [], notes, NOTHING)


def _check_settings(run: Run, notes: Notes) -> None:
    notes.attempt("settings", run.settings, read_settings, run)
    for name, stage in STAGES.items():
        where = run.path(stage.settings)
        found = notes.attempt("settings", where, read_stage_settings, run, name)
        if found is None and not objects.exists(where) and objects.exists(run.path(stage.outcome)):
            notes.problem("settings", where, f"the settings of {stage.outcome}", "missing")
        notes.checked["settings"] += 1


def _check_manifest(run: Run, notes: Notes, folder: str, planned: bool) -> None:
    """The parts of a manifest are whole, and so are the embeddings of its images.

    If there is a plan, the gallery has a manifest and all embeddings that the plan needs.
    """
    where = run.path(folder, "manifest.json")
    found = notes.attempt("manifest_file", where, normalised.read_manifest, run, folder)
    if found is None:
        if planned and folder == "gallery" and not objects.exists(where):
            notes.problem("manifest_file", where, "a manifest", "missing")
        return

    def check(notes: Notes, item: tuple[int, int]) -> None:
        number, rows = item
        where = run.part(folder, number)
        count = notes.attempt("manifest_part", where, _rows_of, where)
        if count is not None and count != rows:
            notes.problem("manifest_part", where, f"{rows} rows", count)
        known = found.parts[number] if number < len(found.parts) else ""
        if count is not None and known and objects.sha256(where) != known:
            notes.problem("manifest_part", where, f"sha256 {known}", "another file")
        notes.checked[f"{folder}_parts"] += 1

    notes.each(check, enumerate(found.rows))
    for role in ("old", "new"):
        check_log(manifest_log(run, folder, role), normalised.units(run, folder, found), notes, NOTHING)
    needed = _WHOLE.get(folder) if planned else None
    if needed is not None and f"{needed}_embedding" not in found.dims:
        _check_whole(manifest_log(run, folder, needed), normalised.units(run, folder, found), notes)


def _check_whole(log: VectorLog, units: Iterable[Unit], notes: Notes) -> None:
    done = {(wave, unit) for wave, some in vector_log.finished_units(log).items() for unit in some}
    for unit in units:
        if (unit.wave, unit.unit) not in done:
            notes.problem("log_part", log.part(unit.wave, unit.unit), f"{unit.images} images", "missing")


def _check_pairs(run: Run, notes: Notes) -> None:
    """The files of the joined pairs are unchanged."""
    where = run.path("pairs", "pairs.json")
    if not objects.exists(where):
        return
    tree = notes.attempt("pairs_file", where, lambda: documents.decode(objects.read_bytes(where), where))
    known = tree.get("parts", {}) if tree else {}
    folders = [run.path("pairs", name) for name in ("train", "held_out")]
    there = {uri for folder in folders for uri in list_parts(folder).values()}
    named = {run.path("pairs", *name.split("/")): sha256 for name, sha256 in known.items()}

    def check(notes: Notes, uri: str) -> None:
        rows = notes.attempt("pairs_part", uri, _rows_of, uri)
        if rows is not None and uri in named and objects.sha256(uri) != named[uri]:
            notes.problem("pairs_part", uri, f"sha256 {named[uri]}", "another file")
        notes.checked["pairs_parts"] += 1

    notes.each(check, sorted(there | named.keys()))


def _check_probe_set(run: Run, notes: Notes) -> None:
    where = run.path(PROBE_SET, "reference.json")
    notes.attempt("probe_set", where, quality.read_baseline, run)
    folder = run.path(PROBE_SET)
    others = [run.path(PROBE_SET, "set.parquet"), *objects.list_files(f"{folder}/neighbours", ".parquet")]
    for uri in others:
        if objects.exists(uri):
            notes.attempt("probe_set", uri, _rows_of, uri)


def _check_reports(run: Run, notes: Notes) -> None:
    notes.attempt("standing", run.path("reports", "standing.json"), read_promotion_status, run)
    notes.attempt("best", run.path("reports", "best.json"), quality.read_best, run, _LATEST)
    for uri in quality.files(run):
        notes.attempt("quality", uri, quality.read_file, uri)


def _check_transformation(run: Run, notes: Notes, needed: bool) -> None:
    """The files of a transformation are those that its marker names."""
    from pipeline.models.transformation import has_transformation, verify  # here: torch takes seconds

    if not has_transformation(run):
        if needed:
            notes.problem("transformation", run.path("transformation", "transformation.json"), "a file", "missing")
        return
    for where, error in verify(run):
        notes.problem("transformation", where, error.details["expected"] or "a whole file", error.summary)
    notes.checked["transformations"] += 1


def _check_transformed(run: Run, plan: Plan, notes: Notes) -> None:
    """No part of the transformed gallery is missing; their content is checked elsewhere."""
    place = plan.laid_out(run)
    there = {uri.rpartition("/")[2] for uri, _ in objects.iter_stats(place.transformed, deep=False)}
    for number in range(plan.num_parts):
        uri = place.transformed_part(number)
        if uri.rpartition("/")[2] not in there:
            notes.problem("plan_part", uri, "a part of the plan", "missing")


def _check_units(run: Run, plan: Plan, notes: Notes, quietly: bool) -> None:
    """The units of each wave hold its images, each once.

    `quietly`: damaged parts of `transformed/` are noted elsewhere.
    """
    units: dict[int, list[Unit]] = {}
    for unit in plan.units(run):
        units.setdefault(unit.wave, []).append(unit)

    def read(notes: Notes, unit: Unit) -> Int64 | None:
        return notes.attempt("units", unit.rows_uri, _ids_of, unit)

    for wave, some in units.items():  # one wave at a time, to limit memory
        where = some[0].rows_uri.rpartition("/")[0]
        found = notes.each(read, some)
        whole = [ids for ids in found if ids is not None]
        notes.checked["units"] += len(whole)
        kept = Notes() if quietly else notes
        planned = kept.attempt("plan_part", where, plans.read_transformed, run, plan, wave, ["id"])
        if planned is not None and len(whole) == len(found):
            notes.compare("units", where, np.sort(planned["id"].to_numpy()), np.concatenate([NO_IDS, *whole]))


def check_log(
    log: VectorLog, units: list[Unit], notes: Notes, published: int, waves: Collection[int] | None = None
) -> None:
    """The parts of a log after wave `published` (or of `waves`) can be read and hold the images of their unit."""
    named = {(unit.wave, unit.unit): unit for unit in units}
    rejects = vector_log.reject_files(log, skip_unreadable=True)
    done = [(wave, unit) for wave, some in vector_log.finished_units(log).items() for unit in some]

    def check(notes: Notes, key: tuple[int, int]) -> None:
        where = log.part(*key)
        notes.checked["log_parts"] += 1
        ids = notes.attempt("log_part", where, _ids_in, where)
        rejected: Int64 | None = NO_IDS
        if key in rejects:
            notes.checked["reject_parts"] += 1
            rejected = notes.attempt("reject_part", rejects[key], _ids_in, rejects[key])
        if ids is None or rejected is None or not units:
            return
        if key not in named:
            notes.problem("log_part", where, "a unit of the plan", "another one")
            return
        wanted = _attempt_quietly(named[key])
        if wanted is not None:
            notes.compare("log_part", where, np.sort(wanted), np.concatenate([ids, rejected]))

    notes.each(check, (key for key in done if key[0] > published and (waves is None or key[0] in waves)))


def _check_first_wave(run: Run, plan: Plan, notes: Notes) -> None:
    """Wave 0 of the log holds the embeddings of the pairs."""
    if not plan.num_from_pairs:
        return
    from pipeline.sampling import pair_sample  # here: Ray Data takes seconds

    def check(notes: Notes, key: tuple[int, int]) -> None:
        where = log.part(*key)
        rows = Notes().attempt("log_part", where, vector_log.read_unit, log, *key)  # a damaged part is noted elsewhere
        if rows is None:
            return
        known = notes.attempt("pairs", where, pair_sample.read_new, run, rows["id"].to_numpy())
        if known is None:
            return
        others = int((known[0] != vectors_from_arrow(rows["vector"])).any(axis=1).sum())
        notes.checked["images_from_pairs"] += rows.num_rows
        if others:
            notes.problem("log_part", where, "the embeddings of the pairs", f"{others} others")

    log = plan.log(run)
    notes.each(check, vector_log.part_files(log.parts_uri, FROM_PAIRS))


def _attempt_quietly(unit: Unit) -> Int64 | None:
    """The ids of a unit; None if its file is damaged, which is noted elsewhere."""
    return Notes().attempt("units", unit.rows_uri, _ids_of, unit)


def _ids_of(unit: Unit) -> Int64:
    ids: Int64 = parquet.read_parquet(unit.rows_uri, row_groups=[unit.row_group])["id"].to_numpy()
    return ids


def _ids_in(uri: str) -> Int64:
    """The ids of a file; every column is read."""
    ids: Int64 = parquet.read_parquet(uri)["id"].to_numpy()
    return ids


def _rows_of(uri: str) -> int:
    """The number of rows of a file; every column is read, a row group at a time."""
    with parquet.open_parquet(uri) as file:
        return sum(file.read_row_group(group).num_rows for group in range(file.num_row_groups))
