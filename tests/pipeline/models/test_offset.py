"""The offset: transformed vectors are further from every query by what their error is expected to be, and no more."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.arrays import Float32
from pipeline.errors import ConfigError
from pipeline.evaluation.metrics import EvaluateOptions, evaluate
from pipeline.models.offset import HeldOutPairs, LinearClassifier, Offset, OffsetKind, fit_offset, least_varying

NUM, DIM, CLASSES = 600, 12, 6


def embeddings(seed: int = 0) -> tuple[Float32, Float32, Float32, np.ndarray, LinearClassifier]:
    """new (N, d), z (N, d), s (N,), labels (N,), and the best classifier of new embeddings.

    Classes are normal around their centres. What is known of an image is its embedding with noise, more of it for some
    images than for others; z is the exact expectation given that, and s the logarithm of the exact expected error.
    The last dimension is constant in `new`: a direction in which nothing varies.
    """
    random, spread = np.random.default_rng(seed), 0.7
    centres = random.normal(size=(CLASSES, DIM))
    labels, noise = random.integers(0, CLASSES, NUM), random.uniform(0.1, 3, (NUM, 1))
    new = centres[labels] + random.normal(size=(NUM, DIM)) * spread
    known = new + random.normal(size=(NUM, DIM)) * noise
    distance = np.square(known[:, None] - centres).sum(axis=2)
    posterior = np.exp(-(distance - distance.min(axis=1, keepdims=True)) / 2 / (spread**2 + noise**2))
    posterior /= posterior.sum(axis=1, keepdims=True)
    shrink = (spread**2 / (spread**2 + noise**2))[:, :, None]
    means = centres + shrink * (known[:, None] - centres)
    z = (posterior[:, :, None] * means).sum(axis=1)
    within = shrink[:, 0, 0] * noise[:, 0] ** 2
    between = (posterior * np.square(means - z[:, None]).sum(axis=2)).sum(axis=1) / DIM
    weight = centres / spread**2
    bias = -0.5 * np.square(centres).sum(axis=1) / spread**2
    z[:, -1], new[:, -1], weight[:, -1] = 1, 1, 0
    classifier = LinearClassifier(weight.astype(np.float32), bias.astype(np.float32))
    return new.astype(np.float32), z.astype(np.float32), np.log(within + between).astype(np.float32), labels, classifier


def fitted(kind: OffsetKind, strength: float = 0.5, metric: str = "l2") -> tuple[Offset, Float32, Float32, Float32]:
    new, z, s, _, classifier = embeddings()
    return fit_offset(kind, strength, HeldOutPairs(z, s, new), classifier, metric), new, z, s


@pytest.mark.parametrize("kind", ["uncertainty", "confidence"])
def test_squared_distances_to_queries_grow_by_the_strength_times_the_error_on_average(kind: OffsetKind) -> None:
    offset, new, z, s = fitted(kind, strength=0.5)
    served = offset.apply(z, s)
    before = np.square(new[:, None] - z[None]).sum(axis=2)
    after = np.square(new[:, None] - served[None]).sum(axis=2)
    error = np.square(new - z).sum(axis=1).mean()
    assert (after - before).mean() == pytest.approx(0.5 * error, rel=1e-3)


@pytest.mark.parametrize("kind", ["uncertainty", "confidence"])
def test_offset_adds_the_same_distance_to_every_query(kind: OffsetKind) -> None:
    offset, new, z, s = fitted(kind)
    before, after = (np.square(new[:, None] - side[None]).sum(axis=2) for side in (z, offset.apply(z, s)))
    change = after - before
    assert change.std(axis=0).max() < 1e-5 * after.max()
    assert change.mean(axis=0).std() > 0.1


def test_offset_by_uncertainty_moves_all_but_the_surest_tenth_by_the_predicted_error() -> None:
    offset, _, z, s = fitted("uncertainty")
    moved = np.square(offset.apply(z, s) - z).sum(axis=1)
    assert (moved < 1e-9).mean() == pytest.approx(0.1, abs=0.01)
    assert np.corrcoef(moved, np.maximum(np.exp(s) - offset.floor, 0))[0, 1] > 0.9999


def test_offset_by_confidence_moves_confident_images_least() -> None:
    offset, _, z, s = fitted("confidence")
    assert offset.classifier is not None
    sure = offset.classifier.probabilities(z).max(axis=1)
    moved = np.linalg.norm(offset.apply(z, s) - z, axis=1)
    order = np.argsort(sure)
    assert (np.diff(moved[order]) <= 1e-5).all()


@pytest.mark.parametrize("kind", ["uncertainty", "confidence"])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_offset_improves_answers_at_half_of_the_backfill(kind: OffsetKind, metric: str) -> None:
    new, z, s, labels, classifier = embeddings()
    if metric == "cosine":
        new, z = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (new, z))
    offset = fit_offset(kind, 0.5, HeldOutPairs(z, s, new), classifier, metric)
    half = np.arange(NUM) % 2 == 0
    found = []
    for vectors in (z, offset.apply(z, s)):
        gallery = np.where(half[:, None], new, vectors)
        found.append(evaluate(new, gallery, labels, labels, EvaluateOptions(metric=metric, self_match=True)))
    assert found[1].top1 > found[0].top1


def test_offset_with_cosine_gives_unit_vectors() -> None:
    offset, _, z, s = fitted("uncertainty", metric="cosine")
    assert np.linalg.norm(offset.apply(z, s), axis=1) == pytest.approx(1, abs=1e-5)


def test_an_offset_is_stored_to_the_bit() -> None:
    for kind in ("uncertainty", "confidence"):
        offset, _, z, s = fitted(kind)  # type: ignore[arg-type] - literals
        again = Offset.from_bytes(offset.to_bytes())
        assert (again.kind, again.factor, again.floor, again.normalize) == (kind, offset.factor, offset.floor, False)
        assert again.apply(z, s).tobytes() == offset.apply(z, s).tobytes()


def test_the_direction_is_one_in_which_embeddings_do_not_vary() -> None:
    new = embeddings()[0]
    direction = least_varying(new)
    assert np.linalg.norm(direction) == pytest.approx(1, abs=1e-5)
    assert (new @ direction).std() < 1e-4


def test_invalid_offset_is_refused() -> None:
    new, z, s, _, classifier = embeddings()
    with pytest.raises(ConfigError, match="no effect with metric `ip`"):
        fit_offset("uncertainty", 0.5, HeldOutPairs(z, s, new), classifier, "ip")
    with pytest.raises(ConfigError, match="classifier"):
        fit_offset("confidence", 0.5, HeldOutPairs(z, s, new), None, "l2")
