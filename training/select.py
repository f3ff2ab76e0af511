"""Choose loss, network, offset and order by the curves that they give on pairs that were held out.

    pairs -> folds -> fit each recipe on all folds but one (Ray tasks) -> z, s of the fold left out
          -> simulate the backfill of that fold: each offset with a few orders, then the best with all of them
          -> the simplest candidate within one standard error of the best, and the table of all

Guarantee: what is measured on a fold was fitted without it: the network and its classifier, the offset, and what the
policies know of pairs. Offset and policies are fitted on another fold, with the classifier that had not seen that one.
The selection is a function of the pairs, the settings and the seed. A fit or a selection that is there is not made
again. This module does not fit what is served in the end; `fit` does that, with the settings chosen here.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np
import pyarrow as pa
import ray
import torch
from safetensors.numpy import load, save

from pipeline import offset as offsets
from pipeline import storage
from pipeline.agreement import agreement_curve
from pipeline.config import Config, Select
from pipeline.errors import ConfigError
from pipeline.evaluate import METRICS, evaluate, order_by_priority, random_order, simulate_curve
from pipeline.offset import Classifier
from pipeline.policy import POLICIES, Scored, load_policy
from pipeline.ranking import Float64
from pipeline.reference import Reference, build_reference
from pipeline.run import Run
from pipeline.schema import Float32, Int64, splitmix64
from pipeline.selection import Selection
from pipeline.transformation import apply, resolve_device
from training.candidates import Candidate, Recipe, Row, Serving, finalists, selection_of
from training.harm import fit_learned, harm
from training.knowledge import measurable
from training.learner import FitData, Job, Learner, PairArrays, can_classify, make_arrays
from training.losses import NO_LABEL, needs_labels

OnStep = Callable[[str, int, int], None]
FOLDER = "selecting"
APPLY_BATCH = 8192
_RANDOM_SEEDS = 3
_SCREENING = ("random", "uncertainty", "least_confidence")
"""Orders with which all offsets of all recipes are tried before the finalists meet every order."""


@dataclass(frozen=True, slots=True)
class Detail:
    """How finely a backfill is simulated: points of the curve, and queries at most."""

    points: int
    queries: int


SCREENING, FINAL = Detail(8, 2500), Detail(22, 5000)


@dataclass(frozen=True, slots=True)
class Fold:
    """Pairs that a recipe was not fitted on, their z (N, d_new) and s (N,), and a classifier that has not seen them."""

    pairs: PairArrays
    z: Float32
    s: Float32
    classifier: Classifier | None

    def scored(self) -> Scored:
        """As policies see it: without labels, which a gallery may not have."""
        none = np.full(len(self.s), None, dtype=object)
        return Scored(np.arange(len(self.s)), self.s, self.z, self.pairs.old, none, none)

    def take(self, rows: Int64) -> Fold:
        """Some of the pairs."""
        pairs = self.pairs
        side = None if pairs.side is None else pairs.side[rows]
        labels = None if pairs.labels is None else pairs.labels[rows]
        return Fold(
            PairArrays(pairs.old[rows], pairs.new[rows], side, labels), self.z[rows], self.s[rows], self.classifier
        )

    def labels(self) -> Int64 | None:
        """The labels where quality can be measured by them."""
        return measurable(self.pairs.labels)


def select(config: Config, run: Run, data: FitData, on_step: OnStep) -> Selection:
    """Measure all candidates and choose one.

    Args:
        config: `select` says what is tried.
        run: where fits and the selection are kept, below FOLDER, until the caller has what it wants of them.
        data: all pairs; those that `fit` will hold out take part as any others.
        on_step: told what is done, how much of it, and of how much.

    Raises:
        ConfigError: a loss, a metric or an order needs labels that the pairs do not have.
        DataError: the pairs break their contract.
    """
    settings = config.select or Select()
    _check(settings, data)
    kept = run.path(FOLDER, f"{_digest(config, data, settings.model_dump(mode='json'))}.json")
    if storage.exists(kept):
        return Selection.from_json(storage.read_bytes(kept))
    found = _select(config, run, data, settings, on_step)
    storage.put(kept, found.to_json().encode())
    return found


def _select(config: Config, run: Run, data: FitData, settings: Select, on_step: OnStep) -> Selection:
    recipes = _recipes(config, settings, data)
    folds = _fit_folds(config, run, data, settings, recipes, on_step)
    columns, names = _columns(settings, folds[recipes[0]][0])
    known = [name for name in settings.policies or POLICIES if _possible(name, data)]
    servings = _servings(config, settings, data)
    first = [name for name in _SCREENING if name in known] or known[:1]
    tried = [(recipe, serving) for recipe in recipes for serving in servings]
    screened = _measure(config, folds, tried, first, SCREENING, "screen", on_step)
    rows = _measure(config, folds, finalists(screened, columns, settings.finalists), known, FINAL, "orders", on_step)
    some = folds[recipes[0]]
    return selection_of(rows, screened, names, columns, len(some[0].s), _ends(config, some))


def _check(settings: Select, data: FitData) -> None:
    if settings.policies and not any(_possible(name, data) for name in settings.policies):
        raise ConfigError(
            "every order to choose from needs what is not given",
            expected="labels in pairs.columns.label, fit.classifier, or other orders",
            found=", ".join(settings.policies),
            where="select.policies",
        )
    if data.num_classes is not None:
        if "recall10" in settings.metrics:
            raise ConfigError(
                "pairs with labels are measured by them",
                expected=", ".join(METRICS),
                found=", ".join(settings.metrics),
                where="select.metrics",
            )
        return
    wanting = [loss for loss in settings.losses if needs_labels(loss)]
    if wanting and len(wanting) == len(settings.losses):
        raise ConfigError(
            "every loss to choose from needs labels",
            expected="pairs.columns.label",
            found=", ".join(wanting),
            where="select.losses",
        )


def _recipes(config: Config, settings: Select, data: FitData) -> list[Recipe]:
    losses = [loss for loss in settings.losses if data.num_classes is not None or not needs_labels(loss)]
    widths, epochs = settings.inner_widths or (config.fit.inner_width,), settings.epochs or (config.fit.epochs,)
    return [
        Recipe(loss, weight, width, count)
        for loss in losses
        for weight in (settings.lambdas if needs_labels(loss) else (config.fit.lambda_disc,))
        for width, count in itertools.product(widths, epochs)
    ]


def _servings(config: Config, settings: Select, data: FitData) -> list[Serving]:
    kinds = [kind for kind in settings.offsets if kind != "confidence" or can_classify(data)]
    kinds = [kind for kind in kinds if kind == "none" or config.gallery.metric != "ip"] or ["none"]
    return [
        Serving(kind, strength) for kind in kinds for strength in (settings.strengths if kind != "none" else (0.0,))
    ]


def _possible(policy: str, data: FitData) -> bool:
    there = {"classifier": can_classify(data), "labels": data.num_classes is not None, "learned": True}
    return all(there.get(item, False) for item in POLICIES[policy].needs)


def _columns(settings: Select, fold: Fold) -> tuple[list[int], tuple[str, ...]]:
    """Which columns of a curve count, and what its columns are."""
    names = METRICS if fold.labels() is not None else ("recall10",)
    columns = [names.index(metric) for metric in settings.metrics if metric in names]
    return columns or list(range(len(names))), names


def _fit_folds(
    config: Config,
    run: Run,
    data: FitData,
    settings: Select,
    recipes: list[Recipe],
    on_step: OnStep,
) -> dict[Recipe, list[Fold]]:
    """Each recipe's folds; the fits are tasks, side by side as far as the cluster has room."""
    tables = [storage.read_parquet(uri) for uri in [*data.train_parts, *data.held_out_parts]]
    table = pa.concat_tables(tables).sort_by("index")
    chance = splitmix64(table["index"].to_numpy(), config.seed + 3)
    rows = np.sort(np.argsort(chance, kind="stable")[: settings.max_pairs])
    table, places = table.take(pa.array(rows)), (chance[rows] % np.uint64(settings.folds)).astype(np.int64)
    stored = ray.put((table, places))
    gpus = ray.cluster_resources().get("GPU", 0)
    use_gpu = config.device.startswith("cuda") or (config.device == "auto" and gpus > 0)
    task = ray.remote(num_cpus=1, num_gpus=1 if use_gpu else 0)(_fit_fold)
    work = [(recipe, fold) for recipe in recipes for fold in range(settings.folds)]
    shape = [settings.folds, settings.max_pairs, settings.max_measured]
    uris = {
        (recipe, fold): run.path(FOLDER, f"{_digest(config, data, [asdict(recipe), fold, *shape])}.safetensors")
        for recipe, fold in work
    }
    waiting = [task.remote(config, data, stored, recipe, fold, uris[recipe, fold]) for recipe, fold in work]
    on_step("select: fits", 0, len(work))
    for done in range(1, len(work) + 1):
        ready, waiting = ray.wait(waiting)
        ray.get(ready)
        on_step("select: fits", done, len(work))
    pairs = [_held(table, places, fold, settings, _job(config, data, recipes[0])) for fold in range(settings.folds)]
    return {
        recipe: [_read_fold(pairs[fold], uris[recipe, fold]) for fold in range(settings.folds)] for recipe in recipes
    }


