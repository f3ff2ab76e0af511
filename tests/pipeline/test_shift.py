"""The test of whether pairs look like the gallery: it stays quiet where they do, and sees where they do not."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.schema import Float32
from pipeline.shift import APART, same_side


def normal(count: int, shift: float, seed: int) -> Float32:
    random = np.random.default_rng(seed)
    return (random.normal(size=(count, 8)) + shift).astype(np.float32)


@pytest.mark.parametrize("seed", range(3))
def test_two_samples_of_the_same_are_alike(seed: int) -> None:
    assert same_side(normal(1500, 0, 2 * seed), normal(900, 0, 2 * seed + 1), seed) == pytest.approx(0.5, abs=0.02)


def test_a_gallery_of_half_other_images_is_noticed() -> None:
    gallery = np.concatenate([normal(500, 0, 1), normal(500, 3, 2)])
    assert same_side(normal(1000, 0, 0), gallery, 0) > APART


def test_what_is_apart_is_wholly_so_whichever_side_is_larger() -> None:
    assert same_side(normal(300, 0, 0), normal(2500, 50, 1), 0) == 1
    assert same_side(normal(2500, 50, 1), normal(300, 0, 0), 0) == 1
