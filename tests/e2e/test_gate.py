"""The gate in whole backfills, by the commands that a user types: what is bad is stopped, and stays unserved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner, Result
from sklearn.datasets import load_digits
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import nn

from jobs.cli import main
from pipeline.arrays import vectors_from_arrow, vectors_to_arrow
from pipeline.config.load import load_config
from pipeline.evaluation import quality
from pipeline.index import commits, tags
from pipeline.planning.plan import read_plan
from pipeline.run import Run
from pipeline.storage import objects, parquet
from tests.support.galleries import PREPROCESS, digits, export_encoder, write_config, write_manifest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def fastfill(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), catch_exceptions=False)


def said(result: Result) -> str:
    """What a command said to people, without the ends of its lines."""
    return " ".join(result.stderr.split())


def status(path: str) -> Any:
    return json.loads(fastfill("status", "--config", path, "--json").stdout)


def index_files(run: Run) -> dict[str, bytes]:
    """Codebook, segments and sidecars by name."""
    uris = [uri for kind in (".faiss", ".parquet") for uri in objects.list_files(run.path("index"), kind)]
    return {uri.removeprefix(run.uri): objects.read_bytes(uri) for uri in uris}


OLD_DIM, NEW_DIM = 6, 9


def write_sound_config(folder: Path, **changes: Any) -> str:
    """A run as one would want it: a new encoder that is trained, an old one that is poor, and pairs to learn from."""
    data = folder / "data"
    if not data.exists():
        data.mkdir(parents=True)
        export_encoder(data / "old.pt2", OLD_DIM, seed=1)
        export(data / "new.pt2", trained())
        write_manifest(data / "gallery.parquet", *digits(300))
        write_manifest(data / "training.parquet", *digits(1200, first=300))
    encoders = {
        "old": {"export": "old.pt2", "dim": OLD_DIM, "preprocess": PREPROCESS},
        "new": {"export": "new.pt2", "dim": NEW_DIM, "preprocess": PREPROCESS},
    }
    fit = {
        "transformation": "fastfill",
        "loss": "alignment+uncertainty",
        "inner_width": 64,
        "epochs": 30,
        "batch_size": 64,
        "lr": 5e-3,
    }
    return write_config(folder, encoders=encoders, fit=fit, **changes)


def trained() -> nn.Module:
    """A linear discriminant of the digits, fitted on the training images."""
    bunch = load_digits()
    pixels = (bunch.images * 15).astype(np.uint8).reshape(len(bunch.images), -1) / 255
    discriminant = LinearDiscriminantAnalysis(n_components=NEW_DIM).fit(pixels[300:1500], bunch.target[300:1500])
    linear = nn.Linear(64, NEW_DIM)
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(discriminant.scalings_[:, :NEW_DIM].T))
        linear.bias.copy_(torch.from_numpy(-discriminant.xbar_ @ discriminant.scalings_[:, :NEW_DIM]))
    return nn.Sequential(nn.Flatten(), linear)


def export(path: Path, encoder: nn.Module) -> None:
    batch = torch.export.Dim("batch", min=1, max=65536)
    program = torch.export.export(encoder.eval(), (torch.zeros(2, 1, 8, 8),), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sound run that nobody has stopped."""
    folder = tmp_path_factory.mktemp("sound")
    result = fastfill("backfill", "--config", write_sound_config(folder))
    assert result.exit_code == 0, result.output
    assert "prod is not moved" not in said(result)
    return folder


def finished_copy(finished: Path, folder: Path) -> str:
    """The run that is finished, to be changed."""
    for name in ("data", "run"):
        shutil.copytree(finished / name, folder / name)
    return write_sound_config(folder)


def fitted_copy(finished: Path, folder: Path, **changes: Any) -> str:
    """A run that is to begin, with the data, the pairs and the transformation of the one that is finished."""
    shutil.copytree(finished / "data", folder / "data")
    for name in ("pairs", "transformation"):
        shutil.copytree(finished / "run" / name, folder / "run" / name)
    return write_sound_config(folder, **changes)


def test_every_commit_of_a_sound_run_is_measured_and_promoted(finished: Path) -> None:
    found = status(str(finished / "run.yaml"))
    assert (found["prod"], found["commit"], found["refused"], found["stopped"]) == (5, 5, [], None)
    assert found["quality"]["recall10"] == 100
    assert found["quality"]["own"] == 100
    assert len(objects.list_files(str(finished / "run" / "reports" / "probe-set"))) == 6
    page = (finished / "run" / "reports" / "report.html").read_text()
    assert "Probe set" in page


