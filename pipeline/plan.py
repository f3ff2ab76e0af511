"""The plan: which wave each image of the gallery belongs to, and the work units of each wave.

Guarantee: each id is in exactly one wave; wave sizes are exact; ties are broken by a stable hash of
the id, so a plan is a pure function of (priorities, waves, seed). `plan/plan.json` is written last, by
`planner`; this module reads it, and imports nothing heavy.

The sizes of the waves and of their units never change. Which images they hold may, where the run learns on the way:
once a wave of `relearn_after` is embedded, those of the waves after it are cut anew (`replan`). Until then no unit of a
later wave is embedded, so what a wave holds when it is embedded is known from its number: `place` says where it lies.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import documents, storage
from pipeline.errors import ConfigError
from pipeline.run import Run
from pipeline.schema import Unit
from pipeline.store import Stat
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
        relearn_after: the waves, ascending, after which what is left is planned anew.
        layout: the folder inside `transformed/` and `plan/` with this plan's own parts. Two drivers that plan at
            the same time write into different folders if their scores differ. Empty in plans of earlier versions.
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
    relearn_after: tuple[int, ...] = ()
    layout: str = ""

    @property
    def stages(self) -> tuple[int, ...]:
        """The last wave of each stretch that is embedded without a stop: those of `relearn_after`, and the last one."""
        return (*self.relearn_after, len(self.waves))

    def learnt_after(self, commit: int) -> int:
        """The wave after which a commit's transformed vectors were learnt; 0 for the first fit."""
        return max((wave for wave in self.relearn_after if wave <= commit), default=0)

    def place(self, run: Run, wave: int, commit: int | None = None) -> Run:
        """Where the rows and units of a wave lie: as a commit has them, else as they are when it is embedded."""
        before = wave - 1 if commit is None else min(commit, wave - 1)
        return self.laid_out(run).relearnt(self.learnt_after(before))

    def laid_out(self, run: Run) -> Run:
        """The run with the paths of this plan's own parts, as first planned."""
        return replace(run, layout=self.layout)

    def log(self, run: Run) -> VectorLog:
        """The vector log of the backfill."""
        return VectorLog(run.path("embedded"), run.path("rejects"), self.dim, self.num_shards)

    def units(self, run: Run) -> Iterable[Unit]:
        """All units, in wave and locality order; the files of those that are planned anew later are not there yet."""
        for wave in self.waves:
            for first in range(0, wave.units, UNITS_PER_FILE):
                uri = self.place(run, wave.wave).wave_units(wave.wave, first)
                for unit in range(first, min(first + UNITS_PER_FILE, wave.units)):
                    yield Unit(wave.wave, unit, uri, unit - first, self.unit_size(wave.wave, unit))

    def unit_size(self, wave: int, unit: int) -> int:
        """The number of images of a unit."""
        return min(self.unit_images, self.waves[wave - 1].images - unit * self.unit_images)


def wave_ends(waves: int | tuple[float, ...]) -> NDArray[np.float64]:
    """The fraction of the gallery that is embedded once each wave is, (W,) float64; see `wave_sizes`."""
    shares = np.arange(1, waves + 1, dtype=np.float64) if isinstance(waves, int) else np.array(waves)
    ends: NDArray[np.float64] = np.cumsum(shares) / shares.sum()
    return ends


def wave_sizes(waves: int | tuple[float, ...], num_gallery: int) -> list[int]:
    """The exact number of images of each wave, in order.

    A count K makes wave i a share of i in 1 + 2 + ... + K: fine at the start, where the curve is
    steepest, and coarser later. Fractions are cut at floor(cumulative * N).

    Raises:
        ConfigError: a wave would have no image.
    """
    ends = np.floor(wave_ends(waves) * num_gallery + 1e-9).astype(np.int64)
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
    """The plan of a run, or None if it is not made yet.

    Raises:
        DataError: the file is damaged or of another format.
    """
    found = storage.read_versioned(run.plan)
    return None if found is None else documents.parse(Plan, found[0], run.plan)


def transformed_parts(run: Run) -> list[str]:
    """The parts of the transformed gallery, as first planned; none before there is a plan."""
    plan = read_plan(run)
    return [] if plan is None else [plan.laid_out(run).transformed_part(part) for part in range(plan.num_parts)]


def dropped_files(run: Run) -> dict[str, Stat]:
    """Files of plans that were dropped because another driver's is the run's plan; and what is left of the scores.

    They are safe to delete: `plan.json` is never replaced, and a driver whose parts vanish takes the plan that is
    there. There are none before there is a plan.
    """
    plan = read_plan(run)
    if plan is None:
        return {}
    mine = f"/{plan.layout}" if plan.layout else ""
    found = dict(storage.iter_stats(run.path(SCORED)))
    parts, units = storage.iter_stats(run.path("transformed")), storage.iter_stats(run.path("plan"))
    found |= {uri: stat for uri, stat in parts if not _above(uri).endswith(f"/transformed{mine}")}
    units = (pair for pair in units if pair[0].endswith(".parquet"))
    return found | {uri: stat for uri, stat in units if not _above(_above(uri)).endswith(f"/plan{mine}")}


def _above(uri: str) -> str:
    return uri.rpartition("/")[0]


def read_transformed(
    run: Run, plan: Plan, wave: int, columns: list[str], shards: range | None = None, commit: int | None = None
) -> pa.Table:
    """Columns of the transformed images of a wave, or of some of its shards, sorted by part.

    Args:
        run: the run.
        plan: its plan.
        wave: which.
        columns: of `transformed/`.
        shards: None for all.
        commit: the wave as this commit has it; None for as it is when it is embedded.
    """
    first = (wave - 1) * plan.num_shards
    groups = [first + shard for shard in (range(plan.num_shards) if shards is None else shards)]
    place = plan.place(run, wave, commit)
    parts = (place.transformed_part(part) for part in range(plan.num_parts))
    read = partial(storage.read_parquet, columns=columns, row_groups=groups)
    return pa.concat_tables(storage.at_once(read, parts))
