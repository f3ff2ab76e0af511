"""What learning on the way would be worth: the backfill of some images simulated with it and without.

    train -> fit -> the gallery is served, ordered -> its first waves are embedded: pairs like any others
    -> nothing, a new order, or a new fit -> what is left is served and ordered anew -> the curve, by labels

Guarantee: at each point of a curve what is embedded counts by its new embedding, and of what is left nothing has been
learnt. It decides by labels alone: a transformation whose vectors lie far from all others disturbs no query, and looks
good by `recall10`, but what it moves away is not found. This module does not know runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from pipeline.config import Config, Select
from pipeline.evaluate import METRICS
from pipeline.policy import load_policy
from pipeline.ranking import Float64
from pipeline.schema import Float32, Int64, splitmix64
from pipeline.selection import Learning, Learnt, learning_starts
from pipeline.transformation import resolve_device
from training.candidates import Candidate, Serving
from training.folds import Fold, OnStep, Split, by_chance, fit_alone, fitting_task, job_of, joined, taken
from training.learner import FitData, Job, PairArrays
from training.losses import NO_LABEL
from training.simulate import FINAL, Detail, knowing, order_by, queries_of, serve

WAYS: tuple[Learnt, ...] = ("nothing", "order", "transformation")
"""What is learnt again, the simplest first; see `config.Relearn`."""

_SALT = 0x2E1


@dataclass(frozen=True, slots=True)
class Scene:
    """A gallery all of whose new embeddings are known, and what a transformation for it is fitted on.

    Attributes:
        config: `gallery.metric`, `pairs.held_out_fraction` and `seed` count.
        job: how to fit.
        train: pairs; a share of them is held out of each fit, for the offset and the policy.
        gallery: images with labels.
        serving: the offset.
        policy: the order.
        starts: the fractions of the gallery after which something is learnt, ascending.
        detail: of the curves.
        device: where to fit.
    """

    config: Config
    job: Job
    train: PairArrays
    gallery: PairArrays
    serving: Serving
    policy: str
    starts: tuple[float, ...]
    detail: Detail
    device: torch.device

    def first(self) -> State:
        """Before anything is embedded."""
        return _fitted(self, np.empty(0, np.int64))


@dataclass(frozen=True, slots=True)
class State:
    """What a fit gives of the gallery, and of pairs that it was not fitted on, which offset and policy know."""

    gallery: Fold
    known: Fold


def curves(scene: Scene) -> dict[Learnt, Float64]:
    """The curve of each way, (P, Q, 3) float64: METRICS of each query that has a match, in per cent."""
    first = scene.first()
    return {way: curve(scene, way, first) for way in WAYS}


def curve(scene: Scene, way: Learnt, first: State) -> Float64:
    """The curve of one way, (P, Q, 3). At a fraction where something is learnt, it is known."""
    num, points = len(scene.gallery.old), scene.detail.points
    fractions, found = np.arange(points) / (points - 1), list[Float64]()
    served, order = _served(scene, first, first)
    state, starts = first, [0.0, *scene.starts] if way != "nothing" else [0.0]
    for start, end in zip(starts, [*starts[1:], 2.0], strict=True):
        if start:
            done = order[: int(start * num)]
            state = _fitted(scene, done) if way == "transformation" else first
            served, rest = _served(scene, state, state if way == "transformation" else _with(state, done))
            order = np.concatenate([done, rest[~np.isin(rest, done)]])
        here = (fractions >= start) & (fractions < end)
        found.append(_queries(scene, served, order)[here])
    return np.concatenate(found)


def decide(
    config: Config, data: FitData, parts: Split, chosen: Candidate, columns: Sequence[int], on_step: OnStep
) -> Learning:
    """Whether to learn on the way with the chosen candidate, by a simulation on each fold, or on the sample; by tasks.

    Args:
        config: `select` and `relearn` say how.
        data: all pairs.
        parts: the folds; with a sample that is measured, whose images have labels.
        chosen: the candidate.
        columns: those of METRICS that count.
        on_step: as in `select`.
    """
    settings, starts, stored = config.select or Select(), learning_starts(config), ray.put(parts)
    task = fitting_task(config, _decide_fold)
    tasks = [task.remote(config, data, stored, chosen, starts, fold) for fold in range(settings.folds)]
    scores: dict[Learnt, list[Float64]] = {way: [] for way in WAYS}
    on_step("select: learning on the way", 0, len(tasks))
    for done, item in enumerate(tasks, start=1):
        for way, found in ray.get(item).items():
            scores[way].append(found.mean(axis=0)[:, list(columns)].mean(axis=1))
        on_step("select: learning on the way", done, len(tasks))
    return Learning.decide(starts, scores)


def _decide_fold(
    config: Config, data: FitData, parts: Split, chosen: Candidate, starts: tuple[float, ...], fold: int
) -> dict[Learnt, Float64]:
    """The curves of one fold; of the sample the same images for each fold's fit: there are few enough to learn from."""
    settings = config.select or Select()
    job = job_of(config, data, chosen.recipe)
    gallery = parts.held(fold, job, settings.max_measured)
    if settings.measured_on == "probe":
        assert parts.sample is not None, "checked before the fits"
        gallery = taken(parts.sample, by_chance(len(parts.sample.old), settings.max_measured))
    train, device = parts.train(fold, job), resolve_device(config.device)
    job = replace(job, seed=config.seed + fold)
    return curves(Scene(config, job, train, gallery, chosen.serving, chosen.policy, starts, FINAL, device))


