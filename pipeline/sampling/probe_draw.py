"""Choose the probe set: a sample of the gallery's own images, on which every snapshot is measured.

    gallery/part-* (and probe.manifest) -> draw -> probe-set/part-00000

Which images it holds is a function of their ids and their number alone, or of the user's sample. A run that is
started again, anywhere, has the same ones. `probe_set` reads them once they are embedded.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import parallel
from pipeline.arrays import Int64
from pipeline.config.tree import Config, num_from_gallery
from pipeline.errors import IncompatibleRun
from pipeline.hashing import splitmix64
from pipeline.manifest import normalised
from pipeline.manifest.normalised import Manifest
from pipeline.run import GALLERY_PAIRS, PROBE_SET, Run
from pipeline.sampling.probe_labels import find_rows, read_sample
from pipeline.storage import parquet

_SALT = 0x9120BE  # of this sample alone: whatever else is chosen by a hash of ids is independent of it
_LEAST = 200  # images that a small gallery gives, as far as it has them
_SHARE = 10  # of a larger gallery at most one image in so many


def size(wanted: int, num_gallery: int) -> int:
    """How many images are drawn where so many are wanted."""
    return min(wanted, max(_LEAST, num_gallery // _SHARE), num_gallery)


def draw(config: Config, run: Run) -> Manifest | None:
    """Choose the images and write where they are as a normalised manifest; nothing where that is done.

    These are the images of the user's sample with its labels, or else some by chance, whose number is that of the
    first time. If the gallery's parts were written again (its images were moved, or are read otherwise), these are too.

    Returns:
        the manifest; None where there is to be no probe set.

    Raises:
        DataError: the sample cannot be used, or names images that the gallery does not have.
        IncompatibleRun: the set was drawn with another sample, or with none.
    """
    if not config.probe.images:
        return None
    gallery, done = normalised.read_manifest(run, "gallery"), normalised.read_manifest(run, PROBE_SET)
    assert gallery is not None, "the gallery is normalised before images are drawn from it"
    sample = None if config.probe.manifest is None else read_sample(config.probe)
    digest = "" if sample is None else sample.digest
    if done is not None:
        _check_sample(run, done.sample, digest)
        if normalised.is_drawn_from(done, gallery):
            return done
    if sample is None:
        pairs = normalised.ids_of(run, GALLERY_PAIRS)  # none where the set is drawn when the run starts
        room = gallery.num_rows - max(len(pairs), num_from_gallery(config, gallery.num_rows))
        count = done.num_rows if done is not None else max(1, min(size(config.probe.images, gallery.num_rows), room))
        rows = _by_chance(run, gallery, count, pairs)
    else:
        rows = find_rows(run, gallery, sample, config.gallery.columns.id)
    return normalised.write_drawn(run, PROBE_SET, gallery, rows.sort_by("id"), digest)


def _check_sample(run: Run, drawn: str, given: str) -> None:
    """The set is what it was drawn from; both are digests of a sample, or empty."""
    if drawn == given:
        return
    found = "no sample" if not given else "another sample" if drawn else "a sample"
    raise IncompatibleRun(
        "the probe set of this run was drawn already, and stays as it is",
        expected=f"the sample of digest {drawn[:16]}" if drawn else "no sample: its images were drawn by chance",
        found=found + (f", of digest {given[:16]}" if given else ""),
        where=f"probe.manifest, {run.path(PROBE_SET, 'manifest.json')}",
        remedy="put the sample back as it was, or start beside it with `fastfill backfill --new-run`",
    )


def _by_chance(run: Run, gallery: Manifest, count: int, excluded: Int64) -> pa.Table:
    """The rows of the gallery with the lowest hashes, but for some."""
    found = list(parallel.each(_lowest, (run, count, excluded), range(len(gallery.rows)), gallery.num_rows))
    hashes = np.concatenate([some for some, _ in found])
    limit = np.sort(hashes)[count - 1]  # unique: the hash is a bijection, and so are ids
    return pa.concat_tables([rows.filter(pa.array(some <= limit)) for some, rows in found])


def _lowest(run: Run, count: int, excluded: Int64, part: int) -> tuple[NDArray[np.uint64], pa.Table]:
    """Of a part of the gallery, the rows with the lowest hashes, as many as are wanted in all, and these hashes."""
    uri = run.part("gallery", part)
    ids: Int64 = parquet.read_parquet(uri, ["id"])["id"].to_numpy()
    hashes = splitmix64(ids, _SALT)
    order = np.argsort(hashes)
    chosen = order[~np.isin(ids[order], excluded)][:count]
    rows = parquet.read_parquet(uri).take(pa.array(np.sort(chosen)))
    return hashes[np.sort(chosen)], rows
