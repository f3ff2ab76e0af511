"""Whole small backfills through the commands that a user types, against plain re-embedding."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from jobs.cli import main
from pipeline.config.load import load_config
from pipeline.config.tree import Config
from pipeline.embedding import vector_log
from pipeline.embedding.decode import Limits, decode_image
from pipeline.evaluation.gallery_arrays import GalleryArrays, load_gallery
from pipeline.index import commits, tags
from pipeline.models.calibration import Calibration
from pipeline.models.encoder import load_encoder
from pipeline.planning.plan import read_plan
from pipeline.run import Run
from pipeline.serving.searcher import Searcher
from pipeline.storage import documents, objects
from tests.support.galleries import NEW_DIM, digits, export_encoder, write_config

pytestmark = pytest.mark.usefixtures("ray_cluster")


def fastfill(*arguments: str) -> Result:
    """Run a command as the user would; stdout and stderr apart."""
    return CliRunner().invoke(main, list(arguments), catch_exceptions=False)


def read_json(*arguments: str) -> Any:
    result = fastfill(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module", params=["Flat", "IVF8,Flat"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, backfilled: str) -> Config:
    """The run with a Flat index, and one with other lists that goes on from its plan and log: it embeds nothing."""
    if request.param == "Flat":
        return load_config(backfilled)
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(Path(backfilled).parent, folder, dirs_exist_ok=True)
    for name in ("index", "reports"):
        shutil.rmtree(folder / "run" / name)
    path = write_config(folder, index__factory=request.param, index__nprobe=3)
    result = fastfill("backfill", "--config", path)
    assert result.exit_code == 0, result.output
    return load_config(path)


def plain_reembedding(config: Config) -> np.ndarray[Any, Any]:
    """Every gallery image through the new encoder, in a plain loop; row i is image i of the manifest."""
    limits = Limits(10**6, 10**6)
    encoder = load_encoder(config.encoders.new, torch.device("cpu"))
    pixels = [decode_image(data, config.encoders.new.preprocess, limits) for data in digits(300)[0]]
    with torch.inference_mode():
        embeddings: np.ndarray[Any, Any] = encoder(torch.from_numpy(np.stack(pixels))).numpy()
    return embeddings


def logical_state(config: Config, gallery: GalleryArrays, commit: int) -> np.ndarray[Any, Any]:
    """What the snapshot must hold: waves up to `commit` embedded, all others transformed."""
    return np.where((gallery.wave <= commit)[:, None], gallery.embedded, gallery.transformed)


def test_last_snapshot_answers_as_one_faiss_index_of_a_plain_reembedding(finished: Config) -> None:
    vectors = plain_reembedding(finished)
    queries = vectors[:50] + np.float32(0.01)
    with Searcher(finished.run) as searcher:
        result = searcher.search(queries, 10)
        commit = commits.read_commit(Run(finished.run), searcher.commit.number)
    plain = faiss.deserialize_index(np.fromfile(Run(finished.run).path(commit.codebook_path), dtype=np.uint8))
    plain.add_with_ids(vectors, np.arange(len(vectors)))
    plain.nprobe = finished.index.nprobe
    distances, ids = plain.search(queries, 11)
    np.testing.assert_allclose(result.distances, distances[:, :10], atol=1e-5, rtol=1e-5)
    gaps = np.pad(np.diff(distances, axis=1), ((0, 0), (1, 0)), constant_values=1)
    apart = (gaps[:, :10] > 1e-5) & (gaps[:, 1:] > 1e-5)  # the batches differ, so nearer ones may change places
    assert apart.mean() > 0.9
    np.testing.assert_array_equal(result.ids[apart], ids[:, :10][apart])


def by_kind(
    codebook: Any, nprobe: int, vectors: Any, ids: Any, embedded: Any, queries: Any, calibration: Calibration
) -> tuple[Any, Any]:
    """The 10 nearest of a mixed gallery: one FAISS index per kind, the transformed distances mapped, both sorted."""
    found = []
    for kind, rows in (("embedded", embedded), ("transformed", ~embedded)):
        plain = faiss.clone_index(codebook)
        plain.add_with_ids(vectors[rows], ids[rows])
        plain.nprobe = nprobe
        distances, mine = plain.search(queries, 10)
        distances = np.where(mine < 0, np.inf, distances).astype(np.float32)
        found.append((distances if kind == "embedded" else calibration.apply(distances), mine))
    distances, both = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
    order = np.argsort(distances, axis=1, kind="stable")[:, :10]
    return np.take_along_axis(distances, order, axis=1), np.take_along_axis(both, order, axis=1)


def test_every_snapshot_answers_as_a_search_over_its_logical_state(finished: Config) -> None:
    run = Run(finished.run)
    gallery = load_gallery(run)
    codebook = faiss.read_index(run.path(commits.read_commit(run, 0).codebook_path))
    calibration = commits.read_commit(run, 0).calibration
    assert calibration is not None
    queries = gallery.embedded[::7]
    for number in tags.list_commits(run):
        state, embedded = logical_state(finished, gallery, number), gallery.wave <= number
        distances, ids = by_kind(codebook, finished.index.nprobe, state, gallery.ids, embedded, queries, calibration)
        with Searcher(finished.run, commit=number) as searcher:
            result = searcher.search(queries, 10)
        assert result.commit == number
        np.testing.assert_array_equal(result.ids, ids)
        there = ids >= 0  # three lists may hold fewer than ten images
        np.testing.assert_allclose(result.distances[there], distances[there], atol=1e-5, rtol=1e-5)


def test_each_commit_serves_the_whole_gallery_with_one_more_wave_embedded(finished: Config) -> None:
    run = Run(finished.run)
    plan = read_plan(run)
    assert plan is not None
    embedded = 0
    for number in tags.list_commits(run):
        embedded += plan.waves[number - 1].images if number else 0
        counts = commits.read_commit(run, number).counts
        assert (counts.gallery, counts.embedded, counts.rejected) == (300, embedded, 0)
    assert embedded == 300


def test_audit_finds_a_finished_run_whole(finished: Config) -> None:
    path = str(Path(finished.run).parent / "run.yaml")
    report = read_json("audit", "--config", path)
    assert report["ok"]
    assert report["problems"] == []


def test_backfill_of_a_finished_run_does_nothing_and_says_so(finished: Config) -> None:
    path = str(Path(finished.run).parent / "run.yaml")
    before = {uri: objects.stat(uri).etag for uri in objects.list_files(finished.run)}
    start = time.monotonic()
    result = fastfill("backfill", "--config", path)
    assert time.monotonic() - start < 15
    assert result.exit_code == 0
    assert "Nothing to do" in result.stderr
    assert {uri: objects.stat(uri).etag for uri in objects.list_files(finished.run)} == before


def test_a_report_that_was_lost_or_never_written_is_made_by_the_next_backfill(finished: Config) -> None:
    path, run = str(Path(finished.run).parent / "run.yaml"), Run(finished.run)
    page, figures, curve = (run.path("reports", name) for name in ("report.html", "report.json", "curve.json"))
    before = objects.read_bytes(curve)
    for lost in ([page], [page, figures, curve], [figures]):
        objects.delete_files(lost)
        result = fastfill("backfill", "--config", path)
        assert result.exit_code == 0
        assert "its report is missing" in result.stderr
        assert objects.exists(page)
        assert objects.exists(figures)
    assert json.loads(objects.read_bytes(curve)) == json.loads(before)
    test_backfill_of_a_finished_run_does_nothing_and_says_so(finished)


def test_evaluate_and_search_refuse_a_config_that_is_not_the_runs(finished: Config) -> None:
    path, run = str(Path(finished.run).parent / "run.yaml"), Run(finished.run)
    queries = [str(Path(finished.run).parent / "data" / "gallery.parquet"), "--column", "image", "--limit", "1"]
    curve = objects.read_bytes(run.path("reports", "curve.json"))
    metric, preprocess = "gallery.metric=cosine", "encoders.new.preprocess.pixel_range=255"
    for command, setting in (
        (["evaluate", "--curve"], metric),
        (["evaluate"], metric),
        (["search", *queries], preprocess),
    ):
        result = fastfill(*command, "--config", path, "--set", setting)
        assert result.exit_code == 3, (command, result.output)
        assert setting.partition("=")[0] in result.stderr
    assert objects.read_bytes(run.path("reports", "curve.json")) == curve
    other = Path(finished.run).parent / "other.pt2"
    if not other.exists():
        export_encoder(other, NEW_DIM, seed=3)
    result = fastfill("search", *queries, "--config", path, "--set", f"encoders.new.export={other}")
    assert result.exit_code == 3
    assert "content of encoders.new" in result.stderr
    free = fastfill("evaluate", "--config", path, "--set", "evaluate.points=5", "--set", "index.nprobe=2")
    assert free.exit_code == 0, free.output


def test_evaluate_of_a_snapshot_is_a_table_for_people_and_a_document_for_programs(finished: Config) -> None:
    path = str(Path(finished.run).parent / "run.yaml")
    point = read_json("evaluate", "--config", path, "--commit", "2")
    assert list(point) == ["commit", "fraction", "top1", "top5", "map", "num_queries", "recall10"]
    assert point["num_queries"] == 300
    assert point["recall10"] == 100 if finished.index.factory == "Flat" else 10 < point["recall10"] < 100
    table = fastfill("evaluate", "--config", path, "--commit", "2")
    assert "commit 2" in table.stderr
    assert "recall" in table.stderr
    assert f"{point['map']:.1f}" in table.stderr
    assert "{" not in table.stderr


def test_more_neighbours_than_images_are_null_in_the_document_and_not_in_the_table(finished: Config) -> None:
    path, folder = str(Path(finished.run).parent / "run.yaml"), Path(finished.run).parent
    queries = [str(folder / "data" / "gallery.parquet"), "--column", "image", "--limit", "1"]
    result = fastfill("search", *queries, "-k", "301", "--config", path, "--json")
    assert result.exit_code == 0, result.output
    assert "Infinity" not in result.stdout
    found = json.loads(result.stdout)
    assert [len(found[name][0]) for name in ("ids", "distances", "kinds")] == [301, 301, 301]
    assert found["ids"][0][-1] is found["distances"][0][-1] is found["kinds"][0][-1] is None
    table = fastfill("search", *queries, "-k", "301", "--config", path)
    assert "None" not in table.stderr


def test_search_refuses_more_than_one_file_of_queries(finished: Config) -> None:
    path, table = str(Path(finished.run).parent / "run.yaml"), str(Path(finished.run).parent / "data/gallery.parquet")
    result = fastfill("search", table, table, "--column", "image", "--config", path)
    assert result.exit_code == 2
    assert "these are 2 files" in result.stderr


def test_a_snapshot_that_is_worse_than_the_old_gallery_is_not_promoted(finished: Config) -> None:
    path, run = str(Path(finished.run).parent / "run.yaml"), Run(finished.run)
    marker = objects.join(run.transformation, "transformation.json")
    before = objects.read_bytes(marker)
    objects.put(marker, documents.encode(json.loads(before) | {"better_than_old": False}))
    try:
        read_json("rollback", "--config", path, "--to", "0")
        result = fastfill("promote", "--config", path, "--commit", "2")
        assert result.exit_code == 3
        assert "on held-out pairs the transformed gallery is worse than the old one" in result.stderr
        assert read_json("status", "--config", path)["prod"] == 0
        assert read_json("promote", "--config", path, "--commit", "2", "--force")["prod"] == 2
        assert read_json("promote", "--config", path)["prod"] == 5, "nothing is transformed any more"
    finally:
        objects.put(marker, before)


def test_status_and_curve_and_search_speak_the_documented_json(finished: Config) -> None:
    path = str(Path(finished.run).parent / "run.yaml")
    status = read_json("status", "--config", path)
    assert list(status) == [
        "run", "gallery", "embedded", "durable", "published", "from_pairs", "rejected", "wave", "waves", "fraction",
        "images_per_second", "eta_seconds", "commit", "prod", "quality", "refused", "stopped",
        "quality_commit", "prod_quality", "pinned",
    ]  # fmt: skip
    assert (status["gallery"], status["published"], status["commit"], status["prod"]) == (300, 300, 5, 5)
    curve = read_json("evaluate", "--config", path, "--curve")
    assert {"old_old", "new_new", "num_queries", "num_gallery", "distance", "orders", "published"} <= set(curve)
    assert curve["orders"]["uncertainty"]["points"][-1]["top1"] == curve["new_new"]["top1"]
    assert curve["published"]["points"][-1]["map"] == pytest.approx(curve["new_new"]["map"], abs=1e-6)
    found = read_json(
        "search", str(Path(finished.run).parent / "data" / "gallery.parquet"),
        "--column", "image", "--limit", "2", "-k", "3", "--config", path,
    )  # fmt: skip
    assert [row[0] for row in found["ids"]] == ["gallery-0", "gallery-1"]


def test_backfill_resumed_from_half_a_log_publishes_the_same_bytes(finished: Config, tmp_path: Path) -> None:
    run = Run(finished.run)
    plan = read_plan(run)
    assert plan is not None
    half = write_config(tmp_path, index__factory=finished.index.factory, index__nprobe=3)
    copy = Run(load_config(half).run)
    lost = {run.commit(number) for number in (3, 4, 5)} | {run.tag("prod"), run.tag("candidate")}
    lost |= {plan.log(run).part(wave, 0) for wave in (4, 5)}
    for uri in set(objects.list_files(run.uri)) - lost:
        objects.put(uri.replace(run.uri, copy.uri), objects.read_bytes(uri))
    result = fastfill("backfill", "--config", half)
    assert result.exit_code == 0, result.output
    for number in tags.list_commits(run):
        assert commits.read_commit(copy, number).content() == commits.read_commit(run, number).content()


def test_promote_and_rollback_move_prod_alone(finished: Config) -> None:
    path = str(Path(finished.run).parent / "run.yaml")
    assert read_json("rollback", "--config", path, "--to", "2") == {"prod": 2, "pinned": True}
    with Searcher(finished.run) as searcher:
        assert searcher.search(np.zeros((1, 20), dtype=np.float32), 1).commit == 2
        assert read_json("promote", "--config", path)["prod"] == 5
        assert searcher.search(np.zeros((1, 20), dtype=np.float32), 1).commit == 2
        assert searcher.refresh()
        assert searcher.search(np.zeros((1, 20), dtype=np.float32), 1).commit == 5


def test_log_holds_each_image_once(finished: Config) -> None:
    run = Run(finished.run)
    plan = read_plan(run)
    assert plan is not None
    ids = np.concatenate([vector_log.read_wave(plan.log(run), wave.wave)[0] for wave in plan.waves])
    assert sorted(ids.tolist()) == list(range(300))
