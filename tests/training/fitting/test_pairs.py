"""Training pairs: a held-out pair never trains, the split is stratified, and labels become class numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import save_file

from pipeline.arrays import Int64, vectors_from_arrow
from pipeline.config.load import validate
from pipeline.config.method import ClassifierSettings
from pipeline.config.tree import PairsSettings
from pipeline.errors import DataError
from pipeline.manifest import normalised
from pipeline.run import GALLERY_PAIRS, Run
from pipeline.storage import documents, objects, parquet
from tests.support.synthetic_run import Options, known, make_run
from training.fitting.pairs import _classifier, _codes, build_pairs, fit_data, num_training, split

fractions = st.floats(0.02, 0.5)
PINNED = [18, 26, 33, 34]


@st.composite
def labelled(draw: st.DrawFn) -> tuple[Int64, NDArray[np.int32]]:
    """Unique ids and labels from -1 (none) on, from few to as many as there are pairs."""
    num = draw(st.integers(32, 400))
    ids = np.random.default_rng(draw(st.integers(0, 100))).choice(10**12, num, replace=False)
    labels = draw(st.lists(st.integers(-1, draw(st.sampled_from([0, 3, 400]))), min_size=num, max_size=num))
    return ids, np.array(labels, np.int32)


@settings(max_examples=100, deadline=None)
@given(labelled(), fractions, st.integers(0, 2**32 - 1))
def test_the_fraction_holds_over_all_pairs_and_within_each_label_to_one_pair(
    pairs: tuple[Int64, NDArray[np.int32]], fraction: float, seed: int
) -> None:
    ids, labels = pairs
    held_out = split(ids, labels, fraction, seed)
    fraction = max(fraction, 2 / len(ids))  # two at least
    assert abs(held_out.sum() - fraction * len(ids)) <= 1
    for label in np.unique(labels):
        mine = labels == label
        assert abs(held_out[mine].sum() - fraction * mine.sum()) < 1 + 1e-9


@settings(max_examples=50, deadline=None)
@given(labelled(), fractions, st.integers(0, 1000))
def test_the_split_does_not_depend_on_the_order_of_the_pairs(
    pairs: tuple[Int64, NDArray[np.int32]], fraction: float, seed: int
) -> None:
    ids, labels = pairs
    mixed = np.random.default_rng(seed).permutation(len(ids))
    assert np.array_equal(split(ids, labels, fraction, seed)[mixed], split(ids[mixed], labels[mixed], fraction, seed))


def test_many_labels_of_few_pairs_are_held_out_too() -> None:
    labels = np.repeat(np.arange(250), 4).astype(np.int32)  # 10% of 4 would round to none of each
    held_out = split(np.arange(1000), labels, 0.1, 0)
    assert held_out.sum() == 100
    assert len(np.unique(labels[held_out])) == 100


def test_another_seed_holds_out_others_and_each_pair_by_some_seed() -> None:
    ids, labels = np.arange(200), (np.arange(200) % 4).astype(np.int32)
    splits = np.stack([split(ids, labels, 0.2, seed) for seed in range(60)])
    assert len({row.tobytes() for row in splits}) == 60
    assert splits.any(axis=0).all()
    assert not splits.all(axis=0).any()


def test_split_of_a_seed_is_pinned() -> None:
    held_out = split(np.arange(40), np.zeros(40, np.int32), 0.1, seed=0)
    assert np.flatnonzero(held_out).tolist() == PINNED


@pytest.mark.parametrize("fraction", [0.001, 0.03])  # of 32 pairs none, and one
def test_at_least_two_pairs_are_held_out_as_one_alone_has_no_neighbour(fraction: float) -> None:
    held_out = split(np.arange(32), np.zeros(32, np.int32), fraction, 0)
    assert held_out.sum() == 2
    assert num_training(32, fraction) == 30


@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.1, 0.37, 0.5])
@pytest.mark.parametrize("num", [32, 45, 1000])
def test_num_training_equals_the_number_of_the_split(num: int, fraction: float) -> None:
    held_out = split(np.arange(num), (np.arange(num) % 7).astype(np.int32), fraction, 3)
    assert num - held_out.sum() == num_training(num, fraction)


def codes(labels: list[str | None]) -> tuple[list[int], int | None]:
    found, count, names = _codes(pa.chunked_array([pa.array(labels, pa.string())]))
    if names is not None:
        assert [names[code] if code >= 0 else None for code in found] == labels
    assert found.dtype == np.int32
    return found.tolist(), count


def test_integer_labels_are_kept_as_rows_of_a_classifier() -> None:
    assert codes(["7", "0", None, "99", "7"]) == ([7, 0, -1, 99, 7], 100)


def test_other_labels_are_numbered_in_sorted_order() -> None:
    assert codes(["dog", "cat", None, "ant", "dog"]) == ([2, 1, -1, 0, 2], 3)
    assert codes(["3", "cat"]) == ([0, 1], 2)
    assert codes(["-1", "1"]) == ([0, 1], 2)


def test_integers_too_large_for_rows_of_a_classifier_are_names() -> None:
    assert codes(["48392012", "9999999999", "48392012"]) == ([0, 1, 0], 2)


def test_without_labels_there_are_no_classes() -> None:
    assert codes([None, None]) == ([-1, -1], None)


@pytest.mark.parametrize("bias", [True, False])
def test_a_classifier_gives_its_weight_and_its_bias_where_it_has_one(tmp_path: Path, bias: bool) -> None:
    tensors = {"weight": torch.randn(5, 3).half()} | ({"bias": torch.randn(5)} if bias else {})
    save_file(tensors, tmp_path / "c.safetensors")
    found = _classifier(ClassifierSettings(path=str(tmp_path / "c.safetensors")), d_new=3)
    assert found is not None
    assert found[0].dtype == np.float32
    assert np.array_equal(found[0], tensors["weight"].float().numpy())
    assert (found[1] is not None) == bias


@pytest.mark.parametrize(
    "tensors", [{"weight": torch.zeros(5, 4)}, {"weight": torch.zeros(3)}, {"w": torch.zeros(5, 3)}]
)
def test_a_classifier_of_another_width_is_refused_with_its_shapes(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    save_file(tensors, tmp_path / "c.safetensors")
    with pytest.raises(DataError, match=r"\(num_classes, 3\)"):
        _classifier(ClassifierSettings(path=str(tmp_path / "c.safetensors")), d_new=3)


@pytest.mark.usefixtures("ray_cluster")
def test_each_pair_trains_or_is_held_out_and_none_does_both(tmp_path: Path) -> None:
    rng, num = np.random.default_rng(0), 150
    old, new = rng.normal(size=(num, 3)).astype(np.float32), rng.normal(size=(num, 5)).astype(np.float32)
    ids = rng.choice(10**9, num, replace=False)
    columns = {"id": ids, "label": [f"{row % 3}" for row in range(num)], "kind": [f"{row % 2}" for row in range(num)]}
    pq.write_table(pa.table(columns | {"o": old.tolist(), "n": new.tolist()}), tmp_path / "pairs.parquet")
    names = {"id": "id", "label": "label", "group": "kind", "old_embedding": "o", "new_embedding": "n"}
    source = {"manifest": str(tmp_path / "pairs.parquet"), "columns": names}
    encoder = {"export": "never-loaded.pt2", "dim": 5, "preprocess": {"size": 8}}
    tree = {"run": str(tmp_path / "run"), "encoders": {"new": encoder}, "gallery": source, "pairs": source}
    config, run = validate(tree, where="test"), Run(str(tmp_path / "run"))
    normalised.normalise(run, "pairs", config.pairs, {}, 64)
    pairs = build_pairs(config, run)
    assert (pairs.num_train, pairs.num_held_out, pairs.rejected, pairs.num_classes) == (135, 15, 0, 3)
    train, held_out = (read_all(run, part) for part in ("train", "held_out"))
    assert sorted(train["index"].to_pylist() + held_out["index"].to_pylist()) == sorted(ids.tolist())
    place = {number: row for row, number in enumerate(ids.tolist())}
    for part in (train, held_out):
        rows = [place[number] for number in part["index"].to_pylist()]
        assert np.array_equal(vectors_from_arrow(part["old"]), old[rows])
        assert np.array_equal(vectors_from_arrow(part["new"]), new[rows])
        assert part["label"].to_pylist() == [row % 3 for row in rows]
        assert part["group"].to_pylist() == [f"{row % 2}" for row in rows]
    assert build_pairs(config, run) == pairs
    before = fit_data(config.fit, run, pairs)
    for folder in ("train", "held_out"):  # as a file manager names a copy
        copied = objects.read_bytes(run.part(f"pairs/{folder}", 0))
        objects.put(run.path("pairs", folder, "part-00000 (copy).parquet"), copied)
    assert fit_data(config.fit, run, pairs) == before, "a copy beside a part is not read"


def test_pairs_of_a_manifest_and_of_the_gallery_are_one_set_though_ids_are_the_same(tmp_path: Path) -> None:
    config, run = make_run(tmp_path, known(300), Options(new_in_manifest=True, commits=False))
    pairs = config.pairs.model_copy(update={"from_gallery": 50})
    config = config.model_copy(update={"pairs": pairs})
    given = parquet.read_parquet(run.part("gallery", 0)).slice(0, 40)  # their ids are those of images of the gallery
    objects.put(run.part("pairs", 0), parquet.parquet_bytes(given.schema, [given]))
    gallery = normalised.read_manifest(run, "gallery")
    assert gallery is not None
    objects.put(run.path("pairs", "manifest.json"), documents.encode(replace(gallery, rows=[40])))
    found = build_pairs(config, run)
    assert (found.num_train + found.num_held_out, found.rejected) == (90, 0)
    table = pa.concat_tables([read_all(run, part) for part in ("train", "held_out")])
    assert len(set(table["index"].to_pylist())) == 90
    images = known(300)
    sampled = normalised.ids_of(run, GALLERY_PAIRS)
    rows = np.flatnonzero(np.isin(images.ids, sampled))
    rest = table.filter(pc.invert(pc.is_in(table["index"], value_set=given["id"].combine_chunks())))
    for side, column in ((images.old, "old"), (images.embedded, "new")):
        assert sorted(map(tuple, vectors_from_arrow(rest[column]))) == sorted(map(tuple, side[rows]))


def test_too_few_pairs_that_can_be_read_say_what_to_do(tmp_path: Path) -> None:
    config, run = make_run(tmp_path, known(300), Options(new_in_manifest=True, commits=False))
    config = config.model_copy(update={"pairs": PairsSettings(from_gallery=31)})
    with pytest.raises(DataError, match=r"at least 32\n  found: 31(.|\n)*pairs.from_gallery"):
        build_pairs(config, run)


def read_all(run: Run, part: str) -> pa.Table:
    uris = objects.list_files(run.path("pairs", part), ".parquet")
    return pa.concat_tables([parquet.read_parquet(uri) for uri in uris])
