"""Fits that have not seen what they are measured on: each recipe once per fold of the pairs, by tasks of Ray.

    pairs -> folds -> fit each recipe on all folds but one -> z, s of the fold left out, and of a sample of the gallery

Guarantee: a fold's network and classifier were fitted without it, and without the sample where that is measured. A fit
is a function of the pairs, the recipe, the settings and the seed, and one that is kept is not made again. It does not
know what is measured.
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
from pipeline.config.method import SelectSettings
from pipeline.config.tree import Config
from pipeline.errors import ConfigError
from pipeline.hashing import splitmix64
from pipeline.knn import nearest
from pipeline.models.device import resolve_device
from pipeline.models.networks import LinearTransformation
from pipeline.models.offset import LinearClassifier
from pipeline.models.transformation import apply
from pipeline.planning.signals import Scored
from pipeline.run import Run
from pipeline.storage import objects, parquet
from training.fitting.learner import FitData, Job, Learner, PairArrays, can_classify, cut, make_arrays
from training.fitting.linear_fit import LinearFit, fit_linear, over_arrays
from training.simulation.build_policy_inputs import measurable
from training.simulation.trials import Recipe

OnStep = Callable[[str, int, int], None]
FOLDER = "selecting"
APPLY_BATCH = 8192
_SALT = 0xF01D
_SAME = 5e-4
"""Of the squared length: two old embeddings so near to each other are of one image, also where they were computed in
other batches or in bfloat16; other images are at 0.2 and more."""

_FEWEST_LEFT = 100
"""Pairs of a fold, once those are left out that are images of the sample."""


@dataclass(frozen=True, slots=True)
class Fold:
    """Pairs that a recipe was not fitted on, their z (N, d_new) and s (N,), and a classifier that has not seen them."""

    pairs: PairArrays
    z: Float32
    s: Float32
    classifier: LinearClassifier | None

    def scored(self) -> Scored:
        """As policies see it: without labels, which a gallery may not have."""
        none = np.full(len(self.s), None, dtype=object)
        return Scored(np.arange(len(self.s)), self.s, self.z, self.pairs.old, none, none)

    def take(self, rows: Int64) -> Fold:
        """Some of the pairs."""
        return Fold(taken(self.pairs, rows), self.z[rows], self.s[rows], self.classifier)

    def unlabelled(self) -> Fold:
        """The same without labels."""
        return replace(self, pairs=replace(self.pairs, labels=None))

    def labels(self) -> Int64 | None:
        """The labels where quality can be measured by them."""
        return measurable(self.pairs.labels)


def taken(pairs: PairArrays, rows: Int64) -> PairArrays:
    """Some of the pairs."""
    side = None if pairs.side is None else pairs.side[rows]
    labels = None if pairs.labels is None else pairs.labels[rows]
    return PairArrays(pairs.old[rows], pairs.new[rows], side, labels)


def by_chance(count: int, most: int) -> Int64:
    """Rows of so many, sorted: at most `most` of them, whatever order these are in."""
    chance = splitmix64(np.arange(count), _SALT)
    return np.sort(np.argsort(chance, kind="stable")[:most])


def joined(first: PairArrays, second: PairArrays) -> PairArrays:
    """Both, one after the other; without labels, or side information, where one of them has none."""

    def both(one: np.ndarray | None, other: np.ndarray | None) -> np.ndarray | None:
        return None if one is None or other is None else np.concatenate([one, other])

    old, new = np.concatenate([first.old, second.old]), np.concatenate([first.new, second.new])
    return PairArrays(old, new, both(first.side, second.side), both(first.labels, second.labels))


@dataclass(frozen=True, slots=True)
class Split:
    """The pairs that a selection sees.

    Attributes:
        table: N of them, by ascending index.
        places: (N,) int64, the fold of each.
        sample: images of the gallery, to measure on or to compare with; None where there are none.
    """

    table: pa.Table
    places: Int64
    sample: PairArrays | None

    def train(self, fold: int, job: Job) -> PairArrays:
        """All pairs but a fold's."""
        return make_arrays(self.table.take(pa.array(np.flatnonzero(self.places != fold))), job)

    def held(self, fold: int, job: Job, most: int) -> PairArrays:
        """A fold's pairs, at most so many of them."""
        rows = np.flatnonzero(self.places == fold)
        chance = splitmix64(self.table["index"].to_numpy()[rows], job.seed + 4)  # the index may follow the labels
        return make_arrays(self.table.take(pa.array(rows[np.argsort(chance, kind="stable")[:most]])), job)

    def digest(self) -> str:
        """Of what is fitted and measured on: which pairs, and which images are the sample.

        Only copied bytes count. `new` may have been normalised, and another processor rounds that otherwise.
        """
        found = hashlib.sha256(self.table["index"].to_numpy().tobytes())
        if self.sample is not None:
            for part in (self.sample.old, self.sample.side, self.sample.labels):
                found.update(b"" if part is None else part.tobytes())
        return found.hexdigest()


