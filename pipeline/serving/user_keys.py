"""Look up users' own ids: the index knows an image by a number, a user by its key.

The only place where row ids become users' ids; search and export both use it. Keys are in the gallery's parts. A
gallery with integer ids has no keys: its ids are the users' own.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.arrays import Int64
from pipeline.errors import DataError
from pipeline.run import Run
from pipeline.storage import objects, parquet
from pipeline.storage.part_files import list_parts

_PARTS_IN_MEMORY = 16  # of 131,072 images each, some megabytes


class UserKeys:
    """Looks keys up; usable from many threads; caches the parts that were read last."""

    def __init__(self, run: Run) -> None:
        """Nothing is read before the first look-up."""
        self._run = run
        self._lock = threading.Lock()
        self._parts: list[_Part] | None = None
        self._read: OrderedDict[str, pa.Table] = OrderedDict()

    def __reduce__(self) -> tuple[type[UserKeys], tuple[Run]]:
        """Pickles without the cached parts."""
        return UserKeys, (self._run,)

    @property
    def exist(self) -> bool:
        """Whether the users' ids are strings.

        Raises:
            DataError: the gallery is missing or damaged.
        """
        return bool(self._those_with_keys())

    def strings(self, ids: Int64) -> pa.Array[pa.StringScalar]:
        """The keys of ids (n,), in their order; null if an image has none. Raises as `exist`."""
        wanted = pa.array(ids, pa.int64())
        found: list[pa.Table] = []
        for part in self._those_with_keys():
            if len(ids) and np.any((ids >= part.first) & (ids <= part.last)):
                rows = self._rows(part.uri)
                found.append(rows.filter(pc.is_in(rows["id"], value_set=wanted)))
        if not found:
            return pa.nulls(len(ids), pa.string())
        table = pa.concat_tables(found)
        places = pc.index_in(wanted, value_set=table["id"].combine_chunks())
        return table["key"].combine_chunks().take(places)

    def of(self, ids: Int64) -> NDArray[np.object_]:
        """The users' own ids of ids of any shape: str, or int without keys, None if negative. Raises as `exist`."""
        flat = np.ravel(ids)
        names = flat.astype(object)
        if self.exist:
            known, places = np.unique(flat, return_inverse=True)
            strings = np.array(self.strings(known).to_pylist(), dtype=object)[places]
            names = np.where(strings == None, names, strings)  # noqa: E711 (by element)
        names[flat < 0] = None
        return names.reshape(np.shape(ids))

    def _those_with_keys(self) -> list[_Part]:
        with self._lock:
            if self._parts is None:
                self._parts = _find(self._run)
            return self._parts

    def _rows(self, uri: str) -> pa.Table:
        """`id` and `key` of a part."""
        with self._lock:
            if uri in self._read:
                self._read.move_to_end(uri)
                return self._read[uri]
        rows = parquet.read_parquet(uri, ["id", "key"])
        with self._lock:
            self._read[uri] = rows
            while len(self._read) > _PARTS_IN_MEMORY:
                self._read.popitem(last=False)
        return rows


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of the gallery that has keys, and the range of its ids."""

    uri: str
    first: int
    last: int


def _find(run: Run) -> list[_Part]:
    """The parts that hold keys, by their footers. If the first part has none, no part has."""
    folder = run.path("gallery")
    uris = list(list_parts(folder).values())
    if not uris:
        raise DataError("the run has no gallery to look ids up in", expected="part-*.parquet", where=folder)
    first = _look(uris[0])
    return [] if first is None else [first, *filter(None, objects.at_once(_look, uris[1:]))]


def _look(uri: str) -> _Part | None:
    """A part with its range of ids; None if it has no keys."""
    with parquet.open_parquet(uri) as file:
        columns = [file.schema_arrow.names.index(name) for name in ("id", "key")]
        groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    ids, keys = ([group.column(column).statistics for group in groups] for column in columns)
    if all(item is not None and item.null_count == group.num_rows for item, group in zip(keys, groups, strict=True)):
        return None
    known = [item for item in ids if item is not None and item.has_min_max]
    if len(known) < len(ids):
        return _Part(uri, 0, 2**63 - 1)
    return _Part(uri, min(item.min for item in known), max(item.max for item in known))
