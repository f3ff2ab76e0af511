"""Keys: the users' own ids by the numbers that the index has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.run import Run
from pipeline.schema import MANIFEST
from pipeline.serving import user_keys as module
from pipeline.serving.user_keys import UserKeys
from pipeline.storage import objects, parquet

PART = 10


def write_gallery(run: Run, num_parts: int) -> None:
    """Parts as `normalise` writes them: with string ids an id is the row's number."""
    schema = pa.schema(MANIFEST)
    for part in range(num_parts):
        ids = np.arange(part * PART, (part + 1) * PART)
        columns = {"id": pa.array(ids), "key": pa.array([f"key {item}" for item in ids])}
        table = pa.table({field.name: columns.get(field.name, pa.nulls(PART, field.type)) for field in schema})
        groups = [table.slice(0, 7), table.slice(7)]
        objects.put(run.part("gallery", part), parquet.parquet_bytes(schema, groups))


def test_keys_of_many_parts_are_found_with_few_of_them_in_memory(tmp_path: Path) -> None:
    run, num_parts = Run(str(tmp_path)), module._PARTS_IN_MEMORY + 3
    write_gallery(run, num_parts)
    keys = UserKeys(run)
    ids = np.random.default_rng(0).permutation(num_parts * PART).reshape(-1, 2)
    assert keys.of(ids).tolist() == [[f"key {item}" for item in row] for row in ids]
    assert keys.strings(ids[:, 0]).to_pylist() == [f"key {item}" for item in ids[:, 0]]
    assert len(keys._read) == module._PARTS_IN_MEMORY


def test_keys_read_only_the_parts_that_hold_the_ids(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    write_gallery(run, 4)
    keys = UserKeys(run)
    assert keys.exist
    for part in (0, 1, 3):
        objects.put(run.part("gallery", part), b"damaged")
    assert keys.of(np.array([25, -1, 21])).tolist() == ["key 25", None, "key 21"]
