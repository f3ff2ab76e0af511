"""Draw the probe set: a sample of the gallery's images on which every snapshot is measured.

    gallery/part-* (and probe.manifest) -> draw -> probe-set/part-00000

It depends on the ids and their number alone, or on the user's sample, so a run that starts again has the same images.
`evaluation.probe_set` reads them once they are embedded.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import parallel
from pipeline.arrays import Int64
from pipeline.config.method import ProbeSettings
from pipeline.config.tree import GallerySettings, PairsSettings
from pipeline.errors import IncompatibleRun
from pipeline.hashing import splitmix64
from pipeline.manifest import normalised
from pipeline.manifest.normalised import Manifest
from pipeline.run import GALLERY_PAIRS, PROBE_SET, Run
from pipeline.sampling.probe_labels import find_rows, read_sample
from pipeline.storage import parquet

_SALT = 0x9120BE  # makes this sample independent of other choices by a hash of the ids
_LEAST = 200  # images of a small gallery, if it has as many
_SHARE = 10  # of a larger gallery at most one image in 10


def size(wanted: int, num_gallery: int) -> int:
    """The number of images to draw if `wanted` are asked for."""
    return min(wanted, max(_LEAST, num_gallery // _SHARE), num_gallery)


def draw(run: Run, gallery: GallerySettings, pairs: PairsSettings, probe: ProbeSettings) -> Manifest | None:
    """Draw the images and write a normalised manifest of them; None if `probe.images` is 0.

    They are the images of the user's sample with its labels, or else drawn at random. A drawn set is kept: if the
    gallery's parts were written again, so is the manifest.

    Raises:
        DataError: the sample cannot be used, or names images that the gallery does not have.
        IncompatibleRun: the set was drawn with another sample, or with none.
    """
    if not probe.images:
        return None
    images, done = normalised.read_manifest(run, "gallery"), normalised.read_manifest(run, PROBE_SET)
    assert images is not None, "the gallery is normalised before images are drawn from it"
    sample = None if probe.manifest is None else read_sample(probe)
    digest = "" if sample is None else sample.digest
    if done is not None:
        _check_sample(run, done.sample, digest)
        if normalised.is_drawn_from(done, images):
            return done
    if sample is None:
        drawn = normalised.ids_of(run, GALLERY_PAIRS)  # empty if the set is drawn at the start of the run
        room = images.num_rows - max(len(drawn), pairs.num_from_gallery(images.num_rows))
        count = done.num_rows if done is not None else max(1, min(size(probe.images, images.num_rows), room))
        rows = _by_chance(run, images, count, drawn)
    else:
        rows = find_rows(run, images, sample, gallery.columns.id)
    return normalised.write_drawn(run, PROBE_SET, images, rows.sort_by("id"), digest)


def _check_sample(run: Run, drawn: str, given: str) -> None:
    """Refuse another sample than the set was drawn from; both are digests, empty without a sample."""
    if drawn == given:
        return
    found = "no sample" if not given else "another sample" if drawn else "a sample"
    raise IncompatibleRun(
        "the probe set of this run was drawn already and cannot be replaced",
        expected=f"the sample of digest {drawn[:16]}" if drawn else "no sample: its images were drawn at random",
        found=found + (f", of digest {given[:16]}" if given else ""),
        where=f"probe.manifest, {run.path(PROBE_SET, 'manifest.json')}",
        remedy="restore the sample, or start a new run with `fastfill backfill --new-run`",
    )


def _by_chance(run: Run, gallery: Manifest, count: int, excluded: Int64) -> pa.Table:
    """The rows of the gallery with the lowest hashes, without the excluded ids."""
    found = list(parallel.each(_lowest, (run, count, excluded), range(len(gallery.rows)), gallery.num_rows))
    hashes = np.concatenate([some for some, _ in found])
    limit = np.sort(hashes)[count - 1]  # unique: ids are, and the hash is a bijection
    return pa.concat_tables([rows.filter(pa.array(some <= limit)) for some, rows in found])


def _lowest(run: Run, count: int, excluded: Int64, part: int) -> tuple[NDArray[np.uint64], pa.Table]:
    """The `count` rows of a part with the lowest hashes, and these hashes."""
    uri = run.part("gallery", part)
    ids: Int64 = parquet.read_parquet(uri, ["id"])["id"].to_numpy()
    hashes = splitmix64(ids, _SALT)
    order = np.argsort(hashes)
    chosen = order[~np.isin(ids[order], excluded)][:count]
    rows = parquet.read_parquet(uri).take(pa.array(np.sort(chosen)))
    return hashes[np.sort(chosen)], rows
