"""Learning on the way, simulated: by hand it is the same curve, and the labels of what is measured train nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.evaluate import evaluate
from pipeline.ranking import Float64
from pipeline.selection import Learning, Learnt
from tests.training.test_fit import _data
from tests.training.test_select import RECIPE, _parts, config_of
from training import relearn_worth
from training.candidates import Serving
from training.folds import Fold, job_of
from training.learner import PairArrays
from training.losses import NO_LABEL
from training.relearn_worth import WAYS, Scene, curves
from training.simulate import Detail

POINTS = 6


def scene_of(folder: Path, **changes: object) -> Scene:
    config, data = config_of(folder), _data(folder)
    job, parts = job_of(config, data, RECIPE), _parts(data)
    gallery, detail = parts.held(0, job, 200), Detail(POINTS, 1000)
    scene = Scene(
        config,
        job,
        parts.train(0, job),
        gallery,
        Serving("none", 0),
        "uncertainty",
        (0.4,),
        detail,
        torch.device("cpu"),
    )
    return replace(scene, **changes)  # type: ignore[arg-type]


def by_hand(scene: Scene, way: str) -> Float64:
    """Embed one image after the other, and learn once two fifths are."""
    first, gallery = scene.first(), scene.gallery
    assert gallery.labels is not None
    found, order = [], np.argsort(-first.gallery.s, kind="stable")
    for point in range(POINTS):
        count = point * len(gallery.old) // (POINTS - 1)
        fold: Fold = first.gallery
        if way == "transformation" and point >= 2:
            done = order[: 2 * len(gallery.old) // 5]
            fold = relearn_worth._fitted(scene, done).gallery
            rest = np.argsort(-fold.s, kind="stable")
            order = np.concatenate([done, rest[~np.isin(rest, done)]])
        state = fold.z.copy()
        state[order[:count]] = gallery.new[order[:count]]
        exact = evaluate(gallery.new, state, gallery.labels, gallery.labels, self_match=True)
        found.append([exact.top1, exact.top5, exact.map])
    return np.array(found)


@pytest.mark.parametrize("way", ["nothing", "transformation"])
def test_the_curve_is_that_of_embedding_image_by_image(tmp_path: Path, way: Learnt) -> None:
    scene = scene_of(tmp_path)
    found = curves(scene)
    assert set(found) == set(WAYS)
    np.testing.assert_allclose(found[way].mean(axis=1), by_hand(scene, way))


def test_an_order_that_knows_nothing_of_pairs_gains_nothing_by_learning_it_anew(tmp_path: Path) -> None:
    found = curves(scene_of(tmp_path))
    np.testing.assert_array_equal(found["order"], found["nothing"])


def test_before_something_is_learnt_and_in_the_end_all_ways_are_the_same(tmp_path: Path) -> None:
    found = curves(scene_of(tmp_path, policy="learned", serving=Serving("confidence", 0.5)))
    for way in WAYS:
        np.testing.assert_array_equal(found[way][:2], found["nothing"][:2])
        np.testing.assert_allclose(found[way][-1], found["nothing"][-1])
    assert not np.allclose(found["transformation"][2:-1], found["nothing"][2:-1])
    assert not np.allclose(found["order"][2:-1], found["nothing"][2:-1])


def test_the_labels_of_what_is_measured_train_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene, seen = scene_of(tmp_path), list[PairArrays]()
    real = relearn_worth.fit_alone

    def look(job: object, train: PairArrays, held: PairArrays, *rest: object) -> Fold:
        seen.append(train)
        return real(job, train, held, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(relearn_worth, "fit_alone", look)
    curves(scene)
    images = {row.tobytes() for row in scene.gallery.new}
    without, anew = ([row.tobytes() in images for row in train.new] for train in seen)
    assert not any(without)
    assert 60 < sum(anew) <= 80, "most of two fifths, each once"
    labels = seen[1].labels
    assert labels is not None
    assert set(labels[np.array(anew)].tolist()) == {NO_LABEL}


def test_only_a_clear_gain_is_taken_and_the_larger_of_two() -> None:
    rng = np.random.default_rng(0)
    folds = [50 + rng.normal(size=400) for _ in range(3)]

    def moved(by: float, fits: tuple[float, ...] = (0, 0, 0), images: float = 0.1) -> list[Float64]:
        return [fold + by + fit + images * rng.normal(size=400) for fold, fit in zip(folds, fits, strict=True)]

    def decide(order: list[Float64], transformation: list[Float64]) -> Learning:
        return Learning.decide((0.1,), {"nothing": folds, "order": order, "transformation": transformation})

    assert decide(moved(0.3), moved(1)).what == "transformation"
    assert decide(moved(0.3), moved(0.3, fits=(3, -1, -1))).what == "order", "fits differ by more than it gains"
    assert decide(moved(0.3), moved(0.5, images=10)).what == "order", "images differ by more than it gains"
    found = decide(moved(-0.1), moved(0.3, fits=(3, -1, -1)))
    assert found.what == "nothing"
    assert found.gain_error["transformation"] == pytest.approx(np.std([3, -1, -1], ddof=1) / 3**0.5, abs=0.02)
    assert "transformation +0.6" in str(found)


def test_a_way_that_is_worth_nothing_is_seldom_taken_though_all_folds_share_their_images() -> None:
    rng, taken = np.random.default_rng(1), 0
    for _ in range(300):
        images = rng.normal(size=200)
        folds = [rng.normal(size=200) for _ in range(3)]
        other = [fold + images + 0.1 * rng.normal(size=200) for fold in folds]
        taken += Learning.decide((0.1,), {"nothing": folds, "order": folds, "transformation": other}).what != "nothing"
    assert taken < 0.05 * 300
