"""The vector log: a unit is durable once and for all, with every image in its part or in its rejects."""

from __future__ import annotations

import hashlib
import threading
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.arrays import Float32, Int64
from pipeline.embedding.vector_log import (
    EmbeddedUnit,
    VectorLog,
    count_log_rejects,
    finished_units,
    forget_rejects,
    part_times,
    read_deleted,
    read_parts,
    read_rejects,
    read_wave,
    reject_files,
    write_unit,
)
from pipeline.errors import DataError
from pipeline.hashing import shard_of
from pipeline.schema import DELETED, UNITS, Unit, embedded_schema
from pipeline.storage import interface, objects, parquet

DIM, SHARDS = 3, 4


def make_log(folder: Path) -> VectorLog:
    return VectorLog(str(folder / "embedded"), str(folder / "rejects"), DIM, SHARDS)


@pytest.fixture
def log(tmp_path: Path) -> VectorLog:
    return make_log(tmp_path)


def vectors_of(ids: Int64) -> Float32:
    """The vector that each id stands for."""
    return np.stack([ids % 1000, ids % 7, -ids % 11], axis=1).astype(np.float32)


def write_plan(folder: Path, units: list[list[int]], wave: int = 1) -> list[Unit]:
    """The units file of a wave, whose units have these ids."""
    uri = str(folder / f"wave-{wave}.parquet")
    groups = []
    for ids in units:
        columns = {"id": ids, "uri": [f"{number}.png" for number in ids]}
        columns |= {name: pa.nulls(len(ids), pa.int64()) for name in ("offset", "length", "row")}
        columns["etag"] = pa.nulls(len(ids), pa.string())
        groups.append(pa.table(columns).cast(UNITS))
    objects.put(uri, parquet.parquet_bytes(UNITS, groups))
    return [Unit(wave, number, uri, number, len(ids)) for number, ids in enumerate(units)]


def embed(ids: list[int], bad: tuple[int, ...] = (), shift: float = 0.0) -> EmbeddedUnit:
    """An embedded unit in the order of `ids`; those in `bad` are rejected, and their vectors are rubbish."""
    array = np.array(ids, np.int64)
    vectors = vectors_of(array) + np.float32(shift)
    vectors[np.isin(array, bad)] = np.nan
    return EmbeddedUnit(
        ids=array,
        vectors=vectors,
        etags=pa.array([f"etag-{number}" for number in ids], pa.string()),
        reject_stages=pa.array(["decode" if number in bad else "" for number in ids]),
        reject_reasons=pa.array(["empty" if number in bad else "" for number in ids]),
    )


def files(log: VectorLog) -> dict[str, bytes]:
    uris = objects.list_files(log.parts_uri) + objects.list_files(log.rejects_uri)
    return {uri: objects.read_bytes(uri) for uri in uris}


def test_write_unit_gives_the_digest_of_the_part_that_is_there(tmp_path: Path, log: VectorLog) -> None:
    (unit,) = write_plan(tmp_path, [[4, 9]])
    *_, digest = write_unit(log, unit, embed([4, 9]))
    assert write_unit(log, unit, embed([4, 9], shift=1.0))[2] == digest
    assert read_parts(log, 1)[2] == {0: digest} == read_parts(log, 1, range(1))[2]
    other = VectorLog(str(tmp_path / "other"), str(tmp_path / "other-rejects"), DIM, SHARDS)
    assert write_unit(other, unit, embed([4, 9], shift=1.0))[2] not in ("", digest)


