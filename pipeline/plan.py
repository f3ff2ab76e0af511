"""The plan: which wave each image of the gallery belongs to, and the work units of each wave.

Guarantee: each id is in exactly one wave; wave sizes are exact; ties are broken by a stable hash of
the id, so a plan is a pure function of (priorities, waves, seed). `plan/plan.json` is written last, by
`planner`; this module reads it, and imports nothing heavy.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.errors import ConfigError
from pipeline.run import Run
from pipeline.schema import Unit
from pipeline.vector_log import VectorLog

UNITS_PER_FILE = 64  # whoever reads one of them reads the footer of all: so many are still one request
SCORED = "scored"  # folder of the scored gallery, by a digest of the plan's settings; deleted once it is laid out


@dataclass(frozen=True, slots=True)
class Wave:
    """One wave: its number from 1, its images, and the units they are cut into."""

    wave: int
    images: int
    units: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What the driver needs to know of the plan; the images are in the units files.

    Attributes:
        policy: the policy's name.
        seed: breaks ties.
        num_gallery: images in the plan.
        num_parts: parts of `transformed/`.
        num_shards: shards of the index.
        dim: width of the new space.
        unit_images: images per unit, but for the last unit of a wave.
        waves: in order.
        fingerprint: a digest of the cut points and all of the others.
        deleted_images: `keep` or `drop`, as `config.Plan` says.
        num_rejected: images of the gallery that are not in the plan: the old encoder could not read them, so
            they have no vector of any kind, and cannot be served.
    """

    policy: str
    seed: int
    num_gallery: int
    num_parts: int
    num_shards: int
    dim: int
    unit_images: int
    waves: tuple[Wave, ...]
    fingerprint: str
    deleted_images: str = "keep"
    num_rejected: int = 0

    def log(self, run: Run) -> VectorLog:
        """The vector log of the backfill."""
        return VectorLog(run.path("embedded"), run.path("rejects"), self.dim, self.num_shards)

    def units(self, run: Run) -> Iterable[Unit]:
        """All units, in wave and locality order."""
        for wave in self.waves:
            for first in range(0, wave.units, UNITS_PER_FILE):
                uri = run.wave_units(wave.wave, first)
                for unit in range(first, min(first + UNITS_PER_FILE, wave.units)):
                    yield Unit(wave.wave, unit, uri, unit - first, self.unit_size(wave.wave, unit))

    def unit_size(self, wave: int, unit: int) -> int:
        """The number of images of a unit."""
        return min(self.unit_images, self.waves[wave - 1].images - unit * self.unit_images)


def wave_sizes(waves: int | tuple[float, ...], num_gallery: int) -> list[int]:
    """The exact number of images of each wave, in order.

    A count K makes wave i a share of i in 1 + 2 + ... + K: fine at the start, where the curve is
    steepest, and coarser later. Fractions are cut at floor(cumulative * N).

    Raises:
        ConfigError: a wave would have no image.
    """
    shares = np.arange(1, waves + 1, dtype=np.float64) if isinstance(waves, int) else np.array(waves)
    ends = np.floor(np.cumsum(shares) / shares.sum() * num_gallery + 1e-9).astype(np.int64)
    ends[-1] = num_gallery
    sizes = np.diff(ends, prepend=0)
    if (sizes < 1).any():
        raise ConfigError(
            "a wave has no image",
            expected="at least one image in each wave",
            found=f"wave {int(np.flatnonzero(sizes < 1)[0]) + 1} of {len(sizes)} is empty for {num_gallery} images",
            where="plan.waves",
            remedy="ask for fewer waves",
        )
    return [int(size) for size in sizes]


def read_plan(run: Run) -> Plan | None:
    """The plan of a run, or None where it is not made yet."""
    found = storage.read_versioned(run.plan)
    if found is None:
        return None
    tree = json.loads(found[0])
    return Plan(**tree | {"waves": tuple(Wave(**wave) for wave in tree["waves"])})


def read_transformed(run: Run, plan: Plan, wave: int, columns: list[str], shards: range | None = None) -> pa.Table:
    """Columns of the transformed images of a wave, or of some of its shards, sorted by part."""
    first = (wave - 1) * plan.num_shards
    groups = [first + shard for shard in (range(plan.num_shards) if shards is None else shards)]
    parts = (run.part("transformed", part) for part in range(plan.num_parts))
    read = partial(storage.read_parquet, columns=columns, row_groups=groups)
    return pa.concat_tables(storage.at_once(read, parts))
