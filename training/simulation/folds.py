"""Cross-validated fits: each recipe is fitted once per fold of the pairs, by Ray tasks.

    pairs -> folds -> fit the recipe on all folds but one -> z, s of the fold left out, and of a sample of the gallery

A fold's network and classifier are fitted without it, and without the sample if that is measured. A fit is a function
of the pairs, the recipe, the settings and the seed; a stored fit is not repeated.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np
import pyarrow as pa
import ray
import torch
from safetensors.numpy import load, save

from pipeline.arrays import Float32, Int64, vectors_from_arrow
from pipeline.config.method import FitSettings, SelectSettings
from pipeline.errors import ConfigError
from pipeline.hashing import splitmix64
from pipeline.knn import nearest
from pipeline.models.device import resolve_device
from pipeline.models.offset import LinearClassifier
from pipeline.models.transformation import APPLY_BATCH, apply
from pipeline.planning.signals import Scored
from pipeline.run import Run
from pipeline.storage import objects, parquet
from training.fitting.learner import FitData, Job, Learner, PairArrays, can_classify, cut, make_arrays, with_linear
from training.fitting.linear_fit import over_arrays
from training.simulation.trials import Recipe

OnStep = Callable[[str, int, int], None]
FOLDER = "selecting"
_SALT = 0xF01D
_SAME = 5e-4
"""Two old embeddings are of one image if their squared distance is at most this share of the squared length. The same
image in another batch or in bfloat16 stays below it; other images are at 0.2 and more."""

_FEWEST_LEFT = 100
"""Pairs per fold that must remain when the sample's images are left out."""


@dataclass(frozen=True, slots=True)
class FoldSettings:
    """All that the fits of folds depend on: sections and values of the config, and the pairs."""

    fit: FitSettings
    select: SelectSettings
    data: FitData
    metric: str
    seed: int
    device: str

    def job(self, recipe: Recipe) -> Job:
        """The job that `fit_alone` takes, for a recipe without an offset."""
        fit = recipe.of(self.fit).model_copy(update={"offset": "none"})
        return Job(fit, self.data, self.seed, self.metric, 0, 0, can_classify(self.data))

    def digest(self, decides: object) -> str:
        """The name of a fit, or of a selection: a digest of all that decides it."""
        known = [self.fit.model_dump(mode="json"), self.seed, self.metric, self.data.num_train, decides]
        found = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
        for tensor in self.data.classifier or ():
            found.update(b"" if tensor is None else tensor.tobytes())
        return found.hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Fold:
    """Pairs that a recipe was not fitted on: their z (N, d_new) and s (N,), and a classifier fitted without them."""

    pairs: PairArrays
    z: Float32
    s: Float32
    classifier: LinearClassifier | None

    def scored(self) -> Scored:
        """The pairs as policies see a gallery without labels."""
        none = np.full(len(self.s), None, dtype=object)
        return Scored(np.arange(len(self.s)), self.s, self.z, self.pairs.old, none, none)

    def take(self, rows: Int64) -> Fold:
        """Some of the pairs."""
        return Fold(self.pairs.take(rows), self.z[rows], self.s[rows], self.classifier)

    def unlabelled(self) -> Fold:
        """The same without labels."""
        return replace(self, pairs=replace(self.pairs, labels=None))

    def labels(self) -> Int64 | None:
        """The labels, or None if quality cannot be measured by them."""
        return self.pairs.measurable_labels()


def by_chance(count: int, most: int) -> Int64:
    """At most `most` of `count` rows, drawn by a hash and sorted."""
    chance = splitmix64(np.arange(count), _SALT)
    return np.sort(np.argsort(chance, kind="stable")[:most])


def joined(first: PairArrays, second: PairArrays) -> PairArrays:
    """Both, one after the other; labels and side information are dropped if one of them has none."""

    def both(one: np.ndarray | None, other: np.ndarray | None) -> np.ndarray | None:
        return None if one is None or other is None else np.concatenate([one, other])

    old, new = np.concatenate([first.old, second.old]), np.concatenate([first.new, second.new])
    return PairArrays(old, new, both(first.side, second.side), both(first.labels, second.labels))


@dataclass(frozen=True, slots=True)
class Split:
    """N pairs by ascending index, the fold of each (N,) int64, and a sample of the gallery to measure or compare."""

    table: pa.Table
    places: Int64
    sample: PairArrays | None

    def train(self, fold: int, job: Job) -> PairArrays:
        """All pairs except a fold's."""
        return make_arrays(self.table.take(pa.array(np.flatnonzero(self.places != fold))), job)

    def held(self, fold: int, job: Job, most: int) -> PairArrays:
        """At most `most` of a fold's pairs."""
        rows = np.flatnonzero(self.places == fold)
        chance = splitmix64(self.table["index"].to_numpy()[rows], job.seed + 4)  # the index may follow the labels
        return make_arrays(self.table.take(pa.array(rows[np.argsort(chance, kind="stable")[:most]])), job)

    def digest(self) -> str:
        """Digest of the pairs and of the sample's images.

        `new` is left out: it may have been normalised here, with other rounding on another processor.
        """
        found = hashlib.sha256(self.table["index"].to_numpy().tobytes())
        if self.sample is not None:
            for part in (self.sample.old, self.sample.side, self.sample.labels):
                found.update(b"" if part is None else part.tobytes())
        return found.hexdigest()


@dataclass(frozen=True, slots=True)
class Fits:
    """A recipe's fits, one per fold: the outputs for the fold that was left out, and for the sample."""

    held: tuple[Fold, ...]
    sample: tuple[Fold, ...]