@pytest.mark.parametrize("name", ["unit-00000 (copy).parquet", "unit-0.parquet", "part-00000.parquet"])
def test_a_file_in_the_log_without_the_name_of_a_part_is_ignored_with_a_warning(
    tmp_path: Path, log: VectorLog, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    (unit,) = write_plan(tmp_path, [[4, 9]])
    write_unit(log, unit, embed([4, 9]))
    stray = Path(log.part(1, 0)).with_name(name)
    stray.write_bytes(objects.read_bytes(log.part(1, 0)))
    assert finished_units(log) == {1: [0]}
    assert list(part_times(log)) == [(1, 0)]
    assert read_wave(log, 1)[0].tolist() == [4, 9]
    assert str(stray) in caplog.text


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_read_wave_of_a_part_that_is_cut_off_names_it_and_what_to_do(
    tmp_path: Path, log: VectorLog, kept: float
) -> None:
    units = write_plan(tmp_path, [[4, 9], [5]])
    for unit, ids in zip(units, ([4, 9], [5]), strict=True):
        write_unit(log, unit, embed(ids, bad=(9,)))
    part = Path(log.part(1, 0))
    part.write_bytes(part.read_bytes()[: int(kept * part.stat().st_size)])
    for read in (
        lambda: read_wave(log, 1),
        lambda: count_log_rejects(log),
        lambda: write_unit(log, units[0], embed([4, 9])),
    ):
        with pytest.raises(DataError, match="move this file out of the run") as caught:
            read()
        assert caught.value.details["where"] == str(part)
    part.rename(tmp_path / "moved")
    assert finished_units(log) == {1: [1]}
    write_unit(log, units[0], embed([4, 9]))
    assert read_wave(log, 1)[0].tolist() == [4, 5, 9]


def test_a_unit_is_durable_whole_and_sorted_by_shard_and_id(tmp_path: Path, log: VectorLog) -> None:
    ids = [50, 3, 999, 12, 7, 8]
    (unit,) = write_plan(tmp_path, [ids])
    size, rejected, _ = write_unit(log, unit, embed(ids))
    assert (size, rejected) == (len(objects.read_bytes(log.part(1, 0))), 0)
    part = parquet.read_parquet(log.part(1, 0))
    assert part.schema.equals(embedded_schema(DIM))
    found = part["id"].to_numpy()
    assert sorted(found.tolist()) == sorted(ids)
    assert part["shard"].to_pylist() == shard_of(found, SHARDS).tolist()
    assert part["source_etag"].to_pylist() == [f"etag-{number}" for number in found]
    for shard in range(SHARDS):
        group = parquet.read_parquet(log.part(1, 0), row_groups=[shard])
        assert set(group["shard"].to_pylist()) <= {shard}
        assert group["id"].to_pylist() == sorted(group["id"].to_pylist())


def test_a_unit_written_twice_keeps_the_first_parts_bytes_and_says_what_they_hold(
    tmp_path: Path, log: VectorLog
) -> None:
    ids = list(range(20))
    (unit,) = write_plan(tmp_path, [ids])
    first = write_unit(log, unit, embed(ids, bad=(4, 5)))
    before = files(log)
    assert write_unit(log, unit, embed(ids, bad=(6,), shift=1.0)) == first
    assert files(log) == before


@pytest.mark.parametrize(("winner", "loser"), [((4, 5), (6,)), ((), (6,)), ((4, 5), ()), ((4,), (4, 6))])
def test_two_writers_with_different_rejects_keep_those_of_the_part_that_won(
    tmp_path: Path, log: VectorLog, monkeypatch: pytest.MonkeyPatch, winner: tuple[int, ...], loser: tuple[int, ...]
) -> None:
    ids = list(range(20))
    (unit,) = write_plan(tmp_path, [ids])
    first = write_unit(log, unit, embed(ids, bad=winner))
    # Both looked before either had written: no thread can be stopped just there.
    monkeypatch.setattr(objects, "exists", lambda uri: False)
    assert write_unit(log, unit, embed(ids, bad=loser, shift=1.0)) == first
    assert sorted(read_rejects(log)["id"].to_pylist()) == list(winner)
    assert sorted(read_wave(log, 1)[0].tolist()) == sorted(set(ids) - set(winner))


def test_the_same_unit_in_another_order_gives_the_same_bytes(tmp_path: Path) -> None:
    ids = list(range(40))
    written = []
    for name, order in (("a", ids), ("b", ids[::-1])):
        log = make_log(tmp_path / name)
        (unit,) = write_plan(tmp_path / name, [order])
        write_unit(log, unit, embed(order))
        written.append(objects.read_bytes(log.part(1, 0)))
    assert written[0] == written[1]


def test_rejects_keep_their_place_stage_and_reason_and_are_in_no_part(tmp_path: Path, log: VectorLog) -> None:
    ids = [9, 4, 6, 1]
    (unit,) = write_plan(tmp_path, [ids])
    assert write_unit(log, unit, embed(ids, bad=(4, 1)))[1] == 2
    nothing = {"offset": None, "length": None, "row": None, "etag": None, "stage": "decode", "reason": "empty"}
    assert read_rejects(log).to_pylist() == [{"id": number, "uri": f"{number}.png", **nothing} for number in (4, 1)]
    assert read_wave(log, 1)[0].tolist() == [6, 9]


def test_a_unit_of_rejects_only_is_done(tmp_path: Path, log: VectorLog) -> None:
    (unit,) = write_plan(tmp_path, [[1, 2]])
    assert write_unit(log, unit, embed([1, 2], bad=(1, 2)))[1] == 2
    assert finished_units(log) == {1: [0]}
    ids, vectors = read_wave(log, 1)
    assert (ids.shape, vectors.shape) == ((0,), (0, DIM))


def test_a_unit_without_rejects_has_no_file_of_rejects(tmp_path: Path, log: VectorLog) -> None:
    (unit,) = write_plan(tmp_path, [[1, 2]])
    write_unit(log, unit, embed([1, 2]))
    assert objects.list_files(log.rejects_uri) == []


@settings(max_examples=15, deadline=None)
@given(
    ids=st.lists(st.integers(0, 10**15), min_size=1, max_size=60, unique=True),
    bad=st.sets(st.integers(0, 59)),
    size=st.integers(1, 25),
)
def test_shards_of_a_wave_are_the_wave_filtered(
    tmp_path_factory: pytest.TempPathFactory, ids: list[int], bad: set[int], size: int
) -> None:
    folder = tmp_path_factory.mktemp("log")
    log = make_log(folder)
    rejected = tuple(number for place, number in enumerate(ids) if place in bad)
    cut = [ids[start : start + size] for start in range(0, len(ids), size)]
    for unit, rows in zip(write_plan(folder, cut), cut, strict=True):
        write_unit(log, unit, embed(rows, rejected))
    found, vectors = read_wave(log, 1)
    assert found.tolist() == sorted(set(ids) - set(rejected))
    assert np.array_equal(vectors, vectors_of(found))
    for shard in range(SHARDS):
        mine = shard_of(found, SHARDS) == shard
        ids_of_shard, vectors_of_shard = read_wave(log, 1, range(shard, shard + 1))
        assert np.array_equal(ids_of_shard, found[mine])
        assert np.array_equal(vectors_of_shard, vectors[mine])
    assert np.array_equal(read_wave(log, 1, range(SHARDS))[1], vectors)


def test_a_wave_that_is_not_begun_is_empty(log: VectorLog) -> None:
    assert read_wave(log, 1)[1].shape == read_wave(log, 1, range(1))[1].shape == (0, DIM)
    assert finished_units(log) == count_log_rejects(log) == part_times(log) == {}
    assert read_rejects(log).num_rows == 0


def test_units_and_rejects_are_counted_by_wave(tmp_path: Path, log: VectorLog) -> None:
    cut = [[1, 2, 3], [4, 5], [6]]
    for wave in (1, 12):
        units = write_plan(tmp_path, cut, wave)
        for number in (2, 0):
            write_unit(log, units[number], embed(cut[number], bad=(1, 2) if wave == 12 else ()))
    assert finished_units(log) == {1: [0, 2], 12: [0, 2]}
    assert sorted(part_times(log)) == [(1, 0), (1, 2), (12, 0), (12, 2)]
    assert count_log_rejects(log) == {12: 2}
    assert read_rejects(log, 1).num_rows == 0
    assert read_rejects(log, 12)["id"].to_pylist() == [1, 2]


class Died(Exception):
    """Stands for the end of the process."""


def write_rejects_and_die(log: VectorLog, unit: Unit, embedded: EmbeddedUnit, monkeypatch: pytest.MonkeyPatch) -> None:
    # A patch, because a kill from outside cannot be timed to fall between the two files.
    def die(uri: str, data: bytes) -> None:
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr(objects, "put_if_absent", die)
        with pytest.raises(Died):
            write_unit(log, unit, embedded)


@pytest.mark.parametrize("bad_again", [(), (2,), (1, 2), (3,), (2, 3)])
def test_a_unit_that_died_before_its_part_is_done_again_as_if_it_had_never_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad_again: tuple[int, ...]
) -> None:
    ids, written = [1, 2, 3, 4], []
    for dies in (False, True):
        log = make_log(tmp_path / str(dies))
        (unit,) = write_plan(tmp_path / "plan", [ids])
        if dies:
            write_rejects_and_die(log, unit, embed(ids, bad=(2,)), monkeypatch)
            assert finished_units(log) == {}
            assert count_log_rejects(log) == {}  # they are counted with the unit, once it is done
        assert write_unit(log, unit, embed(ids, bad_again))[1] == len(bad_again)
        embedded, rejected = read_wave(log, 1)[0].tolist(), read_rejects(log)["id"].to_pylist()
        assert sorted(embedded + rejected) == ids
        assert count_log_rejects(log).get(1, 0) == len(bad_again)
        written.append([objects.read_bytes(uri) for uri in (log.part(1, 0), *reject_files(log).values())])
    assert written[0] == written[1]


