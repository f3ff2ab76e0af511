"""A user's sample as it is read: the same whatever files it lies in, and what is refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.method import ProbeSettings
from pipeline.errors import DataError
from pipeline.sampling import probe_labels
from pipeline.sampling.probe_labels import check_kind, read_sample

IDS = [7, 3, 11, 5]
LABELS = ["a", None, "b", "a"]


def write(folder: Path, name: str = "a.parquet", **columns: Any) -> str:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / name)
    return str(folder / name)


def source(manifest: str | list[str], **columns: str) -> ProbeSettings:
    return ProbeSettings.model_validate({"manifest": manifest, "columns": columns})


def test_read_sample_gives_the_same_digest_for_any_order_files_and_column_names(tmp_path: Path) -> None:
    one = read_sample(source(write(tmp_path, "one.parquet", id=IDS, label=LABELS)))
    halves = [write(tmp_path / "parts", f"{row}.parquet", key=IDS[row:][:2], y=LABELS[row:][:2]) for row in (2, 0)]
    for given in (str(tmp_path / "parts"), halves, str(tmp_path / "parts" / "*.parquet")):
        assert read_sample(source(given, id="key", label="y")).digest == one.digest
    assert one.rows.to_pydict() == {"id": [3, 5, 7, 11], "label": [None, "a", "a", "b"]}
    for changes in ({"id": [7, 3, 11, 6]}, {"label": ["a", "a", "b", "a"]}, {"id": ["7", "3", "11", "5"]}):
        assert read_sample(source(write(tmp_path, **{"id": IDS, "label": LABELS, **changes}))).digest != one.digest
    grouped = read_sample(source(write(tmp_path, id=IDS, label=LABELS, group=LABELS), group="group"))
    assert grouped.rows.schema.names == ["id", "label", "group"]
    assert grouped.digest != one.digest


def test_labels_are_names_as_those_of_a_gallery_are(tmp_path: Path) -> None:
    labels = pa.array([1, 2, 2, None]).dictionary_encode()
    found = read_sample(source(write(tmp_path, id=["d", "a", "c", "b"], label=labels)))
    assert found.rows.to_pydict() == {"id": ["a", "b", "c", "d"], "label": ["2", None, "2", "1"]}
    assert not found.has_integers


def test_read_sample_ignores_a_file_without_rows(tmp_path: Path) -> None:
    write(tmp_path, "a.parquet", id=pa.array([], pa.string()), label=pa.array([], pa.null()))
    write(tmp_path, "b.parquet", id=["x", "y"], label=[1, 1])
    assert read_sample(source(str(tmp_path))).rows["id"].to_pylist() == ["x", "y"]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"label": LABELS}, r"no column for id\n  expected: 'id'\n  found: \['label'\]\n  where: .*a.parquet"),
        ({"id": IDS}, "no column for label\n  expected: 'label'"),
        ({"id": [0.5, 1.5], "label": [1, 1]}, "id column has a wrong type\n  expected: int64, or strings"),
        ({"id": IDS, "label": [[1]] * 4}, "label column has a wrong type"),
        ({"id": [7, None], "label": [1, 1]}, r"an id is null\n  where: .*a.parquet: row 1, column id"),
        ({"id": ["7", None], "label": [1, 1]}, "an id is null"),
        ({"id": [7, -1], "label": [1, 1]}, r"an id is negative\n(.*\n)*  where: .*row 1"),
        ({"id": np.array([2**63, 1], np.uint64), "label": [1, 1]}, "an id does not fit int64"),
        ({"id": [4, 4], "label": ["a", "b"]}, r"a repeated id\n  expected: unique ids\n  found: 4\n"),
        ({"id": list("abcdabcd"), "label": [1] * 8}, r"a repeated id\n(.*\n)*  found: a, b, c, \.\.\.\n"),
        (
            {"id": [4], "label": ["a"]},
            "too few images\n  expected: 2 to 200,000\n  found: 1\n  where: probe.manifest: ",
        ),
    ],
)
def test_read_sample_of_unusable_rows_is_refused_with_their_place(
    tmp_path: Path, columns: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        read_sample(source(write(tmp_path, **columns)))


def test_a_sample_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no manifest file\n(.*\n)*  where: .*nowhere"):
        read_sample(source(str(tmp_path / "nowhere")))


def test_ids_of_two_kinds_are_refused_with_a_file_of_each(tmp_path: Path) -> None:
    write(tmp_path, "a.parquet", id=[1, 2], label=[1, 1])
    write(tmp_path, "b.parquet", id=["x", "y"], label=[1, 1])
    with pytest.raises(DataError, match=r"integers in .*a.parquet, strings in .*b.parquet"):
        read_sample(source(str(tmp_path)))


def test_more_images_than_can_be_measured_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_labels, "_MOST", 3)
    with pytest.raises(DataError, match="too many images\n  expected: 2 to 3\n  found: 4"):
        read_sample(source(write(tmp_path, id=IDS, label=LABELS)))


def test_ids_are_of_the_kind_of_the_gallery_s(tmp_path: Path) -> None:
    found = read_sample(source(write(tmp_path, id=IDS, label=LABELS)))
    check_kind(found, "name", integers=True)
    with pytest.raises(DataError, match=r"expected: strings, as in the gallery's column name\n  found: integers"):
        check_kind(found, "name", integers=False)
    with pytest.raises(DataError, match=r"needs a gallery with ids(.|\n)*gallery\.columns\.id"):
        check_kind(found, None, integers=True)
