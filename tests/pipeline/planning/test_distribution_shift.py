"""The test of whether pairs look like the gallery: it stays quiet where they do, and sees where they do not."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.arrays import Float32
from pipeline.planning.distribution_shift import DistributionShift, distribution_shift


def normal(count: int, shift: float, seed: int) -> Float32:
    random = np.random.default_rng(seed)
    return (random.normal(size=(count, 8)) + shift).astype(np.float32)


@pytest.mark.parametrize("seed", range(10))
def test_two_samples_of_the_same_are_alike(seed: int) -> None:
    found = distribution_shift(normal(1500, 0, 2 * seed), normal(900, 0, 2 * seed + 1), seed)
    assert found.same_side == pytest.approx(0.5, abs=0.02)
    assert not found.apart


def test_the_noise_is_how_far_samples_of_the_same_differ_by_chance() -> None:
    found = [distribution_shift(normal(600, 0, 2 * seed), normal(600, 0, 2 * seed + 1), seed) for seed in range(40)]
    spread = float(np.std([item.same_side for item in found]))
    assert float(np.mean([item.noise for item in found])) == pytest.approx(spread, rel=0.35)


@pytest.mark.parametrize("shift", [0.5, 3])
def test_a_gallery_of_half_other_images_is_noticed(shift: float) -> None:
    gallery = np.concatenate([normal(500, 0, 1), normal(500, shift, 2)])
    assert distribution_shift(normal(1000, 0, 0), gallery, 0).apart


def test_distribution_shift_of_disjoint_samples_is_1_for_any_sizes() -> None:
    assert distribution_shift(normal(300, 0, 0), normal(2500, 50, 1), 0).same_side == 1
    assert distribution_shift(normal(2500, 50, 1), normal(300, 0, 0), 0).same_side == 1


def test_distribution_shift_of_errors_is_compared_with_chance() -> None:
    random, old = np.random.default_rng(0), normal(1000, 0, 0)
    mine = random.gamma(2, 1, 4000)
    found = distribution_shift(old[:500], old[500:], 0, (mine, 1.5 * random.gamma(2, 1, 1000)))
    draws = [1.5 * random.gamma(2, 1, 1000).mean() / random.gamma(2, 1, 4000).mean() for _ in range(500)]
    assert found.error_ratio == pytest.approx(1.5, abs=4 * found.error_noise)
    assert found.error_noise == pytest.approx(float(np.std(draws)), rel=0.15)
    assert found.further
    assert not distribution_shift(old[:500], old[500:], 0, (mine, random.gamma(2, 1, 1000))).further


def test_distribution_shift_reports_each_finding_and_the_remedy_once() -> None:
    assert not DistributionShift(0.51, 0.004, 1.1, 0.05).warnings()
    said = DistributionShift(0.53, 0.004, 1.3, 0.02).warnings()
    assert [sentence.split()[0] for sentence in said] == ["The", "The", "Figures"]
    assert "53.0%" in said[0]
    assert "1.30 (± 0.02)" in said[1]
    assert "probe.manifest" in said[2]
    assert list(DistributionShift(0.53, 0.004, 1.3, 0.02).warnings(known=True)) == list(said[:2])
