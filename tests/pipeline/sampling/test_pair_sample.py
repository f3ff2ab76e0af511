"""The gallery's own pairs: every driver draws the same. Each label has its share, and no image is in the probe set."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pytest

from pipeline.arrays import Int64
from pipeline.config.tree import Config, PairsSettings
from pipeline.errors import DataError
from pipeline.manifest import normalised
from pipeline.run import GALLERY_PAIRS, PROBE_SET, Run
from pipeline.sampling.pair_sample import embedded_ids, read_new
from pipeline.storage import objects, parquet
from tests.support.sample import draw_pairs, put_sample
from tests.support.synthetic_run import Known, Options, known, make_run

PINNED = [55, 130, 139, 145, 183]


def scene(
    folder: Path, images: Known, count: int | Literal["auto"] = 60, probe: int = 50, options: Options | None = None
) -> tuple[Config, Run]:
    """A normalised gallery before anything is drawn from it."""
    config, run = make_run(folder, images, options or Options(new_in_manifest=True, commits=False, embedded_waves=0))
    pairs = config.pairs.model_copy(update={"from_gallery": count})
    sampled = config.probe.model_copy(update={"images": probe})
    return config.model_copy(update={"pairs": pairs, "probe": sampled}), run


def ids(run: Run, folder: str = GALLERY_PAIRS) -> list[int]:
    return sorted(normalised.ids_of(run, folder).tolist())


def pairs_with(pairs: dict[str, object]) -> PairsSettings:
    return PairsSettings.model_validate(pairs)


@pytest.mark.parametrize(
    ("gallery", "images"),
    [(10**9, 20_000), (100_000, 20_000), (20_000, 4000), (600, 120), (320, 64), (200, 64), (100, 50), (64, 32), (1, 0)],
)
def test_size_auto_is_a_fifth_of_a_gallery_and_more_of_a_tiny_one(gallery: int, images: int) -> None:
    assert pairs_with({}).num_from_gallery(gallery) == images
    assert pairs_with({"manifest": "x", "columns": {}}).num_from_gallery(gallery) == 0


def test_size_auto_leaves_the_probe_sample_of_the_user_alone_and_a_count_is_what_it_says() -> None:
    assert pairs_with({}).num_from_gallery(600, num_probe=580) == 20
    assert pairs_with({"manifest": "x", "columns": {}, "from_gallery": 70}).num_from_gallery(600) == 70


def test_draw_takes_the_same_images_however_the_gallery_is_ordered(tmp_path: Path) -> None:
    images = known(300)
    order = np.random.default_rng(0).permutation(300)
    assert images.labels is not None
    other = replace(images, ids=images.ids[order], labels=[images.labels[row] for row in order])
    draw_pairs(*(one := scene(tmp_path / "one", images)))
    draw_pairs(*(two := scene(tmp_path / "two", other)))
    assert len(ids(one[1])) == 60
    assert ids(one[1]) == ids(two[1])
    assert ids(one[1])[:5] == PINNED


def test_draw_gives_each_label_its_share_to_one_image_and_no_image_of_the_probe_set(tmp_path: Path) -> None:
    images = known(600, num_labels=7)
    config, run = scene(tmp_path, images, 150, 100)
    assert draw_pairs(config, run) is not None
    probe = set(ids(run, PROBE_SET))
    assert len(probe) == 100
    assert not probe & set(ids(run))
    assert images.labels is not None
    label = dict(zip(images.ids.tolist(), images.labels, strict=True))
    there = Counter(label[image] for image in label if image not in probe)
    drawn = Counter(label[image] for image in ids(run))
    assert drawn.total() == 150
    assert all(abs(drawn[name] - there[name] * 150 / 500) < 1 for name in there)


@pytest.mark.parametrize("labels", ["none", "some", "one each"])
def test_draw_of_a_gallery_with_few_labels_or_too_many_is_of_the_size_that_is_wanted(
    labels: str, tmp_path: Path
) -> None:
    images = known(300)
    names = [None if labels == "none" or (labels == "some" and row % 3) else f"{row}" for row in range(300)]
    config, run = scene(tmp_path, replace(images, labels=names), 60, 0)  # type: ignore[arg-type] # as `Known` may be
    drawn = draw_pairs(config, run)
    assert drawn is not None
    assert drawn.num_rows == len(set(ids(run))) == 60
    assert set(ids(run)) < set(images.ids.tolist())


def test_draw_on_resume_keeps_the_sample_and_finds_it_in_the_parts_that_were_written_again(tmp_path: Path) -> None:
    config, run = scene(tmp_path, known(300))
    first = draw_pairs(config, run)
    written = objects.stat(run.part(GALLERY_PAIRS, 0))
    assert draw_pairs(config, run) == first
    assert objects.stat(run.part(GALLERY_PAIRS, 0)) == written
    before = ids(run)
    gallery = normalised.read_manifest(run, "gallery")
    assert gallery is not None
    moved = replace(gallery, root="/moved")
    objects.put(run.path("gallery", "manifest.json"), json.dumps(asdict(moved)).encode())
    for part in range(2):
        rows = parquet.read_parquet(run.part("gallery", part))
        place = rows.schema.get_field_index("uri")
        rows = rows.set_column(place, "uri", pa.array(["/moved"] * rows.num_rows))
        objects.put(run.part("gallery", part), parquet.parquet_bytes(rows.schema, [rows]))
    found = draw_pairs(config.model_copy(update={"seed": 9}), run)
    assert found is not None
    assert found.root == "/moved"
    assert ids(run) == before
    assert parquet.read_parquet(run.part(GALLERY_PAIRS, 0))["uri"].unique().to_pylist() == ["/moved"]


def test_a_probe_set_that_is_asked_for_later_has_no_image_of_the_sample(tmp_path: Path) -> None:
    config, run = scene(tmp_path, known(300), 60, 0)
    draw_pairs(config, run)
    assert normalised.read_manifest(run, PROBE_SET) is None
    before = ids(run)
    probe = config.probe.model_copy(update={"images": 100})
    assert draw_pairs(config.model_copy(update={"probe": probe}), run) is not None
    assert ids(run) == before
    assert len(ids(run, PROBE_SET)) == 100
    assert not set(ids(run, PROBE_SET)) & set(before)


def test_a_small_gallery_is_shared_out_between_the_sample_and_the_probe_set(tmp_path: Path) -> None:
    config, run = scene(tmp_path, known(100), 50, 1000)
    draw_pairs(config, run)
    assert (len(ids(run)), len(ids(run, PROBE_SET))) == (50, 50)


def test_pair_sample_has_no_image_of_the_users_probe_sample(tmp_path: Path) -> None:
    images = known(300)
    config, run = scene(tmp_path / "run", images, 60)
    chosen = images.ids[:200]
    config = put_sample(config, tmp_path, id=chosen, label=["a"] * len(chosen))
    draw_pairs(config, run)
    assert len(ids(run)) == 60
    assert not set(ids(run)) & set(chosen.tolist())


def test_without_pairs_of_the_gallery_nothing_is_drawn_or_known(tmp_path: Path) -> None:
    config, run = scene(tmp_path, known(300), 0)
    assert draw_pairs(config, run) is None
    assert normalised.read_manifest(run, GALLERY_PAIRS) is None
    assert len(embedded_ids(run)) == 0


def known_rows(images: Known, wanted: Int64) -> Int64:
    order = np.argsort(images.ids)
    found: Int64 = order[np.searchsorted(images.ids, wanted, sorter=order)]
    return found


def test_new_embeddings_that_came_with_the_gallery_are_those_of_the_images(tmp_path: Path) -> None:
    images = known(300)
    config, run = scene(tmp_path, images)
    draw_pairs(config, run)
    wanted = np.random.default_rng(0).permutation(embedded_ids(run))[:30]
    vectors, etags = read_new(run, wanted)
    np.testing.assert_array_equal(vectors, images.embedded[known_rows(images, wanted)])
    assert etags.null_count == len(etags) == 30


def test_an_image_without_an_embedding_is_named(tmp_path: Path) -> None:
    config, run = scene(tmp_path, known(300))
    draw_pairs(config, run)
    with pytest.raises(
        DataError,
        match=r"the embedding of an image(.|\n)*is missing(.|\n)*1 are missing, such as 12345678",
    ):
        read_new(run, np.array([12345678]))
