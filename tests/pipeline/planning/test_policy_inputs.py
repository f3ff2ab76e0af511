"""What policies know of pairs: drawn once, kept bit for bit, found again with the transformation."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.arrays import Float32, Int64
from pipeline.errors import DataError
from pipeline.knn import nearest
from pipeline.models.networks import TransformationNetwork
from pipeline.models.transformation import TransformationInfo, save_transformation
from pipeline.planning import policy_inputs
from pipeline.planning.policy_inputs import (
    PART,
    HeldOutPairs,
    PolicyInputs,
    build_policy_inputs,
    keys,
    load_policy_inputs,
)
from pipeline.run import Run

NUM, D_OLD, D_NEW, CLASSES = 60, 4, 3, 5


def pairs(num: int = NUM, seed: int = 0) -> tuple[Float32, Float32, Float32, Float32, Int64]:
    """old, z, s, new, labels; z is near new."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, num)
    new = (rng.normal(size=(CLASSES, D_NEW))[labels] + rng.normal(size=(num, D_NEW)) / 3).astype(np.float32)
    old = rng.normal(size=(num, D_OLD)).astype(np.float32)
    z = (new + rng.normal(size=new.shape) / 4).astype(np.float32)
    return old, z, rng.normal(size=num).astype(np.float32), new, labels


def build(labelled: bool = True, metric: str = "l2", classifier: bool = True, num: int = NUM) -> PolicyInputs:
    old, z, s, new, labels = pairs(num)
    weight = np.random.default_rng(1).normal(size=(CLASSES, D_NEW)).astype(np.float32)
    known = (weight, np.zeros(CLASSES, np.float32)) if classifier else None
    return build_policy_inputs(HeldOutPairs(old, z, s, new, labels if labelled else None), known, metric, 0)


def same(left: PolicyInputs, right: PolicyInputs) -> bool:
    for item in fields(PolicyInputs):
        one, other = getattr(left, item.name), getattr(right, item.name)
        if isinstance(one, np.ndarray):
            if one.dtype != other.dtype or not np.array_equal(one, other):
                return False
        elif isinstance(one, dict):
            if one.keys() != other.keys() or any(not np.array_equal(one[name], other[name]) for name in one):
                return False
        elif one != other:
            return False
    return True


@pytest.mark.parametrize("labelled", [True, False])
def test_a_reference_comes_back_bit_for_bit(labelled: bool) -> None:
    made = build(labelled)
    model = {"bias": np.ones((2, 3), np.float32), "shift": np.ones(1, np.float32)}
    full = replace(made, signals=("a", "b"), mean=np.ones(2, np.float32), scale=np.ones(2, np.float32), model=model)
    full = replace(full, label_names=("é", "b"), group_names=("g",), group_need=np.ones(1, np.float32))
    for one in (made, full):
        assert same(PolicyInputs.from_bytes(one.to_bytes()), one)
        assert one.to_bytes() == PolicyInputs.from_bytes(one.to_bytes()).to_bytes()


def test_other_bytes_are_refused() -> None:
    for data in (b"", b"x" * 100, build().to_bytes()[:-5]):
        with pytest.raises(DataError, match="the policy inputs are damaged"):
            PolicyInputs.from_bytes(data)


def test_a_transformation_brings_its_reference(tmp_path: Path) -> None:
    info = TransformationInfo(D_OLD, D_NEW, None, 8, False, "alignment", 0, 1, 10, 10, True, {})
    network, made = TransformationNetwork(D_OLD, D_NEW, 8), build()
    with_it, without = Run(str(tmp_path / "with")), Run(str(tmp_path / "without"))
    save_transformation(with_it, network, info, {PART: made.to_bytes()})
    save_transformation(without, network, info)
    found = load_policy_inputs(with_it)
    assert found is not None
    assert same(found, made)
    assert load_policy_inputs(without) is None
    stored = next((tmp_path / "with" / "transformation").glob("reference-*.safetensors"))
    stored.write_bytes(stored.read_bytes()[:-1] + b"\x07")
    with pytest.raises(DataError, match=r"the transformation's reference\.safetensors are damaged"):
        load_policy_inputs(with_it)


def test_centroids_are_the_means_of_the_classes() -> None:
    *_, new, labels = pairs()
    made = build()
    assert made.centroid_labels is not None
    for code, mean in zip(made.centroid_labels, made.centroids, strict=True):
        assert np.allclose(mean, new[labels == code].mean(axis=0), atol=1e-5)


def test_without_labels_centroids_are_those_of_clusters() -> None:
    made, (*_, new, _) = build(labelled=False), pairs()
    assert made.centroid_labels is None
    assert made.centroids.shape == (8, D_NEW)  # the root of 60
    spread = np.square(new - new.mean(axis=0)).sum()
    assert nearest(new, np.concatenate([made.centroids, made.centroids + 99]), 1)[0].sum() < spread / 2
    assert same(made, build(labelled=False))


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_reach_of_a_query_is_the_distance_to_its_tenth_other_pair(metric: str) -> None:
    _, z, _, new, _ = pairs()
    made, far = build(metric=metric), keys(new, z, metric)
    np.fill_diagonal(far, np.inf)
    assert np.allclose(made.reach, np.sort(far, axis=1)[:, 9], atol=1e-4)


def test_policy_inputs_of_many_pairs_keep_a_sample_of_whole_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_inputs, "_MOST_PAIRS", 20)
    monkeypatch.setattr(policy_inputs, "_MOST_QUERIES", 7)
    old, z, s, new, labels = pairs()
    made = build()
    rows = np.array([np.flatnonzero((old == row).all(axis=1))[0] for row in made.old])
    assert len(set(rows)) == 20
    assert np.array_equal(made.transformed, z[rows])
    assert np.array_equal(made.uncertainty, s[rows])
    assert np.array_equal(made.labels, labels[rows])
    assert np.allclose(made.residual, np.square(new - z).sum(axis=1)[rows])
    assert np.array_equal(made.queries, new[rows][made.query_rows])
    assert len(made.query_rows) == 7


@pytest.mark.parametrize("num", [2, 3, 12])
def test_a_handful_of_pairs_is_enough(num: int) -> None:
    made = build(num=num)
    assert np.isfinite(made.reach).all()


def test_neighbours_are_exact_and_leave_out_the_own_row() -> None:
    rng = np.random.default_rng(0)
    queries, base = (rng.normal(size=(num, 6)).astype(np.float32) for num in (30, 40))
    own = np.where(np.arange(30) % 3 == 0, -1, np.arange(30))
    far = np.square(queries[:, None] - base).sum(axis=2)
    far[np.flatnonzero(own >= 0), own[own >= 0]] = np.inf
    distances, rows = nearest(queries, base, 5, own)
    assert np.array_equal(rows, np.argsort(far, axis=1)[:, :5])
    assert np.allclose(distances, np.sort(far, axis=1)[:, :5], rtol=1e-4)
