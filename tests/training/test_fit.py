"""The fit: schedule, determinism, recovery and figures. Synthetic pairs, small networks."""

from __future__ import annotations

import logging
import os
import re
import signal
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config.method import LossMode
from pipeline.errors import ConfigError, DataError, TransientError
from pipeline.evaluation.metrics import METRICS
from pipeline.evaluation.simulated_curve import CurveInputs, CurveOptions, order_by_priority, simulate_curve
from pipeline.models.networks import Transformation
from pipeline.models.transformation import TransformationInfo, apply, load_transformation
from pipeline.planning.policy_inputs import load_policy_inputs
from pipeline.run import Run
from pipeline.storage import objects
from tests.support.pairs import (
    CLASSES,
    CPU,
    D_NEW,
    D_OLD,
    PARTS,
    assert_same_weights,
    fit_config,
    fit_job,
    make_learner,
    read_pairs,
    same_network,
    synthetic_fit_data,
)
from training import fit as fitting
from training.fit import fit
from training.fitting import learner as learning
from training.fitting import trainer
from training.fitting.held_out_metrics import held_out_metrics, spearman, transform
from training.fitting.learner import Epoch, Job, Learner, PairArrays

MODES: list[LossMode] = ["alignment", "alignment+uncertainty", "alignment+discriminative", "fastfill"]


def _fit_here(job: Job) -> Transformation:
    """The same fit as a plain loop in this process, with as many threads as a worker has: sums depend on them."""
    torch.set_num_threads(os.cpu_count() or 1)
    learner = make_learner(job)
    for _ in range(job.fit.epochs):
        learner.run_epoch()
    return learner.network


def _measured(job: Job, network: Transformation, pairs: PairArrays) -> TransformationInfo:
    return held_out_metrics(job, pairs, *transform(network, pairs, "cpu"))


def test_the_learning_rate_warms_up_and_ends_in_a_cosine(tmp_path: Path) -> None:
    job = fit_job(fit_config(tmp_path, epochs=80, warmup_epochs=5, lr=5e-4), synthetic_fit_data(tmp_path))
    rates = [job.lr(epoch) for epoch in range(80)]
    assert rates[:6] == pytest.approx([1e-4, 2e-4, 3e-4, 4e-4, 5e-4, 5e-4])
    assert rates[42] == pytest.approx(5e-4 * 0.5 * (1 + np.cos(np.pi * 37 / 75)))
    assert 0 < rates[79] < 1e-6
    assert all(np.diff(rates[5:]) < 0)


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_aligns_and_ranks_by_error(tmp_path: Path, mode: LossMode) -> None:
    config = fit_config(tmp_path, loss=mode, epochs=30)
    job = fit_job(config, synthetic_fit_data(tmp_path))
    pairs = read_pairs(job.data.held_out_parts, job)
    before, after = (_measured(job, network, pairs) for network in (job.network(), _fit_here(job)))
    assert isinstance(after.held_out["alignment"], float)
    assert isinstance(after.held_out["spearman"], float)
    assert after.held_out["alignment"] < 0.7 * before.held_out["alignment"]  # type: ignore[operator]  # a float too
    assert after.held_out["spearman"] > 0.4
    assert after.loss == mode
    assert after.better_than_old


@pytest.mark.parametrize("mode", ["alignment", "alignment+uncertainty"])
def test_the_modes_for_foundation_models_fit_without_labels(tmp_path: Path, mode: LossMode) -> None:
    config = fit_config(tmp_path, loss=mode)
    job = fit_job(config, synthetic_fit_data(tmp_path, labelled=False))
    info = _measured(job, _fit_here(job), read_pairs(job.data.held_out_parts, job))
    assert info.held_out["new_new"] == {"agreement10": 100.0}
    assert set(info.held_out) == {"alignment", "spearman", "transformed", "old_old", "new_new"}


@pytest.mark.parametrize("mode", ["alignment+discriminative", "fastfill"])
def test_a_loss_that_needs_labels_is_refused_without_them(tmp_path: Path, mode: LossMode) -> None:
    with pytest.raises(ConfigError, match=r"alignment\+uncertainty"):
        fit(fit_config(tmp_path, loss=mode), Run(str(tmp_path / "run")), synthetic_fit_data(tmp_path, labelled=False))


