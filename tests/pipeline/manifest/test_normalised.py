"""A user's manifest: what is taken, in which form it comes out, and what is refused with its file and row."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.arrays import vectors_from_arrow
from pipeline.config.tree import ColumnNames
from pipeline.config.tree import ManifestSettings as Source
from pipeline.errors import DataError
from pipeline.manifest import normalised
from pipeline.manifest.normalised import Manifest, digest, normalise, read_manifest, scan, units, widths
from pipeline.manifest.partition import write_part
from pipeline.run import Run
from pipeline.schema import manifest_schema
from pipeline.storage import documents, objects, parquet

DIM = 3
COLUMNS = {"id": "id", "old_embedding": "old"}
VECTORS = np.arange(60, dtype=np.float32).reshape(20, DIM)


def fixed(values: np.ndarray[Any, Any]) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def table(count: int = 20, first: int = 0, **changes: Any) -> pa.Table:
    columns = {"id": pa.array(range(first, first + count), pa.int64()), "old": fixed(VECTORS[:count])}
    return pa.table(columns | changes)


def write(path: Path, content: pa.Table, row_group_size: int = 6) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(content, path, row_group_size=row_group_size)
    return str(path)


def source(manifest: str | tuple[str, ...], /, **columns: str) -> Source:
    return Source(manifest=manifest, columns=ColumnNames.model_validate(columns or COLUMNS))


def brought_in(folder: Path, given: Source, dims: dict[str, int] | None = None, unit_rows: int = 4) -> pa.Table:
    """The manifest in our own form, its parts read back in order."""
    run = Run(str(folder / "run"))
    found = normalise(run, "gallery", given, dims or {}, unit_rows)
    parts = [parquet.read_parquet(run.part("gallery", number)) for number in range(len(found.rows))]
    assert [part.num_rows for part in parts] == found.rows
    assert all(part.schema.equals(manifest_schema(found.dims)) for part in parts)
    return pa.concat_tables(parts)


@pytest.fixture
def small_partitions(monkeypatch: pytest.MonkeyPatch) -> None:
    # A patched size, because a partition is otherwise 131,072 rows, and a file of several is no small test.
    monkeypatch.setattr(normalised, "PARTITION_ROWS", 10)


# What is read from footers alone; no Ray.


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4), group=st.integers(1, 15))
def test_partitions_hold_every_row_once_in_order(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], group: int
) -> None:
    folder = tmp_path_factory.mktemp("scan")
    for number, size in enumerate(sizes):
        ids = pa.array(range(size), pa.int64())
        write(folder / f"{number}.parquet", pa.table({"id": ids, "uri": pa.array(["a"] * size, pa.string())}), group)
    given_source = source(str(folder), id="id", uri="uri")
    if not sum(sizes):
        with pytest.raises(DataError, match="the manifest has no rows"):
            scan(given_source, {})
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(normalised, "PARTITION_ROWS", 10)
        partitions = scan(given_source, {})
    assert [part.first_row for part in partitions] == np.cumsum([0, *(part.num_rows for part in partitions)])[
        :-1
    ].tolist()
    assert sum(part.num_rows for part in partitions) == sum(sizes)
    for part in partitions:
        rows = parquet.read_parquet(part.uri, row_groups=part.row_groups)["id"].to_pylist()
        assert rows == list(range(part.first_row_in_file, part.first_row_in_file + part.num_rows))
        assert 1 <= part.num_rows < 10 + group


@pytest.mark.parametrize(
    ("columns", "dims", "said"),
    [
        ({"id": "identity", "old_embedding": "old"}, {}, r"no column for id\n  expected: 'identity'"),
        ({"id": "id", "label": "kind", "old_embedding": "old"}, {}, "no column for label"),
        ({"id": "old", "old_embedding": "old"}, {}, "id column has a wrong type"),
        ({"id": "id", "old_embedding": "id"}, {}, "old_embedding column has a wrong type"),
        ({"id": "id", "image": "id"}, {}, r"image column has a wrong type\n  expected: binary"),
        ({"id": "id", "uri": "old"}, {}, r"uri column has a wrong type\n  expected: string"),
        (COLUMNS, {"old_embedding": 4}, r"wrong width\n  expected: 4, the encoder's dim\n  found: 3"),
        ({"id": "id"}, {}, "names no column with images or embeddings"),
    ],
)
def test_columns_that_do_not_fit_are_refused_from_the_footer_with_their_file(
    tmp_path: Path, columns: dict[str, str], dims: dict[str, int], said: str
) -> None:
    uri = write(tmp_path / "a.parquet", table())
    with pytest.raises(DataError, match=f"{said}(.|\n)*a.parquet"):
        scan(source(uri, **columns), dims)


@pytest.mark.parametrize("role", ["label", "group"])
@pytest.mark.parametrize(
    "kind", [pa.list_(pa.int64()), pa.struct([("a", pa.int64())]), pa.binary(), pa.map_(pa.string(), pa.string())]
)
def test_a_label_that_is_no_name_is_refused(tmp_path: Path, role: str, kind: pa.DataType) -> None:
    uri = write(tmp_path / "a.parquet", table(kind=pa.nulls(20, kind)))
    with pytest.raises(
        DataError, match=rf"{role} column has a wrong type\n  expected: strings, numbers(.|\n)*a\.parquet"
    ):
        scan(source(uri, **COLUMNS, **{role: "kind"}), {})


@pytest.mark.parametrize(
    "values",
    [
        pa.array([True, None]),
        pa.array([1.5, 2.0]),
        pa.array([1, 2], pa.timestamp("us")),
        pa.array(["a", "b"]).dictionary_encode(),
        pa.nulls(2),
        pa.array([7, 8], pa.uint8()),
    ],
)
def test_a_label_of_any_simple_type_comes_out_as_text(tmp_path: Path, values: pa.Array) -> None:
    given_source = source(write(tmp_path / "a.parquet", table(2, label=values)), **COLUMNS, label="label")
    run, (part,) = Run(str(tmp_path / "run")), scan(given_source, {})
    write_part(run.part("gallery", 0), part, given_source, 4, ".")
    assert parquet.read_parquet(run.part("gallery", 0))["label"].to_pylist() == values.cast(pa.string()).to_pylist()


def test_write_part_of_images_inside_a_file_gives_them_the_files_etag_and_sha256(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.parquet", table(3, image=[b"a", b"b", b"c"]))
    given_source = source(uri, **COLUMNS, image="image")
    run, (part,) = Run(str(tmp_path / "run")), scan(given_source, {})
    write_part(run.part("gallery", 0), part, given_source, 4, ".")
    tag = f"{objects.stat(uri).etag} {objects.sha256(uri)}"
    assert parquet.read_parquet(run.part("gallery", 0))["etag"].to_pylist() == [tag] * 3


def test_write_part_of_a_file_that_was_replaced_since_the_scan_is_refused(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.parquet", table(3, image=[b"a", b"b", b"c"]))
    given_source = source(uri, **COLUMNS, image="image")
    run, (part,) = Run(str(tmp_path / "run")), scan(given_source, {})
    write(tmp_path / "a.parquet", table(3, image=[b"c", b"b", b"a"]))
    os.utime(uri, ns=(1, 1))
    with pytest.raises(DataError, match=r"replaced while it was read(.|\n)*a\.parquet"):
        write_part(run.part("gallery", 0), part, given_source, 4, ".")


def test_ids_that_are_integers_in_one_file_and_strings_in_another_are_refused_with_both(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", table())
    write(tmp_path / "b.parquet", table(3, id=["x", "y", "z"]))
    with pytest.raises(DataError, match=r"found: integers in .*a\.parquet, strings in .*b\.parquet"):
        scan(source(str(tmp_path)), {})


def test_widths_are_those_that_a_footer_tells(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.parquet", table(other=VECTORS.tolist()))
    assert widths(source(uri, id="id", old_embedding="old", new_embedding="other")) == {"old_embedding": DIM}


def test_one_bad_file_among_good_ones_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", table())
    write(tmp_path / "b.parquet", table().drop_columns(["old"]))
    with pytest.raises(DataError, match=r"b\.parquet"):
        scan(source(str(tmp_path)), {})
    (tmp_path / "b.parquet").write_bytes(b"text")
    with pytest.raises(DataError, match=r"not a readable Parquet file(.|\n)*b\.parquet"):
        scan(source(str(tmp_path)), {})


def test_a_manifest_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no manifest file(.|\n)*nowhere"):
        scan(source((str(tmp_path / "nowhere"),)), {})


@pytest.mark.parametrize("hashed_bytes", [2**30, 0])
def test_the_digest_does_not_depend_on_the_place_and_changes_with_the_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed_bytes: int
) -> None:
    # A patched bound, because only above 1 GiB are the footers all that is looked at.
    monkeypatch.setattr(normalised, "_HASHED_BYTES", hashed_bytes)
    write(tmp_path / "here" / "a.parquet", table())
    write(tmp_path / "here" / "b.parquet", table(5, first=20))
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    wanted = digest(source(str(tmp_path / "here")))
    assert digest(source(str(tmp_path / "there"))) == wanted
    changed = VECTORS.copy()
    changed[0, 0] -= 1
    changes = [table(old=fixed(changed)), table(first=1), table(19), table(label=["x"] * 20)]
    seen = {wanted}
    for change in changes:
        write(tmp_path / "there" / "a.parquet", change)
        seen.add(digest(source(str(tmp_path / "there"))))
    write(tmp_path / "there" / "a.parquet", table(), row_group_size=7)
    seen.add(digest(source(str(tmp_path / "there"))))
    assert len(seen) == len(changes) + 2


def test_the_digest_of_a_small_manifest_sees_two_rows_that_change_places(tmp_path: Path) -> None:
    mixed = [0, 2, 1, *range(3, 20)]  # the same sizes and the same statistics
    one = write(tmp_path / "one.parquet", table())
    two = write(tmp_path / "two.parquet", table(id=pa.array(mixed, pa.int64())))
    assert digest(source(one)) != digest(source(two))


def test_units_are_the_row_groups_of_the_parts() -> None:
    run, found = Run("run"), Manifest(rows=[10, 3, 8], unit_rows=4, dims={}, digest="")
    listed = units(run, "pairs", found)
    assert [(unit.wave, unit.unit, unit.row_group, unit.images) for unit in listed] == [
        (0, 0, 0, 4),
        (0, 1, 1, 4),
        (0, 2, 2, 2),
        (1, 0, 0, 3),
        (2, 0, 0, 4),
        (2, 1, 1, 4),
    ]
    assert {unit.rows_uri for unit in listed if unit.wave == 2} == {run.part("pairs", 2)}


# What reads the rows; over Ray.


@pytest.mark.usefixtures("ray_cluster", "small_partitions")
def test_several_files_come_out_row_by_row_in_order_with_units_as_row_groups(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.parquet", table(label=[f"kind {row % 3}" for row in range(20)], group=["g"] * 20))
    write(tmp_path / "in" / "b.parquet", table(13, first=500, label=pa.nulls(13, pa.string()), group=["h"] * 13))
    given_source = source(str(tmp_path / "in"), **COLUMNS, label="label", group="group")
    rows = brought_in(tmp_path, given_source, {"old_embedding": DIM})
    assert rows["id"].to_pylist() == [*range(20), *range(500, 513)]
    assert rows["label"].to_pylist() == [f"kind {row % 3}" for row in range(20)] + [None] * 13
    assert rows["group"].to_pylist() == ["g"] * 20 + ["h"] * 13
    assert np.array_equal(vectors_from_arrow(rows["old_embedding"]), np.concatenate([VECTORS, VECTORS[:13]]))
    assert rows["key"].null_count == len(rows)
    run = Run(str(tmp_path / "run"))
    found = read_manifest(run, "gallery")
    assert found is not None
    assert (found.num_rows, found.dims, len(found.rows)) == (33, {"old_embedding": DIM}, 4)
    for unit in units(run, "gallery", found):
        assert parquet.read_parquet(unit.rows_uri, row_groups=[unit.row_group]).num_rows == unit.images


@pytest.mark.usefixtures("ray_cluster", "small_partitions")
def test_strings_as_ids_become_row_numbers_and_are_kept_as_keys(tmp_path: Path) -> None:
    names = [f"image-{row}" for row in range(20)]
    write(tmp_path / "in" / "a.parquet", table(id=names[::-1]))
    write(tmp_path / "in" / "b.parquet", table(3, id=["x", "y", "z"]))
    rows = brought_in(tmp_path, source(str(tmp_path / "in")))
    assert rows["id"].to_pylist() == list(range(23))
    assert rows["key"].to_pylist() == [*names[::-1], "x", "y", "z"]


@pytest.mark.usefixtures("ray_cluster", "small_partitions")
def test_images_in_the_manifest_are_found_by_file_column_and_row(tmp_path: Path) -> None:
    pictures = pa.array([b"%d" % row for row in range(25)], pa.binary())
    for name, first in (("a", 0), ("b", 25)):
        write(tmp_path / "in" / f"{name}.parquet", pa.table({"n": range(first, first + 25), "bytes": pictures}))
    rows = brought_in(tmp_path, source(str(tmp_path / "in"), image="bytes"))
    assert rows["id"].to_pylist() == list(range(50))
    assert rows["row"].to_pylist() == [*range(25), *range(25)]
    wanted = [f"{tmp_path}/in/{name}.parquet#bytes" for name in "ab" for _ in range(25)]
    assert rows["uri"].to_pylist() == wanted


@pytest.mark.usefixtures("ray_cluster")
def test_places_of_images_are_kept(tmp_path: Path) -> None:
    places = {"where": [f"s3://b/{row}.tar" for row in range(4)], "start": [0, 512, None, 9], "size": [5, 6, None, 7]}
    content = pa.table({"id": pa.array([3, 1, 2, 0], pa.uint32()), **places})
    given_source = source(write(tmp_path / "a.parquet", content), id="id", uri="where", offset="start", length="size")
    rows = brought_in(tmp_path, given_source)
    assert rows["id"].to_pylist() == [3, 1, 2, 0]
    assert rows["uri"].to_pylist() == places["where"]
    assert rows["offset"].to_pylist() == places["start"]
    assert rows["length"].to_pylist() == places["size"]
    assert rows["row"].null_count == 4


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    "kind",
    [pa.list_(pa.float32(), DIM), pa.list_(pa.float16(), DIM), pa.list_(pa.float64()), pa.large_list(pa.float32())],
)
def test_embeddings_of_any_list_type_come_out_alike(tmp_path: Path, kind: pa.DataType) -> None:
    values = pa.array(VECTORS.astype(kind.value_type.to_pandas_dtype()).tolist(), kind)
    rows = brought_in(tmp_path, source(write(tmp_path / "a.parquet", table(old=values))))
    assert np.array_equal(vectors_from_arrow(rows["old_embedding"]), VECTORS)


def with_value(value: float | None, row: int = 13) -> list[list[float | None]]:
    vectors: list[list[float | None]] = VECTORS.tolist()
    vectors[row][1] = value
    return vectors


WIDTHS = VECTORS.tolist()
WIDTHS[15] = [1.0, 2.0]
NULLED = [*VECTORS.tolist()[:17], None, *VECTORS.tolist()[18:]]
FIXED, VARIABLE = pa.list_(pa.float32(), DIM), pa.list_(pa.float32())


@pytest.mark.usefixtures("ray_cluster", "small_partitions")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"id": pa.array([*range(19), 4])}, r"an id occurs more than once\n  expected: unique ids\n  found: 4\n"),
        ({"id": [*"abcdefghijklmnopqrs", "e"]}, r"more than once\n  expected: unique ids\n  found: e\n"),
        ({"id": pa.array([*range(13), None, *range(14, 20)])}, "an id is null\n.*a.parquet: row 13, column id"),
        (
            {"id": pa.array([2**63, *range(19)], pa.uint64())},
            "does not fit int64\n.*\n  found: 9223372036854775808\n.*row 0",
        ),
        ({"id": pa.array([*range(16), -3, 17, 18, -4])}, "negative\n.*\n  found: -3\n.*a.parquet: row 16, column id"),
        ({"id": pa.array([*range(19), -1], pa.int8())}, "an id is negative(.|\n)*row 19"),
        ({"old": pa.array(with_value(np.nan), FIXED)}, "not finite(.|\n)*a.parquet: row 13, column old"),
        ({"old": pa.array(with_value(-np.inf), VARIABLE)}, "not finite(.|\n)*a.parquet: row 13, column old"),
        ({"old": pa.array(with_value(None), FIXED)}, "not finite(.|\n)*a.parquet: row 13, column old"),
        ({"old": pa.array(with_value(1e300), pa.list_(pa.float64()))}, "not finite(.|\n)*row 13"),
        (
            {"old": pa.array(WIDTHS, VARIABLE)},
            "wrong width\n  expected: 3\n  found: 2\n.*a.parquet: row 15, column old",
        ),
        ({"old": pa.array([[]] * 20, VARIABLE)}, "wrong width\n  expected: 1\n  found: 0\n.*row (0|12),"),
        ({"old": pa.array(NULLED, FIXED)}, "an embedding is null\n.*a.parquet: row 17, column old"),
        ({"old": pa.array(NULLED, VARIABLE)}, "an embedding is null\n.*a.parquet: row 17, column old"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_a_bad_row_is_refused_by_its_file_and_row(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    uri = write(tmp_path / "in" / "a.parquet", table(**changes))
    run = Run(str(tmp_path / "run"))
    with pytest.raises(DataError, match=said):
        normalise(run, "gallery", source(uri), {}, 4)
    assert read_manifest(run, "gallery") is None


PLACES = ["a.png", "./b/c.png", "/abs/d.png", "s3://other/e.png", "file:///f"]


@pytest.mark.parametrize(
    ("root", "found"),
    [
        ("/data", ["/data/a.png", "/data/b/c.png"]),
        ("s3://bucket/some", ["s3://bucket/some/a.png", "s3://bucket/some/b/c.png"]),
        ("s3://bucket/", ["s3://bucket/a.png", "s3://bucket/b/c.png"]),
    ],
)
def test_relative_uris_of_images_start_at_the_root(tmp_path: Path, root: str, found: list[str]) -> None:
    given_source = source(write(tmp_path / "a.parquet", pa.table({"uri": PLACES})), uri="uri")
    run, (part,) = Run(str(tmp_path / "run")), scan(given_source, {})
    assert write_part(run.part("gallery", 0), part, given_source, 4, root).rooted
    assert parquet.read_parquet(run.part("gallery", 0))["uri"].to_pylist() == [*found, *PLACES[2:]]


@pytest.mark.usefixtures("ray_cluster")
def test_a_manifest_is_brought_in_again_when_the_root_of_its_relative_uris_changes(tmp_path: Path) -> None:
    run = Run(str(tmp_path / "run"))
    for uris, roots in ((["/a", "/b"], ["", ""]), (["/a", "b"], ["/one", "/two"])):
        given_source = source(write(tmp_path / f"{len(roots[0])}.parquet", pa.table({"uri": uris})), uri="uri")
        for root, known in zip(("/one", "/two"), roots, strict=True):
            assert normalise(run, "gallery", given_source, {}, 4, root).root == known
    assert parquet.read_parquet(run.part("gallery", 0))["uri"].to_pylist() == ["/a", "/two/b"]


def written(path: Path, content: pa.Table, columns: dict[str, str]) -> pa.Table:
    """The one part of a manifest."""
    given_source = source(write(path / "a.parquet", content, row_group_size=100), **columns)
    run, (part,) = Run(str(path / "run")), scan(given_source, {})
    write_part(run.part("gallery", 0), part, given_source, 4, "/")
    return parquet.read_parquet(run.part("gallery", 0))


@pytest.mark.parametrize(
    "weights",
    [
        pa.array([2**24 + 1, 2**53 + 1, 3], pa.int64()),
        pa.array([2**64 - 1, 0, 3], pa.uint64()),
        pa.array([0.1, 1e30, 3.0], pa.float64()),
    ],
)
def test_write_part_of_traffic_that_float32_rounds_takes_it_rounded(tmp_path: Path, weights: pa.Array) -> None:
    rows = written(tmp_path, pa.table({"uri": ["/a", "/b", "/c"], "n": weights}), {"uri": "uri", "traffic": "n"})
    assert rows["traffic"].to_numpy() == pytest.approx([float(value) for value in weights.to_pylist()], rel=1e-6)


@pytest.mark.parametrize("weights", [[1.0, 1e300], [1.0, None], [1.0, float("nan")], [1.0, -1.0]])
def test_write_part_of_traffic_that_is_no_weight_names_the_row(tmp_path: Path, weights: list[float | None]) -> None:
    content = pa.table({"uri": ["/a", "/b"], "n": pa.array(weights, pa.float64())})
    with pytest.raises(DataError, match=r"a traffic weight is not usable(.|\n)*a\.parquet: row 1, column n"):
        written(tmp_path, content, {"uri": "uri", "traffic": "n"})


@pytest.mark.parametrize("role", ["offset", "length"])
@pytest.mark.parametrize("wrong", [pa.array([0, 2**63], pa.uint64()), pa.array([0, -1], pa.int64())])
def test_write_part_of_a_position_that_no_file_has_names_the_row(tmp_path: Path, role: str, wrong: pa.Array) -> None:
    columns: dict[str, Any] = {"uri": ["/a", "/b"], "offset": [0, 0], "length": [1, 1]}
    with pytest.raises(DataError, match=rf"a position in a file is not usable(.|\n)*row 1, column {role}"):
        written(tmp_path, pa.table(columns | {role: wrong}), {name: name for name in columns})


def test_scan_of_a_file_with_two_columns_of_the_name_is_refused(tmp_path: Path) -> None:
    content = pa.Table.from_arrays([pa.array([1]), pa.array(["/a"]), pa.array(["/b"])], names=["id", "uri", "uri"])
    with pytest.raises(DataError, match="more than one column for uri"):
        scan(source(write(tmp_path / "a.parquet", content), id="id", uri="uri"), {})


@pytest.mark.usefixtures("ray_cluster")
def test_a_null_uri_is_refused_by_its_row(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.parquet", pa.table({"id": [1, 2, 3], "uri": ["a", None, "c"]}))
    with pytest.raises(DataError, match=r"uri is null\n.*row 1, column uri"):
        brought_in(tmp_path, source(uri, id="id", uri="uri"))


@pytest.mark.usefixtures("ray_cluster")
def test_an_id_in_two_files_is_refused_and_so_is_one_in_two_buckets_of_sorting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A patched size, because a bucket is otherwise 50 million ids.
    monkeypatch.setattr(normalised, "_BUCKET_IDS", 7)
    write(tmp_path / "in" / "a.parquet", table(20))
    write(tmp_path / "in" / "b.parquet", table(5, first=19))
    with pytest.raises(DataError, match="found: 19\n"):
        brought_in(tmp_path, source(str(tmp_path / "in")))


@pytest.mark.usefixtures("ray_cluster")
def test_files_whose_embeddings_differ_in_width_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.parquet", table(old=pa.array(VECTORS.tolist(), VARIABLE)))
    write(tmp_path / "in" / "b.parquet", table(20, first=20, old=pa.array(VECTORS[:, :2].tolist(), VARIABLE)))
    with pytest.raises(
        DataError, match=r"wrong width(.|\n)*'old_embedding': 3(.|\n)*'old_embedding': 2(.|\n)*b\.parquet"
    ):
        brought_in(tmp_path, source(str(tmp_path / "in")))
    with pytest.raises(DataError, match=r"wrong width(.|\n)*'old_embedding': 4(.|\n)*'old_embedding': 3"):
        brought_in(tmp_path, source(str(tmp_path / "in" / "a.parquet")), {"old_embedding": 4})


@pytest.mark.usefixtures("ray_cluster")
def test_a_manifest_is_brought_in_once_and_again_only_when_it_changes(tmp_path: Path) -> None:
    run, uri = Run(str(tmp_path / "run")), write(tmp_path / "a.parquet", table())
    first = normalise(run, "gallery", source(uri), {}, 4)
    etag = objects.stat(run.part("gallery", 0)).etag
    assert normalise(run, "gallery", source(uri), {}, 4) == first
    assert objects.stat(run.part("gallery", 0)).etag == etag
    write(tmp_path / "a.parquet", table(19))
    assert normalise(run, "gallery", source(uri), {}, 4).num_rows == 19
    assert normalise(run, "gallery", source(uri), {}, 5).unit_rows == 5
    found = read_manifest(run, "gallery")
    assert json.loads(objects.read_bytes(run.path("gallery", "manifest.json")))["unit_rows"] == 5
    assert found is not None
    assert found.num_rows == 19


@pytest.mark.usefixtures("ray_cluster")
def test_normalise_with_another_column_for_a_role_reads_the_rows_again(tmp_path: Path) -> None:
    run = Run(str(tmp_path / "run"))
    uri = write(tmp_path / "a.parquet", table(sku=[f"sku {row}" for row in range(20)], category=["shoe"] * 20))
    for column in ("sku", "category"):
        normalise(run, "gallery", source(uri, **COLUMNS, label=column), {}, 4)
    assert set(parquet.read_parquet(run.part("gallery", 0))["label"].to_pylist()) == {"shoe"}


@pytest.mark.usefixtures("ray_cluster")
def test_normalise_with_another_expected_width_checks_the_width_again(tmp_path: Path) -> None:
    run, uri = (
        Run(str(tmp_path / "run")),
        write(tmp_path / "a.parquet", table(old=pa.array(VECTORS.tolist(), VARIABLE))),
    )
    normalise(run, "gallery", source(uri), {}, 4)
    with pytest.raises(DataError, match="wrong width"):
        normalise(run, "gallery", source(uri), {"old_embedding": DIM + 1}, 4)


@pytest.mark.usefixtures("ray_cluster")
def test_normalise_after_a_manifest_with_images_was_moved_refers_to_its_new_place(tmp_path: Path) -> None:
    run, images = Run(str(tmp_path / "run")), pa.table({"image": [b"a", b"b"]})
    for name in ("before", "after"):
        uri = write(tmp_path / name / "a.parquet", images)
        normalise(run, "gallery", source(uri, image="image"), {}, 4)
    assert set(parquet.read_parquet(run.part("gallery", 0))["uri"].to_pylist()) == {f"{uri}#image"}


@pytest.mark.usefixtures("ray_cluster")
def test_normalise_that_was_refused_half_way_leaves_nothing_for_the_manifest_before_it(tmp_path: Path) -> None:
    run, uri = Run(str(tmp_path / "run")), write(tmp_path / "a.parquet", table(label=["x"] * 20, twice=[1] * 20))
    good = source(uri, **COLUMNS, label="label")
    normalise(run, "gallery", good, {}, 4)
    with pytest.raises(DataError, match="more than once"):  # found once its parts are written
        normalise(run, "gallery", source(uri, id="twice", old_embedding="old"), {}, 4)
    normalise(run, "gallery", good, {}, 4)
    rows = parquet.read_parquet(run.part("gallery", 0))
    assert rows["id"].to_pylist() == list(range(20))
    assert rows["label"].to_pylist() == ["x"] * 20


@pytest.mark.usefixtures("ray_cluster", "small_partitions")
def test_normalise_of_fewer_rows_removes_the_parts_of_the_longer_manifest(tmp_path: Path) -> None:
    run = Run(str(tmp_path / "run"))
    objects.put(run.path("gallery", "old", "unit-00000.parquet"), b"of the embedding stream")
    for count, parts in ((20, 2), (5, 1)):
        uri = write(tmp_path / "a.parquet", table(count))
        assert len(normalise(run, "gallery", source(uri), {}, 4).rows) == parts
    assert objects.list_files(run.path("gallery"), ".parquet") == [
        run.path("gallery", "old", "unit-00000.parquet"),
        run.part("gallery", 0),
    ]


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("started", [True, False])
def test_normalise_over_parts_of_an_earlier_version_keeps_them_only_in_a_run_that_has_started(
    tmp_path: Path, started: bool
) -> None:
    run, uri = Run(str(tmp_path / "run")), write(tmp_path / "a.parquet", table())
    normalise(run, "gallery", source(uri), {}, 4)
    marker = run.path("gallery", "manifest.json")
    known = json.loads(objects.read_bytes(marker))
    del known["reading"]
    objects.put(marker, documents.encode(known))
    if started:
        objects.put(run.settings, b"{}")
    found = normalise(run, "gallery", source(uri), {}, 4)
    assert (found.reading == "") == started
    assert found.digest == digest(source(uri))


def test_images_in_files_and_at_uris_are_one_manifest(tmp_path: Path) -> None:
    """One file has bytes, one has uris and ranges, one has either in each row."""
    columns = {"id": "id", "image": "image", "uri": "uri", "offset": "offset", "length": "length", "etag": "etag"}
    ids = {"id": [0, 1]}
    inside = write(tmp_path / "in" / "a.parquet", pa.table(ids | {"image": [b"a", b"b"]}))
    ranges = {"uri": ["/x.tar", "/y.png"], "offset": [512, None], "length": [9, None], "etag": ["1", None]}
    write(tmp_path / "in" / "b.parquet", pa.table({"id": [2, 3]} | ranges))
    mixed = {"uri": ["/z.png", None], "offset": pa.nulls(2, pa.int64()), "length": pa.nulls(2, pa.int64())}
    both = write(tmp_path / "in" / "c.parquet", pa.table({"id": [4, 5], "image": [None, b"f"]} | mixed))
    rows = brought_in(tmp_path, source(str(tmp_path / "in"), **columns)).to_pylist()
    places = [(row["uri"], row["offset"], row["length"], row["row"], row["etag"]) for row in rows]
    tags = {file: f"{objects.stat(file).etag} {objects.sha256(file)}" for file in (inside, both)}
    assert places == [
        (f"{inside}#image", None, None, 0, tags[inside]),
        (f"{inside}#image", None, None, 1, tags[inside]),
        ("/x.tar", 512, 9, None, "1"),
        ("/y.png", None, None, None, None),
        ("/z.png", None, None, None, None),
        (f"{both}#image", None, None, 1, tags[both]),
    ]


def test_a_file_with_neither_images_nor_uris_is_refused_by_its_name(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.parquet", pa.table({"id": [0], "uri": ["/a.png"]}))
    write(tmp_path / "in" / "b.parquet", pa.table({"id": [1], "where": ["/b.png"]}))
    with pytest.raises(
        DataError, match=r"no column with images or uris\n(.|\n)*a column image or uri(.|\n)*b\.parquet"
    ):
        scan(source(str(tmp_path / "in"), id="id", image="image", uri="uri"), {})
