"""The plan: the wave of each image of the gallery, and the work units of each wave.

Each id is in exactly one wave, and wave sizes are exact. A stable hash of the id breaks ties, so a plan is a pure
function of (priorities, waves, seed). `planning.build` writes `plan/plan.json` last; this module reads it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import pyarrow as pa

from pipeline.embedding.vector_log import VectorLog
from pipeline.errors import ConfigError, IncompatibleRun
from pipeline.run import Run
from pipeline.schema import Unit
from pipeline.storage import documents, objects, parquet
from pipeline.storage.interface import Stat

FROM_PAIRS = 0
"""The wave of images that were embedded for the fit; commit 0 holds it embedded. Other waves count from 1."""

MOST_WAVES = 20  # of `auto`
_FIRST_WAVE_IMAGES = 32  # of `auto`, at least

UNITS_PER_FILE = 64  # reading one unit reads the footer of all: with 64 it still fits into one request
SCORED = "scored"  # folder of the scored gallery, by a digest of the plan's settings; deleted after laying out


@dataclass(frozen=True, slots=True)
class Wave:
    """A wave: its number, from 1 (or FROM_PAIRS), its images, and its units."""

    wave: int
    images: int
    units: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What the driver needs of the plan; the images are in the units files."""

    policy: str
    seed: int  # breaks ties
    num_gallery: int  # images in the plan
    num_parts: int  # parts of `transformed/`
    num_shards: int
    dim: int  # width of the new space
    unit_images: int  # images per unit, except the last unit of a wave
    waves: tuple[Wave, ...]  # in order; FROM_PAIRS first, if images of the gallery were embedded for the fit
    fingerprint: str  # a digest of the cut points and the other fields
    deleted_images: str = "keep"  # `keep` or `drop`, as in `config.method.PlanSettings`
    # Images of the gallery that the old encoder could not read: they have no vector, so they are not in the plan and
    # not served
    num_rejected: int = 0
    # The folder of this plan's parts in `transformed/` and `plan/`: two drivers with different scores write to
    # different folders. Empty in plans of earlier versions.
    layout: str = ""

    def laid_out(self, run: Run) -> Run:
        """The run with the paths of this plan's parts."""
        return replace(run, layout=self.layout)

    def log(self, run: Run) -> VectorLog:
        """The vector log of the backfill."""
        return VectorLog(run.path("embedded"), run.path("rejects"), self.dim, self.num_shards)

    @property
    def first_wave(self) -> int:
        """The number of the first wave: FROM_PAIRS or 1."""
        return self.waves[0].wave

    @property
    def last_wave(self) -> int:
        """The number of the last wave."""
        return self.waves[-1].wave

    @property
    def num_from_pairs(self) -> int:
        """The number of images that were embedded for the fit."""
        return self.waves[0].images if self.first_wave == FROM_PAIRS else 0

    def wave(self, number: int) -> Wave:
        """A wave by its number."""
        return self.waves[number - self.first_wave]

    def units(self, run: Run) -> Iterable[Unit]:
        """All units, in wave and locality order."""
        for wave in self.waves:
            yield from self.units_of(run, wave.wave)

    def units_of(self, run: Run, number: int) -> Iterable[Unit]:
        """The units of a wave, in locality order."""
        place, wave = self.laid_out(run), self.wave(number)
        for first in range(0, wave.units, UNITS_PER_FILE):
            uri = place.wave_units(wave.wave, first)
            for unit in range(first, min(first + UNITS_PER_FILE, wave.units)):
                yield Unit(wave.wave, unit, uri, unit - first, self.unit_size(wave.wave, unit))

    def unit_size(self, wave: int, unit: int) -> int:
        """The number of images of a unit."""
        return min(self.unit_images, self.wave(wave).images - unit * self.unit_images)

    def row_groups(self, wave: int) -> range:
        """The row groups of a wave in each part of `transformed/`, one per shard."""
        return row_groups(wave - self.first_wave, self.num_shards)


def row_groups(place: int, num_shards: int) -> range:
    """The row groups of a wave by its place in the plan, from 0."""
    return range(place * num_shards, (place + 1) * num_shards)


def num_waves(num_images: int) -> int:
    """The number of waves of `auto`: MOST_WAVES, or fewer if the first wave would be too small; at least 1."""
    return next(
        (count for count in range(MOST_WAVES, 1, -1) if 2 * num_images >= _FIRST_WAVE_IMAGES * count * (count + 1)), 1
    )


def wave_sizes(waves: int | tuple[float, ...] | Literal["auto"], num_gallery: int) -> list[int]:
    """The exact number of images of each wave, without those embedded for the fit.

    A count K gives wave i the share i / (1 + 2 + ... + K): small waves at the start, where the curve is steepest.
    Fractions are cut at floor(cumulative * N).

    Raises:
        ConfigError: a wave would have no image.
    """
    if waves == "auto":
        waves = num_waves(num_gallery)
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
    """The plan of a run; None before it is made.

    Raises:
        DataError: the file is damaged or of another format.
        IncompatibleRun: it is a plan of version 0.1 that cuts later waves again on the way.
    """
    found = objects.read_versioned(run.plan)
    if found is None:
        return None
    tree = documents.decode(found[0], run.plan)
    if waves := tree.get("relearn_after"):
        raise IncompatibleRun(
            "this run plans later waves again on the way (relearn), which only fastfill 0.1 supports",
            expected="one plan for all waves",
            found=f"relearn_after {waves}",
            where=run.plan,
            remedy="use fastfill 0.1 for this run, or start a new one with `fastfill backfill --new-run`",
        )
    return documents.build(Plan, tree, run.plan)


def transformed_parts(run: Run) -> list[str]:
    """The parts of the transformed gallery; empty before there is a plan."""
    plan = read_plan(run)
    return [] if plan is None else [plan.laid_out(run).transformed_part(part) for part in range(plan.num_parts)]


def dropped_files(run: Run) -> dict[str, Stat]:
    """Files of plans that lost against another driver's plan, and remaining scores; empty before there is a plan.

    They are safe to delete: `plan.json` is never replaced, and a driver whose parts vanish takes the plan that exists.
    """
    plan = read_plan(run)
    if plan is None:
        return {}
    mine = f"/{plan.layout}" if plan.layout else ""
    found = dict(objects.iter_stats(run.path(SCORED)))
    parts, units = objects.iter_stats(run.path("transformed")), objects.iter_stats(run.path("plan"))
    found |= {uri: stat for uri, stat in parts if not _above(uri).endswith(f"/transformed{mine}")}
    units = (pair for pair in units if pair[0].endswith(".parquet"))
    return found | {uri: stat for uri, stat in units if not _above(_above(uri)).endswith(f"/plan{mine}")}


def read_transformed(run: Run, plan: Plan, wave: int, columns: list[str], shards: range | None = None) -> pa.Table:
    """Columns of a wave's transformed images, or of some shards of it, in the order of the parts."""
    first = plan.row_groups(wave)[0]
    groups = [first + shard for shard in (range(plan.num_shards) if shards is None else shards)]
    place = plan.laid_out(run)
    parts = (place.transformed_part(part) for part in range(plan.num_parts))
    read = partial(parquet.read_parquet, columns=columns, row_groups=groups)
    return pa.concat_tables(objects.at_once(read, parts))


def _above(uri: str) -> str:
    return uri.rpartition("/")[0]
