"""Read and check the user's labelled sample of the gallery, which becomes the probe set.

probe.manifest -> read_sample, in the first seconds -> find_rows, once the gallery is normalised -> `probe_draw`
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import parallel
from pipeline.config.method import ProbeSettings
from pipeline.config.tree import ColumnNames
from pipeline.errors import DataError
from pipeline.manifest import normalised
from pipeline.manifest.columns import check_columns, check_ids
from pipeline.manifest.normalised import Manifest
from pipeline.manifest.partition import Partition, read_ids
from pipeline.run import Run
from pipeline.storage import parquet

_MOST = 200_000  # images: the measurement of each snapshot is quadratic in them
_FEWEST = 2
_EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class Sample:
    """The images of the gallery to measure on."""

    # Sorted by `id`, int64 or string as in the gallery's `columns.id`; `label` and, if given, `group`: strings or
    # null
    rows: pa.Table
    digest: str  # of the rows, whatever their order and files
    where: str  # the setting and the files, for messages

    @property
    def has_integers(self) -> bool:
        """Whether its ids are integers."""
        return bool(pa.types.is_integer(self.rows.schema.field("id").type))


def read_sample(source: ProbeSettings) -> Sample:
    """Read and check `probe.manifest`.

    Raises:
        DataError: a file or a column is missing or of a wrong type, an id is null, negative or repeated, ids are
            integers in one file and strings in another, or there are too few or too many rows.
    """
    assert source.manifest is not None, "the config names a sample"
    names = ColumnNames(**source.columns.model_dump())
    columns = sorted(set(names.model_dump(exclude_none=True).values()))
    kinds: dict[bool, str] = {}
    tables, count = [], 0
    for uri in normalised.files(source.manifest):
        with parquet.open_parquet(uri) as file:
            check_columns(file.schema_arrow, names, {}, uri)
            check_ids(file.schema_arrow, names.id, kinds, uri)
            count += file.metadata.num_rows
            _check_count(count, 0, uri)
            tables.append(_rows(file.read(columns=columns), names, uri))
    rows = pa.concat_tables(tables).sort_by("id")
    where = f"probe.manifest: {', '.join([source.manifest] if isinstance(source.manifest, str) else source.manifest)}"
    _check_count(count, _FEWEST, where)
    repeats = np.flatnonzero(pc.equal(rows["id"][1:], rows["id"][:-1]).to_numpy())
    if len(repeats):
        raise DataError(
            "the probe sample has a repeated id",
            expected="unique ids",
            found=_shown(rows["id"].take(pa.array(repeats)), len(repeats)),
            where=f"{where}: column {names.id}",
        )
    return Sample(rows, hashlib.sha256(json.dumps(rows.to_pydict()).encode()).hexdigest(), where)


def check_kind(sample: Sample, column: str | None, integers: bool) -> None:
    """Check that the sample's ids have the type of the gallery's ids; `column` is `gallery.columns.id`.

    Raises:
        DataError: they do not, or the gallery has no ids.
    """
    if column is None:
        raise DataError(
            "a probe sample needs a gallery with ids",
            expected="the name of a column",
            where="gallery.columns.id",
        )
    if sample.has_integers != integers:
        kinds = {True: "integers", False: "strings"}
        raise DataError(
            "the probe sample's ids have another type than the gallery's",
            expected=f"{kinds[integers]}, as in the gallery's column {column}",
            found=kinds[sample.has_integers],
            where=sample.where,
        )


def find_rows(run: Run, gallery: Manifest, sample: Sample, column: str | None) -> pa.Table:
    """The rows of the normalised gallery that a sample names, in no order, with the sample's labels and groups.

    Raises:
        DataError: the ids have another type than `column`, or some are not in the gallery.
    """
    check_kind(sample, column, parquet.read_parquet(run.part("gallery", 0), ["key"])["key"].null_count > 0)
    name = "id" if sample.has_integers else "key"
    wanted = sample.rows["id"].combine_chunks()
    parts = range(len(gallery.rows))
    found = pa.concat_tables(parallel.each(_find, (run, name, wanted), parts, gallery.num_rows))
    missing = sample.rows.filter(pc.invert(pc.is_in(sample.rows["id"], value_set=found[name].combine_chunks())))["id"]
    if len(missing):
        raise DataError(
            "images of the probe sample are not in the gallery",
            expected=f"ids of the gallery's column {column}",
            found=f"{len(missing):,} of {len(wanted):,} ids are missing there: {_shown(missing, len(missing))}",
            where=sample.where,
        )
    found = found.sort_by(name)  # the order of the sample's rows, which are as many
    for role in sample.rows.schema.names[1:]:
        found = found.set_column(found.schema.get_field_index(role), role, sample.rows[role])
    return found


def _rows(table: pa.Table, names: ColumnNames, uri: str) -> pa.Table:
    count = table.num_rows
    ids, keys = read_ids(table, names.id, Partition(uri, [], 0, 0, count), np.arange(count))
    columns = {"id": ids if pa.types.is_integer(table[names.id].type) else keys}
    for role in ("label", "group"):
        name = getattr(names, role)
        if name is not None:
            columns[role] = table[name].cast(pa.string())
    return pa.table(columns)


def _check_count(count: int, fewest: int, where: str) -> None:
    if not fewest <= count <= _MOST:
        raise DataError(
            f"the probe sample has too {'few' if count < fewest else 'many'} images",
            expected=f"{_FEWEST} to {_MOST:,}",
            found=count,
            where=where,
        )


def _find(run: Run, name: str, wanted: pa.Array, part: int) -> pa.Table:
    """The wanted rows of a part of the gallery; reads only row groups that hold one."""
    with parquet.open_parquet(run.part("gallery", part)) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        there = pc.is_in(file.read([name])[name], value_set=wanted).to_numpy()
        groups = np.unique(np.repeat(np.arange(len(sizes)), sizes)[there])
        rows = file.read_row_groups(groups.tolist())
    return rows.filter(pc.is_in(rows[name], value_set=wanted))


def _shown(values: pa.ChunkedArray, count: int) -> str:
    examples = ", ".join(map(str, values.slice(0, _EXAMPLES).to_pylist()))
    return examples + (", ..." if count > _EXAMPLES else "")