def test_a_transformation_of_shuffled_pairs_is_not_served_before_all_is_embedded(
    finished: Path, tmp_path: Path
) -> None:
    path = write_sound_config(tmp_path, pairs__columns={"old_embedding": "old", "new_embedding": "new"})
    parts = objects.list_files(str(finished / "run" / "pairs" / "train"), ".parquet")
    pairs = pa.concat_tables([parquet.read_parquet(part, ["old", "new"]) for part in parts])
    shuffled = np.random.default_rng(0).permutation(len(pairs))
    table = {"old": pairs["old"], "new": pairs["new"].take(pa.array(shuffled))}
    pq.write_table(pa.table(table), tmp_path / "data" / "training.parquet")
    early = fastfill("backfill", "--config", path, "--stop-when", "fraction>=0.05")
    assert early.exit_code == 3, early.output
    assert "commit 1 is not promoted, and the backfill stopped there, as asked (fraction>=0.05" in said(early)
    assert "prod is not moved to commit 0: on held-out pairs" in said(early)
    assert "the snapshot is worse than the old model and gallery: top-1 is" in said(early)
    assert status(path)["prod"] is None
    refused = fastfill("promote", "--config", path)
    assert refused.exit_code == 3
    assert "the snapshot is worse than the old model and gallery" in said(refused)
    last = fastfill("backfill", "--config", path)
    assert last.exit_code == 0, last.output
    assert status(path)["prod"] == 5


