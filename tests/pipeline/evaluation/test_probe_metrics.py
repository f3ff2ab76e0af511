"""Quality by the labels of a user's sample: each figure against another way to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.arrays import Float32, Int64
from pipeline.backfill.promotion import Promotion
from pipeline.backfill.stop import Stop, parse
from pipeline.config.tree import Config
from pipeline.evaluation import probe_metrics, quality
from pipeline.evaluation.metrics import EvaluateOptions, evaluate
from pipeline.evaluation.probe_set import ProbeSet, gather, stands_alone
from pipeline.evaluation.quality import QualityBaseline
from pipeline.index import commits
from pipeline.models.calibration import fit_calibration
from pipeline.planning.plan import read_plan
from pipeline.run import Run
from pipeline.storage import documents
from tests.support.sample import draw_probe, put_sample
from tests.support.synthetic_run import Known, Options, known, make_run, storage_waves

LAST = 4
OPTIONS = Options(waves=LAST, new_in_manifest=True)


def unlabelled(images: Known) -> Known:
    return replace(images, labels=None, groups=None)


def sample_of(images: Known, size: int = 200, labelled: int = 200) -> tuple[Int64, list[str | None]]:
    """Rows of the images, and their labels as a person gives them, to the first of them."""
    rows = np.random.default_rng(5).permutation(len(images.ids))[:size]
    assert images.labels is not None
    return rows, [images.labels[row] if place < labelled else None for place, row in enumerate(rows)]


def settled(config: Config, run: Run, stop: Iterable[str] = ()) -> Promotion:
    """Every commit of the run judged, as the driver does that publishes it."""
    assert draw_probe(config, run) is not None
    plan = read_plan(run)
    assert plan is not None
    gate = Promotion(config, run, plan, Stop([parse(text) for text in stop]))
    for number in range(LAST + 1):
        gate.settle(commits.read_commit(run, number))
    return gate


def probe_of(config: Config, run: Run) -> ProbeSet:
    plan = read_plan(run)
    assert plan is not None
    found = gather(config.probe, config.encoders, run, plan)
    assert found is not None
    return found


def sides(images: Known, rows: Int64, number: int, run: Run) -> tuple[Float32, Float32]:
    """The sample's own embeddings, and what a commit serves of it."""
    waves = dict(zip(np.sort(images.ids).tolist(), storage_waves(run).tolist(), strict=True))
    done = np.array([waves[image] <= number for image in images.ids[rows].tolist()])
    return images.embedded[rows], np.where(done[:, None], images.embedded[rows], images.transformed[rows])


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@pytest.mark.parametrize("labelled", [200, 120])
def test_a_labelled_sample_stands_for_a_gallery_without_labels(tmp_path: Path, labelled: int, metric: str) -> None:
    images = known(600)
    rows, labels = sample_of(images, labelled=labelled)
    config, run = make_run(tmp_path, unlabelled(images), replace(OPTIONS, metric=metric))
    config = put_sample(config, tmp_path, id=images.ids[rows], label=labels)
    settled(config, run)
    rows, truth = rows[:labelled], np.array(labels[:labelled])
    for item in quality.read_all_quality(run):
        new, served = sides(images, rows, item.commit, run)
        exact = evaluate(new, served, truth, truth, EvaluateOptions(metric=metric, self_match=True))
        assert item.figures["top1"] == pytest.approx(exact.top1)
        assert item.figures["top5"] == pytest.approx(exact.top5)
        assert len(item.ranks) == 200
        assert sum(rank >= 0 for rank in item.ranks) == exact.num_queries
    reference = quality.read_baseline(run)
    assert reference is not None
    old = evaluate(images.old[rows], images.old[rows], truth, truth, EvaluateOptions(metric=metric, self_match=True))
    assert quality.top(reference.old)["top1"] == pytest.approx(old.top1)
    assert reference.old == reference.within_old
    estimate = quality.full_estimate(reference, quality.read_all_quality(run)[0])
    assert estimate["top1"] == pytest.approx(quality.read_all_quality(run)[-1].figures["top1"]), (
        "nothing is left to guess"
    )


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("alone", [True, False])
def test_quality_of_a_calibrated_run_is_the_evaluation_with_its_map(tmp_path: Path, metric: str, alone: bool) -> None:
    images = known(600)
    images = replace(images, transformed=images.transformed / 2)
    map_ = fit_calibration(images.transformed, images.embedded, metric, seed=0)
    rows, labels = sample_of(images)
    gallery = unlabelled(images) if alone else images
    config, run = make_run(tmp_path, gallery, replace(OPTIONS, metric=metric, calibration=map_, rejects=20))
    settled(put_sample(config, tmp_path, id=images.ids[rows], label=labels), run)
    ids = images.ids
    waves = dict(zip(np.sort(ids).tolist(), storage_waves(run).tolist(), strict=True))
    rejected = np.isin(np.arange(600), np.arange(20) * 7)
    everything, truth = rows if alone else np.arange(600), np.array(images.labels)
    plain = []
    for item in quality.read_all_quality(run):
        left = rejected | np.array([waves[image] > item.commit for image in ids.tolist()])
        served = np.where(left[:, None], images.transformed, images.embedded)
        sides = (images.embedded[rows], served[everything], truth[rows], truth[everything])
        own = (ids[rows], ids[everything])
        of_kind = left[everything]
        exact, uncalibrated = (
            evaluate(
                *sides,
                EvaluateOptions(
                    metric=metric, query_ids=own[0], gallery_ids=own[1], transformed=of_kind, calibration=by
                ),
            )
            for by in (map_, None)
        )
        assert item.figures["top1"] == pytest.approx(exact.top1)
        assert item.figures["top5"] == pytest.approx(exact.top5)
        plain.append(uncalibrated.top1 - exact.top1)
    assert any(plain), "the map matters"


