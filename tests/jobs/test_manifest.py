"""The command `fastfill manifest`, and a run on its manifest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from jobs.cli import main
from pipeline.config import tree as config
from pipeline.storage import objects
from tests.support.galleries import digits, write_config
from tests.support.tars import pack


def run(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, list(words))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def put_shards(folder: str, count: int) -> str:
    """The digits as WebDataset shards of 100; gives their glob."""
    images, labels = digits(count)
    for start in range(0, count, 100):
        members = []
        for row in range(start, min(start + 100, count)):
            members += [(f"{row:05d}.cls", str(labels[row]).encode()), (f"{row:05d}.png", images[row])]
        objects.put(f"{folder}/shard-{start:05d}.tar", pack(members))
    return f"{folder}/shard-*.tar"


def test_manifest_print_config_prints_the_gallery_section(tmp_path: Path) -> None:
    shards = put_shards(f"{tmp_path}/tars", 120)
    code, out, err = run("manifest", shards, "--to", f"{tmp_path}/out", "--print-config")
    assert code == 0
    tree = yaml.safe_load(out)
    gallery = config.GallerySettings.model_validate(tree["gallery"])
    assert gallery.manifest == f"{tmp_path}/out"
    assert gallery.columns.label == "label"
    assert "120 images" in err


def test_manifest_json_has_the_documented_keys(tmp_path: Path) -> None:
    words = ("manifest", put_shards(f"{tmp_path}/tars", 120), "--to", f"{tmp_path}/out", "--json", "--no-ray")
    document = json.loads(run(*words)[1])
    assert set(document) == {
        *("manifest", "images", "bytes", "unknown_sizes", "sources", "parts", "notes", "identical", "gallery"),
        *("digest", "pieces"),
    }
    assert document["images"] == 120
    assert document["pieces"] == {"made": 2, "kept": 0}
    assert json.loads(run(*words)[1]) == document | {"pieces": {"made": 0, "kept": 2}}


def test_manifest_refusals_have_their_exit_codes(tmp_path: Path) -> None:
    shards = put_shards(f"{tmp_path}/tars", 120)
    assert run("manifest", f"{tmp_path}/nowhere", "--to", f"{tmp_path}/a")[0] == 2
    assert run("manifest", shards, "--to", f"{tmp_path}/b", "--json", "--print-config")[0] == 2
    assert run("manifest", shards, "--to", f"{tmp_path}/out")[0] == 0
    code, _, err = run("manifest", f"{tmp_path}/tars/shard-00000.tar", "--to", f"{tmp_path}/out")
    assert (code, "other sources" in err) == (3, True)
    assert run("manifest", f"{tmp_path}/tars/shard-00000.tar", "--to", f"{tmp_path}/out", "--replace")[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["local", "s3"])
def test_backfill_on_a_made_manifest_embeds_all_images_and_search_returns_its_keys(
    tmp_path: Path, ray_cluster: None, request: pytest.FixtureRequest, kind: str
) -> None:
    place = str(tmp_path) if kind == "local" else str(request.getfixturevalue("bucket"))
    images, labels = digits(60, first=240)
    for row, (data, label) in enumerate(zip(images, labels, strict=True), start=240):
        objects.put(f"{place}/loose/{label}/{row:05d}.png", data)
    code, out, _ = run(
        "manifest", f"{place}/loose", put_shards(f"{place}/tars", 240), "--to", f"{place}/m", "--print-config"
    )
    assert code == 0
    path = write_config(tmp_path / "run", gallery=yaml.safe_load(out)["gallery"])
    code, _, err = run("backfill", "--config", path)
    assert code == 0, err
    status = json.loads(run("status", "--config", path, "--json")[1])
    assert (status["gallery"], status["embedded"], status["rejected"]) == (300, 300, 0)
    query = tmp_path / "query.png"
    query.write_bytes(digits(1, first=17)[0][0])
    found = json.loads(run("search", "--config", path, str(query), "-k", "1", "--json")[1])
    assert found["ids"] == [["shard-00000/00017.png"]]
    assert found["distances"][0][0] < 1e-4
    query.write_bytes(images[5])
    found = json.loads(run("search", "--config", path, str(query), "-k", "1", "--json")[1])
    assert found["ids"] == [[f"{labels[5]}/00245.png"]]
