"""A run of an earlier version goes on as it was, though the config does not have the keys that came later."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.config.identity import STAGES, read_settings, stage_settings
from pipeline.config.method import FitSettings
from pipeline.config.older_runs import as_started
from pipeline.config.tree import Config
from pipeline.errors import IncompatibleRun
from pipeline.run import Run
from pipeline.storage import documents, objects
from tests.support.run_settings import begin, config, finish


def begin_before_later_settings(item: Config) -> Run:
    """A run as it was started before there were `preprocess.exif` and `allow_outside`."""
    run = begin(item)
    settings = json.loads(objects.read_bytes(run.settings))
    del settings["sha256"], settings["checked_by"], settings["config"]["allow_outside"]
    for encoder in settings["config"]["encoders"].values():
        del encoder["preprocess"]["exif"]
    objects.put(run.settings, json.dumps(settings).encode())
    return run


def test_as_started_run_without_later_settings_goes_on_as_it_was_and_a_new_one_has_the_defaults(
    tmp_path: Path,
) -> None:
    new = as_started(config(tmp_path))
    assert new.encoders.new.preprocess.exif == "apply"
    assert not new.allow_outside
    begin_before_later_settings(config(tmp_path))
    resumed = as_started(config(tmp_path))
    assert [encoder.preprocess.exif for encoder in (resumed.encoders.old, resumed.encoders.new)] == ["ignore"] * 2
    assert resumed.allow_outside
    assert as_started(resumed) == resumed
    begin(resumed)


def test_as_started_setting_that_is_given_stays_and_is_refused_by_its_name(tmp_path: Path) -> None:
    begin_before_later_settings(config(tmp_path))
    given = as_started(config(tmp_path, encoders__new__preprocess__exif="apply", allow_outside=False))
    assert not given.allow_outside
    with pytest.raises(IncompatibleRun) as caught:
        begin(given)
    lines = [line for line in str(caught.value).splitlines() if line.startswith("  - ")]
    assert lines == ["  - encoders.new.preprocess.exif: the run has 'ignore', you gave 'apply'"]


def by_epochs(item: Config) -> Run:
    """A run as it was started and fitted before there were `fit.transformation` and `fit.steps`."""
    run = begin(item)
    settings = json.loads(objects.read_bytes(run.settings))
    del settings["sha256"], settings["checked_by"]
    del settings["config"]["fit"]["transformation"], settings["config"]["fit"]["steps"]
    settings["config"]["fit"]["epochs"] = 80
    objects.put(run.settings, json.dumps(settings).encode())
    return run


@pytest.mark.parametrize("fitted", [True, False])
def test_as_started_run_from_before_there_were_steps_goes_on_by_epochs(tmp_path: Path, fitted: bool) -> None:
    run = by_epochs(config(tmp_path))
    if fitted:
        made_with = stage_settings(config(tmp_path), "fit") | {"fit.epochs": 80}
        del made_with["fit.transformation"], made_with["fit.steps"]
        objects.put(run.path(STAGES["fit"].settings), documents.encode(made_with))
    resumed = as_started(config(tmp_path))
    assert (resumed.fit.epochs, resumed.fit.transformation) == (80, "fastfill")
    begin(resumed)
    assert as_started(config(tmp_path, fit__epochs=3)).fit.epochs == 3
    assert as_started(config(tmp_path, fit__steps=3)).fit.epochs is None
    if fitted:
        with pytest.raises(IncompatibleRun, match=r"fit\.transformation"):
            begin(as_started(config(tmp_path, fit__transformation="linear", fit__epochs=80)))


def test_as_started_run_that_ignores_exif_goes_on_so_without_the_key(tmp_path: Path) -> None:
    begin(config(tmp_path, encoders__new__preprocess__exif="ignore"))
    begin(as_started(config(tmp_path)))


def begin_with_twenty_waves(item: Config) -> Run:
    """A run as it was started before `plan.waves: auto` and `pairs.from_gallery`."""
    run = begin(item)
    settings = read_settings(run)
    tree = json.loads(json.dumps(settings["config"]))
    tree["plan"]["waves"] = 20
    tree["fit"]["epochs"] = 80
    del tree["fit"]["transformation"], tree["fit"]["steps"], tree["fit"]["calibrate"]
    del tree["pairs"]["from_gallery"]
    objects.put(run.settings, documents.encode(settings | {"config": tree}))
    return run


def test_as_started_run_with_twenty_waves_and_no_pairs_of_the_gallery_keeps_both(tmp_path: Path) -> None:
    assert as_started(config(tmp_path)).plan.waves == "auto"
    begin_with_twenty_waves(config(tmp_path))
    resumed = as_started(config(tmp_path))
    assert resumed.plan.waves == 20
    begin(resumed)
    begin(as_started(config(tmp_path, pairs__from_gallery="auto")))
    with pytest.raises(IncompatibleRun, match=r"pairs\.from_gallery: the run has 'auto', you gave 40"):
        begin(as_started(config(tmp_path, pairs__from_gallery=40)))
    begin(as_started(config(tmp_path, plan__waves=3)))  # there is no plan yet


def begin_in_version_0_1(item: Config, group_bound: float | None = None) -> Run:
    """A planned run with the settings that this version does not have."""
    run = finish(item)
    settings = read_settings(run)
    tree = json.loads(json.dumps(settings["config"]))
    tree["relearn"] = {"after_waves": [3], "what": "selected", "images": 200_000}
    tree["plan"]["group_bound"] = group_bound
    objects.put(run.settings, documents.encode(settings | {"config": tree}))
    where = run.path(STAGES["plan"].settings)
    relearn = {"relearn.after_waves": [3], "relearn.what": "selected", "relearn.images": 200_000}
    made_with = documents.decode(objects.read_bytes(where), where) | relearn | {"plan.group_bound": group_bound}
    objects.put(where, documents.encode(made_with))
    return run


def test_as_started_run_of_version_0_1_goes_on_without_the_settings_that_are_gone(tmp_path: Path) -> None:
    run = begin_in_version_0_1(config(tmp_path))
    written = objects.read_bytes(run.settings)
    begin(as_started(config(tmp_path)))
    assert Config.model_validate(read_settings(run)["config"]) == config(tmp_path)
    assert objects.read_bytes(run.settings) == written


def test_as_started_run_whose_order_was_made_with_a_group_bound_is_refused(tmp_path: Path) -> None:
    begin_in_version_0_1(config(tmp_path), group_bound=0.5)
    with pytest.raises(IncompatibleRun) as caught:
        begin(as_started(config(tmp_path)))
    lines = [line for line in str(caught.value).splitlines() if line.startswith("  - ")]
    assert lines == ["  - plan.group_bound: the run has 0.5, which only fastfill 0.1 supports"]


def test_as_started_of_a_run_of_this_version_takes_the_defaults_of_now(tmp_path: Path) -> None:
    begin(config(tmp_path, fit__lr=1.0))
    assert as_started(config(tmp_path)).fit.lr == FitSettings().lr
