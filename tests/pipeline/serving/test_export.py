"""An export answers as the snapshot does, holds what the segments hold, and is whole once it has its marker."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.config.tree import Metric
from pipeline.errors import DataError, Refused
from pipeline.index import commits, leases, segment, tags
from pipeline.index.gc import Rules, collect_garbage
from pipeline.index.segment import Segment
from pipeline.index.tags import Tag
from pipeline.models.calibration import Calibration
from pipeline.reporting.audit import audit
from pipeline.run import Run
from pipeline.serving.export import export
from pipeline.serving.searcher import Searcher
from pipeline.storage import objects
from tests.support.published_run import Crash, dying, upload
from tests.support.whole_run import DIM, WholeRun

FACTORIES = ["Flat", "IVF4,Flat", "IVF4,SQ8", "OPQ4_8,IVF4,PQ4x4", "IVF4_HNSW8,Flat"]
K = 12


def make(
    folder: Path,
    factory: str = "IVF4,Flat",
    metric: Metric = "l2",
    num_shards: int = 3,
    calibration: Calibration | None = None,
) -> WholeRun:
    """Wave 1 of 2 is published and promoted."""
    run = Run(str(folder))
    whole = WholeRun(run, metric, factory, 300, num_waves=2, num_shards=num_shards, calibration=calibration)
    whole.write_inputs()
    whole.write_gallery()
    whole.publish(1)
    tags.promote(whole.run, 1, blockers=[])
    return whole


def exported(out: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((out / "export.json").read_text())
    return found


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("factory", FACTORIES)
def test_plain_faiss_finds_in_the_files_what_the_searcher_finds(tmp_path: Path, factory: str, metric: Metric) -> None:
    whole = make(tmp_path / "run", factory, metric)
    marker = export(whole.run.uri, str(tmp_path / "out"), "faiss")
    queries = np.random.default_rng(3).standard_normal((20, DIM)).astype(np.float32)
    with Searcher(whole.run.uri) as searcher:
        expected = searcher.search(queries, K)

    shards = [faiss.read_index(str(tmp_path / "out" / file["path"])) for file in marker["files"]]
    answers = [shard.search(queries, K) for shard in shards]
    sign = 1 if metric == "l2" else -1
    keys = np.concatenate([distances * sign for distances, _ in answers], axis=1)
    ids = np.concatenate([found for _, found in answers], axis=1)
    order = np.lexsort((ids, keys), axis=1)[:, :K]

    np.testing.assert_allclose(np.take_along_axis(keys, order, 1) * sign, expected.distances, rtol=1e-4, atol=1e-4)
    same = (np.take_along_axis(ids, order, 1) == expected.ids).mean()
    assert same == 1.0 if whole.codebook.exact else same > 0.9  # a lossy codec makes ties
    assert sum(shard.ntotal for shard in shards) == whole.num
    for number, (_, found) in enumerate(answers):
        assert set(found[found >= 0].tolist()) <= set(whole.ids[whole.shards == number].tolist())
        assert faiss.extract_index_ivf(shards[number]).nprobe == 4


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_export_faiss_of_a_calibrated_snapshot_has_a_file_per_kind_and_merges_as_its_marker_says(
    tmp_path: Path, metric: Metric
) -> None:
    map_ = Calibration((-1.0, 0.0, 1.0, 20.0), (-1.2, 0.1, 4.0, 15.0))
    whole = make(tmp_path / "run", "IVF4,Flat", metric, calibration=map_)
    whole.write_gallery(with_keys=True)
    marker = export(whole.run.uri, str(tmp_path / "out"), "faiss")
    assert exported(tmp_path / "out") == marker == export(whole.run.uri, str(tmp_path / "out"), "faiss")
    names = [f"shard-{shard:05d}-{kind}.faiss" for shard in range(3) for kind in ("embedded", "transformed")]
    assert [file["path"] for file in marker["files"]] == names
    assert sum(file["vectors"] for file in marker["files"]) == whole.num
    knots = marker["calibration"]
    assert "k smallest keys" in knots["how_to_merge"]
    queries, sign = np.random.default_rng(3).standard_normal((20, DIM)).astype(np.float32), 1 if metric == "l2" else -1
    keys, ids = [], []
    for file in marker["files"]:
        distances, found = faiss.read_index(str(tmp_path / "out" / file["path"])).search(queries, K)
        key = distances * sign
        if file["kind"] == "transformed":
            key = np.interp(key, knots["observed"], knots["expected"], right=np.inf)  # none is beyond the knots
        keys.append(key)
        ids.append(found)
    order = np.argsort(np.concatenate(keys, axis=1), axis=1)[:, :K]
    with Searcher(whole.run.uri) as searcher:
        expected = searcher.search(queries, K)
    np.testing.assert_array_equal(np.take_along_axis(np.concatenate(ids, axis=1), order, 1), expected.ids)
    merged = np.take_along_axis(np.concatenate(keys, axis=1), order, 1) * sign
    np.testing.assert_allclose(merged, expected.distances, rtol=1e-4, atol=1e-4)


def test_export_of_a_calibrated_snapshot_of_one_kind_has_a_file_per_shard(tmp_path: Path) -> None:
    whole = make(tmp_path / "run", calibration=Calibration((0.0, 1.0), (0.0, 2.0)))
    marker = export(whole.run.uri, str(tmp_path / "out"), "faiss", commit=0)
    assert [file["kind"] for file in marker["files"]] == ["transformed"] * 3


def test_export_parquet_of_a_calibrated_snapshot_tells_the_map(tmp_path: Path) -> None:
    whole = make(tmp_path / "run", calibration=Calibration((0.0, 1.0), (0.0, 2.0)))
    marker = export(whole.run.uri, str(tmp_path / "out"), "parquet")
    assert len(marker["files"]) == 3
    assert (marker["calibration"]["observed"], marker["calibration"]["expected"]) == ([0.0, 1.0], [0.0, 2.0])


def test_a_faiss_file_needs_nothing_else_and_can_be_changed(tmp_path: Path) -> None:
    whole = make(tmp_path / "run", "OPQ4_8,IVF4,PQ4x4", "cosine")
    export(whole.run.uri, str(tmp_path / "out"), "faiss")
    objects.delete(whole.run.uri)
    shard = faiss.read_index(str(tmp_path / "out" / "shard-00001.faiss"))
    shard.add_with_ids(np.ones((1, DIM), np.float32), np.array([10**12]))
    assert shard.search(np.ones((1, DIM), np.float32), 1)[1][0, 0] == 10**12


@pytest.mark.parametrize(("factory", "metric"), [("Flat", "l2"), ("IVF4,Flat", "cosine"), ("IVF4,SQ8", "l2")])
def test_parquet_holds_what_the_segments_hold(tmp_path: Path, factory: str, metric: Metric) -> None:
    whole = make(tmp_path / "run", factory, metric)
    keys = whole.write_gallery(with_keys=True)
    marker = export(whole.run.uri, str(tmp_path / "out"), "parquet")
    files = [pq.ParquetFile(tmp_path / "out" / file["path"]) for file in marker["files"]]
    commit = commits.read_commit(whole.run, 1)
    rows = {}
    for shard, file in enumerate(files):
        assert file.num_row_groups == whole.num_waves
        facts = json.loads(file.schema_arrow.metadata[b"fastfill"])
        assert facts["vectors"] == ("exact" if whole.codebook.exact else "decoded")
        assert (facts["commit"], facts["shard"], facts["metric"]) == (1, shard, metric)
        rows |= {row["id"]: row for row in file.read().to_pylist()}
    for ref in commit.segments:
        ids, vectors = segment.decode_segment(whole.codebook, Segment.open(whole.run, whole.codebook, ref))
        for item, vector in zip(ids.tolist(), vectors, strict=True):
            assert rows[item]["vector"] == vector.tolist()
    assert rows.keys() == set(whole.ids.tolist())
    assert {item: row["key"] for item, row in rows.items()} == {int(item): keys.get(int(item)) for item in whole.ids}
    new = {int(item) for item in whole.ids[(whole.waves == 1) & ~whole.rejected]}
    assert {item for item, row in rows.items() if row["kind"] == "embedded"} == new
    if whole.codebook.exact:
        for item, vector in zip(whole.ids.tolist(), whole.vectors(1), strict=True):
            assert rows[item]["vector"] == vector.tolist()


def test_export_marker_names_commit_and_files(tmp_path: Path) -> None:
    whole, out = make(tmp_path / "run", num_shards=9), tmp_path / "out"
    steps: list[tuple[int, int]] = []
    marker = export(
        whole.run.uri, str(out), "parquet", commit=0, on_progress=lambda done, total: steps.append((done, total))
    )
    assert exported(out) == marker
    assert steps == [(number, 9) for number in range(1, 10)]
    assert {"commit": 0, "metric": "l2", "nprobe": 4, "dim": DIM, "vectors": "exact"}.items() <= marker.items()
    assert marker["counts"]["transformed"] == sum(file["vectors"] for file in marker["files"]) == whole.num
    for file in marker["files"]:
        data = (out / file["path"]).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (file["sha256"], file["bytes"])
    assert {path.name for path in out.iterdir()} == {"export.json", *(file["path"] for file in marker["files"])}
    assert objects.list_files(whole.run.path("index", "leases")) == []


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    whole, out = make(tmp_path / "run"), tmp_path / "out"
    out.mkdir()
    (out / "shard-00000.faiss").write_bytes(b"precious")
    with pytest.raises(Refused, match="not empty"):
        export(whole.run.uri, str(out), "faiss")
    assert [path.name for path in out.iterdir()] == ["shard-00000.faiss"]
    assert (out / "shard-00000.faiss").read_bytes() == b"precious"
    (out / "shard-00000.faiss").unlink()

    first = export(whole.run.uri, str(out), "faiss")
    assert export(whole.run.uri, str(out), "faiss") == first
    with pytest.raises(Refused, match="of faiss of commit 1"):
        export(whole.run.uri, str(out), "faiss", commit=0)
    with pytest.raises(Refused):
        export(whole.run.uri, str(out), "parquet")


@pytest.mark.parametrize("tries", [1, 2])
def test_export_faiss_of_string_ids_writes_them_beside_each_index(tmp_path: Path, tries: int) -> None:
    whole, out = make(tmp_path / "run"), tmp_path / "out"
    keys = whole.write_gallery(with_keys=True)
    for _ in range(tries):  # a finished export says the same again
        marker = export(whole.run.uri, str(out), "faiss")
    for number, file in enumerate(marker["files"]):
        data = (out / file["ids"]["path"]).read_bytes()
        assert file["ids"]["path"] == f"shard-{number:05d}.ids.parquet"
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (file["ids"]["sha256"], file["ids"]["bytes"])
        ids = np.sort(whole.ids[whole.shards == number]).tolist()
        assert pq.read_table(out / file["ids"]["path"]).to_pylist() == [
            {"id": item, "key": keys.get(item)} for item in ids
        ]


def test_export_faiss_of_integer_ids_writes_indexes_alone(tmp_path: Path) -> None:
    marker = export(make(tmp_path / "run").run.uri, str(tmp_path / "out"), "faiss")
    assert all("ids" not in file for file in marker["files"])
    assert list((tmp_path / "out").glob("*.parquet")) == []


def test_export_without_a_gallery_is_refused_for_its_ids_are_unknown(tmp_path: Path) -> None:
    whole = make(tmp_path / "run")
    objects.delete(whole.run.path("gallery"))
    with pytest.raises(DataError, match="no gallery"):
        export(whole.run.uri, str(tmp_path / "out"), "faiss")


def check_resumed(whole: WholeRun, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at each change of storage, an export goes on and ends as an undisturbed one."""
    expected = export(whole.run.uri, f"{out}/undisturbed", "parquet")
    steps = 0
    while True:
        folder = f"{out}/{steps}"
        with dying(monkeypatch, steps):
            try:
                export(whole.run.uri, folder, "parquet")
                break
            except Crash:
                steps += 1
        there = {uri.rpartition("/")[2] for uri in objects.list_files(folder)}
        if there and "export.json" not in there:
            objects.put(objects.join(folder, "stranger"), b"")
            with pytest.raises(Refused, match="stranger"):
                export(whole.run.uri, folder, "parquet")
            objects.delete_files([objects.join(folder, "stranger")])
        written = {uri: objects.stat(uri).modified_seconds for uri in objects.list_files(folder, ".parquet")}
        assert export(whole.run.uri, folder, "parquet") == expected
        assert not objects.exists(objects.join(folder, "export.started.json"))
        assert written == {uri: objects.stat(uri).modified_seconds for uri in written}
        for file in expected["files"]:
            assert objects.sha256(objects.join(folder, file["path"])) == file["sha256"]
    assert steps >= 5


