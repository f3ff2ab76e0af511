"""Hashes that must never change, and vectors that come back from Arrow as they went in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.arrays import Float32, vector_type, vectors_from_arrow, vectors_to_arrow
from pipeline.hashing import shard_of, splitmix64
from pipeline.storage import objects, parquet
from tests.support.hashes import unmix

IDS = np.array([0, 1, 2, -1, 12345678901234567, 2**63 - 1, -(2**63)], np.int64)
PINNED_HASHES = [
    0xC584133AC916AB3C,
    0x85E7BB0F12278575,
    0xBD34D3AEF603E583,
    0x405DA438A39E8064,
    0x59AD3638ACF656CC,
    0x8C0F2BC06B2765D6,
    0x6250485B3CDEFBBD,
]
PINNED_SHARDS = [50, 24, 48, 19, 48, 63, 13]


def vectors(num: int, dim: int = 4) -> Float32:
    return np.random.default_rng(num).normal(size=(num, dim)).astype(np.float32)


def test_hashes_are_the_published_ones_and_stay() -> None:
    # The first outputs of SplitMix64 with state 0 (Vigna, splitmix64.c), and values pinned here.
    state = np.array([0x9E3779B97F4A7C15 * i % 2**64 for i in range(3)], np.uint64).view(np.int64)
    assert splitmix64(state, seed=0).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert splitmix64(IDS, seed=7).tolist() == PINNED_HASHES


def test_shards_stay_where_they_are() -> None:
    assert shard_of(IDS, 64).tolist() == PINNED_SHARDS


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=200), st.integers(0, 2**32 - 1))
def test_the_hash_is_a_bijection(ids: list[int], seed: int) -> None:
    given_ids = np.array(ids, np.int64)
    assert np.array_equal(unmix(splitmix64(given_ids, seed), seed), given_ids)


@given(st.integers(1, 1000))
def test_every_shard_is_in_range(num_shards: int) -> None:
    shards = shard_of(np.arange(1000), num_shards)
    assert shards.dtype == np.int32
    assert 0 <= shards.min() <= shards.max() < num_shards


def test_neighbouring_ids_spread_evenly_over_shards() -> None:
    counts = np.bincount(shard_of(np.arange(64_000), 64), minlength=64)
    assert 800 < counts.min() <= counts.max() < 1200  # 1000 each; 6 standard deviations


def test_vectors_come_back_as_they_went_in() -> None:
    given_vectors = vectors(10)
    column = vectors_to_arrow(given_vectors)
    assert column.type == vector_type(4)
    assert np.array_equal(vectors_from_arrow(column), given_vectors)


def test_vectors_with_strides_come_back_as_they_went_in() -> None:
    wide = vectors(10, 8)
    assert np.array_equal(vectors_from_arrow(vectors_to_arrow(wide[::2, 1::2])), wide[::2, 1::2])


def test_no_vectors_come_back_with_their_width() -> None:
    assert vectors_from_arrow(vectors_to_arrow(vectors(0, 6))).shape == (0, 6)
    assert vectors_from_arrow(pa.chunked_array([], vector_type(6))).shape == (0, 6)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=5), st.booleans())
def test_sliced_and_chunked_columns_give_their_own_rows(slices: list[tuple[int, int]], half: bool) -> None:
    given_vectors = vectors(20)
    kind = np.float16 if half else np.float32
    whole = pa.FixedSizeListArray.from_arrays(pa.array(given_vectors.astype(kind).reshape(-1)), 4)
    column = pa.chunked_array([whole.slice(start, count) for start, count in slices])
    rows = np.concatenate([np.arange(20)[start : start + count] for start, count in slices])
    found = vectors_from_arrow(column)
    assert found.dtype == np.float32
    assert np.array_equal(found, given_vectors.astype(kind)[rows])
    assert np.array_equal(vectors_from_arrow(column.slice(1, 3)), given_vectors.astype(kind)[rows[1:4]])


def test_filtered_and_taken_rows_give_their_own_vectors() -> None:
    given_vectors = vectors(12)
    table = pa.table({"vector": vectors_to_arrow(given_vectors)}).slice(2)
    keep = np.arange(10) % 3 == 0
    assert np.array_equal(vectors_from_arrow(table.filter(pa.array(keep))["vector"]), given_vectors[2:][keep])
    assert np.array_equal(vectors_from_arrow(table.take(pa.array([7, 0]))["vector"]), given_vectors[2:][[7, 0]])


def test_vectors_survive_parquet_row_group_by_row_group(tmp_path: Path) -> None:
    given_vectors, uri = vectors(9), str(tmp_path / "a.parquet")
    table = pa.table({"vector": vectors_to_arrow(given_vectors)})
    objects.put(uri, parquet.parquet_bytes(table.schema, [table.slice(0, 4), table.slice(4, 0), table.slice(4)]))
    assert np.array_equal(vectors_from_arrow(parquet.read_parquet(uri)["vector"]), given_vectors)
    assert np.array_equal(vectors_from_arrow(parquet.read_parquet(uri, row_groups=[2])["vector"]), given_vectors[4:])
    assert len(vectors_from_arrow(parquet.read_parquet(uri, row_groups=[1])["vector"])) == 0


def test_a_null_vector_is_an_error_only_among_the_rows_that_are_asked_for() -> None:
    column = pa.array([[1.0, 2.0], None, [3.0, 4.0]], vector_type(2))
    with pytest.raises(ValueError, match="1 of 3 vectors are null"):
        vectors_from_arrow(column)
    assert vectors_from_arrow(column.slice(2)).tolist() == [[3.0, 4.0]]
