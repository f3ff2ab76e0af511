"""The gallery of a run as arrays sorted by id: row i of every array is the same image.

The whole gallery is in memory, so this is for measuring, not for the backfill.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import parallel
from pipeline.arrays import Bools, Float32, Int64, vectors_from_arrow
from pipeline.embedding import vector_log
from pipeline.embedding.reject_rules import gallery_log
from pipeline.errors import DataError
from pipeline.hashing import splitmix64
from pipeline.planning.plan import transformed_parts
from pipeline.run import Run
from pipeline.storage import objects, parquet
from pipeline.storage.part_files import list_parts

_SALT = 0x6A11E2  # makes this sample independent of other choices by a hash of ids
_COLUMNS = ["id", "wave", "priority", "uncertainty", "label", "group", "vector"]


@dataclass(frozen=True, slots=True)
class GalleryArrays:
    """N images, sorted by id."""

    ids: Int64  # (N,) int64, unique
    labels: Int64  # (N,) int64, an index into `label_names`; -1 for none
    groups: Int64  # (N,) int64, an index into `group_names`; -1 for none
    label_names: tuple[str, ...]  # sorted
    group_names: tuple[str, ...]  # sorted
    old: Float32  # (N, d_old) float32
    transformed: Float32  # (N, d_new) float32
    embedded: Float32  # (N, d_new) float32; the transformed vector if there is no new embedding
    embedded_mask: Bools  # (N,) bool, whether the new embedding is known, from the log or the manifest
    rejected: Bools  # (N,) bool, whether the image could not be embedded
    uncertainty: Float32  # (N,) float32
    priority: Float32  # (N,) float32, the run's policy; the highest is embedded first
    wave: NDArray[np.int32]  # (N,) int32, from 1


def load_gallery(run: Run) -> GalleryArrays:
    """Read the transformed gallery, the old embeddings and the vector log of a run.

    New embeddings that came with the manifest (`gallery.columns.new_embedding`) fill what is not in the log yet.

    Raises:
        DataError: the gallery is not transformed yet, an id is repeated, or an old embedding is missing.
    """
    table = _sorted(transformed_table(run, _COLUMNS), run.path("transformed"))
    ids = table["id"].to_numpy()
    labels, label_names = codes_of(table["label"])
    groups, group_names = codes_of(table["group"])
    transformed = vectors_from_arrow(table["vector"])
    embedded, embedded_mask = transformed.copy(), np.zeros(len(ids), np.bool_)
    log = _read_vectors(_log_parts(run.path("embedded")), "vector", run.path("embedded"))
    if log is not None:
        rows = find_rows(ids, log[0], run.path("embedded"))
        embedded[rows], embedded_mask[rows] = log[1], True
    rejected = np.isin(ids, _rejected_ids(run)) & ~embedded_mask
    given = None if embedded_mask.all() else _read_vectors(_manifest_parts(run), "new_embedding", run.path("gallery"))
    if given is not None:
        rest = np.flatnonzero(~embedded_mask)
        embedded[rest], embedded_mask[rest] = given[1][find_rows(given[0], ids[rest], run.path("gallery"))], True
    return GalleryArrays(
        ids=ids,
        labels=labels,
        groups=groups,
        label_names=label_names,
        group_names=group_names,
        old=_old_embeddings(run, ids),
        transformed=transformed,
        embedded=embedded,
        embedded_mask=embedded_mask,
        rejected=rejected,
        uncertainty=table["uncertainty"].to_numpy(),
        priority=table["priority"].to_numpy(),
        wave=table["wave"].to_numpy(),
    )


def transformed_table(run: Run, columns: list[str]) -> pa.Table:
    """Columns of the scored gallery, in no order.

    Raises:
        DataError: there is none yet.
    """
    parts = transformed_parts(run)
    if not parts:
        raise DataError(
            "the gallery is not transformed yet", where=run.path("transformed"), remedy="run `fastfill backfill`"
        )
    return pa.concat_tables([parquet.read_parquet(part, columns) for part in parts])


def labelled_sample(run: Run, num_parts: int, num_gallery: int, most: int, other_than: Int64) -> tuple[pa.Table, int]:
    """Draw planned images with a label, by a hash of their ids; tasks read a large gallery.

    Args:
        run: the run as the plan laid it out (`Plan.laid_out`).
        most: how many are drawn; all if there are fewer.
        other_than: (n,) ids that are left out.

    Returns:
        id, label and vector, in no order; and the number of labelled images in the gallery.
    """
    shared, parts = (run, other_than), range(num_parts)
    total = count_labelled(run, num_parts, num_gallery, other_than)
    share = most / max(1, total)
    table = pa.concat_tables(parallel.each(_labelled, (*shared, share), parts, num_gallery))
    if table.num_rows > most:  # the hash gave a few too many
        chance = splitmix64(table["id"].to_numpy(), _SALT)
        table = table.take(pa.array(np.sort(np.argsort(chance)[:most])))
    return table, total


def count_labelled(run: Run, num_parts: int, num_gallery: int, other_than: Int64) -> int:
    """The number of planned images with a label; arguments as in `labelled_sample`."""
    return sum(parallel.each(_count_labelled, (run, other_than), range(num_parts), num_gallery))


def _count_labelled(run: Run, other_than: Int64, part: int) -> int:
    rows = parquet.read_parquet(run.transformed_part(part), ["id", "label"])
    return int((rows["label"].is_valid().to_numpy() & ~np.isin(rows["id"].to_numpy(), other_than)).sum())


def _labelled(run: Run, other_than: Int64, share: float, part: int) -> pa.Table:
    """The rows of a part whose hash is in the given share of all hashes."""
    rows = parquet.read_parquet(run.transformed_part(part), ["id", "label", "vector"])
    ids = rows["id"].to_numpy()
    wanted = rows["label"].is_valid().to_numpy() & ~np.isin(ids, other_than)
    if share < 1:
        wanted &= splitmix64(ids, _SALT) < np.uint64(share * 2**64)
    return rows.filter(pa.array(wanted))


def has_labels(run: Run) -> bool:
    """Whether quality can be measured: two images of one part share a label."""
    for part in transformed_parts(run):
        labels = parquet.read_parquet(part, ["label"])["label"].drop_null()
        if len(labels.unique()) < len(labels):
            return True
    return False


def new_embeddings_given(run: Run) -> bool:
    """Whether new embeddings came with the gallery's manifest; then a curve needs no backfill."""
    parts = _manifest_parts(run)
    if not parts:
        return False
    with parquet.open_parquet(parts[0]) as file:
        return "new_embedding" in file.schema_arrow.names