def test_an_export_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_resumed(make(tmp_path / "run"), str(tmp_path / "out"), monkeypatch)


def test_export_to_s3_and_from_s3_writes_the_same(bucket: str, tmp_path: Path) -> None:
    whole = upload(make(tmp_path / "run", "IVF4,SQ8"), f"{bucket}/run")
    marker = export(whole.run.uri, f"{bucket}/out", "faiss")
    local = export(str(tmp_path / "run"), str(tmp_path / "out"), "faiss")
    assert marker == local
    data = objects.read_bytes(f"{bucket}/out/shard-00002.faiss")
    assert data == (tmp_path / "out" / "shard-00002.faiss").read_bytes()
    assert faiss.read_index(faiss.PyCallbackIOReader(io.BytesIO(data).read)).ntotal > 0
    with pytest.raises(Refused):
        export(whole.run.uri, f"{bucket}/out", "parquet")


def test_gc_keeps_the_commit_of_a_running_export(tmp_path: Path) -> None:
    whole = make(tmp_path / "run")
    whole.publish(2)
    tags.promote(whole.run, 2, blockers=[])
    rules = Rules(keep=1, grace_seconds=0)
    export(
        whole.run.uri,
        str(tmp_path / "out"),
        "parquet",
        commit=0,
        on_progress=lambda *_: collect_garbage(whole.run.uri, rules).commits and pytest.fail("it did not"),
    )
    assert collect_garbage(whole.run.uri, rules).commits == [0]
    with pytest.raises(Refused, match="gc has removed"):
        export(whole.run.uri, str(tmp_path / "other"), "parquet", commit=0)
    assert tags.rollback(whole.run) == Tag(1, pinned=True)
    assert audit(whole.run.uri).ok
    assert leases.find_leases(whole.run, 0.0) == (set(), {})


