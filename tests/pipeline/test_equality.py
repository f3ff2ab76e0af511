"""What counts as the same vector, and that no rounding of real kernels is beyond it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.arrays import Float32
from pipeline.equality import ROUNDING, find_same, same_vectors


def vectors(num: int, dim: int, seed: int = 0) -> Float32:
    return np.random.default_rng(seed).standard_normal((num, dim)).astype(np.float32)


def moved(some: Float32, by: float) -> Float32:
    """By this share of their length, each in a direction of its own."""
    towards = vectors(*some.shape, seed=1).astype(np.float64)
    towards *= by * np.linalg.norm(some, axis=1, keepdims=True) / np.linalg.norm(towards, axis=1, keepdims=True)
    return (some + towards).astype(np.float32)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_same_vectors_by_their_length_whatever_it_is(scale: float) -> None:
    some = vectors(100, 64) * np.float32(scale)
    assert same_vectors(some, some).all()
    assert same_vectors(some, moved(some, 0.9 * ROUNDING)).all()
    assert not same_vectors(some, moved(some, 1.1 * ROUNDING)).any()
    assert same_vectors(np.zeros_like(some), np.zeros_like(some)).all()


@pytest.mark.parametrize("dim", [16, 512, 2048])
def test_products_of_one_row_and_of_many_rows_are_the_same_vectors(dim: int) -> None:
    some, matrix = vectors(200, dim), vectors(dim, dim, seed=2)
    one_by_one = np.concatenate([some[row : row + 1] @ matrix for row in range(len(some))])
    assert same_vectors(one_by_one, some @ matrix).all()
    assert same_vectors((some.astype(np.float64) @ matrix).astype(np.float32), some @ matrix).all()


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 60), st.integers(1, 6))
def test_find_same_finds_what_a_look_at_every_pair_finds(seed: int, num: int, many: int, dim: int) -> None:
    rng = np.random.default_rng(seed)
    among = rng.integers(-1, 2, (many, dim)).astype(np.float32)  # with repeated rows, and zeros
    some = np.where(rng.random((num, 1)) < 0.7, among[rng.integers(0, many, num)], vectors(num, dim, seed))
    some = moved(some, 0.5 * ROUNDING)
    each = np.stack([same_vectors(np.repeat(row[None], many, axis=0), among) for row in some])
    last = np.where(each.any(axis=1), many - 1 - each[:, ::-1].argmax(axis=1), -1)
    np.testing.assert_array_equal(find_same(some, among), last)