def _job(config: Config, data: FitData, recipe: Recipe) -> Job:
    fit = recipe.of(config.fit).model_copy(update={"offset": "none"})
    return Job(fit, data, config.seed, config.gallery.metric == "cosine", 0, 0, can_classify(data))


def _held(table: pa.Table, places: Int64, fold: int, settings: Select, job: Job) -> PairArrays:
    rows = np.flatnonzero(places == fold)
    chance = splitmix64(table["index"].to_numpy()[rows], job.seed + 4)  # the index may follow the labels
    return make_arrays(table.take(pa.array(rows[np.argsort(chance, kind="stable")[: settings.max_measured]])), job)


def _fit_fold(
    config: Config, data: FitData, stored: tuple[pa.Table, Int64], recipe: Recipe, fold: int, uri: str
) -> None:
    """Fit on all folds but one, transform the one, and keep it; nothing where that is done."""
    if storage.exists(uri):
        return
    table, places = stored
    job = _job(config, data, recipe)
    train = make_arrays(table.take(pa.array(np.flatnonzero(places != fold))), job)
    held = _held(table, places, fold, config.select or Select(), job)
    found = fit_alone(job, train, held, config.seed + fold, resolve_device(config.device))
    tensors = {"z": found.z, "s": found.s}
    if found.classifier is not None:
        bias = found.classifier.bias
        tensors |= {"weight": found.classifier.weight} | ({} if bias is None else {"bias": bias})
    storage.put(uri, save(tensors))