def test_export_of_a_missing_tag_commit_or_file_names_it(tmp_path: Path) -> None:
    whole = make(tmp_path / "run")
    with pytest.raises(DataError, match=r"(?s)no tag 'other'.*found: candidate, prod"):
        export(whole.run.uri, str(tmp_path / "out"), "faiss", tag="other")
    with pytest.raises(DataError, match="no such commit"):
        export(whole.run.uri, str(tmp_path / "out"), "faiss", commit=2)
    assert not (tmp_path / "out").exists()
    ref = whole.segment(1, 2, "transformed")
    for path in (ref.sidecar_path, ref.path):
        good = Path(whole.run.path(path)).read_bytes()
        Path(whole.run.path(path)).write_bytes(good[:-4])
        with pytest.raises(DataError, match=path):
            export(whole.run.uri, str(tmp_path / "out"), "parquet")
        assert not (tmp_path / "out" / "export.json").exists()
        Path(whole.run.path(path)).write_bytes(good)
    assert export(whole.run.uri, str(tmp_path / "out"), "parquet")["commit"] == 1


def test_images_that_left_the_index_are_not_exported_and_empty_shards_are(tmp_path: Path) -> None:
    whole = WholeRun(Run(str(tmp_path / "run")), num=24, num_waves=2, num_shards=8).write_inputs()
    whole.write_gallery()
    whole.publish(0)
    tags.promote(whole.run, 0, blockers=[])
    for form in ("faiss", "parquet"):
        marker = export(whole.run.uri, str(tmp_path / form), form)  # type: ignore[arg-type]
        assert len(marker["files"]) == 8
        assert sum(file["vectors"] for file in marker["files"]) == 24