@dataclass(frozen=True, slots=True)
class Fits:
    """A recipe's fits, one per fold: what each gives of the fold that it left out, and of the sample."""

    held: tuple[Fold, ...]
    sample: tuple[Fold, ...]


def split(config: Config, data: FitData, settings: SelectSettings, sample: PairArrays | None) -> Split:
    """Cut the pairs into folds by a hash of their index; at most `max_pairs` of them.

    Pairs that are images of the sample are left out where this is measured: it is measured on none that it saw.

    Raises:
        ConfigError: nearly all are.
    """
    tables = [parquet.read_parquet(uri) for uri in [*data.train_parts, *data.held_out_parts]]
    table = pa.concat_tables(tables).sort_by("index")
    if sample is not None and settings.measured_on == "probe":
        old = vectors_from_arrow(table["old"])
        gaps = nearest(old, sample.old, 1)[0][:, 0]
        table, count = table.filter(pa.array(gaps > _SAME * np.square(old).sum(axis=1))), table.num_rows
        if table.num_rows < min(count, settings.folds * _FEWEST_LEFT):  # few pairs as such are not refused here
            raise ConfigError(
                "nearly all pairs are images of the probe set, which is to be measured",
                expected=f"at least {settings.folds * _FEWEST_LEFT} that are not",
                found=f"{table.num_rows} of {count}",
                where="select.measured_on, probe.manifest",
                remedy="name other images in probe.manifest, or set select.measured_on to pairs",
            )
    chance = splitmix64(table["index"].to_numpy(), config.seed + 3)
    rows = np.sort(np.argsort(chance, kind="stable")[: settings.max_pairs])
    places = (chance[rows] % np.uint64(settings.folds)).astype(np.int64)
    return Split(table.take(pa.array(rows)), places, sample)


class OutOfTime(Exception):
    """Fits took longer than they were given."""


def fit_folds(
    config: Config,
    run: Run,
    data: FitData,
    recipe: Recipe,
    parts: Split,
    on_step: OnStep,
    seconds: float | None = None,
) -> Fits:
    """A recipe's fits, one per fold; they are tasks, side by side as far as the cluster has room.

    Args:
        seconds: that they may take; None: as long as it takes. Fits that are kept take no time.

    Raises:
        OutOfTime: they took longer, and were stopped; those that were done are kept.
    """
    settings, what = config.select, f"select: fits of {recipe}"
    shape = [settings.folds, settings.max_pairs, settings.max_measured, parts.digest()]
    uris = [
        run.path(FOLDER, f"{digest(config, data, [asdict(recipe), fold, *shape])}.safetensors")
        for fold in range(settings.folds)
    ]
    task, stored = ray.remote(num_cpus=1, num_gpus=1 if _use_gpu(config) else 0)(_fit_fold), ray.put(parts)
    missing = [fold for fold, uri in enumerate(uris) if not objects.exists(uri)]
    if missing and seconds is not None and seconds <= 0:
        raise OutOfTime
    waiting = [task.remote(config, data, stored, recipe, fold, uris[fold]) for fold in missing]
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
    job = job_of(config, data, recipe)
    held = [parts.held(fold, job, settings.max_measured) for fold in range(settings.folds)]
    return _fits([_read(held[fold], parts.sample, uri) for fold, uri in enumerate(uris)])


