"""The held-out pairs of a run as its transformation sees them: what is simulated before the gallery is touched.

Guarantee: the same run gives the same rows. The policies' reference was made of these very pairs: a pair is not its own
neighbour in it, and what `learned` has learnt of its cost is learnt again from others before the pair is ranked.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pipeline.arrays import Float32, Int64
from pipeline.config.tree import Config
from pipeline.hashing import splitmix64
from pipeline.models import offset as offsets
from pipeline.models.calibration import Calibration, read_calibration
from pipeline.models.offset import Offset
from pipeline.models.transformation import apply, load_transformation, read_part
from pipeline.planning.policies import POLICIES, load_policy
from pipeline.planning.policy_inputs import NO_LABEL, PolicyInputs, load_policy_inputs
from pipeline.planning.signals import Scored
from pipeline.run import Run
from pipeline.storage import parquet
from training.fitting.learner import Job, make_arrays
from training.fitting.pairs import build_pairs, fit_data
from training.simulation.folds import APPLY_BATCH, Fold
from training.simulation.staleness_cost import fit_learned, staleness_cost

FOLDS = 4
SALT = 0x51AB
_MOST_PAIRS = 5000


@dataclass(frozen=True, slots=True)
class HeldOut:
    """N pairs: as the network gives them, as they are served (N, d) float32, their groups (N,) str or None.

    `calibration` is the run's.
    """

    fold: Fold
    served: Float32
    groups: NDArray[np.object_]
    reference: PolicyInputs | None
    calibration: Calibration | None = None


def held_out(config: Config, run: Run) -> HeldOut:
    """The held-out pairs of a run with a transformation, 5,000 at most, by ascending index.

    Raises:
        DataError: a file of the transformation is missing or damaged.
    """
    pairs = build_pairs(config, run)
    job = Job(config.fit, fit_data(config, run, pairs), config.seed, config.gallery.metric == "cosine", 0, 0)
    table = pa.concat_tables([parquet.read_parquet(uri) for uri in job.data.held_out_parts]).sort_by("index")
    chance = splitmix64(table["index"].to_numpy(), SALT)
    table = table.take(pa.array(np.sort(np.argsort(chance, kind="stable")[:_MOST_PAIRS])))
    arrays = make_arrays(table, job)
    network, _ = load_transformation(run, torch.device("cpu"))
    z, s = apply(network, arrays.old, arrays.side, torch.device("cpu"), APPLY_BATCH)
    part = read_part(run, offsets.PART)
    served = z if part is None else Offset.from_bytes(part).apply(z, s)
    groups = table["group"].to_numpy() if "group" in table.schema.names else np.full(len(z), None, dtype=object)
    return HeldOut(Fold(arrays, z, s, None), served, groups, load_policy_inputs(run), read_calibration(run))


def fold_places(num: int, num_folds: int) -> Int64:
    """The fold of each pair, (N,) int64, by chance; folds differ in size by one at most."""
    order = np.argsort(splitmix64(np.arange(num), SALT), kind="stable")
    places = np.empty(num, np.int64)
    places[order] = np.arange(num) % num_folds
    return places


def as_scored(config: Config, pairs: HeldOut) -> Scored:
    """The pairs as a policy sees the gallery: with their groups, and with labels where the gallery has some."""
    scored = replace(pairs.fold.scored(), groups=pairs.groups)
    codes = pairs.fold.pairs.labels
    if codes is None or config.gallery.columns.label is None:
        return scored
    names = None if pairs.reference is None else pairs.reference.label_names
    labels = [None if code == NO_LABEL else str(code) if names is None else names[code] for code in codes.tolist()]
    return replace(scored, labels=np.array(labels, dtype=object))


def priorities(config: Config, pairs: HeldOut, policy: str, boost: float = 0.0) -> Float32:
    """The priority of each pair under the run's policy, (N,) float32; without traffic.

    `learned` ranks a pair by a model of the staleness cost of other folds' pairs.

    Args:
        config: `gallery` and `seed` count.
        pairs: of which the policy knows.
        policy: by its name.
        boost: `group_boost`.

    Raises:
        ConfigError: the policy needs what the reference does not have.
    """
    scored = as_scored(config, pairs)
    found = np.empty(len(pairs.served), np.float32)
    for rows, reference in _unseen(config, pairs, policy):
        found[rows] = load_policy(policy, config.seed, reference, group_boost=boost)(_take(scored, rows))
    return found


def _unseen(config: Config, pairs: HeldOut, policy: str) -> list[tuple[Int64, PolicyInputs | None]]:
    """Rows, and a reference whose model they did not train; all rows at once where the policy has no model."""
    reference, num = pairs.reference, len(pairs.served)
    known = POLICIES.get(policy)
    if known is None or "learned" not in known.needs or reference is None or reference.model is None:
        return [(np.arange(num), reference)]
    places, scored, parts = fold_places(num, FOLDS), pairs.fold.scored(), list[tuple[Int64, PolicyInputs | None]]()
    labels, new, metric = pairs.fold.labels(), pairs.fold.pairs.new, config.gallery.metric
    for fold in range(min(FOLDS, num)):
        rest = np.flatnonzero(places != fold)
        some = None if labels is None else labels[rest]
        cost = staleness_cost(pairs.served[rest], new[rest], some, metric, config.seed)
        model = fit_learned(_take(scored, rest), reference, cost, config.seed)
        parts.append((np.flatnonzero(places == fold), model))
    return parts


def _take(scored: Scored, rows: Int64) -> Scored:
    """Some of the rows; pairs have no traffic."""
    names = ("ids", "uncertainty", "transformed", "old_embeddings", "labels", "groups")
    return Scored(*(getattr(scored, name)[rows] for name in names))
