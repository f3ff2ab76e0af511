"""A gallery manifest from anything: the same images wherever they lie, done once, and nothing twice."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import parallel
from pipeline.config.tree import ManifestSettings
from pipeline.errors import DataError, IncompatibleRun
from pipeline.manifest import assemble, catalog, splits
from pipeline.manifest import scan as indexing
from pipeline.manifest.catalog import Catalog, build_manifest
from pipeline.manifest.normalised import scan
from pipeline.manifest.splits import Options
from pipeline.storage import objects, parquet
from tests.support.galleries import digits
from tests.support.tars import pack

OPTIONS = Options(suffixes=(".png",))
IMAGES = {
    f"{label}/{row:03d}.png": (data, str(label)) for row, (data, label) in enumerate(zip(*digits(40), strict=True))
}


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder on local disk, and one on S3."""
    return str(tmp_path) if request.param == "local" else str(request.getfixturevalue("bucket"))


def put_folder(folder: str) -> str:
    for key, (data, _) in IMAGES.items():
        objects.put(f"{folder}/{key}", data)
    objects.put(f"{folder}/README.txt", b"no image")
    return folder


def put_tars(folder: str) -> str:
    rows = list(IMAGES.items())
    for shard in range(3):
        members = []
        for key, (data, label) in rows[shard::3]:
            members += [(key.replace(".png", ".cls"), label.encode()), (key, data)]
        objects.put(f"{folder}/shard-{shard}.tar", pack(members))
    return f"{folder}/shard-*.tar"


def put_table(folder: str, images: str, **columns: Any) -> str:
    table = {"uri": [f"{images}/{key}" for key in IMAGES], "name": list(IMAGES)}
    objects.put(f"{folder}/table.parquet", parquet.parquet_bytes(*_table(table | columns)))
    return f"{folder}/table.parquet"


def _table(columns: dict[str, Any]) -> tuple[pa.Schema, list[pa.Table]]:
    table = pa.table(columns)
    return table.schema, [table.slice(start, 15) for start in range(0, len(table), 15)]


def rows_of(folder: str) -> pa.Table:
    """All rows, in order."""
    return pa.concat_tables([parquet.read_parquet(uri) for uri in objects.expand(folder, ".parquet")])


def contents(folder: str) -> dict[str, tuple[bytes, str | None]]:
    """Bytes at (uri, offset, length) and label, by the image's own name."""
    found = {}
    for row in rows_of(folder).to_pylist():
        data = objects.read_bytes(row["uri"], row["offset"], row["length"])
        assert row["size_bytes"] in (None, len(data))
        found["/".join(row["key"].split("/")[-2:])] = (data, row["label"])
    return found


def made(folder: str, *sources: str, options: Options = OPTIONS) -> tuple[Catalog, Counter[str]]:
    return build_manifest(folder, sources, options)


def test_the_same_images_are_read_from_a_folder_tars_and_tables(place: str) -> None:
    images, tars = put_folder(f"{place}/images"), put_tars(f"{place}/tars")
    labels = [label for _, label in IMAGES.values()]
    table = put_table(place, images, label=labels)
    keys = "".join(f"{images}/{key},{key},{label}\n" for key, (_, label) in IMAGES.items())
    objects.put(f"{place}/table.csv", f"uri,key,label\n{keys}".encode())
    for name, source, labelled in (
        ("folder", images, False),
        ("tars", tars, True),
        ("table", table, True),
        ("csv", f"{place}/table.csv", True),
    ):
        found, _ = made(f"{place}/of-{name}", source)
        assert found.images == len(IMAGES)
        expected = {key: (data, label if labelled else None) for key, (data, label) in IMAGES.items()}
        assert contents(f"{place}/of-{name}") == expected, name


def test_sources_mix_and_their_columns_stay(place: str) -> None:
    images, tars = put_folder(f"{place}/images"), put_tars(f"{place}/tars")
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(80, dtype=np.float32)), 2)
    shots = put_folder(f"{place}/elsewhere")
    keys = [f"t/{key}" for key in IMAGES]
    table = put_table(place, shots, old_embedding=vectors, year=list(range(40)), name=keys)
    options = Options(suffixes=(".png",), key_column="name", stat=True)
    found, _ = made(f"{place}/out", images, tars, table, options=options)
    assert {kind: counts["images"] for kind, counts in found.sources.items()} == {
        "objects": 40,
        "tar": 40,
        "parquet": 40,
    }
    assert found.bytes == 3 * sum(len(data) for data, _ in IMAGES.values())
    assert (found.unknown_sizes, found.notes) == (0, {"other_objects": 1})
    rows = rows_of(f"{place}/out")
    assert rows["year"].to_pylist() == [None] * 80 + list(range(40))
    assert rows["old_embedding"].null_count == 80
    assert found.gallery["columns"] == {
        **{name: name for name in ("uri", "offset", "length", "etag", "label", "old_embedding")},
        "id": "key",
    }
    for row in rows.to_pylist():
        stat = objects.stat(row["uri"])
        assert row["etag"] == stat.etag
        assert row["size_bytes"] == (stat.size_bytes if row["offset"] is None else row["length"])


