"""Rejects of every stage in one table, and the limit above which they stop a run."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.config.tree import BackfillSettings
from pipeline.embedding.reject_rules import check_manifest, limit, read_all, read_of_pairs
from pipeline.errors import DataError
from pipeline.planning.plan import Plan, Wave
from pipeline.run import Run
from pipeline.schema import REJECTS, embedded_schema
from pipeline.storage import objects, parquet
from tests.support.whole_run import put_rejects

PLAN = Plan("random", 0, 10, 1, 1, 2, 4, (Wave(1, 10, 3),), "f")


def put(run: Run, folder: str, number: int, reason: str) -> None:
    row = {"id": number, "uri": f"/{number}.png", "stage": "decode", "reason": reason}
    rows = pa.Table.from_pylist([{name: row.get(name) for name in REJECTS.names}], REJECTS)
    schema = put_rejects(run.path(folder), 1, number, rows, embedded_schema(2))
    parts = {"rejects": "embedded"}.get(folder, folder.removesuffix("-rejects"))
    uri = run.path(parts, "wave-001", f"unit-{number:05d}.parquet")
    objects.put(uri, parquet.parquet_bytes(schema, [schema.empty_table()]))


def test_the_rejects_of_a_gallery_are_those_of_both_encoders_and_their_stage_says_whose(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    assert read_all(run, PLAN.log(run)).num_rows == read_of_pairs(run).num_rows == 0
    put(run, "gallery/old-rejects", 7, "empty")
    put(run, "rejects", 8, "truncated: half")
    put(run, "pairs/new-rejects", 9, "missing")
    found = read_all(run, PLAN.log(run))
    assert found.schema == REJECTS
    assert [(row["id"], row["stage"], row["reason"]) for row in found.to_pylist()] == [
        (7, "old encoder: decode", "empty"),
        (8, "decode", "truncated: half"),
    ]
    assert read_all(run, None)["id"].to_pylist() == [7]
    assert [(row["id"], row["stage"]) for row in read_of_pairs(run).to_pylist()] == [(9, "pairs, new encoder: decode")]


@pytest.mark.parametrize(
    ("images", "fraction", "allowance", "borne"),
    [(1000, 0.05, 5, 50), (4, 0.05, 5, 5), (4, 0.05, 0, 0.2), (4, 0.0, 5, 0), (10, 1.0, 0, 10)],
)
def test_the_limit_is_a_fraction_and_a_handful_in_any_case(
    images: int, fraction: float, allowance: int, borne: float
) -> None:
    assert limit(images, fraction, allowance) == pytest.approx(borne)


def test_too_many_unreadable_images_of_a_manifest_are_refused_with_the_place_of_their_reasons() -> None:
    settings = BackfillSettings(max_reject_fraction=0.1)
    check_manifest(30, 300, settings, "gallery", "here")
    with pytest.raises(
        DataError, match=r"too many images of the gallery(.|\n)*10\.00% of 300(.|\n)*31 rejects"
    ) as caught:
        check_manifest(31, 300, settings, "gallery", "here")
    assert "where: here" in str(caught.value)
    assert "--retry-rejects" in str(caught.value)
