"""Bad input: a reject with its reason where one image is bad, a refusal before any work where the input is."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from click.testing import CliRunner, Result

from jobs.cli import main
from pipeline.config.load import load_config
from pipeline.embedding import vector_log
from pipeline.index import commits, tags
from pipeline.planning.plan import read_plan
from pipeline.run import Run
from pipeline.serving.searcher import Searcher
from tests.support.galleries import OLD_DIM, digits, write_config

pytestmark = pytest.mark.usefixtures("ray_cluster")

ROOT = Path(__file__).resolve().parents[2]


def fastfill(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), catch_exceptions=False)


def bomb(width: int, height: int) -> bytes:
    """A valid grey PNG of that size whose pixels are all zero: some hundred kilobytes for a gigapixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    compressor = zlib.compressobj(1)
    row = bytes(width + 1)
    body = b"".join(compressor.compress(row) for _ in range(height)) + compressor.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def gallery_of_files(
    tmp_path_factory: pytest.TempPathFactory, make_run: Callable[..., str]
) -> tuple[str, dict[int, str]]:
    """A gallery of 120 image files with old embeddings, five of them bad; gives the config and id -> reason."""
    folder = tmp_path_factory.mktemp("files")
    images, labels = digits(120)
    images[10] = images[10][: len(images[10]) // 2]
    images[20] = b"this is not an image, whatever its name says"
    images[30] = bomb(30_000, 30_000)
    images[40] = b""
    uris = [str(folder / f"{row:03d}.png") for row in range(len(images))]
    for uri, data in zip(uris, images, strict=True):
        Path(uri).write_bytes(data)
    Path(uris[50]).unlink()
    path = make_run(
        folder,
        gallery__columns={"id": "id", "uri": "uri", "old_embedding": "old", "label": "digit"},
        plan__waves=3,
        backfill__max_reject_fraction=0.5,
    )
    write_gallery(folder, uris, labels)
    return path, {10: "truncated", 20: "not an image", 30: "too large", 40: "empty", 50: "missing"}


def write_gallery(folder: Path, uris: list[str], labels: list[int], **columns: Any) -> None:
    old = np.random.default_rng(0).normal(size=(len(uris), OLD_DIM)).astype(np.float32)
    table = {
        "id": np.arange(len(uris)),
        "uri": uris,
        "digit": labels,
        "old": pa.FixedSizeListArray.from_arrays(pa.array(old.ravel()), OLD_DIM),
    }
    pq.write_table(pa.table(table | columns), folder / "data" / "gallery.parquet")


def test_bad_images_become_rejects_and_the_run_completes_with_their_transformed_vectors(
    gallery_of_files: tuple[str, dict[int, str]],
) -> None:
    path, expected = gallery_of_files
    result = fastfill("backfill", "--config", path)
    assert result.exit_code == 0, result.output
    run = Run(load_config(path).run)
    plan = read_plan(run)
    assert plan is not None
    rejects = vector_log.read_rejects(plan.log(run)).to_pylist()
    assert {row["id"]: row["reason"].partition(":")[0] for row in rejects} == expected
    assert all(row["uri"] for row in rejects)
    counts = commits.read_commit(run, 3).counts
    assert (counts.gallery, counts.embedded, counts.transformed, counts.rejected) == (120, 115, 5, 5)
    with Searcher(run.uri) as searcher:
        assert searcher.num_vectors == 120
    audit = fastfill("audit", "--config", path, "--json")
    assert json.loads(audit.stdout)["ok"]
    status = fastfill("status", "--config", path)
    assert "truncated" in status.stderr
    assert "missing" in status.stderr


def test_too_many_rejects_stop_before_the_wave_is_published_and_can_be_retried(
    tmp_path: Path, make_run: Callable[..., str]
) -> None:
    images, labels = digits(60)
    uris = [str(tmp_path / f"{row:03d}.png") for row in range(60)]
    for uri, data in list(zip(uris, images, strict=True))[::2]:
        Path(uri).write_bytes(data)
    columns = {"id": "id", "uri": "uri", "old_embedding": "old", "label": "digit"}
    path = make_run(tmp_path, gallery__columns=columns, plan__waves=[1.0], probe__images=0)
    write_gallery(tmp_path, uris, labels)
    result = fastfill("backfill", "--config", path)
    assert result.exit_code == 2
    assert "too many images of wave 1 cannot be embedded; the wave is not published" in result.stderr
    run = Run(load_config(path).run)
    assert tags.list_commits(run) == [0]
    for uri, data in zip(uris, images, strict=True):
        Path(uri).write_bytes(data)
    assert fastfill("backfill", "--config", path).exit_code == 2
    assert fastfill("backfill", "--config", path, "--retry-rejects").exit_code == 0
    assert commits.read_commit(run, 1).counts.embedded == 60


def test_backfill_with_a_changed_config_is_refused_and_names_the_setting(
    gallery_of_files: tuple[str, dict[int, str]],
) -> None:
    path, _ = gallery_of_files
    result = fastfill("backfill", "--config", path, "--set", "plan.policy=random")
    assert result.exit_code == 3
    assert "plan.policy: the run has 'auto', you gave 'random'" in result.stderr


def test_an_error_of_ours_inside_ray_data_reaches_the_user_as_a_few_lines(
    tmp_path: Path, make_run: Callable[..., str]
) -> None:
    path = make_run(tmp_path, plan__policy="tests.support.own_functions:undecided", probe__images=0)
    command = [sys.executable, "-m", "jobs.plan", "--measure", "0", "--config", path]
    address = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    result = subprocess.run(command, cwd=ROOT, env=address, capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    lines = result.stderr.splitlines()
    start = lines.index("error: the policy gave priorities that cannot be used")
    assert len(lines[start:]) < 6, result.stderr
    progress = [re.search(r": (done in [\d.]+ s|[\d,]+ of [\d,]+)$", line) for line in lines[:start]]
    assert all(progress), result.stderr
    for noise in ("Traceback", "ERROR", "UDF", "ray.data"):
        assert noise not in result.stderr
    assert not (Path(load_config(path).run) / "plan" / "plan.json").exists()


BAD = {
    "duplicated id": ({"id": np.array([0, 1, 1, *range(3, 60)])}, "an id occurs more than once", "1"),
    "wrong width": (
        {"old": pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(60 * 7, np.float32)), 7)},
        "wrong width",
        "gallery.parquet",
    ),
    "ragged width": (
        {"old": pa.array([[0.0] * (OLD_DIM - (row == 5)) for row in range(60)], pa.list_(pa.float32()))},
        "wrong width",
        "row 5",
    ),
    "not a number": (
        {
            "old": pa.FixedSizeListArray.from_arrays(
                pa.array(np.where(np.arange(60 * OLD_DIM) == 3 * OLD_DIM, np.nan, 0.5).astype(np.float32)), OLD_DIM
            )
        },
        "an embedding is not finite",
        "row 3",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_gallery_is_refused_before_any_work(case: str, tmp_path: Path) -> None:
    columns, summary, where = BAD[case]
    mapping = {"id": "id", "uri": "uri", "old_embedding": "old", "label": "digit"}
    path = write_config(tmp_path, gallery__columns=mapping)
    write_gallery(tmp_path, [f"/nowhere/{row}" for row in range(60)], [0] * 60, **columns)
    result = fastfill("backfill", "--config", path)
    assert result.exit_code == 2, result.output
    assert summary in result.stderr
    assert where in result.stderr
    run = Path(load_config(path).run)
    assert not (run / "run.json").exists()
    assert not (run / "pairs").exists()


def test_backfill_with_a_mended_column_after_a_refused_one_reads_the_gallery_again(tmp_path: Path) -> None:
    twice = {"id": "digit", "image": "image", "label": "digit"}  # refused once the gallery is brought in
    path = write_config(tmp_path, pairs__columns=twice)
    for label in ("name", "digit"):
        result = fastfill("backfill", "--config", path, "--set", f"gallery.columns.label={label}")
        assert result.exit_code == 2, result.output
        assert "an id occurs more than once" in result.stderr
    parts = sorted((Path(load_config(path).run) / "gallery").glob("part-*.parquet"))
    labels = [label for part in parts for label in pq.read_table(part, columns=["label"])["label"].to_pylist()]
    assert labels == [str(label) for label in digits(300)[1]]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("plan.wave=3", "plan.wave: unknown key; did you mean 'waves'?"),
        ("plan.waves=[0.5, 0.4]", "the fractions must add up to 1, but add up to 0.9"),
        ("plan.policy=tests.nowhere:policy", "the policy's function cannot be found"),
        ("encoders.new.dim=21", "the encoder's embedding has another width"),
        ("encoders.new.export=missing.pt2", "an input file cannot be read"),
        ("gallery.columns.label=nothing", "the manifest has no column for label"),
        ("device=cuda:7", "this machine has no such GPU"),
        ("index.factory=Nonsense", "index.factory"),
    ],
)
def test_a_bad_setting_is_refused_before_any_work(setting: str, message: str, tmp_path: Path) -> None:
    path = write_config(tmp_path)
    result = fastfill("backfill", "--config", path, "--set", setting)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    run = Path(load_config(path).run)
    assert not (run / "pairs" / "part-00000.parquet").exists()
    shutil.rmtree(run, ignore_errors=True)
