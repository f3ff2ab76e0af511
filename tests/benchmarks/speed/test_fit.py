"""The reference recipe: its schedule, and that slices are one fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.speed import fit
from benchmarks.speed.fit import Reference

D_OLD, D_NEW, CLASSES = 4, 6, 3


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network and batches that a test can afford."""
    monkeypatch.setattr(fit, "BATCH", 16)
    monkeypatch.setattr(fit, "INNER_WIDTH", 8)


def start(state: Path) -> Reference:
    generator = torch.Generator().manual_seed(0)
    rows = {"old": torch.randn(40, D_OLD, generator=generator), "new": torch.randn(40, D_NEW, generator=generator)}
    rows["label"] = torch.arange(40) % CLASSES
    classifier = {"weight": torch.randn(CLASSES, D_NEW, generator=generator), "bias": torch.zeros(CLASSES)}
    return Reference(state, 0, rows, classifier)


@pytest.mark.usefixtures("fits")
def test_reference_run_in_slices_equals_one_run(tmp_path: Path) -> None:
    whole = start(tmp_path / "whole.pt")
    for _ in range(4):
        whole.run_epoch()
    for _ in range(2):
        slices = start(tmp_path / "slices.pt")
        for _ in range(2):
            slices.run_epoch()
        slices.save()
    assert len(slices.seconds) == 4
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, slices.network.state_dict()[name]), name


@pytest.mark.usefixtures("fits")
def test_the_learning_rate_rises_for_five_epochs_and_falls_to_zero(tmp_path: Path) -> None:
    fitted, rates = start(tmp_path / "state.pt"), []
    for _ in range(fit.EPOCHS):
        fitted.run_epoch()
        rates.append(fitted._optimizer.param_groups[0]["lr"])
    assert rates[:6] == pytest.approx([1e-4, 2e-4, 3e-4, 4e-4, 5e-4, 5e-4])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert 0 < rates[-1] < 1e-6


@pytest.mark.usefixtures("fits")
def test_batchnorm_statistics_stand_still_in_the_second_half(tmp_path: Path) -> None:
    fitted, means = start(tmp_path / "state.pt"), []
    for _ in range(fit.EPOCHS):
        fitted.run_epoch()
        means.append(fitted.network.state_dict()["trunk.0.1.running_mean"].clone())
    assert not torch.equal(means[38], means[39])
    assert torch.equal(means[39], means[79])
