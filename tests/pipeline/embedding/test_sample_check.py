"""The probe: which images it takes, and what it says of those that cannot be read."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.config.load import validate
from pipeline.config.tree import Config, PreprocessSettings
from pipeline.embedding.precompute import NUM_CHECKED, _places, check_readable
from pipeline.embedding.stream import StreamSettings
from pipeline.manifest.normalised import Manifest
from pipeline.run import Run
from pipeline.schema import manifest_schema
from pipeline.storage import objects, parquet
from tests.support.galleries import digits

SIZES, UNIT_ROWS = [5, 1, 14], 4


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A normalised manifest of 20 images in three parts, whose files are not there."""
    found, first = Run(str(tmp_path / "run")), 0
    for number, size in enumerate(SIZES):
        rows = [{"id": first + row, "uri": str(tmp_path / f"{first + row}.png")} for row in range(size)]
        table = pa.Table.from_pylist(rows, manifest_schema({}))
        groups = [table.slice(start, UNIT_ROWS) for start in range(0, size, UNIT_ROWS)]
        objects.put(found.part("gallery", number), parquet.parquet_bytes(manifest_schema({}), groups))
        first += size
    return found


def config(folder: Path) -> Config:
    manifest = {"manifest": "a.parquet", "columns": {"uri": "uri"}}
    encoder = {"export": "new.pt2", "dim": 4, "preprocess": {"size": 8, "channels": 1}}
    tree = {"run": str(folder / "run"), "encoders": {"new": encoder}, "gallery": manifest, "pairs": manifest}
    return validate(tree, where="test")


@pytest.mark.parametrize("sizes", [[1], [3], [5, 1], [5, 1, 2], [5, 1, 14]])
def test_images_are_taken_from_the_whole_manifest_each_once(run: Run, sizes: list[int]) -> None:
    places = _places(run, "gallery", Manifest(sizes, UNIT_ROWS, {}, ""))
    names = [int(Path(place.uri).stem) for place in places]
    assert len(names) == len(set(names)) == min(sum(sizes), NUM_CHECKED)
    assert (names[0], names[-1]) == (0, sum(sizes) - 1)
    assert names == sorted(names)


def test_sample_check_names_unreadable_images_with_place_and_reason(run: Run, tmp_path: Path) -> None:
    rows, settings = Manifest(SIZES, UNIT_ROWS, {}, ""), config(tmp_path)
    tried, bad = check_readable(run, "gallery", rows, settings.encoders.new.preprocess, StreamSettings.of(settings))
    assert tried == len(bad) == NUM_CHECKED
    assert bad[0] == f"{tmp_path}/0.png: fetch: missing"
    (tmp_path / "0.png").write_bytes(digits(1)[0][0])
    (tmp_path / "19.png").write_bytes(b"text")
    tried, bad = check_readable(run, "gallery", rows, settings.encoders.new.preprocess, StreamSettings.of(settings))
    assert len(bad) == tried - 1
    assert bad[-1] == f"{tmp_path}/19.png: decode: not an image"
    tried, bad = check_readable(
        run, "gallery", rows, PreprocessSettings(channels=1, size=9), StreamSettings.of(settings)
    )
    assert bad[0] == f"{tmp_path}/0.png: preprocess: wrong shape: 8x8, expected 9x9"