def _use_gpu(config: Config) -> bool:
    """Whether a fit takes a GPU: where the config, or the cluster, says so."""
    gpus: float = ray.cluster_resources().get("GPU", 0)
    return config.device.startswith("cuda") or (config.device == "auto" and gpus > 0)


def job_of(config: Config, data: FitData, recipe: Recipe) -> Job:
    """What `fit_alone` needs to know to fit by a recipe."""
    fit = recipe.of(config.fit).model_copy(update={"offset": "none"})
    return Job(fit, data, config.seed, config.gallery.metric == "cosine", 0, 0, can_classify(data))


def digest(config: Config, data: FitData, decides: object) -> str:
    """Names a fit, or a selection, by all that decides it."""
    known = [config.fit.model_dump(mode="json"), config.seed, config.gallery.metric, data.num_train, decides]
    found = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
    for tensor in data.classifier or ():
        found.update(b"" if tensor is None else tensor.tobytes())
    return found.hexdigest()[:32]


def fit_alone(job: Job, train: PairArrays, held: PairArrays, seed: int, device: torch.device) -> Fold:
    """Fit by a plain loop in this process, and transform what was held out.

    Args:
        job: whose `fit`, `data` and `normalize` count.
        train: what to fit on.
        held: what to transform.
        seed: of the first weights and the shuffles.
        device: where to compute.
    """
    steps, batch = cut(job.fit, len(train.old), 1)
    job = replace(job, seed=seed, steps=steps, rank_batch=batch, linear=_linear(job, train))
    learner = Learner(job, train, 0, device, lambda module: module)
    learner.prepare()
    while not learner.done:
        learner.run_epoch()
    z, s = apply(learner.fitted(), held.old, held.side, device, APPLY_BATCH)
    return Fold(held, z, s, learner.classifier)


def _linear(job: Job, train: PairArrays) -> LinearFit | None:
    """The linear fit that the job's kind is, or starts from."""
    if job.fit.kind == "fastfill":
        return None
    data = job.data
    one_pass = over_arrays(np.arange(len(train.old)), train.old, train.new, train.side, job.normalize)
    return fit_linear(one_pass, LinearTransformation(data.d_old, data.d_new, data.d_side, job.normalize))


def _fit_fold(config: Config, data: FitData, parts: Split, recipe: Recipe, fold: int, uri: str) -> None:
    """Fit on all folds but one, transform that one and the sample, and keep it; nothing where that is done."""
    if objects.exists(uri):
        return
    job = job_of(config, data, recipe)
    held = parts.held(fold, job, config.select.max_measured)
    both = held if parts.sample is None else joined(held, parts.sample)
    found = fit_alone(job, parts.train(fold, job), both, config.seed + fold, resolve_device(config.device))
    tensors = {"z": found.z, "s": found.s}
    if found.classifier is not None:
        bias = found.classifier.bias
        tensors |= {"weight": found.classifier.weight} | ({} if bias is None else {"bias": bias})
    objects.put(uri, save(tensors))


def _read(held: PairArrays, sample: PairArrays | None, uri: str) -> list[Fold]:
    """The fold's, and that of the sample where there is one."""
    tensors = load(objects.read_bytes(uri))
    weight, z, s, count = tensors.get("weight"), tensors["z"], tensors["s"], len(held.old)
    classifier = None if weight is None else LinearClassifier(weight, tensors.get("bias"))
    found = [Fold(held, z[:count], s[:count], classifier)]
    return found if sample is None else [*found, Fold(sample, z[count:], s[count:], classifier)]


def _fits(folds: list[list[Fold]]) -> Fits:
    return Fits(tuple(both[0] for both in folds), tuple(both[1] for both in folds if len(both) > 1))
