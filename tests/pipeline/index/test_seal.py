"""Sealing: tasks that are killed are repeated, but not for ever; and a log that lacks images says what to do."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.embedding import vector_log
from pipeline.errors import DataError, TransientError
from pipeline.index import seal
from pipeline.index.seal import Sealer
from pipeline.index.segment_files import SegmentKind, SegmentRef
from pipeline.planning.plan import Plan, Wave
from pipeline.run import Run
from pipeline.schema import UNITS as UNITS_SCHEMA
from pipeline.storage import objects, parquet
from pipeline.storage.checksums import Content
from tests.support.whole_run import DIM, UNITS, WholeRun


def die(marks: str, name: str, times: int) -> str:
    """Killed as by a native crash, so many times."""
    marks_of_task = Path(marks) / name
    before = marks_of_task.stat().st_size if marks_of_task.exists() else 0
    if before < times:
        with marks_of_task.open("a") as file:
            file.write("x")
        os._exit(1)
    return name


@pytest.mark.usefixtures("ray_cluster")
def test_a_task_that_is_killed_is_repeated_until_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seal, "_MAX_PAUSE_SECONDS", 0.0)
    tasks = [(name, (str(tmp_path), name, times)) for name, times in (("a", 0), ("b", 2), ("c", 1))]
    assert seal._run(die, tasks) == ["a", "b", "c"]
    assert (tmp_path / "b").stat().st_size == 2


@pytest.mark.usefixtures("ray_cluster")
def test_a_task_that_is_killed_every_time_stops_the_run_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert seal._RETRIES == 20
    monkeypatch.setattr(seal, "_RETRIES", 2)
    monkeypatch.setattr(seal, "_MAX_PAUSE_SECONDS", 0.0)
    tasks = [(f"wave 3, shard {shard}", (str(tmp_path), str(shard), 99 * shard)) for shard in range(2)]
    with pytest.raises(TransientError, match=r"3 attempts(.|\n)*WorkerCrashedError(.|\n)*wave 3, shard 1") as caught:
        seal._run(die, tasks)
    assert "more memory" in str(caught.value)
    assert (tmp_path / "1").stat().st_size == 3


def make(folder: Path) -> tuple[WholeRun, Sealer]:
    whole = WholeRun(Run(str(folder))).write_inputs()
    waves = tuple(Wave(number + 1, whole.num // 3, UNITS) for number in range(3))
    plan = Plan("random", 0, whole.num, 2, whole.num_shards, DIM, 40, waves, "f")
    objects.put(whole.run.plan, json.dumps(asdict(plan)).encode())
    for wave in range(1, 4):
        members = [
            whole.ids[(whole.waves == wave) & (np.arange(whole.num) // 3 % UNITS == unit)] for unit in range(UNITS)
        ]
        nothing = [
            {name: pa.nulls(len(ids), UNITS_SCHEMA.field(name).type) for name in UNITS_SCHEMA.names[1:]}
            for ids in members
        ]
        groups = [pa.table({"id": ids, **rest}) for ids, rest in zip(members, nothing, strict=True)]
        objects.put(whole.run.wave_units(wave, 0), parquet.parquet_bytes(UNITS_SCHEMA, groups))
    return whole, Sealer(whole.run, plan, whole.codebook_path, whole.codebook_sha256)


def test_seal_of_a_wave_ignores_rejects_of_a_losing_writer(tmp_path: Path) -> None:
    whole, sealer = make(tmp_path)
    shards = range(whole.num_shards)
    refs = seal._seal_embedded(sealer, 1, shards)[0]
    objects.put(sealer.plan.log(whole.run).rejects(1, 0, 16 * "0"), b"of a writer that lost")
    assert seal._seal_embedded(sealer, 1, shards)[0] == refs
    assert sum(ref.rejected for ref in refs) == int((whole.rejected & (whole.waves == 1)).sum()) > 0


@pytest.mark.parametrize("deleted_images", ["keep", "drop"])
@pytest.mark.parametrize("kind", ["transformed", "embedded"])
def test_shards_that_are_read_together_are_sealed_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: SegmentKind, deleted_images: str
) -> None:
    whole, sealer = make(tmp_path)
    sealer = replace(sealer, plan=replace(sealer.plan, deleted_images=deleted_images))
    monkeypatch.setattr(seal, "_run", lambda function, tasks: [function(*arguments) for _, arguments in tasks])
    monkeypatch.setattr(vector_log, "read_deleted", lambda log, wave: whole.ids[whole.rejected])
    found, opened = [], []
    open_parquet = parquet.open_parquet

    @contextmanager
    def watched(uri: str) -> Iterator[Content]:
        with open_parquet(uri) as file:
            read = file.read_row_groups
            file.read_row_groups = lambda *rest, **more: opened.append(uri) or read(*rest, **more)
            yield file

    monkeypatch.setattr(parquet, "open_parquet", watched)
    for shards_at_once in (1, 2):
        monkeypatch.setattr(seal, "_BYTES_AT_ONCE", 80 * DIM * 4 * shards_at_once // whole.num_shards)
        opened.clear()
        found.append(sealer.transformed([2]) if kind == "transformed" else sealer.embedded(2)[0])
        for folder, files in (("transformed", 2), ("embedded", UNITS if kind == "embedded" else 0)):
            assert sum(f"/{folder}/" in uri for uri in opened) == files * whole.num_shards // shards_at_once
    assert found[0] == found[1]
    if kind == "embedded" and deleted_images == "drop":
        deleted = whole.shards[whole.rejected & (whole.waves == 2)]
        assert [ref.deleted for ref in found[0] if ref.kind == "embedded"] == np.bincount(
            deleted, minlength=whole.num_shards
        ).tolist()
    else:
        shards = range(whole.num_shards)
        expected = [
            ref
            for shard in shards
            for ref in (whole.sealed(shard, 2) if kind == "embedded" else [whole.segment(shard, 2, kind)])
        ]
        what = [{(ref.shard, ref.kind, ref.rejected, ref.path) for ref in refs} for refs in (found[0], expected)]
        assert what[0] == what[1]


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("deleted_images", ["keep", "drop"])
def test_segments_that_are_sealed_again_have_the_bytes_of_their_commit_also_those_of_earlier_versions(
    tmp_path: Path, mixed: bool, deleted_images: Literal["keep", "drop"]
) -> None:
    whole, sealer = make(tmp_path)
    sealer = replace(sealer, plan=replace(sealer.plan, deleted_images=deleted_images))
    for shard in range(whole.num_shards):
        refs = seal._seal_embedded(sealer, 2, range(shard, shard + 1), mixed=mixed)[0]
        assert all(ref.kind == "embedded" for ref in refs) or not mixed
        for ref in (*refs, *seal._seal_transformed(sealer, 2, range(shard, shard + 1))):
            assert seal.seal_again(sealer, ref) == ref


def test_rejects_of_a_wave_are_sealed_into_a_transformed_segment_of_their_own(tmp_path: Path) -> None:
    whole, sealer = make(tmp_path)
    refs, _ = seal._seal_embedded(sealer, 2, range(whole.num_shards))
    for ref in refs:
        ids = parquet.read_parquet(whole.run.path(ref.sidecar_path))["id"].to_numpy()
        mine = (whole.waves == 2) & (whole.shards == ref.shard) & (whole.rejected == (ref.kind == "transformed"))
        assert ids.tolist() == np.sort(whole.ids[mine]).tolist()
        assert ref.rejected == (ref.vectors if ref.kind == "transformed" else 0)
    with_rejects = {int(shard) for shard in whole.shards[(whole.waves == 2) & whole.rejected]}
    assert {ref.shard for ref in refs if ref.kind == "transformed"} == with_rejects


def test_rejects_that_the_log_has_no_more_cannot_be_sealed_again(tmp_path: Path) -> None:
    whole, sealer = make(tmp_path)
    refs, _ = seal._seal_embedded(sealer, 3, range(whole.num_shards))
    ref = next(ref for ref in refs if ref.kind == "embedded" and ref.shard not in _of_rejects(refs))
    with pytest.raises(DataError, match="no rejects"):
        seal.seal_again(sealer, replace(ref, kind="transformed", rejected=1))


def _of_rejects(refs: list[SegmentRef]) -> set[int]:
    return {ref.shard for ref in refs if ref.kind == "transformed"}


def test_seal_embedded_of_a_part_that_is_not_the_acknowledged_one_names_it(tmp_path: Path) -> None:
    whole, sealer = make(tmp_path)
    log, shards = sealer.plan.log(whole.run), range(whole.num_shards)
    digests = vector_log.read_parts(log, 1)[2]
    assert all(digests.values())
    refs, digest = seal._seal_embedded(sealer, 1, shards, digests)
    assert digest == vector_log.wave_digest(digests)
    assert seal._seal_embedded(sealer, 1, shards, {0: digests[0]}) == (refs, digest)  # of others nothing is known
    rows = parquet.read_parquet(log.part(1, 1))
    other = rows.set_column(2, "source_etag", pa.array(["another"] * rows.num_rows))
    groups = [other.filter(pa.array(rows["shard"].to_numpy() == shard)) for shard in shards]
    objects.put(log.part(1, 1), parquet.parquet_bytes(rows.schema, groups))
    assert seal._seal_embedded(sealer, 1, shards)[1] not in ("", digest)
    with pytest.raises(DataError, match=r"unit-00001\.parquet"):
        seal._seal_embedded(sealer, 1, shards, digests)


def test_seal_embedded_of_parts_of_older_versions_gives_no_digest(tmp_path: Path) -> None:
    whole, sealer = make(tmp_path)
    refs, _ = seal._seal_embedded(sealer, 1, range(whole.num_shards))
    part = sealer.plan.log(whole.run).part(1, 0)
    rows = parquet.read_parquet(part)
    with pq.ParquetWriter(part, rows.schema) as writer:
        for shard in range(whole.num_shards):
            writer.write_table(rows.filter(pa.array(rows["shard"].to_numpy() == shard)))
    assert seal._seal_embedded(sealer, 1, range(whole.num_shards)) == (refs, "")


def test_a_task_seals_as_many_shards_as_it_may_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, sealer = make(tmp_path)
    sealer = replace(sealer, plan=replace(sealer.plan, num_shards=7))  # waves of 80 images
    for held, expected in ((1, 7 * [1]), (2 * 80 - 1, 7 * [1]), (3 * 80, [3, 3, 1]), (7 * 80, [7]), (10**9, [7])):
        monkeypatch.setattr(seal, "_BYTES_AT_ONCE", -(-held * DIM * 4 // 7))
        found = sealer.together(1)
        assert [len(shards) for shards in found] == expected
        assert [shard for shards in found for shard in shards] == list(range(7))


def test_a_log_that_lacks_images_names_their_unit_and_what_to_do(tmp_path: Path) -> None:
    whole, sealer = make(tmp_path)
    objects.delete(whole.run.path("rejects"))
    shard = int(whole.shards[whole.rejected & (whole.waves == 1)][0])
    with pytest.raises(
        DataError,
        match=r"[12] images are missing, (.|\n)*in units 1\n(.|\n)*audit(.|\n)*of units 1 out of (.|\n)*embedded again",
    ):
        seal._seal_embedded(sealer, 1, range(shard, shard + 1))
