"""One fit, and the backfill of CIFAR-100's gallery with it, in each order.

    training pairs -> fit (kept in a folder) -> z, s of held-out pairs and gallery -> served vectors, policy inputs
    -> an order by each policy -> curves

The gallery's labels are used by the figures and the oracles alone.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from benchmarks.cached_run import Embedded
from pipeline.arrays import Float32, Float64, Int64
from pipeline.config.tree import Config
from pipeline.evaluation.simulated_curve import (
    CurveInputs,
    CurveOptions,
    oracle_order,
    random_order,
    recall_curve,
    simulate_curve,
)
from pipeline.models import offset as offsets
from pipeline.models.calibration import Calibration, fit_calibration
from pipeline.models.offset import LinearClassifier
from pipeline.planning.policies import POLICIES, load_policy, missing
from pipeline.planning.policy_inputs import PolicyInputs
from pipeline.storage import parquet
from training.fitting.learner import FitData, Job, PairArrays, can_classify, make_arrays
from training.simulation.build_policy_inputs import groups_of, policy_inputs_of
from training.simulation.folds import Fold, fit_alone
from training.simulation.simulate import SimulationDetail, order_by

OFFICIAL = SimulationDetail(22, 10_000)
"""The protocol of METHOD: 22 points, and every image of the gallery is a query."""

_RANDOM_ORDERS = 5

Curves = dict[str, Float64]


@dataclass(frozen=True, slots=True)
class Images:
    """Training pairs, held-out pairs (with their rows as stored), and the gallery."""

    data: FitData
    train: PairArrays
    held_out: PairArrays
    table: pa.Table
    gallery: Embedded


@dataclass(frozen=True, slots=True)
class Fitted:
    """One fit: held-out pairs and gallery, both with their served vectors, and the policy inputs."""

    held_out: Fold
    gallery: Fold
    served: Float32
    transformed: Float32
    reference: PolicyInputs
    calibration: Calibration | None = None


def images_of(config: Config, data: FitData, gallery: Embedded) -> Images:
    """The pairs of a run in memory, beside the gallery."""
    tables = [pa.concat_tables(map(parquet.read_parquet, parts)) for parts in (data.train_parts, data.held_out_parts)]
    job = Job(config.fit, data, config.seed, "l2", 0, 0)
    return Images(data, make_arrays(tables[0], job), make_arrays(tables[1], job), tables[1], gallery)


def fit_once(config: Config, images: Images, seed: int, folder: Path) -> tuple[Fold, Fold]:
    """The held-out pairs and the gallery as one fit transforms them, before any offset; kept in the folder."""
    gallery, held_out, count = images.gallery, images.held_out, len(images.held_out.old)
    fit = config.fit.model_copy(update={"offset": "none"})
    labels = None if images.train.labels is None else hashlib.sha256(images.train.labels.tobytes()).hexdigest()
    decides = [fit.model_dump(mode="json", exclude={"offset_strength"}), seed, images.data.num_train, labels]
    file = folder / f"fit-{digest(decides)}.npz"
    if not file.exists():
        old, new = (np.concatenate(pair) for pair in ((held_out.old, gallery.old), (held_out.new, gallery.new)))
        job = Job(fit, images.data, seed, "l2", 0, 0, can_classify(images.data))
        found = fit_alone(job, images.train, PairArrays(old, new, None, None), seed, torch.device("cpu"))
        known = found.classifier
        parts = {"z": found.z, "s": found.s} | ({} if known is None else {"weight": known.weight})
        parts |= {} if known is None or known.bias is None else {"bias": known.bias}
        np.savez(file, **parts)  # type: ignore[arg-type]  # none is called allow_pickle
    with np.load(file) as arrays:
        z, s = arrays["z"], arrays["s"]
        classifier = LinearClassifier(arrays["weight"], arrays.get("bias")) if "weight" in arrays else None
    mine = PairArrays(gallery.old, gallery.new, None, None)
    return Fold(held_out, z[:count], s[:count], classifier), Fold(mine, z[count:], s[count:], classifier)


def fitted(config: Config, images: Images, seed: int, folder: Path) -> Fitted:
    """A fit with the config's offset, and its policy inputs."""
    known, mine = fit_once(config, images, seed, folder)
    served, transformed = known.z, mine.z
    if config.fit.offset != "none":
        kind, strength = config.fit.offset, config.fit.offset_strength
        pairs = offsets.HeldOutPairs(known.z, known.s, known.pairs.new)
        offset = offsets.fit_offset(kind, strength, pairs, known.classifier, "l2")
        served, transformed = offset.apply(known.z, known.s), offset.apply(mine.z, mine.s)
    reference = policy_inputs_of(known, served, groups_of(images.table), None, "l2", config.seed)
    calibration = fit_calibration(served, known.pairs.new, "l2", config.seed) if config.fit.calibrate else None
    return Fitted(known, mine, served, transformed, reference, calibration)


def orders_of(found: Fitted, seed: int) -> dict[str, list[Int64]]:
    """The gallery's rows in each order by a policy that needs no labels of it, and several times at random."""
    ids, scored = np.arange(len(found.transformed)), found.gallery.scored()
    return {
        "random": [random_order(ids, seed + number) for number in range(_RANDOM_ORDERS)],
        **{
            name: [order_by(load_policy(name, seed, found.reference)(scored), seed)]
            for name, policy in POLICIES.items()
            if name != "random" and "gallery_labels" not in policy.needs and not missing(name, found.reference)
        },
    }


def simulate(config: Config, images: Images, seed: int, folder: Path, detail: SimulationDetail = OFFICIAL) -> Curves:
    """Fit once and backfill the gallery in every order: per order (P, 3), METRICS in per cent.

    If the pairs have no labels, a fourth column is `recall10`, of one random order.
    """
    gallery, found = images.gallery, fitted(config, images, seed, folder)
    orders = orders_of(found, seed) | {"oracle: distance": [oracle_order(found.transformed, gallery.new)]}
    labelled = found.gallery.classifier is not None
    if labelled:
        orders["oracle: cross-entropy"] = [order_by(_cross_entropy(found.gallery, gallery.labels), seed)]
    ids, labels = np.arange(len(gallery.labels)), gallery.labels
    queries = ids[:: -(-len(ids) // detail.queries)]
    simulation = simulate_curve(
        CurveInputs(
            found.transformed,
            gallery.new,
            gallery.new[queries],
            labels[queries],
            labels,
            query_ids=queries,
            gallery_ids=ids,
        ),
        orders,
        CurveOptions(points=detail.points, calibration=found.calibration),
    )
    curves = {name: curve.values for name, curve in simulation.orders.items()}
    if labelled:
        return curves
    first = {name: some[0] for name, some in orders.items()}
    recalled = recall_curve(
        found.transformed,
        gallery.new,
        queries,
        first,
        CurveOptions(points=detail.points, metric="l2", calibration=found.calibration),
    )
    return {name: np.column_stack([values, recalled[name]]) for name, values in curves.items()}


def digest(decides: object) -> str:
    """A name for a result, from its settings and the code."""
    code = subprocess.run(["git", "rev-parse", "HEAD:training", "HEAD:pipeline"], capture_output=True, check=True)
    return hashlib.sha256(json.dumps(decides).encode() + code.stdout).hexdigest()[:16]


def _cross_entropy(fold: Fold, labels: Int64) -> Float32:
    assert fold.classifier is not None, "asked only where there is one"
    shares = fold.classifier.probabilities(fold.z)[np.arange(len(labels)), labels]
    return -np.log(np.maximum(shares, np.finfo(np.float32).tiny))
