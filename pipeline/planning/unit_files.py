"""Cut the rows of a wave into units in locality order, in bounded memory.

A wave of a large gallery does not fit into a worker, so it is sorted in pieces of about a million images, each a range
of objects. The units equal those of one sort of the whole wave. A piece holds at least one whole object, so the images
of one container are in memory together.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.schema import UNITS
from pipeline.storage import objects as storage
from pipeline.storage import parquet

_PIECE_IMAGES = 1_000_000
_SAMPLES = 256  # of a piece's objects, from which the bounds between pieces are chosen
_ORDER = [(name, "ascending") for name in ("uri", "offset", "row", "id")]


def cut_units(
    parts: Sequence[str], groups: list[int], num_images: int, unit_images: int, piece_images: int = _PIECE_IMAGES
) -> Iterator[pa.Table]:
    """The units of a wave, one UNITS table each, ordered by object, then by offset or row in it, then by id.

    Args:
        parts: URIs of the transformed parts.
        groups: the wave's row groups, the same in each part.
        num_images: of the wave.
        unit_images: rows of each unit but the last.
        piece_images: roughly how many are sorted at once.
    """
    sources, ranges = [_Source(uri, None, None, True) for uri in parts], [_Range(None, None)]
    if num_images > piece_images:
        sources, ranges = _survey(parts, groups, num_images, piece_images)
    left = UNITS.empty_table()
    for some in ranges:
        found = [source.uri for source in sources if some.meets(source)]
        rows = storage.at_once(partial(some.read, groups), found)
        piece = pa.concat_tables([left, pa.concat_tables([UNITS.empty_table(), *rows]).sort_by(_ORDER)])
        whole = piece.num_rows // unit_images * unit_images
        for start in range(0, whole, unit_images):
            yield piece.slice(start, unit_images).combine_chunks()
        left = piece.slice(whole).combine_chunks()
    if left.num_rows:
        yield left


@dataclass(frozen=True, slots=True)
class _Source:
    """A part's rows of the wave: their first and last object (None if there are none)."""

    uri: str
    first: str | None
    last: str | None
    has_nulls: bool


@dataclass(frozen=True, slots=True)
class _Range:
    """The objects from `first` (None: the start) to before `end` (None: the end, with nulls)."""

    first: str | None
    end: str | None

    def meets(self, source: _Source) -> bool:
        if self.end is None and source.has_nulls:
            return True  # nulls come last
        if source.first is None or source.last is None:
            return False
        before = self.first is not None and source.last < self.first
        after = self.end is not None and source.first >= self.end
        return not before and not after

    def read(self, groups: list[int], uri: str) -> pa.Table:
        table = parquet.read_parquet(uri, UNITS.names, groups)
        if self.first is not None:
            below = pc.less(table["uri"], self.first)
            table = table.filter(pc.invert(pc.fill_null(below, False)))
        return table if self.end is None else table.filter(pc.less(table["uri"], self.end))


def _survey(
    parts: Sequence[str], groups: list[int], num_images: int, piece_images: int
) -> tuple[list[_Source], list[_Range]]:
    """The part's sources, and ranges of objects with about `piece_images` images each, in order."""
    every = max(1, piece_images // _SAMPLES)

    def look(number: int) -> tuple[_Source, list[str]]:
        column = parquet.read_parquet(parts[number], ["uri"], groups)["uri"]
        objects, ends = column.drop_null(), pc.min_max(column)
        first = number * every // len(parts)  # so that of small parts some, not none or all, give a sample
        sample = objects.take(np.arange(first, len(objects), every)).to_pylist()
        return _Source(parts[number], ends["min"].as_py(), ends["max"].as_py(), column.null_count > 0), sample

    looked = storage.at_once(look, range(len(parts)))
    sources, sample = [source for source, _ in looked], sorted(name for _, names in looked for name in names)
    pieces = -(-num_images // piece_images)
    places = [len(sample) * piece // pieces for piece in range(1, pieces)]
    bounds = list(dict.fromkeys(sample[place] for place in places)) if sample else []
    return sources, [_Range(*ends) for ends in itertools.pairwise([None, *bounds, None])]