def test_tars_below_a_prefix_are_indexed_too(place: str) -> None:
    put_folder(f"{place}/mixed/plain")
    put_tars(f"{place}/mixed/packed")
    found, counts = made(f"{place}/out", f"{place}/mixed")
    assert {kind: found.sources[kind]["images"] for kind in found.sources} == {"objects": 40, "tar": 40}
    assert counts == {"made": sum(item["pieces"] for item in found.sources.values())}
    keys = set(rows_of(f"{place}/out")["key"].to_pylist())
    assert keys >= {"plain/0/000.png", "packed/shard-0/0/000.png"}


def test_the_manifest_is_one_that_a_gallery_reads(place: str) -> None:
    found, _ = made(f"{place}/out", put_tars(f"{place}/tars"))
    source = ManifestSettings.model_validate(found.gallery)
    assert sum(part.num_rows for part in scan(source, {})) == 40
    objects.delete(f"{place}/out/catalog.json")
    with pytest.raises(DataError, match="the manifest is incomplete"):
        scan(source, {})


def test_a_second_run_lists_again_and_changes_nothing(place: str) -> None:
    images, tars = put_folder(f"{place}/images"), put_tars(f"{place}/tars")
    first, counts = made(f"{place}/out", images, tars)
    listings = first.sources["objects"]["pieces"]
    assert counts == {"made": listings + 3}
    before = objects.list_stats(f"{place}/out", ".parquet")
    again, counts = made(f"{place}/out", images, tars)
    assert again == first
    assert counts == {"made": listings, "kept": 3}
    assert objects.list_stats(f"{place}/out", ".parquet") == before


def test_only_what_changed_is_indexed_again(place: str) -> None:
    images, tars = put_folder(f"{place}/images"), put_tars(f"{place}/tars")
    first, _ = made(f"{place}/out", images, tars)
    objects.put(f"{place}/tars/shard-1.tar", pack([("new.png", b"new")]))
    objects.delete(f"{place}/images/0/000.png")
    second, counts = made(f"{place}/out", images, tars)
    assert counts["kept"] == 2
    assert second.digest != first.digest
    assert second.images == 40 - 1 + 40 - 13 + 1
    fresh, _ = made(f"{place}/fresh", images, tars)
    assert rows_of(f"{place}/out").equals(rows_of(f"{place}/fresh"))
    assert fresh.digest == second.digest
    assert len(objects.list_files(f"{place}/out/pieces")) == len(objects.list_files(f"{place}/fresh/pieces"))


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    sources = [put_folder(f"{tmp_path}/images"), put_tars(f"{tmp_path}/tars")]
    made(f"{tmp_path}/whole", *sources)
    index, calls = indexing._INDEX["tar"], Counter[str]()

    def failing(*args: Any) -> None:
        calls["tar"] += 1
        if calls["tar"] == stop:
            raise KeyboardInterrupt
        index(*args)

    def failing_part(work: assemble.PartWork) -> assemble.PartInfo:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(indexing._INDEX, "tar", failing)
        patch.setattr(assemble, "write_part", failing_part)
        with pytest.raises(KeyboardInterrupt):
            made(f"{tmp_path}/out", *sources)
    assert catalog.is_incomplete(f"{tmp_path}/out")
    _, counts = made(f"{tmp_path}/out", *sources)
    assert counts["kept"] > 0
    for uri in objects.list_files(f"{tmp_path}/whole", ".parquet"):
        assert objects.sha256(uri) == objects.sha256(uri.replace("/whole/", "/out/"))


def test_other_sources_are_refused_by_name(tmp_path: Path) -> None:
    images, tars = put_folder(f"{tmp_path}/images"), put_tars(f"{tmp_path}/tars")
    made(f"{tmp_path}/out", images)
    with pytest.raises(IncompatibleRun, match=r"is now: .*/shard-\*\.tar"):
        made(f"{tmp_path}/out", images, tars)
    with pytest.raises(IncompatibleRun, match="stat: was False, is now True"):
        made(f"{tmp_path}/out", images, options=Options(suffixes=(".png",), stat=True))
    catalog.forget(f"{tmp_path}/out")
    assert objects.list_files(f"{tmp_path}/out") == []
    assert made(f"{tmp_path}/out", images, tars)[0].images == 80


def test_a_folder_with_other_parquet_files_is_refused(tmp_path: Path) -> None:
    images = put_folder(f"{tmp_path}/images")
    objects.put(f"{tmp_path}/out/mine.parquet", b"x")
    with pytest.raises(DataError, match=r"other Parquet files[^$]*mine\.parquet"):
        made(f"{tmp_path}/out", images)


