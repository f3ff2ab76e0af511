"""Try a few images of a normalised manifest before any work: a wrong root, bucket or shape spoils all of them.

Runs as a Ray task, where the images will be read. Changes nothing. It does not judge: that some images are bad
is no news, that all of them are is for the caller to say.
"""

from __future__ import annotations

import numpy as np

from pipeline import parquet
from pipeline.config import Config, Preprocess
from pipeline.fetch import Place, Reject, fetch
from pipeline.images import decode_image, image_limits
from pipeline.manifest import Manifest
from pipeline.run import Run
from pipeline.schema import LOCATION

NUM_PROBED = 8


def probe(config: Config, run: Run, folder: str, rows: Manifest, preprocess: Preprocess) -> tuple[int, list[str]]:
    """Read and decode some images that are spread over a manifest.

    Returns:
        how many were tried, and of those that cannot be read the place and the reason.

    Raises:
        DataError: a store refuses the credentials.
        TransientError: a store kept failing.
    """
    limits = image_limits(config)
    places = _places(run, folder, rows)
    bad = []
    for place, (data, _) in zip(places, fetch(places, limits.max_bytes, config.fetch, limits.root), strict=True):
        try:
            if isinstance(data, Reject):
                raise data
            decode_image(data, preprocess, limits)
        except Reject as reject:
            bad.append(f"{place.uri}{'' if place.row is None else f' row {place.row}'}: {reject}")
    return len(places), bad


def _places(run: Run, folder: str, rows: Manifest) -> list[Place]:
    ends = np.cumsum(rows.rows)
    found = []
    for position in np.unique(np.linspace(0, rows.num_rows - 1, NUM_PROBED).astype(np.int64)).tolist():
        part = int(np.searchsorted(ends, position, side="right"))
        group, row = divmod(position - int(ends[part]) + rows.rows[part], rows.unit_rows)
        columns = [field.name for field in LOCATION]
        table = parquet.read_parquet(run.part(folder, part), columns, [group])
        found.append(Place(**table.slice(row, 1).to_pylist()[0]))
    return found