def test_cosine_fits_unit_vectors(tmp_path: Path) -> None:
    config = fit_config(tmp_path, metric="cosine", loss="alignment+uncertainty", epochs=30)
    job = fit_job(config, synthetic_fit_data(tmp_path))
    pairs = read_pairs(job.data.held_out_parts, job)
    np.testing.assert_allclose(np.linalg.norm(pairs.new, axis=1), 1, rtol=1e-5)
    info = _measured(job, _fit_here(job), pairs)
    assert info.normalize
    assert info.better_than_old


def test_bfloat16_fits_too(tmp_path: Path) -> None:
    config = fit_config(tmp_path, precision="bfloat16", epochs=20)
    job = fit_job(config, synthetic_fit_data(tmp_path))
    info = _measured(job, _fit_here(job), read_pairs(job.data.held_out_parts, job))
    assert info.better_than_old


@pytest.mark.parametrize("native", [True, False])
def test_the_precision_auto_is_bfloat16_where_the_device_has_it(
    tmp_path: Path, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "computes_bfloat16", lambda device: native)
    weights = {}
    for precision in ("auto", "bfloat16", "float32"):
        weights[precision] = _fit_here(fit_job(fit_config(tmp_path, precision=precision), synthetic_fit_data(tmp_path)))
    assert_same_weights(weights["auto"], weights["bfloat16" if native else "float32"])
    with pytest.raises(AssertionError):
        assert_same_weights(weights["float32"], weights["bfloat16"])


def test_pairs_without_a_label_are_fitted_by_alignment_alone(tmp_path: Path) -> None:
    job = fit_job(fit_config(tmp_path), synthetic_fit_data(tmp_path))
    pairs = read_pairs(job.data.train_parts, job)
    assert pairs.labels is not None
    labels = np.where(np.arange(len(pairs.labels)) % 3 == 0, -1, pairs.labels)
    learner = Learner(job, PairArrays(pairs.old, pairs.new, None, labels), 0, CPU, same_network)
    learner.prepare()
    assert np.isfinite(learner.run_epoch()["loss"])


def test_a_given_classifier_is_used_as_it_is(tmp_path: Path) -> None:
    data = synthetic_fit_data(tmp_path)
    weight, bias = np.zeros((CLASSES, D_NEW), np.float32), np.arange(CLASSES, dtype=np.float32)
    job = fit_job(fit_config(tmp_path), replace(data, classifier=(weight, bias)))
    known = make_learner(job).state()["classifier"]
    assert isinstance(known, tuple)
    np.testing.assert_array_equal(known[0], weight)
    np.testing.assert_array_equal(known[1], bias)


def test_batchnorm_statistics_are_frozen_from_half_of_the_epochs_on(tmp_path: Path) -> None:
    learner = make_learner(fit_job(fit_config(tmp_path, epochs=4), synthetic_fit_data(tmp_path)))
    means = []
    for _ in range(4):
        learner.run_epoch()
        means.append(learner.network.state_dict()["trunk.0.1.running_mean"].clone())
    assert not torch.equal(means[0], means[1])
    assert torch.equal(means[1], means[2])
    assert torch.equal(means[2], means[3])


@pytest.mark.parametrize("stopped_after", [2, 4])
@pytest.mark.parametrize("mode", ["alignment+uncertainty", "fastfill"])
def test_a_fit_restored_from_a_state_equals_an_uninterrupted_one(
    tmp_path: Path, mode: LossMode, stopped_after: int
) -> None:
    job = fit_job(fit_config(tmp_path, loss=mode), synthetic_fit_data(tmp_path))
    learner = make_learner(job)
    for _ in range(stopped_after):
        learner.run_epoch()
    torch.save(learner.state(), tmp_path / "state.pt")
    resumed = Learner(job, read_pairs(job.data.train_parts, job), 0, CPU, same_network)
    resumed.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    resumed.prepare()
    while resumed.epoch < job.fit.epochs:
        resumed.run_epoch()
    assert_same_weights(resumed.network, _fit_here(job))


def test_the_order_of_rows_and_parts_does_not_matter(tmp_path: Path) -> None:
    job = fit_job(fit_config(tmp_path), synthetic_fit_data(tmp_path))
    forwards, backwards = read_pairs(job.data.train_parts, job), read_pairs(job.data.train_parts[::-1], job)
    np.testing.assert_array_equal(forwards.old, backwards.old)
    np.testing.assert_array_equal(forwards.labels, backwards.labels)