class Killed(Exception):
    """Stands for the end of the other writer."""


def write_between(
    log: VectorLog, unit: Unit, first: EmbeddedUnit, other: EmbeddedUnit, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Write `first` whole while another writer, which looked before, writes `other` and then dies.

    Args:
        log: the log.
        unit: the unit.
        first: what becomes durable.
        other: what comes too late.
        monkeypatch: no process can be stopped at just these moments.
        moment: of the other writer: before its rejects, after them, after its part was refused, or (never) the end.
    """
    put, create = objects.put, objects.put_if_absent

    with monkeypatch.context() as patch:

        def put_late(uri: str, data: bytes) -> None:
            patch.setattr(objects, "put", put)
            write_unit(log, unit, first)
            raise Killed

        def create_late(uri: str, data: bytes) -> None:
            patch.setattr(objects, "put_if_absent", create)
            write_unit(log, unit, first)
            if moment == "after its part":
                with pytest.raises(interface.AlreadyExists):
                    create(uri, data)
            if moment != "never":
                raise Killed
            create(uri, data)

        if moment == "before its rejects":
            patch.setattr(objects, "put", put_late)
        else:
            patch.setattr(objects, "put_if_absent", create_late)
        if moment == "never":
            assert write_unit(log, unit, other)[1] == read_rejects(log).num_rows
        else:
            with pytest.raises(Killed):
                write_unit(log, unit, other)


def reasons(log: VectorLog) -> dict[int, str]:
    return {row["id"]: row["reason"] for row in read_rejects(log).to_pylist()}


@pytest.mark.parametrize("winner", [(), (2,), (2, 3)])
@pytest.mark.parametrize(
    ("moment", "loser"),
    [
        (moment, loser)
        for moment in ("before its rejects", "after its rejects", "after its part", "never")
        for loser in ((), (2,), (5, 6))
        if loser or moment != "before its rejects"  # which it does not have
    ],
)
def test_a_writer_that_comes_too_late_changes_neither_the_rejects_nor_their_reasons(
    tmp_path: Path,
    log: VectorLog,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    winner: tuple[int, ...],
    loser: tuple[int, ...],
) -> None:
    ids = [1, 2, 3, 4, 5, 6]
    (unit,) = write_plan(tmp_path, [ids])
    first = replace(embed(ids, winner), reject_reasons=pa.array([f"{DELETED}: {number}" for number in ids]))
    write_between(log, unit, first, embed(ids, loser, shift=1.0), monkeypatch, moment)
    for _ in range(2):  # and so it stays when the unit is written again on resume
        ids_of_part, vectors = read_wave(log, 1)
        assert np.array_equal(vectors, vectors_of(ids_of_part))
        assert sorted(set(ids) - set(ids_of_part.tolist())) == sorted(reasons(log)) == list(winner)
        assert reasons(log) == {number: f"{DELETED}: {number}" for number in winner}
        assert read_deleted(log, 1).tolist() == list(winner)
        assert count_log_rejects(log).get(1, 0) == len(winner)
        assert write_unit(log, unit, embed(ids, loser))[1] == len(winner)


def test_a_part_without_rejects_has_the_bytes_that_it_always_had_and_one_with_rejects_names_their_file(
    tmp_path: Path, log: VectorLog
) -> None:
    units = write_plan(tmp_path, [[1, 2], [3, 4]])
    write_unit(log, units[0], embed([1, 2]))
    write_unit(log, units[1], embed([3, 4], bad=(4,)))
    with parquet.open_parquet(log.part(1, 0)) as file:
        assert file.schema_arrow.metadata is None
    (uri,) = objects.list_files(log.rejects_uri)
    with parquet.open_parquet(log.part(1, 1)) as file:
        digest = file.schema_arrow.metadata[b"rejects"].decode()
    assert digest == hashlib.sha256(objects.read_bytes(uri)).hexdigest()[:16]
    assert uri == f"{log.rejects_uri}/wave-001/unit-00001-{digest}.parquet"


def test_a_unit_that_is_forgotten_between_its_two_files_keeps_its_rejects(
    tmp_path: Path, log: VectorLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    (unit,) = write_plan(tmp_path, [[1, 2, 3]])
    create = objects.put_if_absent

    def create_late(uri: str, data: bytes) -> None:
        assert forget_rejects(log, after_wave=0) == 0
        assert objects.list_files(log.rejects_uri) == []
        create(uri, data)

    monkeypatch.setattr(objects, "put_if_absent", create_late)
    assert write_unit(log, unit, embed([1, 2, 3], bad=(2,)))[1] == 1
    assert reasons(log) == {2: "empty"}


def test_forget_rejects_removes_losers_files_and_undoes_no_unit(
    tmp_path: Path, log: VectorLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = write_plan(tmp_path, [[1, 2, 3], [4, 5]])
    write_between(log, units[0], embed([1, 2, 3]), embed([1, 2, 3], bad=(2,)), monkeypatch, "never")
    write_between(log, units[1], embed([4, 5], bad=(4,)), embed([4, 5], bad=(5,)), monkeypatch, "never")
    assert len(objects.list_files(log.rejects_uri)) == 3
    assert forget_rejects(log, after_wave=0) == 1
    assert objects.list_files(log.rejects_uri) == []
    assert finished_units(log) == {1: [0]}


def test_a_damaged_part_does_not_pass_for_one_without_rejects(tmp_path: Path, log: VectorLog) -> None:
    (unit,) = write_plan(tmp_path, [[1, 2, 3]])
    write_unit(log, unit, embed([1, 2, 3], bad=(2,)))
    objects.put(log.part(1, 0), b"PAR1 and nothing PAR1")
    for read in (read_rejects, count_log_rejects, lambda log: forget_rejects(log, after_wave=0)):
        with pytest.raises(DataError, match="unit-00000"):
            read(log)
    assert reject_files(log, skip_unreadable=True) == {}


def test_footers_are_read_at_the_same_time(tmp_path: Path, log: VectorLog, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = [[2 * number, 2 * number + 1] for number in range(8)]
    for unit, ids in zip(write_plan(tmp_path, cut), cut, strict=True):
        write_unit(log, unit, embed(ids, bad=(ids[0],)))
    together, open_parquet = threading.Barrier(8, timeout=30), parquet.open_parquet

    def open_together(uri: str) -> AbstractContextManager[pq.ParquetFile]:
        together.wait()  # breaks where one waits for another
        return open_parquet(uri)

    monkeypatch.setattr(parquet, "open_parquet", open_together)
    assert count_log_rejects(log) == {1: 8}


def test_forgetting_rejects_undoes_their_units_of_later_waves_only(tmp_path: Path, log: VectorLog) -> None:
    cut = [[1, 2, 3], [4, 5], [6]]
    for wave in (1, 2, 3):
        for unit, rows in zip(write_plan(tmp_path, cut, wave), cut, strict=True):
            write_unit(log, unit, embed(rows, bad=(2, 6)))
    assert forget_rejects(log, after_wave=1) == 4
    assert finished_units(log) == {1: [0, 1, 2], 2: [1], 3: [1]}
    assert count_log_rejects(log) == {1: 2}
    assert forget_rejects(log, after_wave=1) == 0


def test_a_forgotten_unit_can_be_embedded_without_its_rejects(tmp_path: Path, log: VectorLog) -> None:
    (unit,) = write_plan(tmp_path, [[1, 2, 3]])
    write_unit(log, unit, embed([1, 2, 3], bad=(2,)))
    forget_rejects(log, after_wave=0)
    assert write_unit(log, unit, embed([1, 2, 3]))[1] == 0
    assert read_wave(log, 1)[0].tolist() == [1, 2, 3]
    assert read_rejects(log).num_rows == 0
