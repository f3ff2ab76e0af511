from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.index.segment_files import put_by_content
from pipeline.run import Run

DATA = b"some bytes of a segment"


@pytest.mark.parametrize("damaged", [b"", DATA[:-1], b"other bytes of a segment"[: len(DATA)]])
def test_put_by_content_over_a_damaged_object_of_that_name_replaces_it(damaged: bytes, tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    path, _ = put_by_content(run, "index/{}.faiss", DATA)
    Path(run.path(path)).write_bytes(damaged)
    assert put_by_content(run, "index/{}.faiss", DATA)[0] == path
    assert Path(run.path(path)).read_bytes() == DATA


def test_put_by_content_over_a_whole_object_of_that_name_leaves_it(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    path, _ = put_by_content(run, "index/{}.faiss", DATA)
    before = Path(run.path(path)).stat().st_ino
    put_by_content(run, "index/{}.faiss", DATA)
    assert Path(run.path(path)).stat().st_ino == before
