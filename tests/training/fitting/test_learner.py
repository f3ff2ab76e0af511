"""How a fit is cut into batches, steps and epochs, and how `residual` learns. The loop itself is in test_fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config.method import TransformationKind
from tests.support.pairs import (
    CPU,
    assert_same_weights,
    fit_config,
    fit_job,
    make_learner,
    read_pairs,
    same_network,
    synthetic_fit_data,
)
from training.fitting.held_out_metrics import transform
from training.fitting.learner import Job, Learner, PairArrays, with_linear
from training.fitting.linear_fit import over_arrays
from training.fitting.stopping import PATIENCE
from training.simulation.folds import FoldSettings, fit_alone
from training.simulation.trials import Recipe


@pytest.mark.parametrize(
    ("settings", "num", "batch"),
    [
        ({"batch_size": 513}, 640, 64),
        ({"batch_size": 1024}, 100, 10),
        ({"batch_size": 32}, 640, 32),
        ({"batch_size": 1}, 640, 2),
        ({"batch_size": 1024, "num_workers": 2}, 640, 32),
        ({"batch_size": 1024, "transformation": "residual"}, 640, 57),
        ({"batch_size": 1024}, 15, 2),
    ],
)
def test_a_batch_is_an_eighth_of_the_pairs_at_most_and_two_at_least(
    tmp_path: Path, settings: dict[str, object], num: int, batch: int
) -> None:
    job = fit_job(fit_config(tmp_path, **settings), synthetic_fit_data(tmp_path, num))
    assert job.rank_batch == batch
    assert job.steps >= 6


def test_without_epochs_few_pairs_get_all_steps_in_eighty_epochs(tmp_path: Path) -> None:
    job = fit_job(fit_config(tmp_path, epochs=None, steps=1000, batch_size=1024), synthetic_fit_data(tmp_path, num=100))
    assert job.fit.num_epochs == 80
    assert [step for epoch in range(80) for step in job.steps_of(epoch)] == list(range(1000))
    assert fit_job(fit_config(tmp_path, epochs=None), synthetic_fit_data(tmp_path)).fit.steps == 4000


def test_learner_with_epochs_passes_over_the_pairs_once_an_epoch(tmp_path: Path) -> None:
    job = fit_job(fit_config(tmp_path, epochs=3, steps=1000), synthetic_fit_data(tmp_path))
    assert [list(job.steps_of(epoch)) for epoch in range(job.fit.num_epochs)] == [
        list(range(start, start + 8)) for start in (0, 8, 16)
    ]


def test_learner_with_fewer_steps_than_epochs_takes_one_step_an_epoch(tmp_path: Path) -> None:
    job = fit_job(fit_config(tmp_path, epochs=None, steps=3), synthetic_fit_data(tmp_path))
    assert [list(job.steps_of(epoch)) for epoch in range(job.fit.num_epochs)] == [[0], [1], [2]]


def test_learner_with_steps_has_the_papers_learning_rate(tmp_path: Path) -> None:
    data = synthetic_fit_data(tmp_path)
    by_steps = fit_job(fit_config(tmp_path, epochs=None, warmup_epochs=5), data)
    by_epochs = fit_job(fit_config(tmp_path, epochs=80, warmup_epochs=5), data)
    assert [by_steps.lr(epoch) for epoch in range(80)] == [by_epochs.lr(epoch) for epoch in range(80)]


def test_an_epoch_of_several_passes_shuffles_each(tmp_path: Path) -> None:
    job = fit_job(fit_config(tmp_path, epochs=None, steps=80 * 12), synthetic_fit_data(tmp_path))
    rows = torch.cat(list(make_learner(job)._batches(0)))
    assert len(rows) == 12 * 64
    assert rows[:512].sort().values.tolist() == list(range(512))
    assert rows[:256].tolist() != rows[512:].tolist()
    following = torch.cat(list(make_learner(job)._batches(1)))
    second = torch.cat([rows[512:], following[:256]])
    assert second.sort().values.tolist() == list(range(512)), "an epoch goes on with the pass that the last one began"


def _residual(tmp_path: Path, **settings: object) -> Job:
    config = fit_config(tmp_path, **{"transformation": "residual", "epochs": 20} | settings)
    job = fit_job(config, synthetic_fit_data(tmp_path, hard=True))
    pairs = read_pairs(job.data.train_parts, job)
    return with_linear(job, lambda: over_arrays(np.arange(len(pairs.old)), pairs.old, pairs.new, None, job.normalize))


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_residual_without_a_step_equals_linear(tmp_path: Path, metric: str) -> None:
    job = _residual(tmp_path, metric=metric)
    pairs = read_pairs(job.data.held_out_parts, job)
    assert job.linear is not None
    for found, expected in zip(
        transform(make_learner(job).fitted(), pairs, "cpu"), transform(job.linear.network, pairs, "cpu"), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("loss", ["alignment", "alignment+discriminative"])
def test_residual_is_better_than_linear_on_the_pairs_it_watches(tmp_path: Path, loss: str) -> None:
    job = _residual(tmp_path, lr=5e-3, loss=loss)
    learner = make_learner(job)
    first = learner._watched_error()
    while not learner.done:
        learner.run_epoch()
    learner.fitted()
    assert learner._watched_error() < 0.99 * first


def test_residual_that_gets_worse_is_linear_and_ends_soon(tmp_path: Path) -> None:
    job = _residual(tmp_path, lr=10.0, warmup_epochs=0)
    learner = make_learner(job)
    first = learner._watched_error()
    while not learner.done:
        learner.run_epoch()
    assert learner.epoch == PATIENCE
    learner.fitted()
    assert learner._watched_error() == first


def test_residual_restored_from_a_state_equals_an_uninterrupted_fit(tmp_path: Path) -> None:
    job = _residual(tmp_path, epochs=8, lr=5e-3)
    whole, learner = make_learner(job), make_learner(job)
    while not whole.done:
        whole.run_epoch()
    for _ in range(3):
        learner.run_epoch()
    torch.save(learner.state(), tmp_path / "state.pt")
    resumed = Learner(job, read_pairs(job.data.train_parts, job), 0, CPU, same_network)
    resumed.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    resumed.prepare()
    while not resumed.done:
        resumed.run_epoch()
    assert_same_weights(resumed.fitted(), whole.fitted())


@pytest.mark.parametrize("kind", ["linear", "residual", "fastfill"])
def test_a_fold_is_fitted_by_each_kind(tmp_path: Path, kind: TransformationKind) -> None:
    data = synthetic_fit_data(tmp_path)
    config = fit_config(tmp_path)
    given = FoldSettings(config.fit, config.select, data, "l2", config.seed, config.device)
    job = given.job(Recipe("alignment", 0.0, 32, 12, kind))
    train, held = read_pairs(data.train_parts, job), read_pairs(data.held_out_parts, job)
    found = fit_alone(job, train, held, 0, CPU)
    assert found.z.shape == held.new.shape
    assert np.isfinite(found.s).all()
    assert found.classifier is not None, "orders by it are tried for each kind"
    assert np.square(found.z - held.new).mean() < 0.9 * held.new.var(axis=0).mean()


@pytest.mark.parametrize(("labels", "found"), [(None, False), ([3, -1, -1, 5], False), ([3, -1, 3], True)])
def test_measurable_labels_are_none_if_no_two_images_share_one(labels: list[int] | None, found: bool) -> None:
    codes = None if labels is None else np.array(labels)
    none = np.empty((0, 1), np.float32)
    assert (PairArrays(none, none, None, codes).measurable_labels() is not None) == found
