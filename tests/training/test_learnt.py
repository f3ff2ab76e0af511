"""Which transformation is taken: the nearer one, unless it finds clearly less among the embedded images."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from pipeline.evaluate import evaluate
from pipeline.probe_set import ProbeSet
from pipeline.run import Run
from pipeline.schema import Float32
from tests.training.test_select import config_of
from training import learnt
from training.learner import PairArrays
from training.learnt import Change, Learnt, compare

NUM, WAVE = 400, 2
NONE = PairArrays(np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32), None, None)


def probe_set(labelled: bool = True) -> ProbeSet:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 8, NUM)
    centres = 3 * rng.normal(size=(8, 16))
    new = (centres[labels] + rng.normal(size=(NUM, 16))).astype(np.float32)
    wave = 1 + np.arange(NUM) % 4
    none = np.full(NUM, -1)
    return ProbeSet(
        ids=np.arange(NUM),
        old=new,
        new=new,
        transformed=new,
        uncertainty=np.zeros(NUM, np.float32),
        wave=wave,
        labels=labels if labelled else none,
        groups=none,
        label_names=tuple("abcdefgh") if labelled else (),
        group_names=(),
    )


def judged(folder: Path, monkeypatch: pytest.MonkeyPatch, probe: ProbeSet, served: dict[str, Float32]) -> Learnt:
    """What is decided where two runs, by their names, give these vectors of the images that are left.

    A network that gives them would have to be fitted: what it gives is known here instead.
    """
    zero = np.zeros(NUM, np.float32)
    monkeypatch.setattr(learnt, "_vectors", lambda place, pairs: (served[place.uri], zero[: len(pairs.old)]))
    monkeypatch.setattr(learnt, "read_part", lambda place, name: None)
    found = compare(config_of(folder), Run("source"), Run("tried"), WAVE, probe, NONE)
    return Learnt(WAVE, "transformation", 100, *found)


def left(probe: ProbeSet) -> Float32:
    return probe.new[probe.wave > WAVE]


def noisy(vectors: Float32, size: float, seed: int = 1) -> Float32:
    return (vectors + size * np.random.default_rng(seed).normal(size=vectors.shape)).astype(np.float32)


def nearer_but_mixed_up(probe: ProbeSet) -> Float32:
    """All in the middle of everything: no vector is far from its image, and none is found."""
    middle = probe.new.mean(axis=0)
    return noisy(np.tile(middle, (len(left(probe)), 1)), 0.1)


def far_but_told_apart(probe: ProbeSet) -> Float32:
    """Each class moved to a side of its own: farther than the middle is, and nearer than other classes are."""
    sides = np.random.default_rng(2).normal(size=(8, 16))
    sides *= 14 / np.linalg.norm(sides, axis=1, keepdims=True)
    return (left(probe) + sides[probe_set().labels[probe.wave > WAVE]]).astype(np.float32)


def test_the_nearer_one_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = probe_set()
    found = judged(tmp_path, monkeypatch, probe, {"source": noisy(left(probe), 2), "tried": noisy(left(probe), 1)})
    assert found.taken
    assert ", taken: squared error" in str(found)


def test_one_that_is_nearer_and_finds_less_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = probe_set()
    vectors = {"source": far_but_told_apart(probe), "tried": nearer_but_mixed_up(probe)}
    found = judged(tmp_path, monkeypatch, probe, vectors)
    assert found.error is not None
    assert found.error.after < found.error.before - found.error.noise
    assert not found.taken
    assert "not taken: squared error" in str(found)
    unlabelled = judged(tmp_path, monkeypatch, probe_set(labelled=False), vectors)
    assert unlabelled.precision is None
    assert unlabelled.taken


def test_what_is_found_is_what_an_evaluation_of_the_mixed_set_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = probe_set()
    vectors = {"source": noisy(left(probe), 3), "tried": noisy(left(probe), 1)}
    found = judged(tmp_path, monkeypatch, probe, vectors)
    exact = []
    for name in ("source", "tried"):
        state = probe.new.copy()
        state[probe.wave > WAVE] = vectors[name]
        exact.append(evaluate(probe.new, state, probe.labels, probe.labels, self_match=True).map)
    assert found.precision is not None
    assert [found.precision.before, found.precision.after] == pytest.approx(exact)


def test_it_is_kept_as_it_was_decided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = probe_set()
    found = judged(tmp_path, monkeypatch, probe, {"source": noisy(left(probe), 2), "tried": noisy(left(probe), 1)})
    assert Learnt.from_json(json.dumps(asdict(found)).encode()) == found
    none = Learnt(3, "nothing", 7)
    assert Learnt.from_json(json.dumps(asdict(none)).encode()) == none
    assert not none.taken


def test_what_was_kept_before_labels_were_looked_at_is_read() -> None:
    old = {"after_wave": 3, "what": "transformation", "images": 9, "before": 2.0, "after": 1.0, "noise": 0.1}
    assert Learnt.from_json(json.dumps(old).encode()) == Learnt(3, "transformation", 9, Change(2.0, 1.0, 0.1))
    none = {"after_wave": 3, "what": "order", "images": 9, "before": None, "after": None, "noise": 0.0}
    assert Learnt.from_json(json.dumps(none).encode()) == Learnt(3, "order", 9)


def test_a_difference_within_its_noise_takes_nothing() -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(size=1000)
    assert not Learnt(1, "transformation", 9, Change.of(before, before + rng.normal(size=1000) * 3 + 0.01)).taken
    assert Learnt(1, "transformation", 9, Change.of(before, before - 0.5)).taken
