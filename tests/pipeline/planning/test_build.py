"""Two planners at once, on processors that round differently: one plan, whole, and nobody writes into it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.tree import BackfillSettings, Config
from pipeline.errors import IncompatibleRun
from pipeline.index import gc
from pipeline.models.networks import TransformationNetwork
from pipeline.models.transformation import TransformationInfo, save_transformation
from pipeline.planning import build, score
from pipeline.planning.plan import SCORED, Plan, dropped_files, read_plan, read_transformed
from pipeline.planning.policy_inputs import PART, HeldOutPairs, build_policy_inputs
from pipeline.planning.score import ScoredPart, Scorer, ScoreSettings
from pipeline.run import Run
from pipeline.storage import objects, parquet
from tests.support.in_process import plan_in_process, score_each
from tests.support.interleave import Turns
from tests.support.synthetic_run import Options, known, make_run

IMAGES = known(60)
A_FIRST, B_FIRST = 0, 1


class OtherProcessor(Scorer):
    """Scores as a machine does whose matrix products round differently."""

    def _score(self, part: int) -> bytes:
        with torch.no_grad():
            for weights in self._network.parameters():
                weights.mul_(1 + 1e-6)
        return super()._score(part)


def scene(folder: Path) -> tuple[Config, Run]:
    """A run with its gallery and a transformation, and no plan."""
    options = Options(waves=3, unit_images=7, embedded_waves=0, commits=False, transformation=False)
    config, run = make_run(folder, IMAGES, options)
    config = config.model_copy(update={"device": "cpu"})
    images, widths = IMAGES, (IMAGES.old.shape[1], IMAGES.embedded.shape[1])
    torch.manual_seed(0)
    info = TransformationInfo(*widths, None, 8, False, "alignment", 0, 1, 10, 10, True, {})
    old, new, z = images.old, images.embedded, images.transformed
    known_pairs = build_policy_inputs(HeldOutPairs(old, z, images.uncertainty, new), None, "l2", 0)
    save_transformation(run, TransformationNetwork(*widths, 8), info, {PART: known_pairs.to_bytes()})
    for folder_name in ("plan", "transformed"):
        objects.delete(run.path(folder_name))
    return config, run


def in_two_threads(patch: pytest.MonkeyPatch, order: Iterable[int], drivers: list[tuple[Config, Run]]) -> list[object]:
    """What each driver's `make_plan` gives; the second driver is on another processor."""
    plan_in_process(patch)

    def score_gallery(run: Run, folder: str, settings: ScoreSettings, _: BackfillSettings) -> list[ScoredPart]:
        kind = OtherProcessor if threading.current_thread() in others else Scorer
        return score_each(kind(run, folder, settings))

    others: set[threading.Thread] = set()

    def second() -> Plan:
        others.add(threading.current_thread())
        return build.make_plan(*drivers[1])

    patch.setattr(score, "score_gallery", score_gallery)
    return Turns(patch, order).run(lambda: build.make_plan(*drivers[0]), second)


def content(run: Run) -> dict[str, bytes]:
    """The files of the run's plan."""
    plan = read_plan(run)
    assert plan is not None
    dropped = dropped_files(run)
    uris = objects.list_files(run.path("plan")) + objects.list_files(run.path("transformed"))
    return {uri: objects.read_bytes(uri) for uri in uris if uri not in dropped}


def check_whole(run: Run) -> None:
    """Each image is in one wave, and the units of a wave hold the images that the transformed parts give it."""
    plan = read_plan(run)
    assert plan is not None
    waves = [read_transformed(run, plan, wave.wave, ["id"])["id"].to_pylist() for wave in plan.waves]
    assert [len(ids) for ids in waves] == [wave.images for wave in plan.waves]
    assert sorted(itertools.chain(*waves)) == sorted(IMAGES.ids.tolist())
    for wave, ids in zip(plan.waves, waves, strict=True):
        units = [unit for unit in plan.units(run) if unit.wave == wave.wave]
        found = [parquet.read_parquet(unit.rows_uri, ["id"], [unit.row_group])["id"].to_pylist() for unit in units]
        assert sorted(itertools.chain(*found)) == sorted(ids)


