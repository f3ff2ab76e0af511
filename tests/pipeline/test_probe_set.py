"""The probe set: the same images whoever draws it, however the gallery is cut, and all that is known of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline import fan_out, manifest, storage
from pipeline.plan import read_plan
from pipeline.probe_set import ProbeSet, draw, gather, size
from pipeline.run import Run
from tests.pipeline.synthetic_run import Known, Options, known, make_run


def drawn(folder: Path, images: Known, options: Options | None = None, wanted: int = 1000) -> tuple[Run, ProbeSet]:
    options = options or Options(new_in_manifest=True, commits=False)
    config, run = make_run(folder, images, options)
    config = config.model_copy(update={"probe": config.probe.model_copy(update={"images": wanted})})
    plan = read_plan(run)
    assert plan is not None
    assert draw(config, run) is not None
    found = gather(config, run, plan)
    assert found is not None
    return run, found


@pytest.mark.parametrize(
    ("wanted", "gallery", "images"),
    [(1000, 200_000_000, 1000), (1000, 5000, 500), (1000, 897, 200), (1000, 60, 60), (50, 897, 50), (9, 10**6, 9)],
)
def test_it_has_a_tenth_of_a_small_gallery_and_more_of_a_tiny_one(wanted: int, gallery: int, images: int) -> None:
    assert size(wanted, gallery) == images


def test_row_i_of_every_array_is_the_same_image(tmp_path: Path) -> None:
    images = known(600)
    _, probe = drawn(tmp_path, images)
    assert len(probe.ids) == 200
    assert (np.diff(probe.ids) > 0).all()
    rows = [int(np.flatnonzero(images.ids == image)[0]) for image in probe.ids]
    np.testing.assert_array_equal(probe.old, images.old[rows])
    np.testing.assert_array_equal(probe.new, images.embedded[rows])
    np.testing.assert_array_equal(probe.transformed, images.transformed[rows])
    np.testing.assert_array_equal(probe.uncertainty, images.uncertainty[rows])
    assert images.labels is not None
    assert images.groups is not None
    assert [probe.label_names[label] for label in probe.labels] == [images.labels[row] for row in rows]
    assert [probe.group_names[group] for group in probe.groups] == [images.groups[row] for row in rows]


def test_the_order_of_the_gallery_does_not_matter(tmp_path: Path) -> None:
    images = known(600)
    order = np.random.default_rng(0).permutation(600)
    assert images.labels is not None
    assert images.groups is not None
    other = Known(
        ids=images.ids[order],
        labels=[images.labels[row] for row in order],
        groups=[images.groups[row] for row in order],
        old=images.old[order],
        transformed=images.transformed[order],
        embedded=images.embedded[order],
        uncertainty=images.uncertainty[order],
    )
    _, one = drawn(tmp_path / "one", images)
    _, two = drawn(tmp_path / "two", other)
    np.testing.assert_array_equal(one.ids, two.ids)
    np.testing.assert_array_equal(one.new, two.new)


def test_a_smaller_one_is_a_part_of_a_larger_one(tmp_path: Path) -> None:
    _, small = drawn(tmp_path / "small", known(600), wanted=20)
    _, large = drawn(tmp_path / "large", known(600), wanted=100)
    assert set(small.ids.tolist()) < set(large.ids.tolist())


def test_old_embeddings_that_were_computed_are_found_in_their_log(tmp_path: Path) -> None:
    images = known(600)
    options = Options(new_in_manifest=True, commits=False, old_in_log=True, unit_images=1000)
    _, probe = drawn(tmp_path, images, options)
    rows = [int(np.flatnonzero(images.ids == image)[0]) for image in probe.ids]
    np.testing.assert_array_equal(probe.old, images.old[rows])


def test_it_stays_as_it_was_drawn_whatever_is_asked_for_later(tmp_path: Path) -> None:
    run, before = drawn(tmp_path, known(600), wanted=50)
    config, _ = make_run(tmp_path, known(600), Options(new_in_manifest=True, commits=False))
    files = {uri: storage.read_bytes(uri) for uri in storage.list_files(run.path("probe-set"))}
    assert draw(config, run) is not None
    assert {uri: storage.read_bytes(uri) for uri in storage.list_files(run.path("probe-set"))} == files
    assert len(before.ids) == 50


def test_images_that_were_moved_are_found_where_they_are_now(tmp_path: Path) -> None:
    run, before = drawn(tmp_path, known(600), wanted=50)
    config, _ = make_run(tmp_path, known(600), Options(new_in_manifest=True, commits=False))
    gallery = manifest.read_manifest(run, "gallery")
    assert gallery is not None
    moved = replace(gallery, root="/elsewhere")
    storage.put(run.path("gallery", "manifest.json"), manifest_json(moved))
    again = draw(config, run)
    assert again is not None
    assert (again.root, again.num_rows) == ("/elsewhere", 50)
    ids = storage.read_parquet(run.part("probe-set", 0), ["id"])["id"].to_numpy()
    np.testing.assert_array_equal(ids, before.ids)


def manifest_json(value: manifest.Manifest) -> bytes:
    import json
    from dataclasses import asdict

    return json.dumps(asdict(value)).encode()


def test_a_large_gallery_is_looked_through_by_tasks_to_the_same_end(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, here = drawn(tmp_path / "here", known(600))
    monkeypatch.setattr(fan_out, "SMALL_IMAGES", 0)
    _, there = drawn(tmp_path / "there", known(600))
    np.testing.assert_array_equal(here.ids, there.ids)
    np.testing.assert_array_equal(here.transformed, there.transformed)
