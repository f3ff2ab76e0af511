"""A run's identity: which starts continue it, and which are refused, saying why."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import identity
from pipeline.config.identity import (
    RUNTIME,
    STAGES,
    check_resumable,
    check_settings_of,
    encoder_fingerprint,
    fix_settings,
    read_settings,
    settings_digest,
    stage_settings,
    start,
    weight_fingerprints,
)
from pipeline.config.tree import Config
from pipeline.errors import DataError, IncompatibleRun
from pipeline.run import Run
from pipeline.storage import objects
from tests.support.run_settings import begin, config, fingerprints, finish


def test_the_same_config_continues_its_run_and_leaves_its_settings_alone(tmp_path: Path) -> None:
    run = begin(config(tmp_path))
    written = objects.read_bytes(run.settings)
    assert begin(config(tmp_path)) == run
    assert objects.read_bytes(run.settings) == written


@pytest.mark.parametrize(
    "change",
    [
        {"device": "cpu"},
        {"allow_outside": True},
        {"backfill__batch_size": 7, "backfill__max_actors": 9, "backfill__max_reject_fraction": 1.0},
        {"evaluate__points": 5},
        {"publish__promote": "manual"},
        {"telemetry__port": 1234},
        {"fit__num_workers": 4, "fit__max_failures": 0},
        {"index__nprobe": 3},
    ],
)
def test_settings_that_only_say_how_may_change_at_any_time(tmp_path: Path, change: dict[str, Any]) -> None:
    begin(config(tmp_path))
    begin(config(tmp_path, **change))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"seed": 1}, "seed"),
        ({"plan__waves": 3}, "plan.waves"),
        ({"plan__policy": "random"}, "plan.policy"),
        ({"fit__epochs": 1}, "fit.epochs"),
        ({"index__shards": 2}, "index.shards"),
        ({"index__factory": "Flat"}, "index.factory"),
        ({"gallery__metric": "ip"}, "gallery.metric"),
        ({"gallery__columns__label": "label"}, "gallery.columns.label"),
        ({"encoders__new__dim": 5}, "encoders.new.dim"),
        ({"encoders__new__preprocess__mean": (1.0,)}, "encoders.new.preprocess.mean"),
        ({"encoders__new__preprocess__resample": "pillow"}, "encoders.new.preprocess.resample"),
        ({"encoders__new__preprocess__resize": 8}, "encoders.new.preprocess.resize"),
        ({"pairs__held_out_fraction": 0.2}, "pairs.held_out_fraction"),
    ],
)
def test_any_other_setting_is_refused_by_its_name_with_both_values(
    tmp_path: Path, change: dict[str, Any], key: str
) -> None:
    finish(config(tmp_path))
    with pytest.raises(IncompatibleRun) as caught:
        begin(config(tmp_path, **change))
    lines = [line for line in str(caught.value).splitlines() if line.startswith("  - ")]
    assert [line.split(":")[0] for line in lines] == [f"  - {key}"]
    assert "the run has" in lines[0]
    assert "you gave" in lines[0]


def test_all_that_differs_is_named_at_once(tmp_path: Path) -> None:
    finish(config(tmp_path))
    with pytest.raises(IncompatibleRun) as caught:
        begin(config(tmp_path, seed=1, plan__waves=3, fit__lr=1.0, device="cpu"))
    assert all(key in str(caught.value) for key in ("seed", "plan.waves", "fit.lr"))
    assert "device" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "key"),
    [("old.pt2", "encoders.old"), ("new.pt2", "encoders.new"), ("classifier.safetensors", "fit.classifier")],
)
def test_changed_weights_under_the_same_name_are_refused(tmp_path: Path, name: str, key: str) -> None:
    finish(config(tmp_path))
    (tmp_path / "data" / name).write_bytes(b"others")
    with pytest.raises(IncompatibleRun, match=f"content of {key}: "):
        begin(config(tmp_path))


@pytest.mark.parametrize(
    ("stage", "change"),
    [
        ("fit", {"fit__lr": 1.0}),
        ("fit", {"fit__classifier": None}),
        ("plan", {"plan__waves": 3, "plan__policy": "random"}),
        ("plan", {"index__shards": 2}),
        ("index", {"index__factory": "Flat", "index__train_vectors": 7}),
    ],
)
def test_a_stages_own_settings_may_change_until_it_has_something_to_keep(
    tmp_path: Path, stage: str, change: dict[str, Any]
) -> None:
    run, changed = begin(config(tmp_path)), config(tmp_path, **change)
    for name in set(STAGES) - {stage}:
        fix_settings(run, name, stage_settings(config(tmp_path), name))
    written = objects.read_bytes(run.settings)
    begin(changed)
    assert objects.read_bytes(run.settings) == written
    fix_settings(run, stage, stage_settings(changed, stage))
    begin(changed)
    with pytest.raises(IncompatibleRun, match="the run has"):
        begin(config(tmp_path))


def test_two_drivers_with_different_settings_keep_those_of_the_first(tmp_path: Path) -> None:
    run, one, other = begin(config(tmp_path)), config(tmp_path), config(tmp_path, plan__waves=3)
    begin(other)  # both were let in: there is no plan yet
    fix_settings(run, "plan", stage_settings(one, "plan"))
    fix_settings(run, "plan", stage_settings(one, "plan"))
    for late in (fix_settings, check_settings_of):
        with pytest.raises(
            IncompatibleRun, match=r"plan\.waves: the run has 'auto', you gave 3(.|\n)*plan/settings\.json"
        ):
            late(run, "plan", stage_settings(other, "plan"))


@pytest.mark.parametrize("name", ["fit", "plan", "index"])
def test_a_stage_that_was_done_before_it_kept_its_settings_is_held_to_those_of_the_run(
    tmp_path: Path, name: str
) -> None:
    run = begin(config(tmp_path))
    change = {"fit": {"fit__lr": 1.0}, "plan": {"plan__waves": 3}, "index": {"index__factory": "Flat"}}[name]
    begin(config(tmp_path, **change))
    objects.put(run.path(STAGES[name].outcome), b"{}")
    with pytest.raises(IncompatibleRun):
        begin(config(tmp_path, **change))


def test_every_key_of_a_stage_is_a_setting(tmp_path: Path) -> None:
    item = config(tmp_path, plan__policy="json:loads")
    for name, stage in STAGES.items():
        settings = stage_settings(item, name)
        assert set(stage.keys) == {
            key for key in stage.keys if any(identity._is_below(found, key) for found in settings)
        }
        assert settings_digest(settings) != settings_digest(settings | {next(iter(settings)): "other"})


def test_a_changed_function_is_refused_like_changed_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    for name in ("mine_encoder", "mine_policy"):
        (tmp_path / f"{name}.py").write_text("def make():\n    return 1\n")
    changes = {"encoders__new__export": None, "encoders__new__function": "mine_encoder:make"}
    item = config(tmp_path, **changes, plan__policy="mine_policy:make")
    assert set(fingerprints(item)) == {"gallery", "encoders.old", "encoders.new", "fit.classifier", "plan.policy"}
    finish(item)
    begin(item)
    for name, key in (("mine_encoder", "encoders.new"), ("mine_policy", "plan.policy")):
        before = (tmp_path / f"{name}.py").read_text()
        (tmp_path / f"{name}.py").write_text(before.replace("1", "2"))
        with pytest.raises(IncompatibleRun, match=f"content of {key}: "):
            begin(item)
        (tmp_path / f"{name}.py").write_text(before)


def test_another_gallery_is_refused(tmp_path: Path) -> None:
    begin(config(tmp_path))
    with pytest.raises(IncompatibleRun, match="content of gallery: the run has '0123', you gave '4567'"):
        start(config(tmp_path), weight_fingerprints(config(tmp_path)) | {"gallery": "4567"})


def test_a_copy_of_the_same_data_elsewhere_continues_the_run(tmp_path: Path) -> None:
    begin(config(tmp_path))
    shutil.copytree(tmp_path / "data", tmp_path / "moved")
    begin(config(tmp_path, data="moved"))


@pytest.mark.parametrize("missing", ["fit__classifier", "encoders__old"])
def test_an_input_that_comes_or_goes_is_refused(tmp_path: Path, missing: str) -> None:
    without = config(tmp_path, **{missing: None})
    finish(without)
    with pytest.raises(IncompatibleRun, match="content of"):
        begin(config(tmp_path))


def test_a_command_that_only_reads_compares_the_settings_and_the_inputs_that_it_uses(tmp_path: Path) -> None:
    item = config(tmp_path)
    finish(item)
    for name in ("old.pt2", "classifier.safetensors"):
        (tmp_path / "data" / name).unlink()
    check_resumable(item, {}, all_inputs=False)
    check_resumable(item, encoder_fingerprint("encoders.new", item.encoders.new), all_inputs=False)
    with pytest.raises(IncompatibleRun, match=r"fit\.lr"):
        check_resumable(config(tmp_path, fit__lr=1.0), {}, all_inputs=False)
    (tmp_path / "data" / "new.pt2").write_bytes(b"others")
    with pytest.raises(IncompatibleRun, match=r"content of encoders\.new"):
        check_resumable(item, encoder_fingerprint("encoders.new", item.encoders.new), all_inputs=False)


def test_a_refused_start_changes_nothing(tmp_path: Path) -> None:
    run = begin(config(tmp_path))
    written = objects.read_bytes(run.settings)
    with pytest.raises(IncompatibleRun):
        begin(config(tmp_path, seed=1))
    assert objects.read_bytes(run.settings) == written
    assert objects.list_files(run.uri) == [run.settings]


def test_a_run_that_is_not_there_refuses_nothing(tmp_path: Path) -> None:
    item = config(tmp_path)
    check_resumable(item, fingerprints(item))
    assert not objects.exists(item.run)


def test_every_runtime_setting_is_a_setting(tmp_path: Path) -> None:
    keys = {key for key, _ in identity._flatten(config(tmp_path).model_dump(), "")}
    keys |= {key.replace(".export", ".torchvision.state_dict") for key in keys}
    for name in RUNTIME:
        assert any(key == name or key.startswith(f"{name}.") for key in keys), name


def test_settings_keep_the_resolved_config_and_the_fingerprints(tmp_path: Path) -> None:
    item = config(tmp_path)
    settings = read_settings(begin(item))
    assert Config.model_validate(settings["config"]) == item
    assert settings["fingerprints"] == fingerprints(item)


def test_a_missing_run_and_another_format_are_named(tmp_path: Path) -> None:
    run = Run(str(tmp_path / "run"))
    with pytest.raises(DataError, match="there is no run here"):
        read_settings(run)
    objects.put(run.settings, b'{"format_version": 99}')
    with pytest.raises(DataError, match="found: format_version 99"):
        read_settings(run)


def test_missing_weights_are_named_by_their_key(tmp_path: Path) -> None:
    item = config(tmp_path)
    (tmp_path / "data" / "new.pt2").unlink()
    with pytest.raises(DataError, match=r"encoders\.new: .*new\.pt2"):
        weight_fingerprints(item)


def test_every_file_of_a_run_lies_below_it_under_its_own_name() -> None:
    run = Run("s3://bucket/run")
    paths = [run.settings, run.transformation, run.plan, run.reports, run.wave_units(1, 0)]
    paths += [run.wave_units(1, 64), run.wave_units(1000, 0)]
    paths += [run.part("a", 1), run.part("b", 1), run.commit(0), run.commit(10**19), run.tag("prod")]
    assert len(set(paths)) == len(paths)
    assert all(path.startswith("s3://bucket/run/") for path in paths)
    assert sorted([run.commit(9), run.commit(10)]) == [run.commit(9), run.commit(10)]


@pytest.mark.parametrize("name", ["../../run", "a/b", "", ".", "a.b", "prod\n", "a b", "x" * 5 + "\0"])
def test_tag_with_a_name_that_is_no_word_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="not a valid name of a tag"):
        Run("/run").tag(name)


@pytest.mark.parametrize("name", ["prod", "candidate", "spring-2026_b"])
def test_tag_with_a_word_as_its_name_lies_among_the_tags(name: str) -> None:
    assert Run("/run").tag(name) == f"/run/index/tags/{name}.json"
