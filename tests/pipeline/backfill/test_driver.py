"""Whole backfills in this process: each image once, whole snapshots, and figures that exact search confirms.

On Ray, by the command: tests/e2e/test_backfill.py; killed at any point: tests/crashes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.backfill.stop import Condition, Stop
from pipeline.errors import GateRefused
from pipeline.evaluation import quality
from pipeline.index import commits, tags
from pipeline.planning.plan import read_transformed
from pipeline.reporting.audit import audit
from pipeline.serving.searcher import Searcher
from pipeline.storage import parquet
from tests.support.planned_backfill import REJECTED, WAVES, Scene, backfill_in_process, begin, served_vectors


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    backfill_in_process(monkeypatch)


def test_backfill_embeds_each_image_once_and_every_commit_holds_the_gallery_once(tmp_path: Path) -> None:
    scene = begin(tmp_path)
    assert scene.go_on().left == 0
    ids = set(scene.encoder.images.ids.tolist())
    assert scene.encoder.asked == dict.fromkeys(ids, 1)
    assert tags.list_commits(scene.run) == list(range(WAVES + 1))
    for number in range(WAVES + 1):
        assert served_vectors(scene.run, number).keys() == ids
        counts = commits.read_commit(scene.run, number).counts
        assert counts.embedded + counts.rejected == sum(wave.images for wave in scene.plan.waves[:number])
    report = audit(scene.run.uri)
    assert report.problems == []
    assert report.checked["vectors"] > 0


def test_backfill_whose_condition_to_stop_holds_from_the_start_embeds_nothing_and_goes_on_without_it(
    tmp_path: Path,
) -> None:
    scene = begin(tmp_path)
    always = Stop([Condition("fraction>=0", "fraction", 0.0, False)])
    with pytest.raises(GateRefused, match="the backfill stopped there, as asked"):  # nothing is embedded yet
        scene.go_on(stop=always)
    assert scene.encoder.asked == {}
    assert tags.list_commits(scene.run) == [0]
    assert scene.go_on().left == 0
    assert set(scene.encoder.asked.values()) == {1}


def test_backfill_shows_whole_snapshots_to_a_reader_that_follows(tmp_path: Path) -> None:
    scene, seen = begin(tmp_path), set()
    ids = sorted(scene.encoder.images.ids.tolist())

    def look() -> None:
        with Searcher(scene.run.uri, tag=tags.CANDIDATE) as searcher:
            found = searcher.search(scene.encoder.images.embedded[:3], len(ids))
            seen.add(searcher.commit.number)
            assert all(sorted(row) == ids for row in found.ids.tolist())

    scene.go_on(look)
    assert len(seen) > 2


def test_backfill_measures_the_probe_set_as_exact_search_in_the_commit_does(tmp_path: Path) -> None:
    scene = begin(tmp_path)
    scene.go_on()
    images, probe = scene.encoder.images, _probe_ids(scene)
    rows = np.flatnonzero(np.isin(images.ids, probe))
    labels, distances_of = np.array(images.labels), images.embedded[rows][:, None]
    for measured in quality.read_all_quality(scene.run):
        done = [(wave, len(_members(scene, wave) & _embedded(probe))) for wave in range(1, measured.commit + 1)]
        assert [(wave, count) for wave, _, count in measured.own] == [item for item in done if item[1]]
        assert measured.figures.get("own", 100) == 100
        held = served_vectors(scene.run, measured.commit)
        gallery = np.stack([held[id] for id in images.ids.tolist()])
        distances = np.square(distances_of - gallery[None]).sum(axis=2)
        distances[np.arange(len(rows)), rows] = np.inf
        expected = 100 * (labels[distances.argmin(axis=1)] == labels[rows]).mean()
        assert measured.figures["top1"] == pytest.approx(expected)


def _probe_ids(scene: Scene) -> list[int]:
    found: list[int] = parquet.read_parquet(scene.run.path("probe-set", "set.parquet"))["id"].to_pylist()
    return found


def _embedded(ids: list[int]) -> set[int]:
    return {id for id in ids if id % REJECTED}


def _members(scene: Scene, wave: int) -> set[int]:
    return set(read_transformed(scene.run, scene.plan, wave, ["id"])["id"].to_pylist())