def test_ranks_share_steps_and_split_the_batch(tmp_path: Path) -> None:
    data = synthetic_fit_data(tmp_path)
    jobs = [fit_job(fit_config(tmp_path, num_workers=workers), data) for workers in (1, 2)]
    assert [(job.steps, job.rank_batch) for job in jobs] == [(8, 64), (8, 32)]
    with pytest.raises(ConfigError, match="larger than the number of parts"):
        fit_job(fit_config(tmp_path, num_workers=PARTS + 1), data)
    with pytest.raises(ConfigError, match="too few training pairs for this many workers"):
        fit_job(fit_config(tmp_path, num_workers=PARTS), synthetic_fit_data(tmp_path / "few", num=10))


def test_a_classifier_of_another_shape_is_refused(tmp_path: Path) -> None:
    data = replace(synthetic_fit_data(tmp_path), classifier=(np.zeros((CLASSES, D_OLD), np.float32), None))
    with pytest.raises(DataError, match="does not match the training pairs"):
        fit_job(fit_config(tmp_path), data)


def test_pairs_with_wrong_labels_or_widths_are_refused(tmp_path: Path) -> None:
    data = synthetic_fit_data(tmp_path)
    for wrong, message in ((replace(data, num_classes=3), "labels out of range"), (replace(data, d_old=9), "width")):
        with pytest.raises(DataError, match=message):
            read_pairs(data.train_parts, fit_job(fit_config(tmp_path), wrong))


def test_a_loss_that_is_not_finite_stops_the_fit(tmp_path: Path) -> None:
    job = fit_job(fit_config(tmp_path), synthetic_fit_data(tmp_path))
    pairs = read_pairs(job.data.train_parts, job)
    learner = Learner(job, replace(pairs, new=np.full_like(pairs.new, np.inf)), 0, CPU, same_network)
    learner.prepare()
    with pytest.raises(DataError, match="not finite"):
        learner.run_epoch()


def test_a_transformation_worse_than_the_old_model_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = fit_config(tmp_path)
    job = fit_job(config, synthetic_fit_data(tmp_path))
    with caplog.at_level(logging.WARNING):
        info = _measured(job, job.network(), read_pairs(job.data.held_out_parts, job))
    assert not info.better_than_old
    assert "answers worse than the old model" in caplog.text
    assert re.search(r"\(top1 \d+\.\d, top5 \d+\.\d, map \d+\.\d against top1", caplog.text)


def test_spearman_handles_ties_and_constants() -> None:
    a = np.array([1, 2, 2, 3], np.float32)
    assert spearman(a, 10 * a) == pytest.approx(1)
    assert spearman(a, -a) == pytest.approx(-1)
    assert spearman(a, np.array([1, 2, 3, 4], np.float32)) == pytest.approx(0.9486833)
    assert spearman(a, np.ones(4, np.float32)) == 0


def test_a_snapshot_cut_short_by_a_crash_is_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    objects.put(str(tmp_path / "checkpoint_manager_snapshot.json"), b'{"checkpoint_results": [')
    with caplog.at_level(logging.WARNING):
        trainer._drop_broken_snapshot(str(tmp_path))
    assert not tmp_path.exists()
    assert "starting again at the first epoch" in caplog.text


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_killed_workers_and_a_second_start_change_nothing(tmp_path: Path) -> None:
    config, run, data = (
        fit_config(tmp_path, epochs=14, max_failures=1),
        Run(str(tmp_path / "run")),
        synthetic_fit_data(tmp_path),
    )
    first: list[Epoch] = []
    with pytest.raises(TransientError, match="run the same command again"):
        fit(config, run, data, on_epoch=lambda figures: _kill(figures, first, at=(2, 7)))
    assert (
        len({figures["pid"] for figures in first}) == 2
    )  # Ray Train replaced the first one, and gave up at the second
    second: list[Epoch] = []
    info = fit(config, run, data, on_epoch=second.append)
    assert [figures["epoch"] for figures in first + second] == list(range(14))
    network, stored = load_transformation(run, CPU)
    assert stored == info
    assert_same_weights(network, _fit_here(fit_job(config, data)))
    assert not objects.exists(objects.join(run.transformation, "training"))
    assert fit(config, run, data, on_epoch=lambda figures: pytest.fail("fitted again")) == info


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_fit_as_well_as_one(tmp_path: Path) -> None:
    """Within half a point of area, and within a tenth of the alignment error."""
    data = synthetic_fit_data(tmp_path, num=12_000, hard=True)
    settings = {
        "transformation": "fastfill",
        "loss": "alignment+uncertainty",
        "inner_width": 64,
        "epochs": 16,
        "batch_size": 512,
        "lr": 2e-3,
    }
    held_out = read_pairs(data.held_out_parts, fit_job(fit_config(tmp_path, **settings), data))
    alone_job = fit_job(fit_config(tmp_path, **settings), data)
    alone = _fit_here(alone_job)  # what one worker of Ray Train gives to the bit: see the test above
    run = Run(str(tmp_path / "run"))
    together = fit(fit_config(tmp_path, num_workers=2, **settings), run, data)
    areas = {1: _areas(alone, held_out), 2: _areas(load_transformation(run, CPU)[0], held_out)}
    for name in ("top1", "map"):
        assert abs(areas[2][name] - areas[1][name]) <= 0.5, areas
        assert areas[1][f"start {name}"] + 5 < areas[1][name] < areas[1][f"end {name}"] - 5, "else it shows nothing"
    figures = _measured(alone_job, alone, held_out)
    assert together.held_out["alignment"] == pytest.approx(figures.held_out["alignment"], rel=0.1)
    assert together.better_than_old


