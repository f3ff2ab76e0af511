"""The probe set: the same images whoever draws it, however the gallery is cut, and all that is known of them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from jobs.shell.progress_bars import Bars
from jobs.steps.prepare import RunSteps
from pipeline import parallel
from pipeline.arrays import Int64, vectors_from_arrow, vectors_to_arrow
from pipeline.config.tree import Config
from pipeline.errors import ConfigError, DataError, IncompatibleRun
from pipeline.evaluation.probe_set import ProbeSet, embedded, gather
from pipeline.manifest import normalised
from pipeline.planning.plan import read_plan
from pipeline.run import Run
from pipeline.sampling.probe_draw import size
from pipeline.schema import embedded_schema, manifest_schema
from pipeline.storage import objects, parquet
from tests.support.sample import draw_probe, put_sample
from tests.support.synthetic_run import Known, Options, known, make_run


def drawn(folder: Path, images: Known, options: Options | None = None, wanted: int = 1000) -> tuple[Run, ProbeSet]:
    options = options or Options(new_in_manifest=True, commits=False)
    config, run = make_run(folder, images, options)
    config = config.model_copy(update={"probe": config.probe.model_copy(update={"images": wanted})})
    plan = read_plan(run)
    assert plan is not None
    assert draw_probe(config, run) is not None
    found = gather(config.probe, config.encoders, run, plan)
    assert found is not None
    return run, found


@pytest.mark.parametrize(
    ("wanted", "gallery", "images"),
    [(1000, 200_000_000, 1000), (1000, 5000, 500), (1000, 897, 200), (1000, 60, 60), (50, 897, 50), (9, 10**6, 9)],
)
def test_probe_set_size_is_a_tenth_of_a_small_gallery_and_more_of_a_tiny_one(
    wanted: int, gallery: int, images: int
) -> None:
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


def log(run: Run, images: Known, ids: Int64, role: str = "old") -> None:
    """What the embedding stream leaves of these images of the drawn set, in two units."""
    vectors = images.old if role == "old" else images.embedded
    for unit, some in enumerate(np.array_split(ids, 2)):
        rows = [int(np.flatnonzero(images.ids == image)[0]) for image in some]
        columns = {"id": some, "shard": np.zeros(len(some), np.int32), "source_etag": pa.nulls(len(some), pa.string())}
        table = pa.table(columns | {"vector": vectors_to_arrow(vectors[rows])})
        uri = run.path("probe-set", role, "wave-000", f"unit-{unit:05d}.parquet")
        objects.put(uri, parquet.parquet_bytes(embedded_schema(vectors.shape[1]), [table]))


def made_by_encoders(folder: Path, images: Known, **options: bool) -> tuple[Config, Run]:
    """A run whose old embeddings did not come with the gallery."""
    config, run = make_run(folder, images, Options(commits=False, old_in_log=True, **options))
    old = config.encoders.new.model_copy(update={"dim": images.old.shape[1]})
    return config.model_copy(update={"encoders": config.encoders.model_copy(update={"old": old})}), run


def test_old_embeddings_that_were_computed_are_found_in_its_own_log(tmp_path: Path) -> None:
    images = known(600)
    config, run = made_by_encoders(tmp_path, images, new_in_manifest=True)
    assert draw_probe(config, run) is not None
    ids = parquet.read_parquet(run.part("probe-set", 0), ["id"])["id"].to_numpy()
    assert embedded(config.probe, config.encoders, run) is None, "no old embedding is there yet"
    log(run, images, ids[5:])  # the old encoder could not read the others
    plan = read_plan(run)
    assert plan is not None
    probe = gather(config.probe, config.encoders, run, plan)
    assert probe is not None
    np.testing.assert_array_equal(probe.ids, ids[5:])
    rows = [int(np.flatnonzero(images.ids == image)[0]) for image in probe.ids]
    np.testing.assert_array_equal(probe.old, images.old[rows])


def test_probe_set_finds_its_new_embeddings_without_a_plan(tmp_path: Path) -> None:
    images = known(600)
    config, run = made_by_encoders(tmp_path, images)
    assert embedded(config.probe, config.encoders, run) is None, "nothing is drawn"
    assert draw_probe(config, run) is not None
    objects.delete(run.plan)
    ids = parquet.read_parquet(run.part("probe-set", 0), ["id"])["id"].to_numpy()
    log(run, images, ids[3:])
    log(run, images, ids[:-4], "new")
    found = embedded(config.probe, config.encoders, run)
    assert found is not None
    assert found.schema.names == ["id", "label", "group", "old", "new"]
    np.testing.assert_array_equal(found["id"].to_numpy(), ids[3:-4])
    rows = [int(np.flatnonzero(images.ids == image)[0]) for image in ids[3:-4]]
    np.testing.assert_array_equal(vectors_from_arrow(found["old"]), images.old[rows])
    np.testing.assert_array_equal(vectors_from_arrow(found["new"]), images.embedded[rows])
    assert images.labels is not None
    assert found["label"].to_pylist() == [images.labels[row] for row in rows]
    off = config.model_copy(update={"probe": config.probe.model_copy(update={"images": 0})})
    assert embedded(off.probe, off.encoders, run) is None


def test_side_information_of_the_gallery_comes_with_it(tmp_path: Path) -> None:
    config, run = make_run(tmp_path, known(60), Options(new_in_manifest=True, commits=False))
    gallery = normalised.read_manifest(run, "gallery")
    assert gallery is not None
    gallery = replace(gallery, dims=gallery.dims | {"side": 2})
    objects.put(run.path("gallery", "manifest.json"), manifest_json(gallery))
    for part in range(2):
        rows = parquet.read_parquet(run.part("gallery", part))
        side = np.stack([rows["id"].to_numpy(), -rows["id"].to_numpy()], axis=1).astype(np.float32)
        rows = rows.append_column("side", vectors_to_arrow(side))
        objects.put(run.part("gallery", part), parquet.parquet_bytes(manifest_schema(gallery.dims), [rows]))
    assert draw_probe(config, run) is not None
    found = embedded(config.probe, config.encoders, run)
    assert found is not None
    np.testing.assert_array_equal(vectors_from_arrow(found["side"])[:, 0], found["id"].to_numpy())


def test_probe_set_of_a_planned_run_embeds_no_known_image_again(tmp_path: Path) -> None:
    images = known(600)
    config, run = made_by_encoders(tmp_path, images, new_in_manifest=True)
    bars, unable = Bars(Console(quiet=True)), config.encoders.model_copy(update={"old": None})
    without = config.model_copy(update={"encoders": unable})
    with pytest.raises(ConfigError, match="the probe-set has no old embeddings"):
        RunSteps(without, run, bars).embed()
    log(run, images, parquet.read_parquet(run.part("probe-set", 0), ["id"])["id"].to_numpy())
    plan = read_plan(run)
    assert plan is not None
    assert gather(config.probe, config.encoders, run, plan) is not None
    objects.delete(run.path("probe-set", "old"))  # as it was before the set had old embeddings of its own
    RunSteps(without, run, bars).embed()


def test_probe_set_once_drawn_ignores_later_settings(tmp_path: Path) -> None:
    run, before = drawn(tmp_path, known(600), wanted=50)
    config, _ = make_run(tmp_path, known(600), Options(new_in_manifest=True, commits=False))
    files = {uri: objects.read_bytes(uri) for uri in objects.list_files(run.path("probe-set"))}
    assert draw_probe(config, run) is not None
    assert {uri: objects.read_bytes(uri) for uri in objects.list_files(run.path("probe-set"))} == files
    assert len(before.ids) == 50


def test_images_that_were_moved_are_found_where_they_are_now(tmp_path: Path) -> None:
    run, before = drawn(tmp_path, known(600), wanted=50)
    config, _ = make_run(tmp_path, known(600), Options(new_in_manifest=True, commits=False))
    gallery = normalised.read_manifest(run, "gallery")
    assert gallery is not None
    moved = replace(gallery, root="/elsewhere")
    objects.put(run.path("gallery", "manifest.json"), manifest_json(moved))
    again = draw_probe(config, run)
    assert again is not None
    assert (again.root, again.num_rows) == ("/elsewhere", 50)
    ids = parquet.read_parquet(run.part("probe-set", 0), ["id"])["id"].to_numpy()
    np.testing.assert_array_equal(ids, before.ids)


def manifest_json(value: normalised.Manifest) -> bytes:
    return json.dumps(asdict(value)).encode()


def test_a_large_gallery_is_looked_through_by_tasks_to_the_same_end(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, here = drawn(tmp_path / "here", known(600))
    monkeypatch.setattr(parallel, "SMALL_IMAGES", 0)
    _, there = drawn(tmp_path / "there", known(600))
    np.testing.assert_array_equal(here.ids, there.ids)
    np.testing.assert_array_equal(here.transformed, there.transformed)


OPTIONS = Options(new_in_manifest=True, commits=False)


def drawn_rows(run: Run) -> pa.Table:
    return parquet.read_parquet(run.part("probe-set", 0))


@pytest.mark.parametrize("strings", [False, True])
def test_a_sample_s_images_are_the_set_with_the_sample_s_labels(tmp_path: Path, strings: bool) -> None:
    images = known(600)
    config, run = make_run(tmp_path, images, replace(OPTIONS, keys=strings))
    rows = np.random.default_rng(1).permutation(600)[:250]
    labels = [f"own {row % 4}" if row % 5 else None for row in rows]
    ids = [f"image {image}" for image in images.ids[rows]] if strings else images.ids[rows]
    config = put_sample(config, tmp_path, id=ids, label=labels, images=30)  # fewer than are named
    found = draw_probe(config, run)
    assert found is not None
    assert found.num_rows == 250
    plan = read_plan(run)
    assert plan is not None
    probe = gather(config.probe, config.encoders, run, plan)
    assert probe is not None
    order = np.argsort(images.ids[rows])
    np.testing.assert_array_equal(probe.ids, images.ids[rows][order])
    np.testing.assert_array_equal(probe.old, images.old[rows][order])
    np.testing.assert_array_equal(probe.new, images.embedded[rows][order])
    names = [None if label < 0 else probe.label_names[label] for label in probe.labels]
    assert names == [labels[row] for row in order]
    assert images.groups is not None
    assert [probe.group_names[group] for group in probe.groups] == [images.groups[rows[row]] for row in order]


def test_a_sample_s_groups_go_before_the_gallery_s_where_their_column_is_named(tmp_path: Path) -> None:
    images = known(60)
    config, run = make_run(tmp_path, images, OPTIONS)
    groups = [None if image % 2 else "even" for image in images.ids]
    config = put_sample(config, tmp_path, id=images.ids, label=[1] * 60, country=groups, columns={"group": "country"})
    assert draw_probe(config, run) is not None
    rows = drawn_rows(run)
    assert rows["group"].to_pylist() == [None if image % 2 else "even" for image in rows["id"].to_pylist()]
    assert set(rows["label"].to_pylist()) == {"1"}


def test_probe_set_with_0_images_ignores_the_sample(tmp_path: Path) -> None:
    config, run = make_run(tmp_path, known(60), OPTIONS)
    config = put_sample(config, tmp_path, id=[-1], label=[None], images=0)
    assert draw_probe(config, run) is None
    assert normalised.read_manifest(run, "probe-set") is None


@pytest.mark.parametrize("strings", [False, True])
def test_images_that_the_gallery_does_not_have_are_named_and_nothing_is_drawn(tmp_path: Path, strings: bool) -> None:
    images = known(60)
    config, run = make_run(tmp_path, images, replace(OPTIONS, keys=strings))
    ids = [*images.ids[:6].tolist(), *range(10_000, 10_004)]
    named = [f"image {image}" for image in ids] if strings else ids
    config = put_sample(config, tmp_path, id=named, label=["a"] * 10)
    shown = "image 10000, image 10001, image 10002" if strings else "10000, 10001, 10002"
    with pytest.raises(DataError, match=f"not in the gallery\n(.*\n)*  found: 4 of 10 ids are .*: {shown}, ...\n"):
        draw_probe(config, run)
    assert objects.list_files(run.path("probe-set")) == []
    draw_probe(put_sample(config, tmp_path, id=named[:6], label=["a"] * 6), run)
    assert drawn_rows(run).num_rows == 6


@pytest.mark.parametrize(("strings", "found"), [(False, "strings"), (True, "integers")])
def test_ids_of_another_kind_than_the_gallery_s_are_refused(tmp_path: Path, strings: bool, found: str) -> None:
    images = known(60)
    config, run = make_run(tmp_path, images, replace(OPTIONS, keys=strings))
    ids = images.ids[:9] if strings else [f"image {image}" for image in images.ids[:9]]
    with pytest.raises(DataError, match=f"another type than the gallery's\n(.*\n)*  found: {found}"):
        draw_probe(put_sample(config, tmp_path, id=ids, label=["a"] * 9), run)


def test_a_gallery_without_ids_has_no_sample(tmp_path: Path) -> None:
    config, run = make_run(tmp_path, known(60), OPTIONS)
    config = put_sample(config, tmp_path, id=[1, 2], label=["a", "a"])
    columns = config.gallery.columns.model_copy(update={"id": None})
    config = config.model_copy(update={"gallery": config.gallery.model_copy(update={"columns": columns})})
    with pytest.raises(DataError, match=r"a probe sample needs a gallery with ids(.|\n)*gallery.columns.id"):
        draw_probe(config, run)


def sampled(config: Config, folder: Path, images: Known, rows: Int64, **changes: str) -> Config:
    labels = [changes.get(str(image), "a") for image in images.ids[rows]]
    return put_sample(config, folder, id=images.ids[rows], label=labels)


def test_a_run_goes_on_with_the_sample_s_content_wherever_it_lies(tmp_path: Path) -> None:
    images, rows = known(60), np.arange(20)
    config, run = make_run(tmp_path / "run", images, OPTIONS)
    first = draw_probe(sampled(config, tmp_path / "here", images, rows), run)
    files = {uri: objects.read_bytes(uri) for uri in objects.list_files(run.path("probe-set"))}
    assert first is not None
    assert first.sample
    assert draw_probe(sampled(config, tmp_path / "there", images, rows[::-1]), run) == first
    assert {uri: objects.read_bytes(uri) for uri in objects.list_files(run.path("probe-set"))} == files
    gallery = normalised.read_manifest(run, "gallery")
    assert gallery is not None
    objects.put(run.path("gallery", "manifest.json"), manifest_json(replace(gallery, root="/elsewhere")))
    again = draw_probe(sampled(config, tmp_path / "here", images, rows), run)
    assert again == replace(first, root="/elsewhere")
    assert drawn_rows(run)["label"].to_pylist() == ["a"] * 20


def test_a_run_does_not_go_on_with_another_sample(tmp_path: Path) -> None:
    images, rows = known(60), np.arange(20)
    config, run = make_run(tmp_path, images, OPTIONS)
    draw_probe(sampled(config, tmp_path, images, rows), run)
    others = {
        "another sample": [
            sampled(config, tmp_path / "label", images, rows, **{str(images.ids[3]): "b"}),
            sampled(config, tmp_path / "more", images, np.arange(21)),
        ],
        "no sample": [config],
    }
    for found, configs in others.items():
        for other in configs:
            with pytest.raises(IncompatibleRun, match=rf"drawn already(.|\n)*found: {found}(.|\n)*--new-run"):
                draw_probe(other, run)


def test_a_sample_is_not_added_to_a_run_that_has_drawn_its_set(tmp_path: Path) -> None:
    images = known(60)
    config, run = make_run(tmp_path, images, OPTIONS)
    before = draw_probe(config, run)
    assert before is not None
    old = {name: value for name, value in asdict(before).items() if name != "sample"}  # before there were samples
    objects.put(run.path("probe-set", "manifest.json"), json.dumps(old).encode())
    assert draw_probe(config, run) == before
    with pytest.raises(IncompatibleRun, match=r"at random\n  found: a sample, of digest(.|\n)*--new-run"):
        draw_probe(sampled(config, tmp_path, images, np.arange(20)), run)
    off = config.model_copy(update={"probe": config.probe.model_copy(update={"images": 0})})
    assert draw_probe(off, run) is None
