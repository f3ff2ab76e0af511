"""What is damaged of a run is made again from what is left, or named with what to do."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.backfill.repair import Repair, repair, units_of
from pipeline.config.load import load_config
from pipeline.config.tree import Config
from pipeline.errors import DataError
from pipeline.index import commits
from pipeline.index.train_codebook import train_for_run
from pipeline.planning.plan import Plan, read_plan
from pipeline.reporting.audit import audit
from pipeline.run import Run
from pipeline.schema import UNITS
from pipeline.storage import documents, objects, parquet
from tests.support.golden import FINISHED, HALF, copy_run

DAMAGES = ("flipped", "truncated", "missing", "exchanged")


def opened(name: str, folder: Path) -> tuple[Config, Run, Plan]:
    config = load_config(copy_run(name, folder))
    run = Run(config.run)
    plan = read_plan(run)
    assert plan is not None
    return config, run, plan


def damage(path: Path, how: str, other: Path) -> None:
    """Change a file; `other` is a whole file of the same kind."""
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "flipped":
        path.write_bytes(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 16]) + data[len(data) // 2 + 1 :])
    else:
        path.write_bytes(other.read_bytes())


def repaired(config: Config, run: Run, plan: Plan) -> Repair:
    def train() -> bytes:
        return train_for_run(run, plan, config.index, config.gallery.metric, device=config.device, seed=config.seed)

    return repair(run, plan, audit(run.uri).problems, train)


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("ending", ["faiss", "parquet"])
@pytest.mark.parametrize("name", FINISHED)
def test_repair_of_a_damaged_segment_or_sidecar_restores_its_bytes(
    name: str, how: str, ending: str, tmp_path: Path
) -> None:
    config, run, plan = opened(name, tmp_path)
    first = sorted(Path(run.path("index", "segments")).glob(f"*.{ending}"))[:2]
    before = first[0].read_bytes()
    damage(first[0], how, other=first[1])
    done = repaired(config, run, plan)
    assert done.rebuilt == [str(first[0])]
    assert done.left == []
    assert first[0].read_bytes() == before
    assert audit(run.uri).problems == []


def test_repair_of_a_run_that_is_whole_changes_nothing(tmp_path: Path) -> None:
    config, run, plan = opened(FINISHED[0], tmp_path)
    before = {uri: objects.sha256(uri) for uri in objects.list_files(run.uri)}
    assert repaired(config, run, plan) == Repair()
    assert {uri: objects.sha256(uri) for uri in objects.list_files(run.uri)} == before


def test_repair_of_a_segment_whose_sources_are_damaged_names_a_commit_to_serve(tmp_path: Path) -> None:
    config, run, plan = opened(FINISHED[0], tmp_path)
    last = commits.read_commit(run, 4)
    ref = next(ref for ref in last.segments if ref.wave == 4)
    Path(run.path(ref.path)).unlink()
    for part in Path(run.path("transformed")).rglob("*.parquet"):
        part.write_bytes(b"PAR1 and then nothing PAR1")
    done = repaired(config, run, plan)
    (why,) = [item.why for item in done.left if item.where == run.path(ref.path)]
    assert "cannot be sealed again" in why
    assert "fastfill rollback --to 3" in why
    assert done.rebuilt == []


def test_repair_of_a_segment_that_comes_out_with_other_bytes_leaves_the_commit_and_says_why(tmp_path: Path) -> None:
    config, run, plan = opened(FINISHED[0], tmp_path)
    commit = commits.read_commit(run, 4)
    mine = commit.segments[-1]
    other = dataclasses.replace(mine, sha256="0" * 64, path="index/segments/" + "0" * 64 + ".faiss")
    changed = dataclasses.replace(commit, segments=(*commit.segments[:-1], other))
    objects.put(run.commit(4), documents.encode(changed))
    done = repaired(config, run, plan)
    (left,) = done.left
    assert left.where == run.path(other.path)
    assert "other bytes" in left.why
    assert "rollback --to 3" in left.why
    assert not objects.exists(run.path(other.path))


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
def test_repair_of_a_units_file_cuts_the_units_again(how: str, tmp_path: Path) -> None:
    config, run, plan = opened(HALF[0], tmp_path)
    units = [unit for unit in plan.units(run) if unit.wave == 4]
    uri = Path(units[0].rows_uri)
    before = [parquet.read_parquet(unit.rows_uri, row_groups=[unit.row_group]) for unit in units]
    damage(uri, how, other=uri)
    if how == "flipped":
        uri.write_bytes(uri.read_bytes()[:-4] + b"nope")
    assert uri.name in {Path(item.where).name for item in audit(run.uri).problems}
    done = repaired(config, run, plan)
    assert done.rebuilt == [str(uri)]
    assert [parquet.read_parquet(unit.rows_uri, row_groups=[unit.row_group]) for unit in units] == before
    assert audit(run.uri).problems == []


def test_repair_of_a_units_file_with_other_ids_keeps_the_parts_of_the_log_that_fit_the_plan(tmp_path: Path) -> None:
    config, run, plan = opened(HALF[0], tmp_path)
    units = [unit for unit in plan.units(run) if unit.wave == 3]
    rows = [parquet.read_parquet(unit.rows_uri, row_groups=[unit.row_group]) for unit in units]
    wrong = rows[0].set_column(0, "id", pa.array(rows[0]["id"].to_numpy() ^ 2**40))  # as a flipped bit of an older run
    Path(units[0].rows_uri).write_bytes(parquet.parquet_bytes(UNITS, [wrong, *rows[1:]], with_digests=False))
    part = Path(plan.log(run).part(3, 0))
    before = part.read_bytes()
    assert {"units", "log_part"} <= {item.kind for item in audit(run.uri).problems}
    done = repaired(config, run, plan)
    assert (done.rebuilt, done.embed_again, done.left) == ([units[0].rows_uri], [], [])
    assert part.read_bytes() == before
    assert audit(run.uri).problems == []


def test_repair_of_units_that_cannot_be_cut_again_moves_nothing(tmp_path: Path) -> None:
    config, run, plan = opened(HALF[0], tmp_path)
    uri = next(unit.rows_uri for unit in plan.units(run) if unit.wave == 4)
    for file in (Path(uri), *Path(run.path("transformed")).rglob("*.parquet")):
        file.write_bytes(file.read_bytes()[:-100])
    done = repaired(config, run, plan)
    assert done.moved == []
    assert "cannot be cut again" in next(item.why for item in done.left if item.where == uri)
    assert objects.exists(uri)


@pytest.mark.parametrize("how", ["truncated", "exchanged"])
def test_repair_of_a_part_of_an_unpublished_wave_moves_it_aside(how: str, tmp_path: Path) -> None:
    config, run, plan = opened(HALF[0], tmp_path)
    part = Path(plan.log(run).part(3, 0))
    damage(part, how, other=Path(plan.log(run).part(1, 0)))
    data = part.read_bytes()
    done = repaired(config, run, plan)
    assert done.embed_again == [(3, 0)]
    assert not part.exists()
    assert data in [Path(uri).read_bytes() for uri in done.moved]
    assert all("/damaged/" in uri for uri in done.moved)
    assert audit(run.uri).problems == []


@pytest.mark.parametrize("how", ["truncated", "missing"])
def test_repair_of_a_part_of_a_published_wave_names_the_unit_to_embed_again(how: str, tmp_path: Path) -> None:
    config, run, plan = opened(FINISHED[0], tmp_path)
    part = Path(plan.log(run).part(2, 1))
    damage(part, how, other=part)
    done = repaired(config, run, plan)
    assert done.embed_again == [(2, 1)]
    assert [(unit.wave, unit.unit) for unit in units_of(run, plan, done)] == [(2, 1)]
    assert not part.exists()


def test_repair_of_a_codebook_trains_it_again_or_says_on_which_machine(tmp_path: Path) -> None:
    config, run, plan = opened(FINISHED[0], tmp_path)
    commit = commits.read_commit(run, 4)
    where = run.path(commit.codebook_path)
    Path(where).unlink()
    done = repaired(config, run, plan)
    told = [item.where for item in done.left if "other bytes" in item.why]
    assert [*done.rebuilt, *told] == [where]


def test_repair_of_a_manifest_part_or_of_run_json_says_to_restore_it(tmp_path: Path) -> None:
    config, run, plan = opened(FINISHED[0], tmp_path)
    Path(run.settings).write_bytes(b"{")
    Path(run.part("gallery", 0)).unlink()
    done = repaired(config, run, plan)
    assert {run.settings, run.part("gallery", 0)} <= {item.where for item in done.left}
    assert all("restore the file" in item.why for item in done.left)


@pytest.mark.parametrize("place", ["reports/standing.json", "reports/probe-set/*.json", "probe-set/reference.json"])
def test_repair_of_a_figure_that_a_backfill_makes_again_moves_it_aside(place: str, tmp_path: Path) -> None:
    config, run, plan = opened(FINISHED[0], tmp_path)
    file = sorted(Path(run.uri).glob(place))[0]
    file.write_bytes(b"{")
    done = repaired(config, run, plan)
    assert not file.exists()
    assert [Path(uri).read_bytes() for uri in done.moved] == [b"{"]
    assert audit(run.uri).problems == []


def test_check_files_of_a_commit_names_a_missing_or_cut_off_segment(tmp_path: Path) -> None:
    _, run, _ = opened(FINISHED[0], tmp_path)
    commits.check_files(run, 4)
    ref = commits.read_commit(run, 4).segments[0]
    path = Path(run.path(ref.path))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"{ref.bytes - 1} bytes"):
        commits.check_files(run, 4)
    path.unlink()
    with pytest.raises(DataError, match=r"missing(.|\n)*fastfill repair"):
        commits.check_files(run, 4)