def fit_alone(job: Job, train: PairArrays, held: PairArrays, seed: int, device: torch.device) -> Fold:
    """Fit by a plain loop in this process, and transform what was held out.

    Args:
        job: whose `fit`, `data` and `normalize` count.
        train: what to fit on.
        held: what to transform.
        seed: of the first weights and the shuffles.
        device: where to compute.
    """
    batch = min(job.fit.batch_size, len(train.old))
    job = replace(job, seed=seed, steps=len(train.old) // batch, rank_batch=batch)
    learner = Learner(job, train, 0, device, lambda module: module)
    learner.prepare()
    while learner.epoch < job.fit.epochs:
        learner.run_epoch()
    z, s = apply(learner.network.eval(), held.old, held.side, device, APPLY_BATCH)
    return Fold(held, z, s, learner.classifier)


def _read_fold(pairs: PairArrays, uri: str) -> Fold:
    tensors = load(storage.read_bytes(uri))
    weight = tensors.get("weight")
    classifier = None if weight is None else Classifier(weight, tensors.get("bias"))
    return Fold(pairs, tensors["z"], tensors["s"], classifier)


def _digest(config: Config, data: FitData, decides: object) -> str:
    """Names a fit, or a selection, by all that decides it."""
    known = [config.fit.model_dump(mode="json"), config.seed, config.gallery.metric, data.num_train, decides]
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
    for tensor in data.classifier or ():
        digest.update(b"" if tensor is None else tensor.tobytes())
    return digest.hexdigest()[:32]


def _measure(
    config: Config,
    folds: dict[Recipe, list[Fold]],
    tried: list[tuple[Recipe, Serving]],
    policies: list[str],
    detail: Detail,
    what: str,
    on_step: OnStep,
) -> list[Row]:
    """The curves of each recipe and offset under each order, by tasks of Ray."""
    task = ray.remote(num_cpus=1)(measure_fold)
    stored = {recipe: [ray.put(fold) for fold in some] for recipe, some in folds.items()}
    tasks = []
    for recipe, serving in tried:
        some = stored[recipe]
        others = [*some[1:], some[0]]
        tasks.append([task.remote(config, *two, serving, policies, detail) for two in zip(some, others, strict=True)])
    rows = []
    for done, ((recipe, serving), parts) in enumerate(zip(tried, tasks, strict=True), start=1):
        curves = ray.get(parts)
        rows += [
            Row(Candidate(recipe, serving, policy), np.stack([curve[policy] for curve in curves]))
            for policy in policies
        ]
        on_step(f"select: {what}", done, len(tried))
    return rows


def measure_fold(
    config: Config, fold: Fold, other: Fold, serving: Serving, policies: list[str], detail: Detail
) -> dict[str, Float64]:
    """The curve of each order on one fold, (P, M) float64 in per cent.

    Args:
        config: `gallery.metric` and `seed` count.
        fold: gallery and queries at once.
        other: pairs that offset and policies are fitted on.
        serving: the offset.
        policies: their names.
        detail: P points, and how many queries at most.
    """
    served, others = fold.z, other.z
    if serving.offset != "none":
        fitted = offsets.fit_offset(
            serving.offset, serving.strength, other.z, other.s, other.pairs.new, other.classifier, config.gallery.metric
        )
        others = fitted.apply(other.z, other.s)
        served = replace(fitted, classifier=fold.classifier).apply(fold.z, fold.s)
    reference = _reference(config, other, others, policies)
    if fold.classifier is not None:
        weight, bias = fold.classifier.weight, fold.classifier.bias
        reference = replace(reference, classifier_weight=weight, classifier_bias=bias)
    ids, scored = np.arange(len(served)), fold.scored()
    orders = {}
    for name in policies:
        if name == "random":
            orders[name] = [random_order(ids, config.seed + seed) for seed in range(_RANDOM_SEEDS)]
        else:
            orders[name] = [order_by(load_policy(name, config.seed, reference)(scored), config.seed)]
    return curves_of(config, served, fold, orders, detail)[1]


def order_by(priority: Float32, seed: int) -> Int64:
    """Rows by descending priority, (N,) int64."""
    return order_by_priority(priority, np.arange(len(priority)), seed)


def curves_of(
    config: Config, served: Float32, fold: Fold, orders: dict[str, list[Int64]], detail: Detail
) -> tuple[tuple[str, ...], dict[str, Float64]]:
    """The metrics, and the curve of each order, (P, M) float64 in per cent; the fold is gallery and queries at once."""
    labels, metric, ids = fold.labels(), config.gallery.metric, np.arange(len(served))
    if labels is None:
        flat = {name: some[0] for name, some in orders.items()}
        rows = ids[:: -(-len(ids) // detail.queries)]
        curves = agreement_curve(served, fold.pairs.new, rows, flat, detail.points, metric)
        return ("recall10",), {name: curve[:, None] for name, curve in curves.items()}
    queries = np.flatnonzero(labels != NO_LABEL)
    queries = queries[:: -(-len(queries) // detail.queries)]
    simulation = simulate_curve(
        served,
        fold.pairs.new,
        fold.pairs.new[queries],
        labels[queries],
        labels,
        orders,
        points=detail.points,
        metric=metric,
        query_ids=queries,
        gallery_ids=ids,
    )
    return METRICS, {name: curve.values for name, curve in simulation.orders.items()}


def _reference(config: Config, other: Fold, served: Float32, policies: list[str]) -> Reference:
    pairs, metric = other.pairs, config.gallery.metric
    known = None if other.classifier is None else (other.classifier.weight, other.classifier.bias)
    reference = build_reference(pairs.old, other.z, other.s, pairs.new, pairs.labels, known, metric, config.seed)
    if "learned" not in policies:
        return reference
    return fit_learned(
        other.scored(), reference, harm(served, pairs.new, other.labels(), metric, config.seed), config.seed
    )


def _ends(config: Config, folds: list[Fold]) -> dict[str, dict[str, float]]:
    """old/old and new/new over the folds, as means; empty without labels."""
    found: dict[str, list[dict[str, float]]] = {"old_old": [], "new_new": []}
    for fold in folds:
        labels = fold.labels()
        if labels is None:
            return {}
        rows = np.flatnonzero(labels != NO_LABEL)
        for name, vectors in (("old_old", fold.pairs.old), ("new_new", fold.pairs.new)):
            sides = (vectors[rows], vectors[rows], labels[rows], labels[rows])
            found[name].append(evaluate(*sides, metric=config.gallery.metric, self_match=True).as_dict())
    return {
        name: {metric: float(np.mean([item[metric] for item in some])) for metric in METRICS}
        for name, some in found.items()
    }