def test_a_run_is_gated_and_stopped_by_the_labels_of_a_sample(tmp_path: Path) -> None:
    images = known(600)
    rows, labels = sample_of(images)
    config, run = make_run(tmp_path, unlabelled(images), OPTIONS)
    groups = [f"group {row % 2}" for row in rows]
    columns = {"group": "group"}
    config = put_sample(config, tmp_path, id=images.ids[rows], label=labels, group=groups, columns=columns)
    gate = settled(config, run, stop=["top1>=1*full"])
    assert gate.refusals == []
    assert str(gate.stopped).startswith("top1>=1*full: top1 is")
    found = quality.read_all_quality(run)[-1]
    assert {"negative_flips", "group_gap"} <= found.figures.keys()
    assert [name for name, *_ in found.groups] == ["group 0", "group 1"]


@pytest.mark.parametrize("own", [True, False])
def test_a_sample_of_a_labelled_gallery_is_searched_in_all_of_it_with_the_sample_s_labels(
    tmp_path: Path, own: bool
) -> None:
    images = known(600)
    rows, labels = sample_of(images)
    if not own:  # what people say of these images is not what the gallery does
        labels = [f"label {(int(str(label).split()[1]) + row % 2) % 12}" for row, label in enumerate(labels)]
    config, run = make_run(tmp_path, images, OPTIONS)
    settled(put_sample(config, tmp_path, id=images.ids[rows], label=labels), run)
    truth = np.array(images.labels)
    truth[rows] = labels
    everything = np.arange(600)
    for item in quality.read_all_quality(run):
        _, served = sides(images, everything, item.commit, run)
        exact = evaluate(
            images.embedded[rows],
            served,
            truth[rows],
            truth,
            EvaluateOptions(query_ids=images.ids[rows], gallery_ids=images.ids),
        )
        assert item.figures["top1"] == pytest.approx(exact.top1)
        assert item.figures["top5"] == pytest.approx(exact.top5)
    reference = quality.read_baseline(run)
    assert reference is not None
    assert not reference.alone
    old = evaluate(
        images.old[rows],
        images.old,
        truth[rows],
        truth,
        EvaluateOptions(query_ids=images.ids[rows], gallery_ids=images.ids),
    )
    assert quality.top(reference.old)["top1"] == pytest.approx(old.top1)


def test_a_sample_stands_alone_where_one_image_of_the_gallery_has_no_label(tmp_path: Path) -> None:
    images = known(300)
    assert images.labels is not None
    found = {}
    for name, missing in (("whole", None), ("outside", 250), ("inside", 3)):
        labels: list[Any] = [None if row == missing else label for row, label in enumerate(images.labels)]
        config, run = make_run(tmp_path / name, replace(images, labels=labels), OPTIONS)
        config = put_sample(config, tmp_path / name, id=images.ids[:200], label=images.labels[:200])
        assert draw_probe(config, run) is not None
        plan = read_plan(run)
        assert plan is not None
        found[name] = stands_alone(run, plan, probe_of(config, run))
    assert found == {"whole": False, "outside": True, "inside": False}, "the sample gives the last one its label"


def test_a_partly_labelled_gallery_without_a_sample_is_searched_as_before(tmp_path: Path) -> None:
    images = known(600)
    assert images.labels is not None
    labels: list[Any] = [label if row % 3 else None for row, label in enumerate(images.labels)]
    config, run = make_run(tmp_path, replace(images, labels=labels), OPTIONS)
    settled(config, run)
    reference = quality.read_baseline(run)
    assert reference is not None
    assert not reference.alone


@pytest.mark.parametrize("labelled", [0, 1])
def test_sample_without_two_labels_is_measured_by_recall10(tmp_path: Path, labelled: int) -> None:
    images = known(600)
    rows, labels = sample_of(images, labelled=labelled)
    config, run = make_run(tmp_path, unlabelled(images), OPTIONS)
    settled(put_sample(config, tmp_path, id=images.ids[rows], label=labels), run)
    assert quality.read_all_quality(run)[-1].figures.keys() >= {"recall10", "own"}
    assert "top1" not in quality.read_all_quality(run)[-1].figures


def test_a_reference_from_before_there_were_samples_is_read(tmp_path: Path) -> None:
    config, run = make_run(tmp_path, known(300), OPTIONS)
    assert draw_probe(config, run) is not None
    plan, probe = read_plan(run), probe_of(config, run)
    assert plan is not None
    made = probe_metrics.baseline_of(config.encoders, config.gallery.metric, run, plan, probe)
    fields = [item.name for item in dataclasses.fields(QualityBaseline) if item.name != "alone"]
    before = dataclasses.make_dataclass("Before", fields)(*(getattr(made, name) for name in fields))
    assert documents.parse(QualityBaseline, documents.encode(before), "reference.json", must_be_checked=True) == made
