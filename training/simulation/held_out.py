"""The held-out pairs of a run with their transformed vectors: a backfill of them is simulated before the real one.

The policy inputs were built from the same pairs. So a pair is excluded from its own neighbours, and before `learned`
ranks a pair, its model is fitted again without that pair's fold.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pipeline.arrays import NO_LABEL, Float32, Int64
from pipeline.config.tree import Config, GallerySettings
from pipeline.hashing import splitmix64
from pipeline.models import offset as offsets
from pipeline.models.calibration import Calibration, read_calibration
from pipeline.models.offset import Offset
from pipeline.models.transformation import APPLY_BATCH, apply, load_transformation, read_part
from pipeline.planning.policies import POLICIES, load_policy
from pipeline.planning.policy_inputs import PolicyInputs, load_policy_inputs
from pipeline.planning.signals import Scored
from pipeline.run import Run
from pipeline.storage import parquet
from training.fitting.learner import Job, make_arrays
from training.fitting.pairs import build_pairs, fit_data
from training.simulation.build_policy_inputs import groups_of
from training.simulation.folds import Fold
from training.simulation.staleness_cost import fit_learned, staleness_cost

FOLDS = 4
SALT = 0x51AB
_MOST_PAIRS = 5000


@dataclass(frozen=True, slots=True)
class HeldOut:
    """N held-out pairs, their served vectors (N, d) float32 and groups (N,) str or None, and the policy inputs."""

    fold: Fold
    served: Float32
    groups: NDArray[np.object_]
    reference: PolicyInputs | None
    calibration: Calibration | None = None


def held_out(config: Config, run: Run) -> HeldOut:
    """At most 5,000 held-out pairs of a run that has a transformation, by ascending index.

    Raises:
        DataError: a file of the transformation is missing or damaged.
    """
    data = fit_data(config.fit, run, build_pairs(config, run))
    job = Job(config.fit, data, config.seed, config.gallery.metric, 0, 0)
    table = pa.concat_tables([parquet.read_parquet(uri) for uri in job.data.held_out_parts]).sort_by("index")
    chance = splitmix64(table["index"].to_numpy(), SALT)
    table = table.take(pa.array(np.sort(np.argsort(chance, kind="stable")[:_MOST_PAIRS])))
    arrays = make_arrays(table, job)
    network, _ = load_transformation(run, torch.device("cpu"))
    z, s = apply(network, arrays.old, arrays.side, torch.device("cpu"), APPLY_BATCH)
    part = read_part(run, offsets.PART)
    served = z if part is None else Offset.from_bytes(part).apply(z, s)
    return HeldOut(Fold(arrays, z, s, None), served, groups_of(table), load_policy_inputs(run), read_calibration(run))


def fold_places(num: int, num_folds: int) -> Int64:
    """The fold of each pair, (N,) int64, drawn by a hash; the sizes of folds differ by at most one."""
    order = np.argsort(splitmix64(np.arange(num), SALT), kind="stable")
    places = np.empty(num, np.int64)
    places[order] = np.arange(num) % num_folds
    return places


def as_scored(gallery: GallerySettings, pairs: HeldOut) -> Scored:
    """The pairs as policies see the gallery: with their groups, and with labels if the gallery has any."""
    scored = replace(pairs.fold.scored(), groups=pairs.groups)
    codes = pairs.fold.pairs.labels
    if codes is None or gallery.columns.label is None:
        return scored
    names = None if pairs.reference is None else pairs.reference.label_names
    labels = [None if code == NO_LABEL else str(code) if names is None else names[code] for code in codes.tolist()]
    return replace(scored, labels=np.array(labels, dtype=object))


def priorities(pairs: HeldOut, policy: str, gallery: GallerySettings, seed: int, group_boost: float = 0.0) -> Float32:
    """The priority of each pair, (N,) float32, without traffic; `learned` is fitted on the other folds' pairs."""
    scored = as_scored(gallery, pairs)
    found = np.empty(len(pairs.served), np.float32)
    for rows, reference in _unseen(pairs, policy, gallery.metric, seed):
        found[rows] = load_policy(policy, seed, reference, group_boost=group_boost)(_take(scored, rows))
    return found


def _unseen(pairs: HeldOut, policy: str, metric: str, seed: int) -> list[tuple[Int64, PolicyInputs | None]]:
    """Rows, and policy inputs whose model was fitted without them; all rows at once if the policy has no model."""
    reference, num = pairs.reference, len(pairs.served)
    known = POLICIES.get(policy)
    if known is None or "learned" not in known.needs or reference is None or reference.model is None:
        return [(np.arange(num), reference)]
    places, scored, parts = fold_places(num, FOLDS), pairs.fold.scored(), list[tuple[Int64, PolicyInputs | None]]()
    labels, new = pairs.fold.labels(), pairs.fold.pairs.new
    for fold in range(min(FOLDS, num)):
        rest = np.flatnonzero(places != fold)
        some = None if labels is None else labels[rest]
        cost = staleness_cost(pairs.served[rest], new[rest], some, metric, seed)
        model = fit_learned(_take(scored, rest), reference, cost, seed)
        parts.append((np.flatnonzero(places == fold), model))
    return parts


def _take(scored: Scored, rows: Int64) -> Scored:
    names = ("ids", "uncertainty", "transformed", "old_embeddings", "labels", "groups")
    return Scored(*(getattr(scored, name)[rows] for name in names))
