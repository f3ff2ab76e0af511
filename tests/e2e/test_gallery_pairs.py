"""A gallery of 600 photographs without pairs and labels, by the command: its own images are the pairs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner

from jobs.cli import main
from pipeline.backfill import driver
from pipeline.config.load import load_config
from pipeline.config.tree import Config
from pipeline.embedding import precompute
from pipeline.embedding.decode import Limits, decode_image
from pipeline.embedding.stream import StreamSettings, Work, embed_stream
from pipeline.index import commits, tags
from pipeline.manifest.normalised import ids_of
from pipeline.models.encoder import load_encoder
from pipeline.planning.plan import read_plan
from pipeline.run import GALLERY_PAIRS, Run
from pipeline.schema import UnitAck
from pipeline.serving.searcher import Searcher
from pipeline.storage import parquet
from tests.support.galleries import NEW_DIM, digits, encoders, export_encoders, write_manifest

pytestmark = pytest.mark.usefixtures("ray_cluster")

IMAGES, FROM_PAIRS, PROBED = 600, 120, 200


def write_gallery(folder: Path) -> str:
    """The data, and the smallest config that moves them; gives its path."""
    data = folder / "data"
    data.mkdir()
    export_encoders(data)
    write_manifest(data / "gallery.parquet", *digits(IMAGES))
    tree = {
        "run": str(folder / "run"),
        "data_root": str(data),
        "device": "cpu",
        "encoders": encoders(),
        "gallery": {"manifest": "gallery.parquet", "columns": {"id": "name", "image": "image"}},
        "fit": {"transformation": "linear"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return str(folder / "run.yaml")


def fastfill(*arguments: str) -> Any:
    result = CliRunner().invoke(main, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@dataclass(frozen=True)
class Finished:
    """A finished run, and how often each image went through each encoder."""

    path: str
    config: Config
    asked: dict[str, Counter[int]]

    @property
    def run(self) -> Run:
        return Run(self.config.run)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    path = write_gallery(tmp_path_factory.mktemp("gallery"))
    config, asked = load_config(path), {"old.pt2": Counter[int](), "new.pt2": Counter[int]()}

    def counting(work: list[Work], settings: StreamSettings) -> Iterator[tuple[int, UnitAck]]:
        for item in work:
            for unit in item.units:
                ids = parquet.read_parquet(unit.rows_uri, ["id"], [unit.row_group])["id"].to_pylist()
                asked[Path(item.encoder.export or "").name].update(ids)
        yield from embed_stream(work, settings)

    with pytest.MonkeyPatch.context() as patch:
        for module in (driver, precompute):
            patch.setattr(module, "embed_stream", counting)
        plan = fastfill("plan", "--config", path, "--measure", "0")
        assert [wave["images"] for wave in plan["waves"]] == [FROM_PAIRS, 32, 64, 96, 128, 160]
        fastfill("backfill", "--config", path)
    return Finished(path, config, asked)


def test_every_image_goes_through_the_new_encoder_once_but_for_those_that_snapshots_are_measured_on(
    finished: Finished,
) -> None:
    probe, pairs = (set(ids_of(finished.run, folder).tolist()) for folder in ("probe-set", GALLERY_PAIRS))
    assert (len(probe), len(pairs), len(probe & pairs)) == (PROBED, FROM_PAIRS, 0)
    assert finished.asked["new.pt2"] == {id: 2 if id in probe else 1 for id in range(IMAGES)}


def test_the_first_snapshot_serves_the_pairs_as_embedded_and_the_last_one_everything(finished: Finished) -> None:
    plan = read_plan(finished.run)
    assert plan is not None
    counts = [commits.read_commit(finished.run, number).counts for number in tags.list_commits(finished.run)]
    assert [item.embedded for item in counts] == [120, 152, 216, 312, 440, 600]
    prod = tags.read_tag(finished.run, tags.PROD)
    assert prod is not None
    assert prod.commit == plan.last_wave == 5


def test_the_last_snapshot_answers_as_one_flat_index_of_a_plain_reembedding(finished: Finished) -> None:
    encoder = load_encoder(finished.config.encoders.new, torch.device("cpu"))
    pixels = [
        decode_image(data, finished.config.encoders.new.preprocess, Limits(10**6, 10**6)) for data in digits(IMAGES)[0]
    ]
    with torch.inference_mode():
        vectors = encoder(torch.from_numpy(np.stack(pixels))).numpy()
    plain = faiss.IndexFlatL2(NEW_DIM)
    plain.add(vectors)
    queries = vectors[::5] + np.float32(0.01)
    distances, ids = plain.search(queries, 11)
    with Searcher(finished.config.run) as searcher:
        found = searcher.search(queries, 10)
    np.testing.assert_allclose(found.distances, distances[:, :10], atol=1e-4, rtol=1e-4)
    apart = np.diff(distances, axis=1) > 1e-4
    apart = apart & np.pad(apart, ((0, 0), (1, 0)), constant_values=True)[:, :10]
    assert apart.mean() > 0.9
    np.testing.assert_array_equal(found.ids[apart], ids[:, :10][apart])


def test_audit_finds_the_run_whole_and_status_names_the_pairs(finished: Finished) -> None:
    assert fastfill("audit", "--config", finished.path)["ok"]
    status = fastfill("status", "--config", finished.path)
    assert (status["published"], status["from_pairs"], status["wave"], status["waves"]) == (600, 120, 5, 5)
    shown = CliRunner().invoke(main, ["status", "--config", finished.path]).output
    assert "120 of 600 images are embedded already: the pairs of the fit" in " ".join(shown.split())
    again = CliRunner().invoke(main, ["backfill", "--config", finished.path])
    assert "Nothing to do" in again.output
