"""Images that change or disappear between the plan and their embedding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from jobs.cli import main
from pipeline.config.load import load_config
from pipeline.embedding import vector_log
from pipeline.evaluation.gallery_arrays import load_gallery
from pipeline.index import commits
from pipeline.index.commits import Commit
from pipeline.index.writer import Writer
from pipeline.planning.plan import read_plan
from pipeline.reporting import telemetry
from pipeline.run import Run
from pipeline.serving.searcher import Searcher
from pipeline.storage import objects, parquet
from pipeline.storage.retry import COUNTS
from tests.support.galleries import OLD_DIM, digits

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

IMAGES, CHANGED, DELETED = 60, 7, 23


def fastfill(*arguments: str) -> Result:
    result = CliRunner().invoke(main, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def backfill_after_changes(folder: Path, make_run: Callable[..., str], deleted_images: str) -> tuple[str, Result]:
    """Plan a gallery of files, then replace one and delete another, then backfill."""
    images, _ = digits(IMAGES + 1)
    uris = [str(folder / f"{row:03d}.png") for row in range(IMAGES)]
    for uri, data in zip(uris, images, strict=False):
        Path(uri).write_bytes(data)
    columns = {"id": "id", "uri": "uri", "etag": "etag", "old_embedding": "old"}
    plan = {"waves": 3, "unit_images": 32, "deleted_images": deleted_images}
    path = make_run(folder, gallery__columns=columns, plan=plan, backfill__max_reject_fraction=0.5)
    old = np.random.default_rng(0).normal(size=(IMAGES, OLD_DIM)).astype(np.float32)
    table: dict[str, Any] = {
        "id": np.arange(IMAGES),
        "uri": uris,
        "etag": [objects.stat(uri).etag for uri in uris],
        "old": pa.FixedSizeListArray.from_arrays(pa.array(old.ravel()), OLD_DIM),
    }
    pq.write_table(pa.table(table), folder / "data" / "gallery.parquet")
    fastfill("plan", "--measure", "0", "--config", path)
    Path(uris[CHANGED]).write_bytes(images[IMAGES])
    Path(uris[DELETED]).unlink()
    return path, fastfill("backfill", "--config", path)


@pytest.mark.parametrize("deleted_images", ["keep", "drop"])
def test_a_deleted_image_is_a_reject_of_its_own_kind_and_leaves_the_index_only_where_that_is_wanted(
    tmp_path: Path, make_run: Callable[..., str], deleted_images: str
) -> None:
    path, _ = backfill_after_changes(tmp_path, make_run, deleted_images)
    run = Run(load_config(path).run)
    plan = read_plan(run)
    assert plan is not None
    (reject,) = vector_log.read_rejects(plan.log(run)).to_pylist()
    assert (reject["id"], reject["stage"]) == (DELETED, "fetch")
    assert reject["reason"].startswith("deleted")
    drops = deleted_images == "drop"
    counts = [commits.read_commit(run, number).counts for number in (0, 3)]
    assert (counts[0].gallery, counts[0].vectors, counts[0].deleted) == (IMAGES, IMAGES, 0)
    assert (counts[1].gallery, counts[1].vectors, counts[1].deleted) == (IMAGES, IMAGES - drops, int(drops))
    assert counts[1].embedded == IMAGES - 1
    with Searcher(run.uri, commit=3) as searcher:
        found = searcher.search(load_gallery(run).transformed, IMAGES).ids
    assert (DELETED in found) != drops
    assert json.loads(fastfill("audit", "--config", path, "--json").stdout)["ok"]


def test_a_changed_image_is_embedded_from_what_is_there_now_and_that_is_recorded(
    tmp_path: Path, make_run: Callable[..., str]
) -> None:
    path, result = backfill_after_changes(tmp_path, make_run, "keep")
    run = Run(load_config(path).run)
    etags = {
        row["id"]: row["source_etag"]
        for uri in objects.list_files(run.path("embedded"), ".parquet")
        for row in parquet.read_parquet(uri, ["id", "source_etag"]).to_pylist()
    }
    planned = pq.read_table(tmp_path / "data" / "gallery.parquet")["etag"].to_pylist()
    assert [row for row in range(IMAGES) if row != DELETED and etags[row] != planned[row]] == [CHANGED]
    assert "1 changed" in result.stderr


def test_retries_of_the_publisher_are_in_the_metrics_and_in_the_last_line(
    tmp_path: Path, make_run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = Writer.publish

    def with_a_retry(self: Writer, draft: Commit) -> Commit:
        COUNTS.add("retries:InternalError")
        return publish(self, draft)

    monkeypatch.setattr(Writer, "publish", with_a_retry)
    before = telemetry.REGISTRY.get_sample_value("fastfill_retries_total", {"cause": "server"}) or 0.0
    _, result = backfill_after_changes(tmp_path, make_run, "keep")
    assert "4 retries, 1 changed" in result.stderr  # commit 0 and three waves
    assert telemetry.REGISTRY.get_sample_value("fastfill_retries_total", {"cause": "server"}) == before + 4
