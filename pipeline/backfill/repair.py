"""Repair a run after an audit: make damaged or missing files again from the files that are left.

Whole files are not overwritten. A file of the index is replaced only by the bytes that its commit names. Damaged files
are moved to `damaged/` below the run, never deleted. A file that cannot be made again is left, with advice. Images are
not read here: units to embed again are only listed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from pipeline.embedding import vector_log
from pipeline.errors import DataError
from pipeline.index import tags, writer
from pipeline.index.commits import Commit, read_commit
from pipeline.index.seal import Sealer, seal_again
from pipeline.index.segment_files import SegmentRef, put_by_content
from pipeline.index.train_codebook import write_codebook
from pipeline.planning import build
from pipeline.planning import plan as plans
from pipeline.planning.plan import Plan
from pipeline.reporting.audit_evidence import Notes, Problem
from pipeline.reporting.audit_inputs import NOTHING, check_log
from pipeline.run import Run
from pipeline.schema import SIDECAR, UNITS, Unit
from pipeline.storage import objects, parquet

ASIDE = "damaged"
_WAVE = re.compile(r"/wave-(\d+)(?:/|$|,)")
_UNIT = re.compile(r"/wave-(\d+)/unit-(\d+)(?:-[0-9a-f]{16})?\.parquet$")
_DERIVED = {"standing", "best", "quality", "boost", "probe_set"}  # `fastfill backfill` makes these again
_OF_THE_LOG = {"log", "log_part", "reject_part", "log_digest"}
_RESTORE = "It cannot be made again: restore the file from a copy of the run or from the store's versions"


@dataclass(frozen=True, slots=True)
class Left:
    """A file that was not repaired, and why or what to do."""

    where: str
    why: str


@dataclass(slots=True)
class Repair:
    """The result of a repair."""

    rebuilt: list[str] = field(default_factory=list)  # files made again, to the bytes that a commit or the plan names
    moved: list[str] = field(default_factory=list)  # damaged files, at their new places
    embed_again: list[tuple[int, int]] = field(default_factory=list)  # (wave, unit) of the vector log
    folders: list[str] = field(default_factory=list)  # manifests with images to embed again: gallery, pairs, ...
    left: list[Left] = field(default_factory=list)  # files that are still damaged


def repair(run: Run, plan: Plan, problems: Iterable[Problem], train: Callable[[], bytes]) -> Repair:
    """Repair the problems of an audit, as far as that needs no images.

    No driver may run at the same time. If units are moved, a driver that runs loses the run. `train` gives the bytes of
    the codebook.
    """
    done, listed = Repair(), list(problems)
    for problem in listed:
        if problem.kind in _DERIVED and objects.exists(problem.where):
            done.moved.append(_move_aside(run, problem.where))
    _cut_units_again(run, plan, done, [item for item in listed if item.kind == "units"])
    _move_units(run, plan, done, [item for item in listed if item.kind in _OF_THE_LOG])
    _train_again(run, train, done, [item for item in listed if item.kind == "codebook"])
    _seal_again(run, plan, done, {item.where for item in listed if item.kind in ("segment", "sidecar")})
    handled = {"segment", "sidecar", "codebook", "units", *_DERIVED, *_OF_THE_LOG}
    done.left += [Left(item.where, f"{item.found}. {_RESTORE}") for item in listed if item.kind not in handled]
    return done


def units_of(run: Run, plan: Plan, done: Repair) -> list[Unit]:
    """The units that have to be embedded again."""
    wanted = set(done.embed_again)
    return [unit for unit in plan.units(run) if (unit.wave, unit.unit) in wanted]


def _move_aside(run: Run, uri: str) -> str:
    """Move a damaged file below `damaged/`; returns its new place."""
    data = objects.read_bytes(uri)
    digest = hashlib.sha256(data).hexdigest()[:16]
    target = run.path(ASIDE, f"{uri.removeprefix(run.uri).lstrip('/')}.{digest}")
    objects.put(target, data)
    objects.delete_files([uri])
    return target


def _waves(places: Iterable[str]) -> set[int]:
    return {int(found[1]) for where in places if (found := _WAVE.search(where))}


def _cut_units_again(run: Run, plan: Plan, done: Repair, problems: list[Problem]) -> None:
    """Cut the units of damaged waves again, from the transformed gallery."""
    for wave in sorted(_waves(item.where for item in problems)):
        place = plan.laid_out(run)
        files = sorted({unit.rows_uri for unit in plan.units_of(run, wave)})
        try:
            plans.read_transformed(run, plan, wave, UNITS.names)  # before any file is moved
        except DataError as error:
            done.left.append(Left(files[0], f"the units cannot be cut again: {error}"))
            continue
        done.moved += [_move_aside(run, uri) for uri in files if objects.exists(uri)]
        build.cut_wave(place, plan.num_parts, plan.unit_images, (plan.wave(wave), plan.row_groups(wave)))
        done.rebuilt += files


def _move_units(run: Run, plan: Plan, done: Repair, problems: list[Problem]) -> None:
    """Move damaged parts of logs and their rejects aside: a unit without a part is embedded again.

    Parts of waves whose units were cut again are checked again: they may be whole.
    """
    if not problems:
        return
    writer.Writer.acquire(run)  # a driver that still runs can no longer publish the parts that are moved here
    log, notes = plan.log(run), Notes()
    mine = (f"{log.parts_uri}/", f"{log.rejects_uri}/")
    cut_again = _waves(done.rebuilt)
    problems = [item for item in problems if not (item.where.startswith(mine) and _waves([item.where]) & cut_again)]
    waves = _waves(item.where for item in problems if item.kind != "log_part")
    units = [unit for unit in plan.units(run) if unit.wave in waves | cut_again]
    check_log(log, units, notes, published=NOTHING, waves=waves | cut_again)
    finished = vector_log.finished_units(log)
    broken = {
        (unit.wave, unit.unit) for unit in units if unit.wave in waves and unit.unit not in finished.get(unit.wave, [])
    }
    for where in {item.where for item in [*problems, *notes.problems]}:
        found = _UNIT.search(where)
        if found is None:
            continue
        if where.startswith(mine):
            broken.add((int(found[1]), int(found[2])))
        else:
            folder = where.removeprefix(f"{run.uri}/").partition("/")[0]
            done.folders += [folder] if folder not in done.folders else []
            done.moved += [_move_aside(run, where)] if objects.exists(where) else []
    for wave, unit in sorted(broken):
        rejects = objects.list_files(objects.join(log.rejects_uri, f"wave-{wave:03d}"), ".parquet")
        named = [uri for uri in rejects if f"/unit-{unit:05d}-" in uri]
        parts = [log.part(wave, unit)] if objects.exists(log.part(wave, unit)) else []
        done.moved += [_move_aside(run, uri) for uri in (*parts, *named)]  # the part first: then the unit is not done
    done.embed_again = sorted(broken)
    if not broken and not done.folders:
        why = "the parts are whole, but the commit names other ones: restore the parts of that wave from a copy"
        done.left += [Left(item.where, f"{item.found}: {why}") for item in problems]


def _train_again(run: Run, train: Callable[[], bytes], done: Repair, problems: list[Problem]) -> None:
    """Train the codebook again, from the pairs and, with an offset, the transformed gallery."""
    if not problems:
        return
    where = problems[0].where
    try:
        path, _ = write_codebook(run, train())
    except DataError as error:
        done.left.append(Left(where, f"the codebook cannot be trained again: {error}"))
        return
    if run.path(path) == where:
        done.rebuilt.append(where)
    else:
        done.left.append(Left(where, f"the codebook was trained again and has other bytes. {_OTHER_MACHINE}"))


_OTHER_MACHINE = (
    "Other processors round differently: run `fastfill repair` on a machine of the kind that sealed the run, "
    "or restore the file"
)


def _seal_again(run: Run, plan: Plan, done: Repair, suspected: set[str]) -> None:
    """Seal damaged segments and sidecars again, from the transformed gallery and the vector log."""
    commits = _readable(run)
    named: dict[str, tuple[SegmentRef, Commit]] = {}
    for commit in reversed(commits):
        for ref in commit.segments:
            named |= {run.path(path): (ref, commit) for path in (ref.path, ref.sidecar_path)}
    damaged = {where for where in suspected if where not in named or not _is_whole(run, where, named[where][0])}
    why = f"it has the bytes that its commit names, but the plan or the log has changed. {_RESTORE}"
    done.left += [Left(where, why) for where in sorted(suspected - damaged)]
    found = [named[where] for where in sorted(damaged & named.keys())]
    again = {(ref.shard, ref.wave, ref.kind, ref.sha256): (ref, commit) for ref, commit in found}
    for ref, commit in again.values():
        files = {run.path(ref.path), run.path(ref.sidecar_path)} & damaged
        failed = _seal_one(run, plan, ref, commit, files)
        if failed is None:
            done.rebuilt += sorted(files)
        else:
            done.left += [Left(where, f"{failed}. {_serve_another(run, commits, damaged)}") for where in sorted(files)]
    done.left += [Left(where, f"no readable commit names it. {_RESTORE}") for where in damaged - named.keys()]


def _is_whole(run: Run, where: str, ref: SegmentRef) -> bool:
    """Whether a segment or sidecar has the bytes that its commit names."""
    sha256 = ref.sha256 if where == run.path(ref.path) else ref.sidecar_sha256
    return objects.exists(where) and objects.sha256(where) == sha256


def _seal_one(run: Run, plan: Plan, ref: SegmentRef, commit: Commit, files: set[str]) -> str | None:
    """Seal one segment again; returns why its files still differ from those of the commit, or None."""
    sealer = Sealer(run, plan, commit.codebook_path, commit.codebook_sha256)
    try:
        found = seal_again(sealer, ref)
    except DataError as error:
        return f"it cannot be sealed again: {error}"
    same = run.path(ref.path) not in files or found.sha256 == ref.sha256
    same &= run.path(ref.sidecar_path) not in files or _is_sidecar(run, found, ref)
    return None if same else f"it was sealed again and has other bytes. {_OTHER_MACHINE}"


def _is_sidecar(run: Run, found: SegmentRef, ref: SegmentRef) -> bool:
    """Whether the sidecar that a commit names is stored now; it may be in the format of an earlier version."""
    if found.sidecar_sha256 == ref.sidecar_sha256:
        return True
    rows = parquet.read_parquet(run.path(found.sidecar_path))
    data = parquet.parquet_bytes(SIDECAR, [rows], with_digests=False)
    if hashlib.sha256(data).hexdigest() != ref.sidecar_sha256:
        return False
    put_by_content(run, "index/segments/{}.parquet", data)
    return True


def _serve_another(run: Run, commits: list[Commit], damaged: set[str]) -> str:
    whole = [
        commit.number
        for commit in commits
        if not damaged & {run.path(path) for ref in commit.segments for path in (ref.path, ref.sidecar_path)}
    ]
    if not whole:
        return "Every published commit needs it: start a new run with `fastfill backfill --new-run`"
    return f"Until then serve a commit without it: `fastfill rollback --to {max(whole)}`"


def _readable(run: Run) -> list[Commit]:
    found = []
    for number in tags.list_commits(run):
        try:
            found.append(read_commit(run, number))
        except DataError:  # a problem of the audit
            continue
    return found
