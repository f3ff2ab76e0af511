"""The audit finds each thing that can be wrong with a run, names it, and finds nothing in a whole one."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.tree import Metric
from pipeline.errors import DataError, IncompatibleRun, TransientError
from pipeline.index import commits, leases, segment
from pipeline.index import tags as snapshot
from pipeline.index.commits import SegmentCounts
from pipeline.index.segment_files import KINDS, Rows, SegmentRef
from pipeline.index.writer import Writer
from pipeline.models.calibration import Calibration
from pipeline.reporting.audit import audit
from pipeline.reporting.audit_evidence import Notes
from pipeline.run import Run
from pipeline.storage import documents, objects, parquet
from pipeline.storage.local import LocalStore
from tests.support.run_inputs import write_manifest_part
from tests.support.whole_run import WholeRun, put_rejects

LAST = 2


def make(tmp_path: Path, metric: Metric = "l2", factory: str = "IVF4,Flat") -> WholeRun:
    """Waves 1 and 2 of 3 are published; the log of wave 3 is there already."""
    return template(metric, factory).copy_to(tmp_path)


@cache
def template(metric: Metric, factory: str) -> WholeRun:
    whole = WholeRun(Run(tempfile.mkdtemp()), metric=metric, factory=factory).write_inputs()
    whole.publish(LAST)
    snapshot.promote(whole.run, 1, blockers=[])
    atexit.register(shutil.rmtree, whole.run.uri)
    return whole


def test_audit_run_of_version_0_1_that_this_one_cannot_follow_is_refused_and_not_called_damaged(tmp_path: Path) -> None:
    run = make(tmp_path).run
    plan = documents.decode(objects.read_bytes(run.plan), run.plan)
    objects.put(run.plan, documents.encode(plan | {"relearn_after": [2]}))
    with pytest.raises(IncompatibleRun, match=r"use fastfill 0\.1"):
        audit(run.uri)


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "IVF4,SQ8"])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_audit_of_a_whole_run_finds_no_problem(tmp_path: Path, factory: str, metric: Metric) -> None:
    whole = make(tmp_path, metric, factory)
    report = audit(whole.run.uri)
    assert report.problems == []
    assert report.ok
    segments = len({ref for number in range(LAST + 1) for ref in whole.draft(number).segments})  # not once per commit
    assert report.checked == {
        "commits": LAST + 1,
        "tags": 2,
        "codebooks": 1,
        "plan_parts": 2,
        "log_parts": 6,
        "log_digests": 1 + 2,  # of commits 1 and 2
        "reject_parts": 3,
        "segments": segments,
        "sidecars": segments,
        "ids": whole.num,
        "settings": 3,
        "gallery_parts": 2,
        "manifest_parts": 2,
        "planned_parts": 2,
        "manifest_ids": whole.num,
        "transformations": 1,
        "units": 6,
    } | ({"vectors": whole.num + whole.num * LAST // whole.num_waves} if whole.codebook.exact else {})


@pytest.mark.parametrize("factory", ["Flat", "IVF4,SQ8"])
def test_audit_of_segments_of_an_earlier_version_which_hold_their_rejects_finds_nothing(
    tmp_path: Path, factory: str
) -> None:
    whole = WholeRun(Run(str(tmp_path)), factory=factory, mixed=True).write_inputs()
    whole.publish(LAST)
    assert any(ref.rejected for ref in whole.draft(LAST).segments)
    assert audit(whole.run.uri).problems == []


def test_audit_of_a_run_that_an_earlier_version_began_and_this_one_ended_finds_nothing(tmp_path: Path) -> None:
    whole = WholeRun(Run(str(tmp_path)), mixed=True).write_inputs()
    whole.publish(1)
    old = {ref for ref in whole.draft(1).segments if ref.wave == 1}
    whole.mixed, whole.refs = False, {}
    mine = tuple(ref for ref in whole.draft(2).segments if ref.wave != 1)
    draft = replace(whole.draft(2), segments=(*old, *mine))
    Writer.acquire(whole.run).publish(replace(draft, counts=SegmentCounts.of(draft.segments)))
    assert audit(whole.run.uri).problems == []


def test_audit_of_a_commit_without_the_rejects_of_a_wave_names_it(tmp_path: Path) -> None:
    whole = make(tmp_path)
    commit = commits.read_commit(whole.run, LAST)
    segments = tuple(ref for ref in commit.segments if ref.kind == "embedded" or not ref.rejected)
    assert len(segments) < len(commit.segments)
    changed = replace(commit, segments=segments, counts=SegmentCounts.of(segments))
    objects.put(whole.run.commit(LAST), documents.encode(changed))
    assert_found(whole, "commit", whole.run.commit(LAST), "counts.gallery")


MAP = Calibration((0.0, 1.0), (0.0, 2.0))


def test_audit_of_a_calibrated_run_finds_nothing(tmp_path: Path) -> None:
    whole = WholeRun(Run(str(tmp_path)), calibration=MAP).write_inputs()
    whole.publish(LAST)
    assert audit(whole.run.uri).problems == []


@pytest.mark.parametrize("fitted", [None, Calibration((0.0, 1.0), (0.0, 3.0))])
def test_audit_of_commits_with_another_calibration_than_the_transformation_names_the_first(
    tmp_path: Path, fitted: Calibration | None
) -> None:
    whole = WholeRun(Run(str(tmp_path)), calibration=fitted).write_inputs()
    whole.calibration = MAP
    whole.publish(LAST)
    assert_found(whole, "commit", whole.run.commit(0), "another one")


def test_audit_of_a_commit_with_another_calibration_than_the_one_before_names_it(tmp_path: Path) -> None:
    whole = WholeRun(Run(str(tmp_path)), calibration=MAP).write_inputs()
    whole.publish(1)
    whole.calibration = None
    whole.publish(2)
    assert_found(whole, "commit", whole.run.commit(2), "calibration")


def test_audit_of_a_log_part_that_was_replaced_after_its_wave_was_sealed_names_the_commits(tmp_path: Path) -> None:
    whole = make(tmp_path)
    part = whole.run.path("embedded", "wave-001", "unit-00000.parquet")
    rows = parquet.read_parquet(part)
    shards = rows["shard"].to_numpy()
    other = rows.set_column(2, "source_etag", pa.array(["another"] * rows.num_rows))
    groups = [other.filter(pa.array(shards == shard)) for shard in range(whole.num_shards)]
    objects.put(part, parquet.parquet_bytes(rows.schema, groups))
    problems = audit(whole.run.uri).problems
    assert [(item.kind, item.where) for item in problems] == [
        ("log_digest", whole.run.commit(1)),
        ("log_digest", whole.run.commit(2)),
    ]


def put_into_container(_: int, columns: dict[str, list[object]]) -> None:
    columns["uri"] = ["/data/a.parquet#image"] * len(columns["id"])
    columns["row"] = list(range(len(columns["id"])))


def put_etag(etag: str, _: int, columns: dict[str, list[object]]) -> None:
    columns["source_etag"] = [etag] * len(columns["id"])


@pytest.mark.parametrize("replaced", [False, True])
def test_audit_of_a_container_that_was_replaced_in_mid_run_names_it(tmp_path: Path, replaced: bool) -> None:
    whole = WholeRun(Run(str(tmp_path))).write_inputs()
    for part in objects.list_files(whole.run.path("transformed"), ".parquet"):
        rewrite(part, put_into_container)
    for part in objects.list_files(whole.run.path("embedded"), ".parquet"):
        etag = "second" if replaced and "wave-002" in part else "first"
        rewrite(part, partial(put_etag, etag))
    whole.publish(LAST)
    report = audit(whole.run.uri)
    assert report.checked["containers"] == 1
    found = [(item.kind, item.where, item.found) for item in report.problems]
    assert found == ([("container", "/data/a.parquet#image", "first, second")] if replaced else [])


def test_audit_of_commits_of_older_versions_compares_no_digests(tmp_path: Path) -> None:
    whole = WholeRun(Run(str(tmp_path))).write_inputs()
    writer = Writer.acquire(whole.run)
    for number in range(LAST + 1):
        writer.publish(replace(whole.draft(number), log_digests=()))
    report = audit(whole.run.uri)
    assert report.ok
    assert "log_digests" not in report.checked


def test_audit_of_a_run_without_commits_passes_and_without_a_run_fails(tmp_path: Path) -> None:
    whole = WholeRun(Run(str(tmp_path / "run"))).write_inputs()
    assert audit(whole.run.uri).ok
    with pytest.raises(DataError, match="no run"):
        audit(str(tmp_path / "nothing"))


def test_audit_of_a_run_with_empty_shards_finds_no_problem(tmp_path: Path) -> None:
    whole = WholeRun(Run(str(tmp_path)), num=24, num_waves=2, num_shards=8).write_inputs()
    whole.publish(1)
    assert any(ref.vectors == 0 for ref in commits.read_commit(whole.run, 1).segments)
    assert audit(whole.run.uri).problems == []


@pytest.mark.parametrize("last", [0, None])
def test_audit_while_commits_are_published_finds_no_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int | None
) -> None:
    whole = WholeRun(Run(str(tmp_path))).write_inputs()
    if last is not None:
        whole.publish(last)
    later = iter([1])  # once, and after the audit has seen which commits there are

    def read_removals(run: Run) -> leases.Removals:
        for number in later:
            whole.publish(number)
            snapshot.promote(whole.run, number, blockers=[])
        return leases.read_removals(run)

    monkeypatch.setattr("pipeline.reporting.audit.read_removals", read_removals)
    report = audit(whole.run.uri)
    assert report.problems == []
    assert report.checked["commits"] == 2


def test_audit_while_commits_are_published_finds_a_damaged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = WholeRun(Run(str(tmp_path))).write_inputs()
    whole.publish(0)
    path = whole.run.path(whole.segment(0, 3, "transformed").path)
    flip(path)
    later = iter(range(1, LAST + 1))

    def read_removals(run: Run) -> leases.Removals:
        if (number := next(later, None)) is not None:
            whole.publish(number)
        return leases.read_removals(run)

    monkeypatch.setattr("pipeline.reporting.audit.read_removals", read_removals)
    assert [item.where for item in audit(whole.run.uri).problems] == [path]


@pytest.mark.parametrize("error", [TransientError("object storage keeps failing"), PermissionError(13, "no", "here")])
@pytest.mark.parametrize(
    "folder", ["index/tags", "index/commits", "index/codebook-", "index/segments", "transformed", "embedded", "rejects"]
)
def test_audit_over_a_failing_store_raises_and_blames_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, error: Exception
) -> None:
    monkeypatch.setattr(objects, "PARALLEL_READS", 1)
    whole = make(tmp_path)
    asked: list[str] = []

    def failing(name: str) -> None:
        real = getattr(LocalStore, name)

        def call(store: LocalStore, uri: str, *rest: object) -> object:
            if f"/{folder}" in uri:
                asked.append(uri)
                time.sleep(0.05)  # longer than it takes to cancel what waits
                raise error
            return real(store, uri, *rest)

        monkeypatch.setattr(LocalStore, name, call)

    for name in ("read", "read_versioned", "open", "local_file"):
        failing(name)
    with pytest.raises(type(error)) as caught:
        audit(whole.run.uri)
    assert caught.value is error
    assert len(asked) <= 2  # the one that failed and the one begun meanwhile, not each file: each may take minutes


def flip(uri: str) -> None:
    data = bytearray(Path(uri).read_bytes())
    data[len(data) // 2] ^= 4
    Path(uri).write_bytes(data)


def rewrite(uri: str, change: Callable[[int, dict[str, list[object]]], None]) -> None:
    """Change the rows of each row group of a Parquet file, as Python lists by column."""
    file = pq.ParquetFile(uri)
    schema, groups = file.schema_arrow, []
    for number in range(file.num_row_groups):
        columns = file.read_row_group(number).to_pydict()
        change(number, columns)
        groups.append(columns)
    tables = [pa.table(columns, schema=schema) for columns in groups]
    objects.put(uri, parquet.parquet_bytes(schema, tables))


def republish(whole: WholeRun, number: int, other: SegmentRef) -> None:
    """Rewrite a commit with another segment, so that it is whole in itself."""
    commit = commits.read_commit(whole.run, number)
    segments = tuple(
        other if (ref.shard, ref.wave, ref.kind) == (other.shard, other.wave, other.kind) else ref
        for ref in commit.segments
    )
    changed = replace(commit, segments=segments, counts=SegmentCounts.of(segments))
    objects.put(whole.run.commit(number), documents.encode(changed))


def assert_found(whole: WholeRun, kind: str, where: str, found: str = "") -> None:
    report = audit(whole.run.uri)
    assert not report.ok
    matching = [item for item in report.problems if item.kind == kind and where in item.where]
    assert matching, report.problems
    assert found in matching[0].found


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing", "swapped"])
@pytest.mark.parametrize("kind", ["segment", "sidecar", "codebook"])
def test_audit_names_damaged_files_of_the_index(tmp_path: Path, how: str, kind: str) -> None:
    whole = make(tmp_path)
    ref, other = whole.segment(1, 1, "transformed"), whole.segment(0, 1, "transformed")
    path = {"segment": ref.path, "sidecar": ref.sidecar_path, "codebook": whole.codebook_path}[kind]
    uri = whole.run.path(path)
    if how == "flipped":
        flip(uri)
    elif how == "truncated":
        Path(uri).write_bytes(Path(uri).read_bytes()[:-5])
    elif how == "missing":
        Path(uri).unlink()
    else:
        Path(uri).write_bytes(objects.read_bytes(whole.run.path(other.path)))
    assert_found(whole, kind, path, "missing" if how == "missing" else "sha256")
    problems = audit(whole.run.uri).problems
    assert len(problems) == 1, problems


def test_audit_finds_a_misplaced_segment_with_a_right_checksum(tmp_path: Path) -> None:
    whole = make(tmp_path)
    stranger = replace(whole.segment(0, 3, "transformed"), wave=1, kind="embedded", rejected=0)
    republish(whole, 2, stranger)
    assert_found(whole, "segment", stranger.path, "missing")
    assert_found(whole, "sidecar", stranger.sidecar_path, "unknown")
    assert_found(whole, "commit", whole.run.commit(2), "segment (shard 0, wave 1)")


def test_audit_finds_a_sidecar_with_a_wrong_kind(tmp_path: Path) -> None:
    whole = make(tmp_path)
    (shard,) = whole.shards[whole.rejected & (whole.waves == 2)][:1]
    good, left = (whole.rows(int(shard), 2, kind, kind == "transformed") for kind in KINDS)
    both = Rows(
        np.concatenate([good.ids, left.ids]),
        np.concatenate([good.vectors, left.vectors]),
        np.full(len(good.ids) + len(left.ids), "embedded"),
        np.concatenate([good.uncertainties, left.uncertainties]),
        pa.chunked_array([good.groups, left.groups]),
    )
    ref = segment.write_segment(whole.run, whole.codebook, both, int(shard), 2, "embedded")
    republish(whole, 2, ref)
    assert_found(whole, "kind", ref.sidecar_path, "1 unknown")


def test_audit_finds_a_wrong_count_of_a_commit(tmp_path: Path) -> None:
    whole = make(tmp_path)
    ref = replace(whole.segment(0, 3, "transformed"), vectors=1)
    for number in range(LAST + 1):
        republish(whole, number, ref)
    assert_found(whole, "count", ref.sidecar_path)
    assert_found(whole, "segment", ref.path)


def test_audit_finds_vectors_that_differ_from_the_log(tmp_path: Path) -> None:
    whole = make(tmp_path)
    rows = whole.rows(0, 2, "embedded")
    at = int(np.flatnonzero(rows.kinds == "embedded")[0])
    rows.vectors[at, 3] += 0.5
    ref = segment.write_segment(whole.run, whole.codebook, rows, 0, 2, "embedded")
    republish(whole, 2, ref)
    assert_found(whole, "vector", ref.path, f"1 of {len(rows.ids)} are others, such as that of id {rows.ids[at]}")


@pytest.mark.parametrize(("edit", "found"), [("drop", "1 missing"), ("repeat", "1 repeated"), ("invent", "1 unknown")])
def test_audit_finds_an_image_of_a_published_wave_that_the_log_lacks(tmp_path: Path, edit: str, found: str) -> None:
    whole = make(tmp_path)
    uri = whole.run.path("embedded", "wave-002", "unit-00001.parquet")

    def change(number: int, columns: dict[str, list[object]]) -> None:
        if number != 1:
            return
        for name, values in columns.items():
            if edit == "drop":
                values.pop()
            else:
                values.append(99_999 if edit == "invent" and name == "id" else values[0])

    rewrite(uri, change)
    assert_found(whole, "log", "wave-002, shard 1", found)


def test_audit_finds_an_image_both_embedded_and_rejected(tmp_path: Path) -> None:
    whole = make(tmp_path)
    embedded = pq.read_table(whole.run.path("embedded", "wave-002", "unit-00000.parquet"))["id"][0].as_py()
    uri = next(iter(objects.list_files(whole.run.path("rejects", "wave-002"), ".parquet")))

    def change(_: int, columns: dict[str, list[object]]) -> None:
        for values in columns.values():
            values.append(values[0])
        columns["id"][-1] = embedded

    rewrite(uri, change)
    assert_found(whole, "log", "wave-002", "1 repeated")


def test_audit_finds_missing_rejects(tmp_path: Path) -> None:
    whole = make(tmp_path)
    objects.delete(whole.run.path("rejects"))
    assert_found(whole, "log", "wave-002", "missing")


def test_audit_ignores_a_losers_rejects_and_finds_changed_rejects_of_the_winner(
    tmp_path: Path,
) -> None:
    whole = make(tmp_path)
    (uri,) = objects.list_files(whole.run.path("rejects", "wave-002"), ".parquet")
    checked = audit(whole.run.uri).checked
    other = uri[: -len("0123456789abcdef.parquet")] + 16 * "0" + ".parquet"
    objects.put(other, b"of a writer that lost, whatever it says")
    report = audit(whole.run.uri)
    assert (report.problems, report.checked) == ([], checked)
    objects.delete_files([uri])
    assert_found(whole, "log", "wave-002", "missing")


@pytest.mark.parametrize("folder", ["transformed", "embedded/wave-001", "embedded/wave-003", "rejects/wave-001"])
def test_audit_names_unreadable_parts(tmp_path: Path, folder: str) -> None:
    whole = make(tmp_path)
    uri = objects.list_files(whole.run.path(folder), ".parquet")[-1]
    objects.put(uri, b"PAR1 and then nothing PAR1")
    kind = {"t": "plan_part", "e": "log_part", "r": "reject_part"}[folder[0]]
    assert_found(whole, kind, uri)


def test_audit_finds_an_id_in_two_waves_or_in_the_wrong_shard(tmp_path: Path) -> None:
    whole = make(tmp_path)
    uri = whole.run.part("transformed", 0)
    twice = int(pq.ParquetFile(uri).read_row_group(0)["id"][0].as_py())
    astray = int(whole.ids[whole.shards == 1][0])

    def change(number: int, columns: dict[str, list[object]]) -> None:
        if number in (2, 4):  # shard 0 of waves 2 and 3
            for values in columns.values():
                values.append(values[0])
            columns["id"][-1] = twice if number == 2 else astray

    rewrite(uri, change)
    assert_found(whole, "plan", "transformed, shard 0", "1 repeated, such as " + str(twice))
    assert_found(whole, "shard", "transformed, shard 0", str(astray))


def test_audit_finds_rows_outside_the_waves_and_mixed_row_groups(tmp_path: Path) -> None:
    whole = make(tmp_path)

    def outside(number: int, columns: dict[str, list[object]]) -> None:
        if number == 0:
            columns["wave"] = [9] * len(columns["wave"])

    def mixed(number: int, columns: dict[str, list[object]]) -> None:
        if number == 0:
            columns["wave"][0] = 2

    rewrite(whole.run.part("transformed", 0), outside)
    rewrite(whole.run.part("transformed", 1), mixed)
    assert_found(whole, "plan", whole.run.part("transformed", 0), "[[9, 0]]")
    assert_found(whole, "plan_part", whole.run.part("transformed", 1), "more than one value of wave")


def test_audit_finds_damaged_commits_and_tags_without_a_commit(tmp_path: Path) -> None:
    whole = make(tmp_path)
    flip(whole.run.commit(0))
    Path(whole.run.commit(1)).unlink()
    report = audit(whole.run.uri)
    assert [item.where for item in report.problems if item.kind == "commit"] == [
        whole.run.commit(0),
        whole.run.commit(1),
    ]
    tags = [item.where for item in report.problems if item.kind == "tag"]
    assert tags == [], "the commits are damaged, and the tags that name them are not"
    tag = snapshot.Tag(7, attempt_id="x")
    objects.put(whole.run.tag("prod"), documents.encode(tag))
    assert_found(whole, "tag", whole.run.tag("prod"), "7")
    objects.put(whole.run.tag("candidate"), b"{}")
    assert_found(whole, "tag", whole.run.tag("candidate"))


def test_audit_report_is_plain_text_and_small(tmp_path: Path) -> None:
    whole = make(tmp_path)
    objects.delete(whole.run.path("embedded"))
    report = audit(whole.run.uri)
    assert all(isinstance(value, str) for item in report.problems for value in (item.where, item.expected, item.found))
    assert max(len(item.found) for item in report.problems) < 200


def bring_in(whole: WholeRun, part: int, ids: list[int], rejected: list[int]) -> None:
    """A part of the manifest, and those of its images that the old encoder could not read."""
    run = whole.run
    write_manifest_part(run, part, ids)
    schema = pa.schema([("id", pa.int64())])
    if rejected:
        named = put_rejects(run.path("gallery", "old-rejects"), part, 0, pa.table({"id": rejected}), schema)
        uri = run.path("gallery", "old", f"wave-{part:03d}", "unit-00000.parquet")
        others = [image for image in ids if image not in rejected]
        objects.put(uri, parquet.parquet_bytes(named, [pa.table({"id": others}, schema=schema)]))


def test_audit_of_a_manifest_with_images_rejected_by_the_old_encoder_finds_no_problem(tmp_path: Path) -> None:
    whole = make(tmp_path)
    for part in range(2):
        planned = parquet.read_parquet(whole.run.part("transformed", part), ["id"])["id"].to_pylist()
        bring_in(whole, part, [*planned, 10**6 + part], rejected=[10**6 + part])
    report = audit(whole.run.uri)
    assert report.problems == []
    assert report.checked["manifest_ids"] == whole.num + 2


@pytest.mark.parametrize("damage", ["vanished", "unknown", "planned and rejected", "no part", "no manifest part"])
def test_audit_finds_an_image_that_is_neither_planned_nor_rejected(tmp_path: Path, damage: str) -> None:
    whole = make(tmp_path)
    parts = [parquet.read_parquet(whole.run.part("transformed", part), ["id"])["id"].to_pylist() for part in (0, 1)]
    rejected = {"planned and rejected": [parts[1][5]], "unknown": [77_777_777]}.get(damage, [])
    bring_in(whole, 0, parts[0], [])
    bring_in(whole, 1, [*parts[1], *([88_888_888] if damage == "vanished" else [])], rejected)
    if damage == "no part":
        bring_in(whole, 2, [99_999_999], [])
    if damage == "no manifest part":
        objects.delete_files([whole.run.part("gallery", 1)])
    (problem,) = [item for item in audit(whole.run.uri).problems if item.kind == "manifest"]
    said = {
        "vanished": "1 missing, such as 88888888",
        "unknown": "1 unknown, such as 77777777",
        "planned and rejected": f"1 repeated, such as {parts[1][5]}",
        "no part": "1 missing, such as 99999999",
        "no manifest part": f"{len(parts[1])} unknown, such as ",
    }[damage]
    assert problem.found.startswith(said)
    assert problem.where == whole.run.part("gallery", 2 if damage == "no part" else 1)


def test_audit_notes_parallel_checks_in_order() -> None:
    notes = Notes()

    def check(own: Notes, number: int) -> int:
        time.sleep(0.01 * (number % 3 == 0))
        own.checked["files"] += 1
        if number % 2:
            own.problem("file", str(number), "even", "odd")
        return number

    assert notes.each(check, range(40)) == list(range(40))
    assert [item.where for item in notes.problems] == [str(number) for number in range(1, 40, 2)]
    assert notes.checked == {"files": 40}