def test_an_image_that_is_there_twice_is_refused_with_both_keys(tmp_path: Path) -> None:
    images = put_folder(f"{tmp_path}/images")
    with pytest.raises(DataError, match=r"an image occurs more than once[^$]*key '0/000.png' and key '000.png'"):
        made(f"{tmp_path}/out", images, f"{images}/0")
    assert catalog.is_incomplete(f"{tmp_path}/out")


def test_a_key_that_is_there_twice_is_refused_with_both_places(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        objects.put(f"{tmp_path}/{folder}/x.png", folder.encode())
        objects.put(f"{tmp_path}/{folder}/s.tar", pack([("1.png", b"x"), ("1.png", b"y")]))
    with pytest.raises(DataError, match=r"a key occurs more than once[^$]*'x.png': .*/a/x.png and .*/b/x.png"):
        made(f"{tmp_path}/out", f"{tmp_path}/a", f"{tmp_path}/b", options=Options(suffixes=(".png",)))
    with pytest.raises(DataError, match=r"'s/1.png': .*/s.tar at 512 and .*/s.tar at 1536"):
        made(f"{tmp_path}/out2", f"{tmp_path}/a/s.tar")


def test_identical_content_is_counted_and_shown(bucket: str) -> None:
    for name, data in (("1.png", b"same"), ("2.png", b"same"), ("3.png", b"other")):
        objects.put(f"{bucket}/images/{name}", data)
    objects.put(f"{bucket}/s.tar", pack([("1.png", b"same"), ("2.png", b"more")]))
    found, _ = made(f"{bucket}/out", f"{bucket}/images", f"{bucket}/s.tar")
    assert found.identical == {"by": ["etag", "size_bytes"], "images": 1, "examples": [["1.png", "2.png"]]}
    options = Options(suffixes=(".png",), hash=True)
    found, _ = made(f"{bucket}/hashed", f"{bucket}/images", f"{bucket}/s.tar", options=options)
    assert found.identical == {"by": ["sha256"], "images": 2, "examples": [["1.png", "2.png", "s/1.png"]]}
    assert rows_of(f"{bucket}/hashed")["sha256"][0].as_py() == hashlib.sha256(b"same").hexdigest()


def test_local_files_of_one_time_and_size_are_not_called_identical(tmp_path: Path) -> None:
    for name in ("1.png", "2.png"):
        objects.put(f"{tmp_path}/images/{name}", name.encode())
        os.utime(tmp_path / "images" / name, (1, 1))
    assert made(f"{tmp_path}/out", f"{tmp_path}/images")[0].identical["images"] == 0


def test_missing_and_empty_sources_are_named(place: str) -> None:
    objects.put(f"{place}/other/notes.txt", b"x")
    objects.put(f"{place}/empty.tar", pack([("notes.txt", b"x")]))
    for source, message in (
        (f"{place}/nowhere", "source"),
        (f"{place}/nowhere.tar", "a source does not exist"),
        (f"{place}/nowhere-*.csv", "a source does not exist"),
        (f"{place}/other", r"has no images[^$]*1 other objects"),
        (f"{place}/empty.tar", r"has no images[^$]*1 labels without image"),
        (f"{place}/*.zip", "must end with a known suffix"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            made(f"{place}/out-{abs(hash(source))}", source)
        assert source in str(caught.value)


def test_catalog_refuses_tables_with_bad_columns(tmp_path: Path) -> None:
    def table(**columns: Any) -> str:
        pq.write_table(pa.table(columns), tmp_path / "t.parquet")
        return str(tmp_path / "t.parquet")

    for number, (columns, message) in enumerate(
        [
            ({"url": ["a"]}, r"a column is missing[^$]*uri[^$]*url"),
            ({"uri": ["/a", None]}, r"a uri is null[^$]*row 1"),
            ({"uri": ["/a"], "key": pa.array([None], pa.string())}, r"a key is null[^$]*row 0"),
            ({"uri": ["/a"], "offset": ["x"]}, r"column for offset has a wrong type[^$]*int64[^$]*string"),
        ]
    ):
        with pytest.raises(DataError, match=message):
            made(f"{tmp_path}/out-{number}", table(**columns))
    with pytest.raises(DataError, match="but there is also a column `uri`"):
        made(f"{tmp_path}/o", table(uri=["/a"], url=["/b"]), options=Options((".png",), uri_column="url"))
    objects.put(f"{tmp_path}/t.csv", b"uri,year\n" + b"/a.png,1\n" * 2_000_000 + b"/b.png,late\n")
    with pytest.raises(DataError, match=r"not a readable CSV file[^$]*late"):
        made(f"{tmp_path}/o2", f"{tmp_path}/t.csv")


def test_integer_keys_stay_integers_and_relative_uris_start_at_their_table(tmp_path: Path) -> None:
    images = put_folder(f"{tmp_path}/images")
    pq.write_table(
        pa.table({"file": ["0/000.png", f"{images}/1/001.png"], "id": [7, 2**40], "label": [0, 1]}),
        f"{images}/t.parquet",
    )
    options = Options(suffixes=(".png",), uri_column="file", key_column="id", stat=True)
    made(f"{tmp_path}/out", f"{images}/t.parquet", options=options)
    rows = rows_of(f"{tmp_path}/out")
    assert rows.schema.field("key").type == rows.schema.field("label").type == pa.int64()
    assert rows["uri"].to_pylist() == [f"{images}/0/000.png", f"{images}/1/001.png"]
    assert rows["key"].to_pylist() == [7, 2**40]


def test_missing_objects_of_a_table_are_counted(place: str) -> None:
    images = put_folder(f"{place}/images")
    objects.delete(f"{images}/0/000.png")
    found, _ = made(f"{place}/out", put_table(place, images), options=Options((".png",), stat=True))
    assert (found.notes, found.unknown_sizes) == ({"missing_images": 1}, 1)


def test_parts_have_equal_sizes_for_any_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [put_folder(f"{tmp_path}/images"), put_tars(f"{tmp_path}/tars")]
    made(f"{tmp_path}/whole", *sources)
    monkeypatch.setattr(assemble, "CHUNK_ROWS", 13)
    monkeypatch.setattr(splits, "CHUNK_ROWS", 5)
    made(f"{tmp_path}/out", *sources)
    sizes = [parquet.read_parquet(uri).num_rows for uri in objects.expand(f"{tmp_path}/out", ".parquet")]
    assert sizes == [13] * 6 + [2]
    assert rows_of(f"{tmp_path}/out").equals(rows_of(f"{tmp_path}/whole"))


def test_catalog_over_ray_equals_the_local_one(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [put_folder(f"{tmp_path}/images"), put_tars(f"{tmp_path}/tars")]
    made(f"{tmp_path}/here", *sources)
    started = []
    monkeypatch.setattr(parallel, "_PATIENCE_SECONDS", -1.0)
    monkeypatch.setattr(parallel, "_ENOUGH", 1)
    build_manifest(f"{tmp_path}/there", sources, OPTIONS, start_ray=lambda: started.append(1))
    assert rows_of(f"{tmp_path}/there").equals(rows_of(f"{tmp_path}/here"))
    assert started


def test_all_items_are_done_once_here_and_over_ray(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow_square(number: int) -> tuple[int, int]:
        time.sleep(0.01)
        return number * number, os.getpid()

    monkeypatch.setattr(parallel, "_PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(parallel, "_MAX_TASKS", 16)
    done = list(parallel.spread(slow_square, range(300), lambda: None))
    assert sorted((item, square) for item, (square, _) in done) == [(item, item * item) for item in range(300)]
    assert len({process for _, (_, process) in done}) > 1


def test_a_prefix_is_shared_among_pieces_by_its_folders(place: str) -> None:
    for name in ("1.png", "a/2.png", "a/b/3.png", "a/b/4.png", "c/d/5.png"):
        objects.put(f"{place}/images/{name}", b"x")
    found = indexing.split_folder(f"{place}/images/")
    assert sorted(uri.removeprefix(f"{place}/images") for piece in found for uri in piece.uris) == [
        "/",
        "/a/",
        "/a/b",
        "/c/",
        "/c/d",
    ]
    made(f"{place}/out", f"{place}/images")
    assert sorted(rows_of(f"{place}/out")["key"].to_pylist()) == [
        "1.png",
        "a/2.png",
        "a/b/3.png",
        "a/b/4.png",
        "c/d/5.png",
    ]


def test_many_folders_become_few_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexing, "_SPLIT_INTO", 4)
    for number in range(10):
        (tmp_path / "images" / str(number)).mkdir(parents=True)
        (tmp_path / "images" / str(number) / "1.png").write_bytes(b"x")
    assert len(indexing.split_folder(f"{tmp_path}/images")) == 4
    assert made(f"{tmp_path}/out", f"{tmp_path}/images")[0].images == 10


def test_the_result_is_json(tmp_path: Path) -> None:
    found, _ = made(f"{tmp_path}/out", put_folder(f"{tmp_path}/images"))
    assert catalog.read_catalog(f"{tmp_path}/out") == found
    assert json.loads((tmp_path / "out" / "catalog.json").read_text())["images"] == 40


def test_a_mistyped_source_does_not_claim_the_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        made(f"{tmp_path}/manifest", f"{tmp_path}/imagse")
    assert made(f"{tmp_path}/manifest", put_folder(f"{tmp_path}/images"))[0].images == len(IMAGES)
