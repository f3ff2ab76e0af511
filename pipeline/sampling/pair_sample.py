"""Draw pairs from the gallery: a sample of its images that both encoders embed before the fit.

    gallery/part-*, probe-set -> draw -> gallery-pairs/part-00000 -> the embedding stream -> gallery-pairs/old, new
    -> `training.fitting.pairs`; and as wave 0 of the plan -> the vector log (`planning.log_pairs`)

The sample depends on the ids, labels and number of images alone, and never changes.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import parallel
from pipeline.arrays import Float32, Int64, vectors_from_arrow
from pipeline.config.method import ProbeSettings
from pipeline.config.tree import GallerySettings, PairsSettings
from pipeline.embedding import vector_log
from pipeline.embedding.reject_rules import manifest_log
from pipeline.errors import DataError
from pipeline.hashing import splitmix64
from pipeline.manifest import normalised
from pipeline.manifest.normalised import Manifest
from pipeline.run import GALLERY_PAIRS, PROBE_SET, Run
from pipeline.sampling import probe_draw
from pipeline.storage import parquet

_SALT = 0x9A125  # makes this sample independent of other choices by a hash of the ids
_MOST_LABELS = 10_000  # with more labels the sample ignores them: at random each label gets its share, too
_ORDER = [(name, "ascending") for name in ("uri", "offset", "row", "id")]  # neighbours are read together


def draw(run: Run, gallery: GallerySettings, pairs: PairsSettings, probe: ProbeSettings) -> Manifest | None:
    """Draw the images and write a normalised manifest of them; None if no pairs come from the gallery.

    Each label has its share, and no image is in the probe set, which is drawn first. A drawn sample is kept: if the
    gallery's parts were written again since, the same images are found in them.

    Raises:
        DataError, IncompatibleRun: as `probe_draw.draw`.
    """
    probe_draw.draw(run, gallery, pairs, probe)
    images, done = normalised.read_manifest(run, "gallery"), normalised.read_manifest(run, GALLERY_PAIRS)
    assert images is not None, "the gallery is normalised before images are drawn from it"
    if done is None:
        probed = normalised.ids_of(run, PROBE_SET)
        count = min(pairs.num_from_gallery(images.num_rows, len(probed)), images.num_rows - len(probed))
        if not count:
            return None
        ids = _choose(run, images, count, probed)
    elif normalised.is_drawn_from(done, images):
        return done
    else:
        ids = normalised.ids_of(run, GALLERY_PAIRS)
    found = parallel.each(_rows_of, (run, ids), range(len(images.rows)), images.num_rows)
    return normalised.write_drawn(run, GALLERY_PAIRS, images, pa.concat_tables(found).sort_by(_ORDER))


def embedded_ids(run: Run) -> Int64:
    """The ids of the drawn images that have a new embedding, (n,) int64, sorted; empty if none are drawn."""
    drawn = normalised.read_manifest(run, GALLERY_PAIRS)
    if drawn is None:
        return np.empty(0, np.int64)
    if "new_embedding" in drawn.dims:
        return np.sort(normalised.ids_of(run, GALLERY_PAIRS))
    return vector_log.read_ids(manifest_log(run, GALLERY_PAIRS, "new"), 0)


def read_new(run: Run, ids: Int64) -> tuple[Float32, pa.Array]:
    """The new embeddings of some drawn images, given by their ids (n,) int64 in any order.

    Returns:
        (n, d) float32, and the etags of the objects that were read (null if the manifest gave the embeddings).

    Raises:
        DataError: one of them has none, or a file is damaged.
    """
    drawn, part = normalised.read_manifest(run, GALLERY_PAIRS), run.part(GALLERY_PAIRS, 0)
    assert drawn is not None, "the sample is drawn before its embeddings are asked for"
    units = np.unique(_places(parquet.read_parquet(part, ["id"])["id"].to_numpy(), ids, part) // drawn.unit_rows)
    if "new_embedding" in drawn.dims:
        rows = parquet.read_parquet(part, ["id", "new_embedding"], units.tolist())
        rows = rows.rename_columns(["id", "vector"]).append_column("source_etag", pa.nulls(len(rows), pa.string()))
        where = part
    else:
        log = manifest_log(run, GALLERY_PAIRS, "new")
        rows, where = pa.concat_tables([vector_log.read_unit(log, 0, unit) for unit in units.tolist()]), log.parts_uri
    rows = rows.take(pa.array(_places(rows["id"].to_numpy(), ids, where)))
    return vectors_from_arrow(rows["vector"]), rows["source_etag"].combine_chunks()


def _places(there: Int64, ids: Int64, where: str) -> Int64:
    """The row of each id in `there`, (n,) int64; raises DataError if one is missing."""
    order = np.argsort(there, kind="stable")
    places = order[np.minimum(np.searchsorted(there[order], ids), len(there) - 1)]
    missing = ids[there[places] != ids]
    if len(missing):
        raise DataError(
            "the embedding of an image that was embedded for the fit is missing",
            expected=f"{len(ids)} images",
            found=f"{len(missing)} are missing, such as {missing[0]}",
            where=where,
            remedy="run `fastfill repair`, then repeat this command",
        )
    return places


def _choose(run: Run, gallery: Manifest, count: int, excluded: Int64) -> Int64:
    """The ids of the sample, those with the lowest hashes of each label: (count,) int64, sorted."""
    names, totals = _labels(run, gallery, excluded, min(_MOST_LABELS, count))
    wanted = _shares(totals, count)
    codes, ids = np.empty(0, np.int64), np.empty(0, np.int64)
    parts = range(len(gallery.rows))
    for some_codes, some_ids in parallel.each(_lowest, (run, excluded, names, wanted), parts, gallery.num_rows):
        codes, ids = _keep_lowest(np.concatenate([codes, some_codes]), np.concatenate([ids, some_ids]), wanted)
    return np.sort(ids)


def _labels(run: Run, gallery: Manifest, excluded: Int64, most: int) -> tuple[pa.Array | None, Int64]:
    """The gallery's labels, sorted, and their image counts; None and the total if there are more than `most` labels."""
    counts: dict[str | None, int] = {}
    total, parts = 0, range(len(gallery.rows))
    for labels, images, rows in parallel.each(_count_labels, (run, excluded, most), parts, gallery.num_rows):
        total += rows
        for label, number in zip(labels, images, strict=True):
            if label in counts or len(counts) <= most:
                counts[label] = counts.get(label, 0) + number
    if len(counts) > most:
        return None, np.array([total])
    names = sorted(counts, key=lambda name: (name is None, name))
    return pa.array(names, pa.string()), np.array([counts[name] for name in names])