class _Brightness(nn.Module):
    """A real encoder that is worse than any: all that it sees of an image is how bright it is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(1, NEW_DIM)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        embeddings: torch.Tensor = self.linear(images.mean(dim=(1, 2, 3), keepdim=True).flatten(1))
        return embeddings


def test_a_new_model_that_is_worse_than_the_old_one_is_stopped_before_an_image_of_the_gallery_is_embedded(
    tmp_path: Path,
) -> None:
    path = write_sound_config(tmp_path)
    export(tmp_path / "data" / "new.pt2", _Brightness())
    for _ in range(2):
        result = fastfill("backfill", "--config", path)
        assert result.exit_code == 3, result.output
        assert "commit 0 is not promoted" in said(result)
        assert "the new model is worse than the old one: top-1 among the probe images is" in said(result)
        found = status(path)
        assert (found["prod"], found["commit"], found["durable"]) == (None, 0, 0)
        assert "new model is worse" in " ".join(found["refused"])


def test_a_wave_with_swapped_ids_is_not_published_and_is_mended_by_embedding_it_again(
    finished: Path, tmp_path: Path
) -> None:
    path = finished_copy(finished, tmp_path)
    run = Run(load_config(path).run)
    plan = read_plan(run)
    assert plan is not None
    objects.delete_files([*map(run.commit, (3, 4, 5)), run.tag("prod"), run.tag("candidate")])
    for unit in range(plan.waves[2].units):
        swap_ids(plan.log(run).part(3, unit))
    for _ in range(2):
        result = fastfill("backfill", "--config", path)
        assert result.exit_code == 3, result.output
        assert "wave 3 is not published" in said(result)
        assert "probe images return their own embedding" in said(result)
        found = status(path)
        assert (found["prod"], found["commit"]) == (2, 2)
        assert found["refused"][0].startswith("wave 3: only ")
    objects.delete(objects.join(plan.log(run).parts_uri, "wave-003"))
    assert fastfill("backfill", "--config", path).exit_code == 0
    assert contents(run) == contents(Run(str(finished / "run")))


def contents(run: Run) -> list[dict[str, object]]:
    """What every commit says, which names its segments by their content."""
    return [commits.read_commit(run, number).content() for number in tags.list_commits(run)]


def test_a_commit_whose_driver_was_killed_before_measuring_it_is_promoted_by_the_backfill_alone(
    finished: Path, tmp_path: Path
) -> None:
    path = finished_copy(finished, tmp_path)
    run = Run(load_config(path).run)
    objects.delete_files([run.tag("prod"), run.path("reports", "probe-set", f"{5:020d}.json")])
    refused = fastfill("promote", "--config", path)
    assert refused.exit_code == 3
    assert "commit 5 is not promoted: - it is not measured on the probe set yet: run `fastfill backfill`" in said(
        refused
    )
    assert status(path)["prod"] is None
    assert fastfill("backfill", "--config", path).exit_code == 0
    assert status(path)["prod"] == 5
    assert quality.read_best(run, 5) is not None
    assert fastfill("promote", "--config", path).exit_code == 0


def swap_ids(part: str) -> None:
    """What a mixed-up worker would write: each vector under the id of another image of the unit."""
    with pq.ParquetFile(part) as file:
        schema, groups = file.schema_arrow, [file.read_row_group(number) for number in range(file.num_row_groups)]
    place = schema.get_field_index("vector")
    mixed = [
        group.set_column(place, "vector", vectors_to_arrow(np.roll(vectors_from_arrow(group["vector"]), 1, axis=0)))
        for group in groups
    ]
    objects.put(part, parquet.parquet_bytes(schema, mixed))


def test_a_backfill_that_was_stopped_goes_on_to_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    path = fitted_copy(finished, tmp_path)
    run, uninterrupted = Run(str(tmp_path / "run")), Run(str(finished / "run"))
    stopped = fastfill("backfill", "--config", path, "--stop-when", "fraction>=0.15", "--stop-when", "hours>=5")
    assert stopped.exit_code == 0, stopped.output
    assert "stopped, as asked: fraction>=0.15: fraction is 0.2" in said(stopped)
    found = status(path)
    assert (found["prod"], found["commit"]) == (2, 2)
    assert found["stopped"].startswith("fraction>=0.15")
    probe = objects.read_bytes(run.path("probe-set", "set.parquet"))
    assert fastfill("backfill", "--config", path).exit_code == 0
    assert status(path)["stopped"] is None
    assert objects.read_bytes(run.path("probe-set", "set.parquet")) == probe
    assert index_files(run) == index_files(uninterrupted)
    assert contents(run) == contents(uninterrupted)


def test_a_gallery_without_labels_is_gated_and_stopped_by_what_it_recalls(finished: Path, tmp_path: Path) -> None:
    path = fitted_copy(finished, tmp_path, gallery__columns={"id": "name", "image": "image"})
    refused = fastfill("backfill", "--config", path, "--stop-when", "top1>=48")
    assert refused.exit_code == 2
    assert "the gallery has no labels" in said(refused)
    assert not (tmp_path / "run" / "run.json").exists()
    result = fastfill("backfill", "--config", path, "--stop-when", "recall10>=0.6*full")
    assert result.exit_code == 0, result.output
    found = status(path)
    assert found["quality"]["recall10"] >= 60
    assert "top1" not in found["quality"]
    assert found["prod"] == found["commit"]
    assert "recall10>=0.6*full" in found["stopped"]


def test_a_gallery_without_labels_is_gated_and_stopped_by_the_labels_of_a_sample(
    finished: Path, tmp_path: Path
) -> None:
    rows = np.random.default_rng(0).permutation(300)[:150]
    path = fitted_copy(
        finished,
        tmp_path,
        gallery__columns={"id": "name", "image": "image"},
        probe={"manifest": "sample.parquet", "columns": {"id": "name", "label": "digit"}},
    )
    gallery = pq.read_table(tmp_path / "data" / "gallery.parquet", columns=["name", "digit"])
    strange = gallery.slice(0, 2).set_column(0, "name", pa.array(["gallery-1", "elsewhere"]))
    pq.write_table(strange, tmp_path / "data" / "sample.parquet")
    refused = fastfill("backfill", "--config", path)
    assert refused.exit_code == 2
    assert "found: 1 of 2 ids are missing there: elsewhere" in said(refused)
    pq.write_table(gallery.take(pa.array(rows)), tmp_path / "data" / "sample.parquet")
    planned = json.loads(fastfill("plan", "--config", path, "--measure", "0", "--json").stdout)
    assert list(planned["expected"]) == ["top1", "top5", "map"]
    assert "150 of the gallery's images (the labelled images of probe.manifest)" in planned["expected_notes"][0]
    result = fastfill("backfill", "--config", path, "--stop-when", "top1>=0.95*full")
    assert result.exit_code == 0, result.output
    found = status(path)
    assert found["quality"]["top1"] > 50
    assert found["prod"] == found["commit"]
    assert "top1>=0.95*full" in found["stopped"]
    pq.write_table(gallery.take(pa.array(rows[1:])), tmp_path / "data" / "sample.parquet")
    other = fastfill("backfill", "--config", path)
    assert other.exit_code == 3
    assert "the probe set of this run was drawn already" in said(other)


def test_an_expression_that_is_not_understood_is_refused_before_work_starts(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    result = fastfill("backfill", "--config", path, "--stop-when", "speed>=3")
    assert result.exit_code == 2
    assert "fraction>=0.3" in said(result)
    assert not (tmp_path / "run").exists()