def check_known(gallery: GalleryArrays, run: Run, *, labelled_only: bool = False) -> None:
    """Refuse to measure before all images are embedded: those embedded first are not typical.

    Args:
        labelled_only: only labelled images have to be embedded.

    Raises:
        DataError: images are neither embedded nor rejected yet.
    """
    wanted = gallery.labels >= 0 if labelled_only else np.ones(len(gallery.ids), np.bool_)
    missing = int((wanted & ~gallery.embedded_mask & ~gallery.rejected).sum())
    if not missing:
        return
    count, what = int(wanted.sum()), "labelled image" if labelled_only else "image"
    raise DataError(
        f"the quality cannot be measured before every {what} is embedded",
        expected=f"{count} images embedded or rejected",
        found=f"{100 * (1 - missing / count):.1f} % of them ({missing} are missing)",
        where=run.path("embedded"),
        remedy="run `fastfill backfill` to the end. If your manifest has new embeddings, name their column in "
        "gallery.columns.new_embedding when you start a run",
    )


def query_rows(gallery: GalleryArrays) -> Int64:
    """The rows that can be queries, (Q,) int64: new embedding and label are known.

    Raises:
        DataError: there are none.
    """
    rows = np.flatnonzero(gallery.embedded_mask & (gallery.labels >= 0))
    if not len(rows):
        raise DataError(
            "the quality cannot be measured",
            expected="embedded images with a label",
            found=f"{int(gallery.embedded_mask.sum())} embedded, {int((gallery.labels >= 0).sum())} with a label",
            remedy="name the label column in gallery.columns.label, and run `fastfill backfill`",
        )
    return rows


def find_rows(ids: Int64, wanted: Int64, where: str) -> Int64:
    """The row of each wanted id in the sorted `ids`, (n,) int64.

    Raises:
        DataError: an id is not in the gallery.
    """
    rows = np.minimum(np.searchsorted(ids, wanted), len(ids) - 1)
    strangers = wanted[ids[rows] != wanted]
    if len(strangers):
        found = f"{len(strangers)} other ids, such as {strangers[:3].tolist()}"
        raise DataError("an id is not in the gallery", expected="ids of transformed images", found=found, where=where)
    return rows


def codes_of(column: pa.ChunkedArray[pa.StringScalar]) -> tuple[Int64, tuple[str, ...]]:
    """Encode a column of names: (N,) int64 into the sorted names, -1 for null; and these names."""
    encoded = column.combine_chunks().dictionary_encode()
    names = encoded.dictionary.to_numpy(zero_copy_only=False).astype(np.str_)
    rank = np.empty(len(names), np.int64)
    order = np.argsort(names)
    rank[order] = np.arange(len(names))
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    known = codes >= 0
    codes[known] = rank[codes[known]]
    return codes, tuple(str(name) for name in names[order])


def _old_embeddings(run: Run, ids: Int64) -> Float32:
    """(N, d_old), from the manifest or from the log of those that were computed."""
    folder = run.path("gallery")
    log = _log_parts(objects.join(folder, "old"))
    found = None if log else _read_vectors(_manifest_parts(run), "old_embedding", folder)
    found = found or _read_vectors(log, "vector", folder)
    missing = np.setdiff1d(ids, found[0]) if found else ids
    if found is None or len(missing):
        raise DataError(
            "old embeddings are missing",
            expected=f"one for each of {len(ids)} images",
            found=f"none for {len(missing)}, such as {missing[:3].tolist()}",
            where=folder,
        )
    return found[1][np.searchsorted(found[0], ids)]


def _log_parts(folder: str) -> list[str]:
    return list(vector_log.part_files(folder).values())


def _manifest_parts(run: Run) -> list[str]:
    return list(list_parts(run.path("gallery")).values())


def _read_vectors(uris: list[str], column: str, where: str) -> tuple[Int64, Float32] | None:
    """Sorted ids and their vectors, from all files; None if the column is missing."""
    tables = []
    for uri in uris:
        with parquet.open_parquet(uri) as file:
            if column not in file.schema_arrow.names:
                return None
            tables.append(file.read(columns=["id", column]))
    if not tables:
        return None
    table = _sorted(pa.concat_tables(tables), where)
    return table["id"].to_numpy(), vectors_from_arrow(table[column])


def _rejected_ids(run: Run) -> Int64:
    ids: Int64 = vector_log.read_rejects(gallery_log(run))["id"].to_numpy()
    return ids


def _sorted(table: pa.Table, where: str) -> pa.Table:
    ids = table["id"].to_numpy()
    order = np.argsort(ids, kind="stable")
    twice = np.flatnonzero(np.diff(ids[order]) == 0)
    if len(twice):
        found = f"{len(twice)} repeated ids, such as {ids[order][twice[:3]].tolist()}"
        raise DataError("an id is repeated", expected="each id once", found=found, where=where)
    return table.take(order).combine_chunks()