def split(given: FoldSettings, sample: PairArrays | None) -> Split:
    """Cut at most `select.max_pairs` pairs into folds by a hash of their index.

    If the sample is measured, pairs of its images are left out: no image is measured that was trained on.

    Raises:
        ConfigError: nearly all pairs are images of the sample.
    """
    data, settings = given.data, given.select
    tables = [parquet.read_parquet(uri) for uri in [*data.train_parts, *data.held_out_parts]]
    table = pa.concat_tables(tables).sort_by("index")
    if sample is not None and settings.measured_on == "probe":
        old = vectors_from_arrow(table["old"])
        gaps = nearest(old, sample.old, 1)[0][:, 0]
        table, count = table.filter(pa.array(gaps > _SAME * np.square(old).sum(axis=1))), table.num_rows
        if table.num_rows < min(count, settings.folds * _FEWEST_LEFT):  # few pairs to begin with: refused elsewhere
            raise ConfigError(
                "nearly all pairs are images of the probe set: a selection cannot train on the images it measures",
                expected=f"at least {settings.folds * _FEWEST_LEFT} other pairs",
                found=f"{table.num_rows} of {count}",
                where="select.measured_on, probe.manifest",
                remedy="name other images in probe.manifest, or set select.measured_on=pairs",
            )
    chance = splitmix64(table["index"].to_numpy(), given.seed + 3)
    rows = np.sort(np.argsort(chance, kind="stable")[: settings.max_pairs])
    places = (chance[rows] % np.uint64(settings.folds)).astype(np.int64)
    return Split(table.take(pa.array(rows)), places, sample)


class OutOfTime(Exception):
    """The fits took longer than the time they were given."""


def fit_folds(
    given: FoldSettings, run: Run, recipe: Recipe, parts: Split, on_step: OnStep, seconds: float | None = None
) -> Fits:
    """A recipe's fits, one per fold: parallel Ray tasks, as many as the cluster has room for.

    Args:
        seconds: the time limit; None for no limit. Stored fits take no time.

    Raises:
        OutOfTime: the limit was reached. Unfinished fits were stopped; finished ones are stored.
    """
    settings, what = given.select, f"select: fits of {recipe}"
    shape = [settings.folds, settings.max_pairs, settings.max_measured, parts.digest()]
    names = [given.digest([asdict(recipe), fold, *shape]) for fold in range(settings.folds)]
    uris = [run.path(FOLDER, f"{name}.safetensors") for name in names]
    task, stored = ray.remote(num_cpus=1, num_gpus=1 if _use_gpu(given.device) else 0)(_fit_fold), ray.put(parts)
    missing = [fold for fold, uri in enumerate(uris) if not objects.exists(uri)]
    if missing and seconds is not None and seconds <= 0:
        raise OutOfTime
    waiting = [task.remote(given, stored, recipe, fold, uris[fold]) for fold in missing]
    ends = None if seconds is None else time.monotonic() + seconds
    on_step(what, len(uris) - len(waiting), len(uris))
    try:
        while waiting:
            ready, waiting = ray.wait(waiting, timeout=None if ends is None else max(0.0, ends - time.monotonic()))
            if not ready:
                raise OutOfTime
            ray.get(ready)
            on_step(what, len(uris) - len(waiting), len(uris))
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)
    job = given.job(recipe)
    held = [parts.held(fold, job, settings.max_measured) for fold in range(settings.folds)]
    return _fits([_read(held[fold], parts.sample, uri) for fold, uri in enumerate(uris)])


def _use_gpu(device: str) -> bool:
    gpus: float = ray.cluster_resources().get("GPU", 0)
    return device.startswith("cuda") or (device == "auto" and gpus > 0)


def fit_alone(job: Job, train: PairArrays, held: PairArrays, seed: int, device: torch.device) -> Fold:
    """Fit on `train` by a plain loop in this process, and transform `held`; `seed` replaces the job's."""
    steps, batch = cut(job.fit, len(train.old), 1)
    job = with_linear(
        replace(job, seed=seed, steps=steps, rank_batch=batch),
        lambda: over_arrays(np.arange(len(train.old)), train.old, train.new, train.side, job.normalize),
    )
    learner = Learner(job, train, 0, device, lambda module: module)
    learner.prepare()
    while not learner.done:
        learner.run_epoch()
    z, s = apply(learner.fitted(), held.old, held.side, device, APPLY_BATCH)
    return Fold(held, z, s, learner.classifier)


def _fit_fold(given: FoldSettings, parts: Split, recipe: Recipe, fold: int, uri: str) -> None:
    """Fit on all folds but one, transform that one and the sample, and store both, unless that is done already."""
    if objects.exists(uri):
        return
    job = given.job(recipe)
    held = parts.held(fold, job, given.select.max_measured)
    both = held if parts.sample is None else joined(held, parts.sample)
    found = fit_alone(job, parts.train(fold, job), both, given.seed + fold, resolve_device(given.device))
    tensors = {"z": found.z, "s": found.s}
    if found.classifier is not None:
        bias = found.classifier.bias
        tensors |= {"weight": found.classifier.weight} | ({} if bias is None else {"bias": bias})
    objects.put(uri, save(tensors))


def _read(held: PairArrays, sample: PairArrays | None, uri: str) -> list[Fold]:
    tensors = load(objects.read_bytes(uri))
    weight, z, s, count = tensors.get("weight"), tensors["z"], tensors["s"], len(held.old)
    classifier = None if weight is None else LinearClassifier(weight, tensors.get("bias"))
    found = [Fold(held, z[:count], s[:count], classifier)]
    return found if sample is None else [*found, Fold(sample, z[count:], s[count:], classifier)]


def _fits(folds: list[list[Fold]]) -> Fits:
    return Fits(tuple(both[0] for both in folds), tuple(both[1] for both in folds if len(both) > 1))
