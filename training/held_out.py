"""The held-out pairs of a run as its transformation sees them: what is simulated before the gallery is touched.

Guarantee: the same run gives the same rows. The policies' reference was made of these very pairs: a pair is not its own
neighbour in it, but `learned` has seen its harm.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pipeline import offset as offsets
from pipeline import storage
from pipeline.config import Config
from pipeline.offset import Offset
from pipeline.reference import Reference, load_reference
from pipeline.run import Run
from pipeline.schema import Float32, splitmix64
from pipeline.transformation import apply, load_transformation, read_part
from training.learner import Job, make_arrays
from training.pairs import build_pairs, fit_data
from training.select import APPLY_BATCH, Fold

_MOST_PAIRS = 5000
SALT = 0x51AB


@dataclass(frozen=True, slots=True)
class HeldOut:
    """N pairs: as the network gives them, as they are served (N, d) float32, their groups (N,) str or None."""

    fold: Fold
    served: Float32
    groups: NDArray[np.object_]
    reference: Reference | None


def held_out(config: Config, run: Run) -> HeldOut:
    """The held-out pairs of a run with a transformation, 5,000 at most, by ascending index.

    Raises:
        DataError: a file of the transformation is missing or damaged.
    """
    pairs = build_pairs(config, run)
    job = Job(config.fit, fit_data(config, run, pairs), config.seed, config.gallery.metric == "cosine", 0, 0)
    table = pa.concat_tables([storage.read_parquet(uri) for uri in job.data.held_out_parts]).sort_by("index")
    chance = splitmix64(table["index"].to_numpy(), SALT)
    table = table.take(pa.array(np.sort(np.argsort(chance, kind="stable")[:_MOST_PAIRS])))
    arrays = make_arrays(table, job)
    network, _ = load_transformation(run, torch.device("cpu"))
    z, s = apply(network, arrays.old, arrays.side, torch.device("cpu"), APPLY_BATCH)
    part = read_part(run, offsets.PART)
    served = z if part is None else Offset.from_bytes(part).apply(z, s)
    groups = table["group"].to_numpy() if "group" in table.schema.names else np.full(len(z), None, dtype=object)
    return HeldOut(Fold(arrays, z, s, None), served, groups, load_reference(run))