def _shares(totals: Int64, count: int) -> Int64:
    """The number of images of each label, by largest remainders; they sum to `count`."""
    exact = totals * (count / totals.sum())
    shares: Int64 = np.minimum(np.floor(exact).astype(np.int64), totals)
    largest = np.argsort(shares - exact, kind="stable")
    shares[largest[: count - shares.sum()]] += 1
    return shares


def _count_labels(run: Run, excluded: Int64, most: int, part: int) -> tuple[list[str | None], list[int], int]:
    """Up to `most` + 1 labels of a part with their numbers of images, and the number of images of the part."""
    rows = _others(run, part, excluded)
    counted = pc.value_counts(rows["label"].combine_chunks())[: most + 1]
    return counted.field("values").to_pylist(), counted.field("counts").to_pylist(), rows.num_rows


def _lowest(run: Run, excluded: Int64, names: pa.Array | None, wanted: Int64, part: int) -> tuple[Int64, Int64]:
    """The images of a part with the lowest hashes of each label, at most as many as are wanted: labels and ids."""
    rows = _others(run, part, excluded)
    if names is None:
        codes = np.zeros(rows.num_rows, np.int64)
    else:
        codes = pc.index_in(rows["label"].combine_chunks(), value_set=names).to_numpy().astype(np.int64)
    return _keep_lowest(codes, rows["id"].to_numpy(), wanted)


def _keep_lowest(codes: Int64, ids: Int64, wanted: Int64) -> tuple[Int64, Int64]:
    order = np.lexsort((splitmix64(ids, _SALT), codes))
    codes, ids = codes[order], ids[order]
    rank = np.arange(len(codes)) - np.searchsorted(codes, codes)
    kept = rank < wanted[codes]
    return codes[kept], ids[kept]


def _others(run: Run, part: int, excluded: Int64) -> pa.Table:
    rows = parquet.read_parquet(run.part("gallery", part), ["id", "label"])
    return rows.filter(pa.array(~np.isin(rows["id"].to_numpy(), excluded)))


def _rows_of(run: Run, ids: Int64, part: int) -> pa.Table:
    """The rows of a part with some ids; reads only row groups that hold one."""
    with parquet.open_parquet(run.part("gallery", part)) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        there = np.isin(file.read(["id"])["id"].to_numpy(), ids)
        groups = np.unique(np.repeat(np.arange(len(sizes)), sizes)[there])
        rows = file.read_row_groups(groups.tolist())
    return rows.filter(pa.array(np.isin(rows["id"].to_numpy(), ids)))