def _fitted(scene: Scene, done: Int64) -> State:
    """Fit on the pairs and on images of the gallery that are embedded, each once, as `relearn` does."""
    pairs, gallery = scene.train, scene.gallery
    apart, own = _held_out(scene, np.arange(len(pairs.old))), _held_out(scene, done)
    train, known = taken(pairs, np.flatnonzero(~apart)), taken(pairs, np.flatnonzero(apart))
    if len(done):
        images = _unlabelled(gallery, pairs)
        train, known = joined(train, taken(images, done[~own])), joined(known, taken(images, done[own]))
    both = joined(known, gallery)
    found = fit_alone(scene.job, train, both, scene.job.seed, scene.device)
    count = len(known.old)
    return State(
        gallery=Fold(gallery, found.z[count:], found.s[count:], found.classifier),
        known=Fold(known, found.z[:count], found.s[:count], found.classifier),
    )


def _unlabelled(gallery: PairArrays, pairs: PairArrays) -> PairArrays:
    """The gallery's images as a run learns from them, without the labels that they are measured by."""
    labels = None if pairs.labels is None else np.full(len(gallery.old), NO_LABEL)
    return replace(gallery, labels=labels)


def _held_out(scene: Scene, rows: Int64) -> NDArray[np.bool_]:
    most = np.uint64(int(2**64 * scene.config.pairs.held_out_fraction))
    return splitmix64(rows, scene.job.seed + _SALT) < most


def _with(state: State, done: Int64) -> State:
    """The policy knows the embedded images as well: no transformation was fitted on them."""
    gallery, known = state.gallery.take(done), state.known
    z, s = np.concatenate([known.z, gallery.z]), np.concatenate([known.s, gallery.s])
    pairs = joined(known.pairs, _unlabelled(gallery.pairs, known.pairs))
    return replace(state, known=Fold(pairs, z, s, known.classifier))


def _served(scene: Scene, state: State, knows: State) -> tuple[Float32, Int64]:
    """The gallery as it is served by the offset of a fit, and its order by what policies know now."""
    config, learned, gallery = scene.config, scene.policy == "learned", state.gallery
    served, others = serve(config, gallery, state.known, scene.serving)
    if knows is not state:
        _, others = serve(config, gallery, knows.known, scene.serving)
    reference = knowing(config, gallery, knows.known, others, learned)
    return served, order_by(load_policy(scene.policy, config.seed, reference)(gallery.scored()), config.seed)


def _queries(scene: Scene, served: Float32, order: Int64) -> Float64:
    """(P, Q, 3)."""
    new, labels, metric = scene.gallery.new, scene.gallery.labels, scene.config.gallery.metric
    assert labels is not None, "it is decided by labels alone"
    found = queries_of(served, new, labels, order, metric, scene.detail)
    return np.stack([found[name].T for name in METRICS], axis=2)
