"""Cut points without a sort equal those of a full sort, whatever the priorities."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.arrays import Float32, Int64
from pipeline.hashing import splitmix64
from pipeline.planning import cut_points
from pipeline.planning.build import find_cuts
from pipeline.planning.cut_points import NUM_DIGITS, CutSearch
from tests.support.hashes import unmix

ODD = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.finfo(np.float32).tiny, 1e-45, -1e-45, 3.4e38, -3.4e38]
anything = st.one_of(st.sampled_from(ODD), st.floats(width=32, allow_nan=False), st.integers(0, 2).map(float))


def waves_by_sort(priority: Float32, ids: Int64, ranks: Int64, seed: int) -> NDArray[np.int64]:
    """The definition: sort by priority, highest first, then by hash; cut at the ranks."""
    order = np.lexsort((splitmix64(ids, seed), -priority.astype(np.float64)))
    waves = np.zeros(len(ids), np.int64)
    waves[order] = np.searchsorted(ranks, np.arange(len(ids)), side="right")
    return waves


def waves_by_cuts(
    priority: Float32, ids: Int64, ranks: Int64, seed: int, parts: list[NDArray[np.int64]]
) -> tuple[NDArray[np.int64], int]:
    """The same by histograms over parts of the gallery, and the number of passes."""
    keys = [cut_points.digits(priority[part], ids[part], seed) for part in parts]
    passes = 0

    def count(search: CutSearch) -> list[tuple[cut_points.Codes, Int64]]:
        nonlocal passes
        passes += 1
        known = cut_points.needs_ids(search.levels)
        return [
            cut_points.count_digit(priority[part], ids[part] if known else None, seed, search.levels) for part in parts
        ]

    found = find_cuts(ranks, count)
    waves = np.zeros(len(ids), np.int64)
    for part, key in zip(parts, keys, strict=True):
        waves[part] = cut_points.bucket(key, found)
    return waves, passes


@st.composite
def galleries(draw: st.DrawFn) -> tuple[Float32, Int64, Int64, list[NDArray[np.int64]]]:
    """Priorities with heavy ties and odd values, any ids, any ranks, cut into parts of any size."""
    num = draw(st.integers(1, 120))
    pool = draw(st.lists(anything, min_size=1, max_size=draw(st.sampled_from([1, 3, 120]))))
    priority = np.array(draw(st.lists(st.sampled_from(pool), min_size=num, max_size=num)), np.float32)
    ids = np.array(draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=num, max_size=num, unique=True)), np.int64)
    ranks = np.array(sorted(draw(st.sets(st.integers(1, num), max_size=10))), np.int64)
    ends = sorted(draw(st.lists(st.integers(0, num), max_size=5)))
    return priority, ids, ranks, np.split(np.arange(num), ends)


@settings(max_examples=150, deadline=None)
@given(galleries(), st.integers(0, 2**32 - 1))
def test_waves_equal_those_of_a_full_sort(
    gallery: tuple[Float32, Int64, Int64, list[NDArray[np.int64]]], seed: int
) -> None:
    priority, ids, ranks, parts = gallery
    found, passes = waves_by_cuts(priority, ids, ranks, seed, parts)
    assert np.array_equal(found, waves_by_sort(priority, ids, ranks, seed))
    assert passes <= NUM_DIGITS


@settings(max_examples=30, deadline=None)
@given(galleries(), st.integers(0, 100))
def test_waves_do_not_depend_on_the_order_or_the_parts_of_the_gallery(
    gallery: tuple[Float32, Int64, Int64, list[NDArray[np.int64]]], seed: int
) -> None:
    priority, ids, ranks, parts = gallery
    found, _ = waves_by_cuts(priority, ids, ranks, seed, parts)
    mixed = np.random.default_rng(seed).permutation(len(ids))
    other, _ = waves_by_cuts(priority[mixed], ids[mixed], ranks, seed, [np.arange(len(ids))])
    assert np.array_equal(found[mixed], other)


def test_every_wave_has_exactly_its_size_among_all_equal_priorities() -> None:
    ids, ranks = np.arange(1000), np.array([1, 10, 11, 500, 999])
    waves, _ = waves_by_cuts(np.zeros(1000, np.float32), ids, ranks, 3, [ids[:100], ids[100:]])
    assert np.bincount(waves).tolist() == [1, 9, 1, 489, 499, 1]


def test_minus_zero_is_zero() -> None:
    ids = np.arange(50)
    signs = np.where(ids % 2, -0.0, 0.0).astype(np.float32)
    assert np.array_equal(cut_points.digits(signs, ids, 0), cut_points.digits(np.zeros(50, np.float32), ids, 0))


@given(st.lists(anything, min_size=2, max_size=50), st.integers(0, 100))
def test_keys_are_in_the_order_of_descending_priority(values: list[float], seed: int) -> None:
    priority, ids = np.array(values, np.float32), np.arange(len(values))
    keys = cut_points.digits(priority, ids, seed)
    ordered = priority[np.lexsort(keys[::-1])]
    assert np.all(ordered[1:] <= ordered[:-1])
    assert keys.max() < 2**16


def test_priorities_without_ties_need_two_passes() -> None:
    rng = np.random.default_rng(0)
    priority = rng.permutation(20_000).astype(np.float32)
    ids, ranks = np.arange(20_000), np.array([7, 100, 5000, 19_999])
    waves, passes = waves_by_cuts(priority, ids, ranks, 0, np.array_split(ids, 3))
    assert passes == 2
    assert np.array_equal(waves, waves_by_sort(priority, ids, ranks, 0))


def test_hashes_that_differ_in_their_last_bits_only_are_still_cut_exactly() -> None:
    hashes = np.arange(2**40 - 30, 2**40 + 30).astype(
        np.uint64
    )  # some differ in the last digit, some in the one before
    ids, priority, ranks = unmix(hashes, seed=5), np.zeros(60, np.float32), np.array([1, 17, 30, 31, 59])
    waves, passes = waves_by_cuts(priority, ids, ranks, 5, np.array_split(np.arange(60), 4))
    assert passes == NUM_DIGITS
    assert np.array_equal(waves, waves_by_sort(priority, ids, ranks, 5))
    assert np.array_equal(waves, np.searchsorted(ranks, np.arange(60), side="right"))


def test_one_wave_needs_no_pass() -> None:
    ids = np.arange(10)
    waves, passes = waves_by_cuts(np.ones(10, np.float32), ids, np.zeros(0, np.int64), 0, [ids])
    assert passes == 0
    assert not waves.any()


@pytest.mark.parametrize(("seed", "wanted"), [(0, "330123322223321133320123"), (1, "321123322223331033320123")])
def test_cut_points_of_a_seed_are_pinned(seed: int, wanted: str) -> None:
    ids = np.arange(100, 124)
    priority = np.round(np.sin(ids)).astype(np.float32)  # with ties
    waves, _ = waves_by_cuts(priority, ids, np.array([2, 6, 14]), seed, [ids - 100])
    assert "".join(str(wave) for wave in waves) == wanted


def test_counts_of_parts_add_up() -> None:
    tally = cut_points.Tally([np.array([7]), np.array([5, 9])])
    tally.add(np.array([1, 3, 2 * 2**16 - 1]), np.array([1, 2, 3]))
    tally.add(np.array([3]), np.array([4]))
    codes, counts = tally.result()
    assert codes.tolist() == [1, 3, 2**17 - 1]
    assert counts.tolist() == [1, 6, 3]


def test_a_pass_counts_the_digit_that_follows_among_the_keys_that_agree() -> None:
    rng = np.random.default_rng(0)
    priority, ids = rng.integers(0, 3, 500).astype(np.float32), rng.permutation(500)
    keys = cut_points.digits(priority, ids, 0)
    levels: list[cut_points.Codes] = []
    agrees = np.ones(500, dtype=bool)
    for depth in range(NUM_DIGITS):
        codes, counts = cut_points.count_digit(priority, ids, 0, levels)
        digits, wanted = np.unique(keys[depth][agrees], return_counts=True)
        assert np.array_equal(codes, digits)
        assert np.array_equal(counts, wanted)
        levels.append(codes[:1])  # go down with one prefix
        agrees &= keys[depth] == digits[0]
