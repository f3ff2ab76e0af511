"""The embeddings of a normalised manifest: given by the manifest, or computed from its images by the embedding stream.

Computed embeddings go into a vector log beside the parts, in which a part's number takes the place of the wave. Also
checks, before a run, that a sample of the images can be read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pyarrow as pa

from pipeline.arrays import Float32, vectors_from_arrow
from pipeline.config.tree import BackfillSettings, EncoderSettings, EncodersSettings, PreprocessSettings
from pipeline.embedding import reject_rules, vector_log
from pipeline.embedding.decode import decode_image
from pipeline.embedding.fetch import Place, Reject, fetch
from pipeline.embedding.stream import StreamSettings, Work, embed_stream
from pipeline.embedding.vector_log import VectorLog
from pipeline.errors import ConfigError
from pipeline.manifest import normalised
from pipeline.manifest.normalised import Manifest
from pipeline.run import GALLERY_PAIRS, PROBE_SET, Run
from pipeline.schema import LOCATION, Unit
from pipeline.storage import parquet

NUM_CHECKED = 8

logger = logging.getLogger(__name__)

_BOTH = ("old", "new")
_NEEDED = {"gallery": ("old",), "pairs": _BOTH, GALLERY_PAIRS: _BOTH, PROBE_SET: _BOTH}
_LOST = {
    "gallery": "they have no vector, so they are not served",
    "pairs": "they are left out of the fit",
    GALLERY_PAIRS: "they are left out of the fit",
    PROBE_SET: "snapshots are not measured on them",
}

OnUnits = Callable[[str, int, int], None]
"""Called with (what, images done, images in all) as images are embedded."""


def embed_missing(
    run: Run, folders: Sequence[str], encoders: EncodersSettings, settings: StreamSettings, on_units: OnUnits
) -> None:
    """Embed the images of normalised manifests whose embeddings were not given, all in one stream.

    The gallery needs old embeddings; pairs and the probe set need both. A warning says how many images cannot be read,
    and where the reasons are. `folders` are among `gallery`, `pairs`, `gallery-pairs` and `probe-set`.

    Raises:
        ConfigError: there is no encoder for missing embeddings.
        DataError: more images than `max_reject_fraction` cannot be read.
    """
    names, work, done, total, rejected = [], [], [], [], []
    for folder in folders:
        rows = normalised.read_manifest(run, folder)
        assert rows is not None, f"the {folder} manifest is normalised before its images are embedded"
        for role in _missing(folder, rows):
            log = embedding_log(encoders, run, folder, role)
            units = _pending(run, folder, rows, log)
            names.append((folder, role))
            work.append(Work(_encoder(encoders, folder, role), log, units))
            total.append(rows.num_rows)
            done.append(rows.num_rows - sum(unit.images for unit in units))
            rejected.append(sum(vector_log.count_log_rejects(log).values()))
            _check_rejects(settings.backfill, folder, rejected[-1], total[-1], log)
            if units:
                on_units(f"{folder}: {role} embeddings", done[-1], total[-1])
    for index, ack in embed_stream(work, settings):
        (folder, role), log = names[index], work[index].log
        done[index] += ack.embedded + ack.rejected
        rejected[index] += ack.rejected
        _check_rejects(settings.backfill, folder, rejected[index], total[index], log)
        on_units(f"{folder}: {role} embeddings", done[index], total[index])
    for (folder, role), item, bad, images in zip(names, work, rejected, total, strict=True):
        if bad:
            _warn(folder, role, bad, images, item.log)


def embedding_log(encoders: EncodersSettings, run: Run, folder: str, role: str) -> VectorLog:
    """The vector log of embeddings that were computed from a manifest's images; `role` is old or new."""
    encoder = getattr(encoders, role)
    dim = encoder.dim if encoder is not None else 1
    return reject_rules.manifest_log(run, folder, role, dim)