def _areas(network: Transformation, pairs: PairArrays) -> dict[str, float]:
    """The curve of held-out pairs by uncertainty, as gallery and queries: its area and its ends, in per cent."""
    transformed, uncertainty = apply(network.eval(), pairs.old, None, CPU, 8192)
    assert pairs.labels is not None
    order = order_by_priority(uncertainty, np.arange(len(pairs.old)), seed=0)
    simulation = simulate_curve(
        CurveInputs(transformed, pairs.new, pairs.new, pairs.labels, pairs.labels),
        {"uncertainty": [order]},
        CurveOptions(self_match=True),
    )
    start, end = simulation.start.as_dict(), simulation.end.as_dict()
    area = dict(zip(METRICS, simulation.orders["uncertainty"].area.tolist(), strict=True))
    return area | {f"start {name}": start[name] for name in start} | {f"end {name}": end[name] for name in end}


def _kill(figures: Epoch, seen: list[Epoch], at: tuple[int, int]) -> None:
    """Kill -9 the first process that reports as soon as it has reached epoch `at[0]`, and the second at `at[1]`."""
    seen.append(figures)
    pids = list(dict.fromkeys(item["pid"] for item in seen))
    if figures["epoch"] >= at[len(pids) - 1]:
        with suppress(ProcessLookupError):  # what it had reported before it died comes after
            os.kill(int(figures["pid"]), signal.SIGKILL)


@pytest.mark.parametrize("mode", ["alignment+uncertainty", "fastfill"])
def test_fit_stores_the_policy_inputs_with_the_transformation(
    tmp_path: Path, mode: LossMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Ray Train, which takes seconds to start: its result is the same to the bit."""
    config, run, data = fit_config(tmp_path, loss=mode), Run(str(tmp_path / "run")), synthetic_fit_data(tmp_path)

    def train(run: Run, job: Job, device: str, on_epoch: object) -> trainer.Fitted:
        learner = make_learner(job)
        learner.run_epoch()
        return learner.network, learner.classifier

    monkeypatch.setattr(fitting, "train", train)
    fit(config, run, data)
    known = load_policy_inputs(run)
    assert known is not None
    held_out = read_pairs(data.held_out_parts, fit_job(config, data))
    assert np.array_equal(known.old, held_out.old)
    assert known.model is not None
    assert (known.classifier_weight is not None) == (mode == "fastfill")


def test_fit_that_loses_to_a_faster_driver_uses_its_transformation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another processor the other driver's weights have other last bits; here it has fitted for longer."""
    config, run, data = fit_config(tmp_path), Run(str(tmp_path / "run")), synthetic_fit_data(tmp_path)
    drivers: list[TransformationInfo] = []
    networks: list[Transformation] = []

    def train(run: Run, job: Job, device: str, on_epoch: object) -> trainer.Fitted:
        learner = make_learner(job)
        learner.run_epoch()
        networks.append(learner.network)
        if len(networks) == 1:
            drivers.append(fit(config, run, data))  # the other driver, from its start to its end
        else:
            learner.run_epoch()
        return learner.network, learner.classifier

    monkeypatch.setattr(fitting, "train", train)
    assert [fit(config, run, data)] == drivers
    network, info = load_transformation(run, CPU)
    assert info == drivers[0]
    assert_same_weights(network, networks[1])
    with pytest.raises(AssertionError):
        assert_same_weights(network, networks[0])
