"""Only files with exactly the name of a part are parts."""

from __future__ import annotations

from pathlib import Path

from pipeline.storage import objects
from pipeline.storage.part_files import list_parts


def test_list_parts_of_a_folder_with_strays_gives_the_parts_alone(tmp_path: Path) -> None:
    folder = str(tmp_path)
    strays = ("part-00000 (copy).parquet", "copy of part-00001.parquet", "part-2.parquet", "below/part-00003.parquet")
    for name in ("part-00010.parquet", "part-00002.parquet", "part-100000.parquet", *strays):
        objects.put(objects.join(folder, name), b"")
    found = list_parts(folder)
    assert list(found) == [2, 10, 100000]
    assert found[10] == objects.join(folder, "part-00010.parquet")


def test_list_parts_of_a_missing_folder_is_empty(tmp_path: Path) -> None:
    assert list_parts(str(tmp_path / "nothing")) == {}
