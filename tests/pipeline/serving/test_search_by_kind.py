"""Search over two kinds with a calibration, against a brute-force search with the same map."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from pipeline.arrays import Float32, Int64
from pipeline.config.tree import IndexSettings, Metric
from pipeline.index.codebook import Codebook
from pipeline.index.segment import Hits, Segment, build_segment, gather_segments, search, search_by_kind
from pipeline.index.segment_files import KINDS, SegmentKind
from pipeline.index.train_codebook import train_codebook
from pipeline.models.calibration import Calibration

DIM, SHARDS, WAVES, K = 4, 8, 20, 80
NUM = 3200
# Some keys are mapped to one value in float32: ties that the map makes.
MAPS = {
    "l2": Calibration((0.0, 1.0, 3.0, 5.0, 40.0), (0.0, 1.0, 2.0, 2.0 + 1e-9, 30.0)),
    "cosine": Calibration((-1.0, -0.5, 0.0, 1.0), (-1.0, -0.7, -0.7 + 1e-12, 2.0)),
}
IDENTITY = Calibration((-1.0, 0.0, 1.0), (-1.0, 0.0, 1.0))

Gathered = dict[SegmentKind, list[Segment]]


@cache
def vectors() -> tuple[Int64, Float32]:
    """Small whole numbers, so that many keys are equal, and exact in float32."""
    rng = np.random.default_rng(1)
    return rng.permutation(10 * NUM)[:NUM].astype(np.int64), rng.integers(0, 4, (NUM, DIM)).astype(np.float32)


@cache
def book(factory: str, metric: Metric) -> Codebook:
    settings = IndexSettings(factory=factory, train_vectors=1000)
    return Codebook(train_codebook(vectors()[1], settings, metric, NUM, device="cpu", seed=0))


def transformed_rows(done: int = WAVES // 2) -> np.ndarray:
    """(N,) bool, after so many waves; every 40th image is a reject."""
    return (np.arange(NUM) % WAVES >= done) | (np.arange(NUM) % 40 == 3)


def segments(folder: Path, codebook: Codebook, transformed: np.ndarray) -> Gathered:
    """One per (shard, wave, kind) that has vectors."""
    ids, stored = vectors()
    found: Gathered = {kind: [] for kind in KINDS}
    for shard in range(SHARDS):
        for wave in range(WAVES):
            for kind in KINDS:
                cell = (np.arange(NUM) % WAVES == wave) & (ids % SHARDS == shard)
                rows = np.flatnonzero(cell & (transformed == (kind == "transformed")))
                path = folder / f"{shard}-{wave}-{kind}"
                path.write_bytes(build_segment(codebook, ids[rows], stored[rows]))
                found[kind].append(Segment.read(codebook, str(path)))
    return found


def brute_force(
    codebook: Codebook, found: Gathered, queries: Float32, nprobe: int, calibration: Calibration | None
) -> tuple[Float32, Int64, np.ndarray]:
    """Every vector of the visited lists of each kind by its own search, then one sort; keys, ids, kinds."""
    sign = 1 if codebook.metric == "l2" else -1
    keys, ids, raw, kinds = [], [], [], []
    for kind, some in found.items():
        distances, of_kind = search(codebook, some, queries, NUM, nprobe)
        raw.append(distances * np.float32(sign))
        keys.append(calibration.apply(raw[-1]) if calibration and kind == "transformed" else raw[-1])
        ids.append(of_kind)
        kinds.append(np.full(of_kind.shape, kind == "transformed"))
    by = [np.concatenate(item, axis=1) for item in (ids, raw, kinds, keys)]
    order = np.lexsort(by if calibration else (by[0], by[3]), axis=1)[:, :K]
    keys_, ids_, kinds_ = (np.take_along_axis(item, order, axis=1) for item in (by[3], by[0], by[2]))
    return keys_ * np.float32(sign), ids_, kinds_ & (ids_ >= 0)


def check(hits: Hits, expected: tuple[Float32, Int64, np.ndarray]) -> None:
    np.testing.assert_array_equal(hits.distances, expected[0])
    np.testing.assert_array_equal(hits.ids, expected[1])
    np.testing.assert_array_equal(hits.transformed, expected[2])


@pytest.mark.parametrize(("factory", "nprobe"), [("Flat", 1), ("IVF16,Flat", 16), ("IVF16,Flat", 3)])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_calibrated_search_of_8_shards_and_20_waves_is_a_brute_force_search_with_ties(
    tmp_path: Path, metric: Metric, factory: str, nprobe: int
) -> None:
    codebook, queries = book(factory, metric), vectors()[1][:60] + np.float32(0.5)
    found = segments(tmp_path, codebook, transformed_rows())
    whole = {kind: [gather_segments(codebook, some)] for kind, some in found.items()}
    for map_ in (MAPS[metric], IDENTITY, None):
        expected = brute_force(codebook, found, queries, nprobe, map_)
        for form in (found, whole):
            check(search_by_kind(codebook, form, queries, K, nprobe, map_), expected)
    hits = search_by_kind(codebook, found, queries, K, nprobe, MAPS[metric])
    equal = hits.distances[:, 1:] == hits.distances[:, :-1]
    assert (equal & (hits.transformed[:, 1:] != hits.transformed[:, :-1])).any(), "ties between kinds"
    assert (equal & (hits.raw[:, 1:] != hits.raw[:, :-1]) & hits.transformed[:, :-1]).any(), "ties that the map made"


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_calibrated_flat_search_is_exact_over_all_vectors(tmp_path: Path, metric: Metric) -> None:
    rng = np.random.default_rng(5)
    stored, queries = (rng.normal(size=(num, DIM)).astype(np.float32) for num in (NUM, 30))
    codebook, transformed = book("Flat", metric), transformed_rows()
    found = {}
    for kind in KINDS:
        rows = np.flatnonzero(transformed == (kind == "transformed"))
        (tmp_path / kind).write_bytes(build_segment(codebook, rows, stored[rows]))
        found[kind] = [Segment.read(codebook, str(tmp_path / kind))]
    map_ = Calibration((-1.0, 0.0, 4.0), (-2.0, 0.5, 3.0))
    hits = search_by_kind(codebook, found, queries, K, 1, map_)
    if metric == "cosine":
        stored, queries = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (stored, queries))
        keys = -(queries @ stored.T).astype(np.float64)
    else:
        keys = np.square(queries[:, None].astype(np.float64) - stored).sum(axis=2)
    keys[:, transformed] = map_.apply_exactly(keys[:, transformed])
    expected = np.argsort(keys, axis=1)[:, :K]
    np.testing.assert_array_equal(hits.ids, expected)
    np.testing.assert_array_equal(hits.transformed, transformed[expected])
    signed = np.take_along_axis(keys, expected, axis=1) * (1 if metric == "l2" else -1)
    np.testing.assert_allclose(hits.distances, signed, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_search_by_kind_without_a_map_is_the_search_of_all_segments(tmp_path: Path, metric: Metric) -> None:
    codebook, queries = book("IVF16,Flat", metric), vectors()[1][:60] + np.float32(0.5)
    found = segments(tmp_path, codebook, transformed_rows())
    distances, ids = search(codebook, [item for some in found.values() for item in some], queries, K, 3)
    hits = search_by_kind(codebook, found, queries, K, 3, None)
    np.testing.assert_array_equal(hits.ids, ids)
    np.testing.assert_array_equal(hits.distances, distances)
    np.testing.assert_array_equal(hits.raw, distances)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_identity_map_gives_the_distances_of_an_uncalibrated_search(tmp_path: Path, metric: Metric) -> None:
    codebook, queries = book("IVF16,Flat", metric), vectors()[1][:60] + np.float32(0.5)
    found = segments(tmp_path, codebook, transformed_rows())
    plain, mapped = (search_by_kind(codebook, found, queries, K, 3, map_) for map_ in (None, IDENTITY))
    np.testing.assert_array_equal(mapped.distances, plain.distances)
    inner = plain.distances != plain.distances[:, -1:]  # equals at the end may be others of the same distance
    assert [set(row[keep]) for row, keep in zip(mapped.ids, inner, strict=True)] == [
        set(row[keep]) for row, keep in zip(plain.ids, inner, strict=True)
    ]


@pytest.mark.parametrize("done", [0, WAVES])
def test_map_of_a_gallery_of_one_kind_changes_no_rank(tmp_path: Path, done: int) -> None:
    codebook, queries = book("IVF16,Flat", "l2"), vectors()[1][:20] + np.float32(0.5)
    transformed = np.arange(NUM) % WAVES >= done
    found = segments(tmp_path, codebook, transformed)
    hits = search_by_kind(codebook, found, queries, K, 3, MAPS["l2"])
    plain = search_by_kind(codebook, found, queries, K, 3, None)
    np.testing.assert_array_equal(hits.ids, plain.ids)
    assert (hits.transformed == (done == 0)).all()
    expected = MAPS["l2"].apply(plain.distances) if done == 0 else plain.distances
    np.testing.assert_array_equal(hits.distances, expected)


def test_fewer_vectors_than_neighbours_are_padded(tmp_path: Path) -> None:
    codebook, (ids, stored) = book("Flat", "cosine"), vectors()
    found: Gathered = {}
    for kind, rows in (("embedded", slice(0, 2)), ("transformed", slice(2, 5))):
        (tmp_path / kind).write_bytes(build_segment(codebook, ids[rows], stored[rows] + 1))
        found[kind] = [Segment.read(codebook, str(tmp_path / kind))]  # type: ignore[index]  # is a kind
    hits = search_by_kind(codebook, found, stored[:3] + 1, 9, 1, MAPS["cosine"])
    assert (hits.ids[:, 5:] == -1).all()
    assert (hits.distances[:, 5:] == -np.inf).all()
    assert hits.transformed.sum(axis=1).tolist() == [3, 3, 3]