def test_make_plan_slower_driver_that_rounds_differently_takes_the_plan_and_leaves_it_as_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The second driver looks for a plan, sleeps until the first one has made it, and scores the gallery again."""
    config, run = scene(tmp_path)
    before: list[dict[str, bytes]] = []
    with pytest.MonkeyPatch.context() as patch:
        plan_in_process(patch)
        real = score.score_gallery

        def meanwhile(run: Run, folder: str, settings: ScoreSettings, backfill: BackfillSettings) -> list[ScoredPart]:
            if not before:
                before.append({})
                build.make_plan(config, run)
                before[0] = content(run)
                return score_each(OtherProcessor(run, folder, settings))
            return real(run, folder, settings, backfill)

        patch.setattr(score, "score_gallery", meanwhile)
        plan = build.make_plan(config, run)
    assert plan == read_plan(run)
    assert content(run) == before[0]
    check_whole(run)
    assert "another driver has planned this run meanwhile" in caplog.text
    assert dropped_files(run), "the second driver has laid out a plan of its own"


@settings(max_examples=15, deadline=None)
@given(order=st.lists(st.integers(0, 1), max_size=60))
def test_make_plan_two_drivers_in_any_order_both_go_on_with_one_whole_plan(
    tmp_path_factory: pytest.TempPathFactory, order: list[int]
) -> None:
    config, run = scene(tmp_path_factory.mktemp("run"))
    with pytest.MonkeyPatch.context() as patch:
        results = in_two_threads(patch, order, [(config, run), (config, run)])
    assert results == [read_plan(run)] * 2
    check_whole(run)


def test_make_plan_with_other_settings_than_an_earlier_driver_is_refused(tmp_path: Path) -> None:
    config, run = scene(tmp_path)
    other = config.model_copy(update={"plan": config.plan.model_copy(update={"waves": 5})})
    with pytest.MonkeyPatch.context() as patch:
        results = in_two_threads(patch, [B_FIRST, A_FIRST] * 500, [(config, run), (other, run)])
    refused = [item for item in results if isinstance(item, IncompatibleRun)]
    assert len(refused) == 1
    assert "plan.waves" in str(refused[0])
    assert [item for item in results if not isinstance(item, IncompatibleRun)] == [read_plan(run)]
    check_whole(run)


def test_collect_parts_of_a_dropped_plan_are_removed_and_those_of_the_plan_are_kept(tmp_path: Path) -> None:
    config, run = scene(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        plan_in_process(patch)
        build.make_plan(config, run)
    kept = content(run)
    dropped = [
        run.part("transformed", 0),
        run.path("transformed", "0123", "part-00000.parquet"),
        run.path("plan", "0123", "wave-001", "units-00000.parquet"),
        run.path("plan", "wave-001", "units-00000.parquet"),
        run.path(SCORED, "4567", "part-00000.parquet"),
    ]
    for uri in dropped:
        objects.put(uri, b"of a driver that was slower")
    assert gc.collect_garbage(run.uri, dry_run=True).leftovers == len(dropped)
    assert gc.collect_garbage(run.uri).leftovers == len(dropped)
    assert not any(map(objects.exists, dropped))
    assert content(run) == kept
    assert objects.exists(run.path("plan", "settings.json"))


def test_dropped_files_plan_of_an_earlier_version_keeps_the_parts_at_their_old_place(tmp_path: Path) -> None:
    _, run = make_run(tmp_path, IMAGES, Options(commits=False, transformation=False))
    assert sorted(content(run)) == [
        run.path("plan", "plan.json"),
        run.part("transformed", 0),
        run.part("transformed", 1),
    ]


def test_dropped_files_run_named_by_a_file_uri_keeps_the_plan(tmp_path: Path) -> None:
    _, run = make_run(tmp_path, IMAGES, Options(commits=False, transformation=False))
    assert dropped_files(Run(f"file://{run.uri}")) == {}