def read_embeddings(run: Run, folder: str, part: int, role: str, log: VectorLog) -> tuple[pa.Table, Float32]:
    """The rows (n) of a normalised part that have an embedding, and these embeddings, (n, d) float32 in their order.

    `role` is the embedding's column; without such a column the embeddings are in `log`.
    """
    rows = parquet.read_parquet(run.part(folder, part))
    if role in rows.schema.names:
        return rows.drop_columns([role]), vectors_from_arrow(rows[role])
    ids, vectors = vector_log.read_wave(log, part)
    if not len(ids):
        return rows.slice(0, 0), vectors
    wanted = rows["id"].to_numpy()
    places = np.minimum(np.searchsorted(ids, wanted), len(ids) - 1)
    there = ids[places] == wanted
    return rows.filter(pa.array(there)), vectors[places[there]]


def check_readable(
    run: Run, folder: str, rows: Manifest, preprocess: PreprocessSettings, settings: StreamSettings
) -> tuple[int, list[str]]:
    """Read and decode a few images spread over a manifest.

    Returns:
        how many were tried; and for each that cannot be read, its place and the reason.

    Raises:
        DataError: a store refuses the credentials.
        TransientError: a store kept failing.
    """
    limits, places = settings.limits, _places(run, folder, rows)
    bad = []
    for place, (data, _) in zip(places, fetch(places, limits.max_bytes, settings.fetch, limits.root), strict=True):
        try:
            if isinstance(data, Reject):
                raise data
            decode_image(data, preprocess, limits)
        except Reject as reject:
            bad.append(f"{place.uri}{'' if place.row is None else f' row {place.row}'}: {reject}")
    return len(places), bad


def _check_rejects(backfill: BackfillSettings, folder: str, rejected: int, images: int, log: VectorLog) -> None:
    """Stop on too many rejects. The probe set is exempt: its images count in their own waves."""
    if folder != PROBE_SET:
        reject_rules.check_manifest(rejected, images, backfill, folder, log.rejects_uri)


@cache
def _warn(folder: str, role: str, rejected: int, images: int, log: VectorLog) -> None:
    """Once per process: the backfill comes here for all manifests, and then for each."""
    logger.warning(
        "%d of %d images of the %s cannot be read by the %s encoder: %s. The reasons are in %s; `fastfill status` "
        "shows them.",
        *(rejected, images, folder, role, _LOST[folder], log.rejects_uri),
    )


def _missing(folder: str, rows: Manifest) -> list[str]:
    return [role for role in _NEEDED[folder] if f"{role}_embedding" not in rows.dims]


def _encoder(encoders: EncodersSettings, folder: str, role: str) -> EncoderSettings:
    encoder: EncoderSettings | None = getattr(encoders, role)
    if encoder is None:
        raise ConfigError(
            f"the {folder} has no {role} embeddings, and there is no {role} encoder to compute them",
            where=f"{'pairs' if folder == 'pairs' else 'gallery'}.columns.{role}_embedding, encoders.{role}",
        )
    return encoder


def _pending(run: Run, folder: str, rows: Manifest, log: VectorLog) -> list[Unit]:
    finished = {(wave, unit) for wave, units in vector_log.finished_units(log).items() for unit in units}
    return [unit for unit in normalised.units(run, folder, rows) if (unit.wave, unit.unit) not in finished]


def _places(run: Run, folder: str, rows: Manifest) -> list[Place]:
    ends = np.cumsum(rows.rows)
    found = []
    for position in np.unique(np.linspace(0, rows.num_rows - 1, NUM_CHECKED).astype(np.int64)).tolist():
        part = int(np.searchsorted(ends, position, side="right"))
        group, row = divmod(position - int(ends[part]) + rows.rows[part], rows.unit_rows)
        columns = [field.name for field in LOCATION]
        table = parquet.read_parquet(run.part(folder, part), columns, [group])
        found.append(Place(**table.slice(row, 1).to_pylist()[0]))
    return found
