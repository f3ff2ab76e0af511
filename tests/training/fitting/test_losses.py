"""The losses against answers that can be worked out by hand (docs/method.md, checks with a known answer)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from pipeline.config.method import LossMode
from training.fitting.losses import (
    FittedClassifier,
    Loss,
    alignment,
    combined,
    discriminative,
    fit_classifier,
    needs_labels,
    uncertainty_weighted,
)

MODES: list[LossMode] = ["alignment", "alignment+uncertainty", "alignment+discriminative", "fastfill"]


def _batch(num: int = 6, dim: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z_bd, new_bd = torch.randn(num, dim, generator=generator), torch.randn(num, dim, generator=generator)
    return z_bd, torch.randn(num, generator=generator), new_bd, torch.arange(num) % 3


def _classifier(dim: int = 4) -> FittedClassifier:
    return FittedClassifier(torch.randn(3, dim, generator=torch.Generator().manual_seed(1)), None)


def test_alignment_is_the_mean_over_dimensions() -> None:
    z_bd, new_bd = torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 2.0]])
    assert alignment(z_bd, new_bd).tolist() == [4.5]


def test_s_has_no_gradient_where_it_is_the_log_of_the_loss() -> None:
    loss_b = torch.tensor([0.1, 1.0, 30.0])
    s_b = loss_b.log().requires_grad_()
    uncertainty_weighted(loss_b, s_b).sum().backward()
    torch.testing.assert_close(s_b.grad, torch.zeros(3))


def test_a_more_uncertain_image_pulls_less() -> None:
    loss_b = torch.ones(2, requires_grad=True)
    uncertainty_weighted(loss_b, torch.tensor([0.0, math.log(4.0)])).sum().backward()
    torch.testing.assert_close(loss_b.grad, torch.tensor([0.5, 0.125]))


@pytest.mark.parametrize(("num_classes", "bound"), [(1000, 1.015), (100, 0.778)])
def test_label_smoothing_bounds_the_discriminative_loss_from_below(num_classes: int, bound: float) -> None:
    target_c = torch.full((1, num_classes), 0.1 / num_classes)
    target_c[0, 7] += 0.9
    identity, label_b = FittedClassifier(torch.eye(num_classes), None), torch.tensor([7])
    best = discriminative(target_c.log(), label_b, identity, 0.1).item()
    assert best == pytest.approx(bound, abs=5e-4)
    noisy = target_c.log() + 0.1 * torch.randn(50, num_classes, generator=torch.Generator().manual_seed(0))
    assert (discriminative(noisy, label_b.expand(50), identity, 0.1) > best).all()


def test_an_image_without_a_label_has_no_discriminative_loss() -> None:
    z_bd, _, _, _ = _batch(2)
    loss_b = discriminative(z_bd, torch.tensor([-1, 0]), _classifier(), 0.1)
    assert loss_b[0] == 0
    assert loss_b[1] > 0


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_has_its_terms(mode: LossMode) -> None:
    z_bd, s_b, new_bd, label_b = _batch()
    objective, align = combined(Loss(mode, 2.0, 0.1, _classifier()), z_bd, s_b, new_bd, label_b)
    loss_b = alignment(z_bd, new_bd)
    assert align == pytest.approx(loss_b.mean().item())
    if needs_labels(mode):
        loss_b = loss_b + 2.0 * discriminative(z_bd, label_b, _classifier(), 0.1)
    expected = (0.5 * torch.exp(-s_b) * loss_b + 0.5 * s_b).mean()
    if mode in ("alignment", "alignment+discriminative"):
        expected = expected + loss_b.mean()
    assert objective.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("mode", ["alignment", "alignment+discriminative"])
def test_loss_without_uncertainty_has_the_same_gradient_for_any_s(mode: LossMode) -> None:
    z_bd, s_b, new_bd, label_b = _batch()
    gradients = []
    for shift in (0.0, 3.0):
        z_leaf = z_bd.clone().requires_grad_()
        objective, _ = combined(Loss(mode, classifier=_classifier()), z_leaf, s_b + shift, new_bd, label_b)
        objective.backward()
        gradients.append(z_leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["alignment", "alignment+uncertainty"])
def test_the_modes_for_foundation_models_need_no_labels(mode: LossMode) -> None:
    z_bd, s_b, new_bd, _ = _batch()
    objective, _ = combined(Loss(mode), z_bd, s_b, new_bd)
    assert torch.isfinite(objective)


def test_the_discriminative_term_is_refused_without_labels() -> None:
    z_bd, s_b, new_bd, _ = _batch()
    with pytest.raises(ValueError, match="needs labels and a classifier"):
        combined(Loss("fastfill", classifier=_classifier()), z_bd, s_b, new_bd)


def test_a_fitted_classifier_separates_classes_on_the_raw_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    label_n = torch.arange(600) % 3
    centre_cd = 20 * torch.randn(3, 8, generator=generator) + 100
    new_nd = centre_cd[label_n] + 5 * torch.randn(600, 8, generator=generator)
    known_n = torch.where(torch.arange(600) % 5 == 0, -1, label_n)
    found = fit_classifier(new_nd, known_n, 3, lambda epoch: torch.arange(600).view(12, 50), _same)
    logits_bc = nn.functional.linear(new_nd, found.weight_cd, found.bias_c)
    assert (logits_bc.argmax(dim=1) == label_n).float().mean() > 0.95
    assert not found.weight_cd.requires_grad


def _same(module: nn.Module) -> nn.Module:
    return module
