"""Exact cut points of a ranking from histograms of its bits; nothing is sorted as a whole.

An image's rank is its place in (priority descending, stable hash of the id ascending). Both form one 96-bit key of six
16-bit digits, smallest first. The key of rank r is found digit by digit: each pass counts one digit among the keys
that still agree with a cut, part by part, and sums the counts. Priorities without ties need two passes. The hash is a
bijection of the id, so six passes always suffice.

Legend: N images of a part, C cuts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeline.arrays import Float32, Int64
from pipeline.hashing import splitmix64

NUM_DIGITS = 6
_PRIORITY_DIGITS = 2
_DIGIT_BITS = 16
_RADIX = 1 << _DIGIT_BITS

Digits = NDArray[np.uint32]
Codes = NDArray[np.int64]


@dataclass(slots=True)
class CutSearch:
    """The state of the search between passes."""

    ranks: Int64  # (C,), ascending: how many images precede each cut
    # Per pass, the sorted codes of the prefixes that still hold a cut; a code is (index of the prefix in the level
    # before) * 65536 + digit
    levels: list[Codes] = field(default_factory=list)
    cuts: Digits = field(init=False)  # (6, C) digits of the last key before each cut; unknown digits are 65535
    _remaining: Int64 = field(init=False)
    _parents: Int64 = field(init=False)
    _open: NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        self.cuts = np.full((NUM_DIGITS, len(self.ranks)), _RADIX - 1, dtype=np.uint32)
        self._remaining = self.ranks.copy()
        self._parents = np.zeros(len(self.ranks), dtype=np.int64)
        self._open = np.ones(len(self.ranks), dtype=bool)

    @property
    def done(self) -> bool:
        """Whether every cut is known."""
        return not self._open.any()

    def advance(self, codes: Codes, counts: Int64) -> None:
        """Apply the counts of one pass over all parts: unique `codes`, ascending, and how often each occurs."""
        depth = len(self.levels)
        before = np.cumsum(counts) - counts
        kept: dict[int, list[int]] = {}
        for cut in np.flatnonzero(self._open):
            siblings = slice(*np.searchsorted(codes, [self._parents[cut] * _RADIX, (self._parents[cut] + 1) * _RADIX]))
            start = before[siblings][0]
            place = siblings.start + int(
                np.searchsorted(before[siblings] - start + counts[siblings], self._remaining[cut])
            )
            self.cuts[depth, cut] = codes[place] % _RADIX
            self._remaining[cut] -= before[place] - start
            if self._remaining[cut] == counts[place]:
                self._open[cut] = False  # the cut falls between two prefixes: further digits do not matter
            else:
                kept.setdefault(int(codes[place]), []).append(int(cut))
        self.levels.append(np.array(sorted(kept), dtype=np.int64))
        for index, code in enumerate(sorted(kept)):
            self._parents[kept[code]] = index


class Tally:
    """The counts of a pass over all parts; 0.5 MiB per prefix that still holds a cut."""

    def __init__(self, levels: list[Codes]) -> None:
        self._counts = np.zeros((len(levels[-1]) if levels else 1) * _RADIX, dtype=np.int64)

    def add(self, codes: Codes, counts: Int64) -> None:
        """Add one part's counts; its codes are unique."""
        self._counts[codes] += counts

    def result(self) -> tuple[Codes, Int64]:
        """The codes that occur, ascending, and how often."""
        codes = np.flatnonzero(self._counts)
        return codes, self._counts[codes]


def digits(priority: Float32, ids: Int64, seed: int) -> Digits:
    """The keys of N images as (6, N) uint32 digits, most significant first."""
    return np.concatenate([_priority_digits(priority), _hash_digits(ids, seed)])


def needs_ids(levels: list[Codes]) -> bool:
    """Whether the next pass reads ids; the first two passes read priorities alone."""
    return len(levels) >= _PRIORITY_DIGITS


def count_digit(priority: Float32, ids: Int64 | None, seed: int, levels: list[Codes]) -> tuple[Codes, Int64]:
    """One part's counts of a pass: the unique codes, ascending, of its keys that agree with `levels`, and their counts.

    `priority` is (N,) float32; `ids` is (N,) int64, or None unless `needs_ids`.
    """
    codes, kept = _agreeing(np.zeros(len(priority), dtype=np.int64), keys := _priority_digits(priority), levels[:2])
    if not needs_ids(levels):
        digit = keys[len(levels)][kept]
    else:
        assert ids is not None, "needs_ids"
        keys = _hash_digits(ids[kept], seed)  # only of images that share their priority with a cut
        codes, kept = _agreeing(codes, keys, levels[2:])
        digit = keys[len(levels) - _PRIORITY_DIGITS][kept]
    return np.unique(codes * _RADIX + digit, return_counts=True)


def bucket(keys: Digits, cuts: Digits) -> NDArray[np.int32]:
    """The wave of each image, counted from 0: how many cuts precede its key; (N,) int32 in [0, C]."""
    words = _words(keys)
    found = np.zeros(keys.shape[1], dtype=np.int32)
    for cut in _words(cuts).T:
        found += (words[0] > cut[0]) | ((words[0] == cut[0]) & (words[1] > cut[1]))
    return found


def _priority_digits(priority: Float32) -> Digits:
    """The first two digits, (2, N)."""
    bits = (np.asarray(priority, dtype=np.float32) + np.float32(0.0)).view(np.uint32)  # -0.0 becomes 0.0
    ascending = np.where(bits >> np.uint32(31), ~bits, bits | np.uint32(1 << 31))
    first = ~ascending  # descending priority
    return np.stack([first >> np.uint32(_DIGIT_BITS), first & np.uint32(_RADIX - 1)])


def _hash_digits(ids: Int64, seed: int) -> Digits:
    """The other four digits, (4, N)."""
    hashes, mask = splitmix64(ids, seed), np.uint64(_RADIX - 1)
    return np.stack([((hashes >> np.uint64(shift)) & mask).astype(np.uint32) for shift in (48, 32, 16, 0)])


def _agreeing(codes: Codes, keys: Digits, levels: list[Codes]) -> tuple[Codes, NDArray[np.intp]]:
    """Follow keys down some levels: their codes in the last level, and the indices of those that reach it."""
    kept = np.arange(len(codes))
    for digit, level in zip(keys, levels, strict=False):
        codes = codes * _RADIX + digit[kept]
        index = np.minimum(np.searchsorted(level, codes), max(len(level) - 1, 0))
        agrees = level[index] == codes if len(level) else np.zeros(len(codes), dtype=bool)
        codes, kept = index[agrees], kept[agrees]
    return codes, kept


def _words(keys: Digits) -> NDArray[np.uint64]:
    """(6, N) digits as (2, N) uint64: the priority's 32 bits, the hash's 64 bits."""
    wide = keys.astype(np.uint64)
    shift = np.uint64(_DIGIT_BITS)
    tail = wide[2]
    for digit in wide[3:]:
        tail = (tail << shift) | digit
    return np.stack([(wide[0] << shift) | wide[1], tail])
