"""Images that the old encoder cannot read are refused, counted, shown and audited; none vanishes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from jobs.cli import main
from pipeline.config.load import load_config
from pipeline.planning.plan import read_plan
from pipeline.run import Run
from pipeline.serving.searcher import Searcher
from pipeline.storage import objects, parquet
from tests.support.galleries import digits

pytestmark = pytest.mark.usefixtures("ray_cluster")

IMAGES, DAMAGED = 300, 60


def fastfill(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), catch_exceptions=False)


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory, make_run: Callable[..., str]) -> tuple[str, Path]:
    """A gallery of files by their paths below data_root, every fifth cut in half; the config and the folder."""
    folder = tmp_path_factory.mktemp("unreadable")
    path = make_run(
        folder,
        gallery__columns={"uri": "file", "label": "digit"},
        plan__waves=3,
        plan__unit_images=32,
        index__shards=2,
    )
    images, labels = digits(IMAGES)
    (folder / "data" / "images").mkdir()
    for row, image in enumerate(images):
        damaged = row % (IMAGES // DAMAGED) == 3
        (folder / "data" / "images" / f"{row:03d}.png").write_bytes(image[: len(image) // 2] if damaged else image)
    files = [f"images/{row:03d}.png" if row % 2 else f"./images/{row:03d}.png" for row in range(IMAGES)]
    pq.write_table(pa.table({"file": files, "digit": labels}), folder / "data" / "gallery.parquet")
    return path, folder


def test_images_that_are_somewhere_else_are_refused_at_once_with_their_places(gallery: tuple[str, Path]) -> None:
    path, folder = gallery
    elsewhere = folder / "elsewhere"
    shutil.copytree(folder / "data", elsewhere, ignore=shutil.ignore_patterns("images"))
    result = fastfill("backfill", "--config", path, "--set", f"data_root={elsewhere}")
    assert result.exit_code == 2, result.output
    assert "none of 8 images, spread over the gallery, can be read" in result.stderr
    assert f"{elsewhere}/images/000.png: fetch: missing" in result.stderr
    assert f"relative ones are below {elsewhere}" in result.stderr
    assert not (folder / "run" / "run.json").exists()


@pytest.mark.slow
def test_too_many_unreadable_images_stop_before_the_plan_and_can_be_mended(gallery: tuple[str, Path]) -> None:
    path, folder = gallery  # the data_root of before is mended
    result = fastfill("backfill", "--config", path)
    assert result.exit_code == 2, result.output
    assert "too many images of the gallery cannot be embedded" in result.stderr
    assert "5.00% of 300 images" in result.stderr
    run = Run(load_config(path).run)
    assert read_plan(run) is None
    status = fastfill("status", "--config", path)
    assert "old encoder: decode" in status.stderr
    assert "truncated" in status.stderr
    images = digits(IMAGES)[0]
    for row in range(3, IMAGES - 50, IMAGES // DAMAGED):
        (folder / "data" / "images" / f"{row:03d}.png").write_bytes(images[row])
    assert fastfill("backfill", "--config", path).exit_code == 2
    result = fastfill("backfill", "--config", path, "--retry-rejects")
    assert result.exit_code == 0, result.output
    said = " ".join(result.stderr.split())
    assert "10 of 300 images of the gallery cannot be read by the old encoder" in said
    assert "they have no vector, so they are not served" in said


@pytest.mark.slow  # after the one before
def test_unreadable_images_are_counted_and_shown_and_the_others_are_served(gallery: tuple[str, Path]) -> None:
    path, _ = gallery
    run = Run(load_config(path).run)
    plan = read_plan(run)
    assert plan is not None
    assert (plan.num_gallery, plan.num_rejected) == (290, 10)
    status = json.loads(fastfill("status", "--config", path, "--json").stdout)
    assert (status["gallery"], status["durable"], status["rejected"], status["published"]) == (300, 290, 10, 290)
    assert (status["eta_seconds"], status["wave"]) == (0, 3)
    shown = " ".join(fastfill("status", "--config", path).stderr.replace("│", " ").split())
    assert "10, 10 of them for the old encoder: these have no vector and are not served" in shown
    report = json.loads(objects.read_bytes(run.path("reports", "report.json")))
    assert (report["progress"]["gallery"], report["progress"]["rejected"]) == (300, 10)
    assert [(row["stage"], row["images"]) for row in report["rejects"]] == [("old encoder: decode", 10)]
    with Searcher(run.uri) as searcher:
        assert searcher.num_vectors == 290
    again = fastfill("backfill", "--config", path, "--retry-rejects")
    assert again.exit_code == 0
    assert "Nothing to do" in again.stderr
    assert "The 10 rejects are not retried: their waves are published" in again.stderr


@pytest.mark.slow  # after the one before
def test_the_audit_misses_an_image_that_is_neither_planned_nor_rejected(gallery: tuple[str, Path]) -> None:
    path, _ = gallery
    assert json.loads(fastfill("audit", "--config", path, "--json").stdout)["ok"]
    run = Run(load_config(path).run)
    rejects = objects.list_files(run.path("gallery", "old-rejects"), ".parquet")
    kept = objects.read_bytes(rejects[-1])
    lost = parquet.read_parquet(rejects[-1]).num_rows
    objects.delete_files([rejects[-1]])
    result = fastfill("audit", "--config", path, "--json")
    problems = json.loads(result.stdout)["problems"]
    found = sorted((item["kind"], item["found"].split(",")[0]) for item in problems)
    assert found == [("log_part", f"{lost} missing"), ("manifest", f"{lost} missing")]
    objects.put(rejects[-1], kept)
