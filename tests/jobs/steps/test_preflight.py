"""Settings and manifests that contradict each other are refused before any work."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.steps.preflight import check_settings, check_widths
from pipeline.config.load import load_config
from pipeline.errors import ConfigError, DataError, FastfillError
from tests.support.galleries import NEW_DIM, OLD_DIM, write_config

Check = Callable[..., None]


def vectors(count: int, width: int) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ones(count * width, np.float32)), width)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_config(folder)
    for name in ("gallery", "training"):
        table = pq.read_table(folder / "data" / f"{name}.parquet")
        for role, width in (("old", OLD_DIM), ("new", NEW_DIM), ("wide", OLD_DIM + 1), ("side", 3)):
            table = table.append_column(role, vectors(len(table), width))
        pq.write_table(table, folder / "data" / f"{name}.parquet", row_group_size=100)
    return folder


@pytest.fixture
def check(data: Path, tmp_path: Path) -> Check:
    def run(**changes: Any) -> None:
        shutil.copytree(data / "data", tmp_path / "data", dirs_exist_ok=True)
        config = load_config(write_config(tmp_path, **changes))
        check_settings(config, {"new_embedding": NEW_DIM} | ({"old_embedding": OLD_DIM} if config.encoders.old else {}))

    return run


def test_a_sound_config_passes_with_images_and_with_embeddings(check: Check) -> None:
    columns = {"id": "name", "old_embedding": "old", "side": "side"}
    check(
        encoders__old=None,
        gallery__columns=columns | {"image": "image"},
        pairs__columns=columns | {"new_embedding": "new"},
    )


@pytest.mark.parametrize(
    "changes",
    [{"plan__policy": "selected", "fit": {}}, {"plan__policy": "entropy", "fit__offset": "confidence"}],
)
def test_preflight_of_a_policy_whose_inputs_the_fit_will_make_passes(check: Check, changes: dict[str, Any]) -> None:
    check(**changes)


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        (
            {"encoders__old": None, "gallery__columns__old_embedding": "old", "pairs__columns__old_embedding": "wide"},
            DataError,
            r"old_embedding has another width in the gallery than in the pairs(.|\n)*"
            r"found: 12 in the gallery \(column old\), 13 in the pairs \(column wide\)",
        ),
        ({"gallery__columns__old_embedding": "wide"}, DataError, "expected: 12, the encoder's dim\n  found: 13"),
        ({"pairs__columns__new_embedding": "wide"}, DataError, "expected: 20, the encoder's dim\n  found: 13"),
        ({"pairs__columns__side": "side"}, ConfigError, "for the pairs and not for the gallery(.|\n)*gallery.columns"),
        ({"gallery__columns__side": "side"}, ConfigError, "for the gallery and not for the pairs(.|\n)*pairs.columns"),
        (
            {"gallery__columns__side": "side", "pairs__columns__side": "wide"},
            DataError,
            "side has another width in the gallery than in the pairs(.|\n)*found: 3 in the gallery",
        ),
        ({"fit__num_workers": 17}, ConfigError, "larger than the number of parts"),
        ({"index__factory": "IVF256,Flat"}, ConfigError, "expected: at least 256\n  found: 180"),
        ({"index__factory": "IVF8,Flat", "index__train_vectors": 7}, ConfigError, "expected: at least 8\n  found: 7"),
        ({"plan__waves": 200}, ConfigError, "a wave has no image"),
        (
            {"plan__policy": "entropy", "fit__transformation": "linear"},
            ConfigError,
            "expected: fit.classifier, or(.|\n)*found: plan.policy entropy",
        ),
        ({"plan__policy": "neighbour_purity", "pairs__columns__label": None}, ConfigError, "pairs.columns.label"),
        ({"plan__traffic": True}, ConfigError, "expected: gallery.columns.traffic"),
        ({"plan__group_boost": 1.0}, ConfigError, "expected: pairs.columns.group and .label"),
        (
            {"plan__policy": "selected", "fit__transformation": "linear"},
            ConfigError,
            "this run makes no selection(.|\n)*where: plan.policy: selected",
        ),
        (
            {"fit": {}, "select": {"measured_on": "probe"}, "probe__images": 0},
            ConfigError,
            "at least 300 images(.|\n)*found: 0",
        ),
        (
            {"fit": {}, "select": {"measured_on": "probe"}},
            ConfigError,
            "too small for select.measured_on=probe(.|\n)*found: 200",
        ),
        ({"plan__policy": "no_such_module:order"}, ConfigError, "the policy's function cannot be found"),
    ],
)
def test_preflight_of_settings_that_contradict_the_data_is_refused_with_both_values(
    check: Check, changes: dict[str, Any], kind: type[FastfillError], said: str
) -> None:
    with pytest.raises(kind, match=said):
        check(**changes)


@pytest.mark.parametrize(
    ("sample", "changes", "said"),
    [
        (None, {}, "there is no manifest file(.|\n)*sample.parquet"),
        ({"id": ["gallery-1", "gallery-2"]}, {}, "no column for label\n  expected: 'label'"),
        ({"id": ["gallery-1"] * 2, "label": [1, 2]}, {}, "a repeated id(.|\n)*found: gallery-1\n"),
        ({"id": [1, 2], "label": [1, 2]}, {}, "expected: strings, as in the gallery's column name\n  found: integers"),
        (
            {"id": ["gallery-1", "gallery-2"], "label": [1, 2]},
            {"gallery__columns__id": None},
            "a probe sample needs a gallery with ids",
        ),
    ],
)
def test_a_probe_sample_is_read_before_any_work(
    check: Check, tmp_path: Path, sample: dict[str, Any] | None, changes: dict[str, Any], said: str
) -> None:
    path = tmp_path / "sample.parquet"
    if sample is not None:
        pq.write_table(pa.table(sample), path)
    with pytest.raises(DataError, match=said):
        check(probe__manifest=str(path), **changes)


def test_preflight_reads_a_probe_sample_only_if_probe_images_are_wanted(check: Check, tmp_path: Path) -> None:
    path = tmp_path / "sample.parquet"
    pq.write_table(pa.table({"id": ["gallery-1", "no such image"], "label": [1, 2]}), path)
    check(probe__manifest=str(path))
    shutil.rmtree(tmp_path / "data")
    check(probe__manifest="nowhere.parquet", probe__images=0)


def test_too_few_pairs_are_refused(check: Check, data: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.parquet"
    pq.write_table(pq.read_table(data / "data" / "training.parquet").slice(0, 31), few)
    with pytest.raises(DataError, match=r"too few training pairs\n  expected: at least 32\n  found: 31"):
        check(pairs__manifest=str(few))


def test_check_widths_compares_the_columns_whose_width_is_known_in_both_manifests(tmp_path: Path) -> None:
    given = load_config(write_config(tmp_path)).sources
    check_widths(given, {"gallery": {"old_embedding": 4}, "pairs": {}})
    check_widths(given, {"gallery": {"old_embedding": 4, "side": 3}})
    check_widths(given, {"gallery": {}, "pairs": {"old_embedding": 4, "side": 3}})
    check_widths(given, {"gallery": {"old_embedding": 4, "side": 3}, "pairs": {"old_embedding": 4, "side": 3}})
    with pytest.raises(DataError, match="side has another width"):
        check_widths(given, {"gallery": {"old_embedding": 4, "side": 3}, "pairs": {"old_embedding": 4, "side": 5}})


NO_LABELS = {"id": "name", "image": "image"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gallery__columns": NO_LABELS},
        {"gallery__columns__label": "digit", "plan__policy": "class_mean"},
        {"pairs": {"from_gallery": 150}},
        {"gallery__columns__side": "side", "gallery__columns__new_embedding": "new"},
    ],
)
def test_a_gallery_without_a_manifest_of_pairs_passes(check: Check, changes: dict[str, Any]) -> None:
    check(**{"pairs": {}, "fit__batch_size": 16, "plan__waves": "auto"} | changes)


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"pairs": {"from_gallery": 31}}, DataError, "at least 32\n  found: 31(.|\n)*31 of the gallery's 300 images"),
        (
            {"pairs": {"from_gallery": 151}},
            ConfigError,
            "at most 150: no more than half the gallery(.|\n)*pairs.from_gallery",
        ),
        (
            {"fit": {"transformation": "fastfill", "loss": "fastfill"}, "gallery__columns": NO_LABELS},
            ConfigError,
            "where: gallery.columns.label",
        ),
        ({"plan__policy": "class_mean", "gallery__columns": NO_LABELS}, ConfigError, "expected: gallery.columns.label"),
        (
            {"gallery__columns__old_embedding": None, "encoders__old": None},
            ConfigError,
            "the gallery has no old embeddings",
        ),
    ],
)
def test_preflight_of_pairs_from_the_gallery_with_contradicting_settings_is_refused(
    check: Check, changes: dict[str, Any], kind: type[FastfillError], said: str
) -> None:
    with pytest.raises(kind, match=said):
        check(**{"pairs": {}, "fit__batch_size": 16} | changes)


def test_a_gallery_that_is_too_small_to_take_pairs_from_is_refused(check: Check, data: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.parquet"
    pq.write_table(pq.read_table(data / "data" / "gallery.parquet").slice(0, 63), few)
    said = r"too few training pairs\n  expected: at least 32\n  found: 31\n  where: 31 of the gallery's 63 images"
    with pytest.raises(DataError, match=said):
        check(pairs={}, gallery__manifest=str(few), plan__waves="auto")


def test_few_pairs_of_a_manifest_are_enough_with_some_of_the_gallery(check: Check, data: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.parquet"
    pq.write_table(pq.read_table(data / "data" / "training.parquet").slice(0, 20), few)
    check(pairs__manifest=str(few), pairs__from_gallery=20, fit__batch_size=16)


def test_the_users_probe_sample_leaves_enough_images_for_pairs(check: Check, tmp_path: Path) -> None:
    path = tmp_path / "sample.parquet"
    pq.write_table(pa.table({"id": [f"gallery-{row}" for row in range(280)], "label": [1] * 280}), path)
    with pytest.raises(DataError, match=r"at least 32\n  found: 20"):
        check(pairs={}, probe__manifest=str(path), fit__batch_size=16)
    with pytest.raises(ConfigError, match=r"at most 20: (.|\n)*the images in probe.manifest\n  found: 40"):
        check(pairs={"from_gallery": 40}, probe__manifest=str(path), fit__batch_size=16)
