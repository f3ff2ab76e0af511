"""The config: what is refused and how it is said, what may be overridden, and where paths start."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.config.load import load_config, resolve, validate
from pipeline.config.tree import Config
from pipeline.errors import ConfigError

SHIPPED = Path(__file__).resolve().parents[3] / "jobs" / "configs" / "cifar100.yaml"


def tree(**changes: Any) -> dict[str, Any]:
    """The smallest valid config; changes replace whole sections."""
    encoder = {"export": "new.pt2", "dim": 4, "preprocess": {"size": 8}}
    manifest = {"manifest": "gallery.parquet", "columns": {"old_embedding": "old"}}
    return {"run": "run", "encoders": {"new": encoder}, "gallery": manifest, "pairs": dict(manifest)} | changes


def write(folder: Path, content: dict[str, Any]) -> str:
    """The config as a YAML file."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def refusal(content: dict[str, Any]) -> str:
    """The message with which a tree is refused."""
    with pytest.raises(ConfigError) as caught:
        validate(content, where="run.yaml")
    return str(caught.value)


def test_pairs_come_from_a_manifest_from_the_gallery_or_from_both() -> None:
    columns = {"label": "digit", "uri": "uri"}
    gallery = {"manifest": "g.parquet", "columns": columns | {"group": "kind"}}
    pairs = {"manifest": "p.parquet", "columns": columns | {"side": "side"}}
    alone = validate({key: value for key, value in tree(gallery=gallery).items() if key != "pairs"}, "here")
    assert (alone.pairs.given, alone.pairs.uses_gallery, alone.pair_roles) == (
        None,
        True,
        {"label", "uri", "group"},
    )
    assert list(alone.sources) == ["gallery"]
    given = validate(tree(gallery=gallery, pairs=pairs), "here")
    assert (given.pairs.uses_gallery, given.pair_roles) == (False, {"label", "uri", "side"})
    assert given.sources["pairs"].columns == given.pairs.columns
    both = validate(tree(gallery=gallery, pairs=pairs | {"from_gallery": 7}), "here")
    assert (both.pairs.uses_gallery, both.pair_roles) == (True, {"label", "uri", "side", "group"})
    for config in (alone, given, both):
        assert Config.model_validate(config.model_dump(mode="json")) == config, "as run.json keeps it"


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ({"from_gallery": 0}, "pairs: there are no pairs: give a manifest, or from_gallery above 0"),
        ({"columns": {"uri": "uri"}}, "pairs: pairs.columns needs pairs.manifest: give the manifest"),
        ({"manifest": "p.parquet"}, "pairs: columns: required with a manifest, and not given"),
        ({"from_gallery": -1}, "pairs.from_gallery"),
        ({"from_gallery": "all"}, "pairs.from_gallery"),
        ({"gallery": 5}, "pairs.gallery: unknown key"),
    ],
)
def test_pairs_that_come_from_nowhere_are_refused(pairs: dict[str, Any], said: str) -> None:
    assert said in refusal(tree(pairs=pairs))


def test_the_smallest_config_is_enough_and_the_rest_has_defaults() -> None:
    config = validate(tree(), where="here")
    assert config.fit.transformation == config.fit.loss == config.plan.policy == "auto"
    assert config.plan.waves == "auto"
    assert config.telemetry.host == "127.0.0.1"


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"index": {"nprobe": 2**63}}, "index.nprobe"),
        ({"index": {"shards": 10**9}}, "index.shards"),
        ({"backfill": {"batch_size": 10**9}}, "backfill.batch_size"),
        ({"plan": {"waves": 10**9}}, "plan.waves"),
        ({"evaluate": {"points": 10**9}}, "evaluate.points"),
    ],
)
def test_counts_far_above_what_a_machine_can_hold_are_refused(content: dict[str, Any], key: str) -> None:
    assert f"{key}" in refusal(tree(**content))


@pytest.mark.timeout(10)
def test_load_config_of_a_pipe_that_nobody_writes_to_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="not a mapping"):
        load_config(str(tmp_path / "pipe"))


def test_load_config_of_a_pipe_that_is_written_to_reads_it_whole() -> None:
    """As a shell's `<(...)` gives it."""
    reading, writing = os.pipe()
    os.write(writing, yaml.safe_dump(tree()).encode())
    os.close(writing)
    assert load_config(f"/dev/fd/{reading}").gallery.manifest
    os.close(reading)


@pytest.mark.timeout(10)
def test_load_config_of_a_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="is a device"):
        load_config("/dev/zero")


def test_load_config_of_more_than_a_mebibyte_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(ConfigError, match="too large"):
        load_config(str(tmp_path / "run.yaml"))


@pytest.mark.parametrize("section", ["run", "encoders", "gallery"])
def test_required_section_that_is_missing_is_refused(section: str) -> None:
    content = tree()
    del content[section]
    assert f"{section}: required, but not given" in refusal(content)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (tree(galery={}), "galery: unknown key; did you mean 'gallery'?"),
        (tree(fit={"lamda_disc": 1}), "fit.lamda_disc: unknown key; did you mean 'lambda_disc'?"),
        (tree(backfill={"batchsize": 1}), "backfill.batchsize: unknown key; did you mean 'batch_size'?"),
        (
            tree(encoders={"new": {"exports": "a", "dim": 1, "preprocess": {"size": 8}}}),
            "encoders.new.exports: unknown key; did you mean 'export'?",
        ),
        (
            tree(encoders={"new": {"export": "a", "dim": 1, "preprocess": {"size": 8, "centre_crop": 3}}}),
            "encoders.new.preprocess.centre_crop: unknown key; did you mean 'center_crop'?",
        ),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name_of_its_section(content: dict[str, Any], said: str) -> None:
    assert said in refusal(content)


@pytest.mark.parametrize("alias", ["*encoder", "{<<: *encoder, dim: 4}"])
def test_override_of_a_key_below_a_yaml_alias_changes_that_key_alone(tmp_path: Path, alias: str) -> None:
    path = tmp_path / "run.yaml"
    content = tree()
    text = yaml.safe_dump({name: content[name] for name in ("run", "gallery", "pairs")})
    encoder = "&encoder {export: old.pt2, dim: 4, preprocess: {size: 8}}"
    path.write_text(f"{text}\nencoders:\n  old: {encoder}\n  new: {alias}\n")
    config = load_config(str(path), ("encoders.new.preprocess.size=224", "encoders.new.dim=9"))
    assert config.encoders.old is not None
    sizes = [(item.preprocess.size, item.dim) for item in (config.encoders.old, config.encoders.new)]
    assert sizes == [(8, 4), (224, 9)]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"storage": {"endpoint_url": "https://USER:SECRET@host:9000"}}, "storage.endpoint_url"),
        ({"storage": {"endpoint_url": "HTTP://SECRET@host"}}, "storage.endpoint_url"),
        ({"run": "s3://USER:SECRET@bucket/run"}, "run"),
        ({"data_root": "s3://USER:SECRET@bucket"}, "data_root"),
        ({"pairs": {"manifest": ["a", "s3://USER:SECRET@bucket"], "columns": {}}}, "pairs.manifest"),
        ({"fit": {"classifier": {"path": "s3://USER:SECRET@bucket/c"}}}, "fit.classifier.path"),
    ],
)
def test_validate_of_a_url_with_a_user_in_any_field_is_refused_without_showing_it(
    changes: dict[str, Any], key: str
) -> None:
    said = refusal(tree(**changes))
    assert f"{key}: a URL must not hold a user or password" in said
    assert "SECRET" not in said


@pytest.mark.parametrize("path", ["s3://bucket/a@b/c", "/home/me@work/run", "me@host:run", "s3://bucket?x=a@b"])
def test_validate_of_a_path_with_an_at_sign_that_is_no_user_is_taken(path: str) -> None:
    assert validate(tree(data_root=path), where="").data_root == path


@pytest.mark.parametrize(
    "content",
    [
        b"\x00\x01\x02binary\xff\xfe",
        b"\xff" * 1000,
        b"run: 2026-13-45",
        b"[" * 5000,
        b"a: " + b"{b: " * 5000,
        b"seed: " + b"9" * 5000,
        b"run: !!timestamp soon",
        b"run: !!bool perhaps",
        b"run: !!int ''",
        b"run: !!python/object/apply:os.getcwd []",
        b"a: &a [*a]\nb: *c",
        b"",
        b"- 1",
        b"run",
        "run: \u00e4".encode("latin-1"),
    ],
)
def test_load_config_of_a_file_that_is_no_config_is_a_config_error_that_names_it(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_config(str(path))


@pytest.mark.parametrize("value", ["2026-13-45", "[" * 5000, "!!bool perhaps", "{"])
def test_override_with_a_value_that_is_no_yaml_is_a_config_error_that_names_the_key(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError, match=r"--set is not valid YAML(.|\n)*where: fit\.lr"):
        load_config(write(tmp_path, tree()), (f"fit.lr={value}",))


def test_load_config_of_a_list_that_yaml_aliases_make_huge_is_refused_in_few_words(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    path.write_text("\n".join([*lines, "run: *a11"]))
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    assert len(str(caught.value)) < 3000


def test_validate_of_hundreds_of_unknown_keys_shows_the_first_and_counts_the_rest() -> None:
    message = refusal(tree(**{f"key{number}": 1 for number in range(300)}))
    assert "300 problem(s)" in message
    assert "and 280 more" in message


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"fit": {"lr": float("nan")}}, "fit.lr"),
        ({"storage": {"retry_seconds": float("inf")}}, "storage.retry_seconds"),
        ({"plan": {"waves": [float("nan"), 1.0]}}, "plan.waves"),
        ({"run": "a\0b"}, "run"),
        ({"run": ""}, "run"),
        ({"gallery": {"manifest": ["a\0b"], "columns": {}}}, "gallery.manifest"),
    ],
)
def test_validate_of_a_number_or_text_that_nothing_can_use_names_its_key(changes: dict[str, Any], key: str) -> None:
    assert f"  - {key}" in refusal(tree(**changes))


def test_an_unknown_key_like_no_other_is_refused_with_all_names_of_its_section() -> None:
    message = refusal(tree(publish={"zzz": 1}))
    assert "publish.zzz: unknown key; valid here: promote" in message


def test_all_problems_are_listed_at_once_each_with_its_key() -> None:
    message = refusal(tree(seed=-1, fit={"epochs": 0, "loss": "mse"}, publish={"zzz": 1}, index={"shards": "many"}))
    assert "5 problem(s)" in message
    for key in ("seed: ", "fit.epochs: ", "fit.loss: ", "publish.zzz: ", "index.shards: "):
        assert f"  - {key}" in message


def test_settings_of_version_0_1_are_unknown_and_the_valid_ones_are_named() -> None:
    message = refusal(tree(relearn={"after_waves": [3]}, plan={"group_bound": 0.5}))
    assert "plan.group_bound: unknown key; did you mean 'group_boost'?" in message
    assert "relearn: unknown key; valid here: run, data_root, " in message


@pytest.mark.parametrize("waves", [[0.5, 0.4], [0.5, 0.6], [1.0, 0.0], [1.5, -0.5], 0, []])
def test_waves_that_do_not_make_up_the_gallery_are_refused(waves: object) -> None:
    assert re.search(r"\bwaves\b", refusal(tree(plan={"waves": waves})))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=60))
def test_any_fractions_that_add_up_to_one_are_taken(parts: list[int]) -> None:
    fractions = [part / sum(parts) for part in parts]
    assert validate(tree(plan={"waves": fractions}), where="").plan.waves == tuple(fractions)


@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([1, 3]))
def test_by_default_a_unit_is_as_many_images_as_fill_64_mib(height: int, width: int, channels: int) -> None:
    preprocess = {"size": [height, width], "channels": channels}
    config = validate(tree(encoders={"new": {"export": "a", "dim": 4, "preprocess": preprocess}}), where="")
    images, each = config.unit_images, height * width * channels
    assert images == 2048 or images * each <= 2**26 < 2 * images * each
    assert images & (images - 1) == 0


@pytest.mark.parametrize(
    ("given", "loss"), [({}, "alignment"), ({"loss": "alignment+discriminative"}, "alignment+discriminative")]
)
def test_other_kinds_of_transformation_are_fitted_by_alignment_if_no_loss_is_given(given: Any, loss: str) -> None:
    assert validate(tree(fit={"transformation": "residual"} | given), where="").fit.mode == loss
    assert validate(tree(fit={"transformation": "linear"}), where="").fit.mode == "alignment"


@pytest.mark.parametrize(("kind", "loss"), [("linear", "fastfill"), ("residual", "alignment+uncertainty")])
def test_a_loss_that_a_kind_of_transformation_does_not_take_is_refused(kind: str, loss: str) -> None:
    assert f"transformation {kind} takes alignment" in refusal(tree(fit={"transformation": kind, "loss": loss}))


def test_a_configured_unit_is_taken_as_it_is() -> None:
    config = validate(tree(plan={"unit_images": 77}), where="")
    assert config.unit_images == 77


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (tree(encoders={"new": {"dim": 4, "preprocess": {"size": 8}}}), "give exactly one of export"),
        (
            tree(encoders={"new": {"export": "a", "function": "a:b", "dim": 4, "preprocess": {"size": 8}}}),
            "give exactly one of export",
        ),
        (tree(encoders={"new": {"function": "a.b", "dim": 4, "preprocess": {"size": 8}}}), "module:function"),
        (tree(encoders={"new": {"export": "a", "dim": 4, "preprocess": {"resize": 8}}}), "the input shape is unknown"),
        (
            tree(encoders={"new": {"export": "a", "dim": 4, "preprocess": {"size": 8, "reducing_gap": 2}}}),
            "reducing_gap needs resize: it is a multiple of the resized size",
        ),
        (
            tree(encoders={"new": {"export": "a", "dim": 4, "preprocess": {"size": 8, "mean": [1, 2]}}}),
            "mean has 2 values",
        ),
        (tree(plan={"policy": "best"}), "random, uncertainty, norm"),
        (tree(backfill={"min_actors": 3, "max_actors": 2}), "max_actors (2) must be at least min_actors (3)"),
        (tree(gallery={"manifest": "a", "columns": {"uri": "u", "offset": "o"}}), "offset, length and uri go together"),
        (tree(device="tpu"), "device: "),
    ],
)
def test_values_that_contradict_each_other_are_refused(content: dict[str, Any], said: str) -> None:
    assert said in refusal(content)


def test_an_override_reaches_any_depth_and_reads_its_value_as_yaml(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, tree()),
        (
            "fit.lr=1e-3",
            "plan.waves=[0.25, 0.75]",
            "encoders.new.preprocess.size=[6, 7]",
            "fit.classifier.path=/w.safetensors",
            "device=cpu",
        ),
    )
    assert config.fit.lr == 1e-3
    assert config.plan.waves == (0.25, 0.75)
    assert config.device == "cpu"
    assert config.encoders.new.preprocess.image_size == (6, 7)
    assert config.fit.classifier is not None
    assert config.fit.classifier.path == "/w.safetensors"


def test_an_override_wins_over_the_file_and_the_last_one_over_the_first(tmp_path: Path) -> None:
    path = write(tmp_path, tree(seed=1))
    assert load_config(path, ("seed=2",)).seed == 2
    assert load_config(path, ("seed=2", "seed=3")).seed == 3


def test_an_override_with_an_empty_value_unsets_a_key(tmp_path: Path) -> None:
    path = write(tmp_path, tree(fit={"classifier": {"path": "w.safetensors"}}))
    assert load_config(path, ("fit.classifier=",)).fit.classifier is None


@pytest.mark.parametrize("item", ["seed", "=3", "run.deeper=1", "fit.lr=[1, ", ""])
def test_a_bad_override_is_refused(tmp_path: Path, item: str) -> None:
    with pytest.raises(ConfigError):
        load_config(write(tmp_path, tree()), (item,))


def test_an_override_of_an_unknown_key_is_refused_like_one_in_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"plan\.wave: unknown key; did you mean 'waves'\?"):
        load_config(write(tmp_path, tree()), ("plan.wave=3",))


@pytest.mark.parametrize("content", ["- a list", "a: [1", "just text", ""])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    assert str(path) in str(caught.value)


def test_a_missing_file_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_config(str(tmp_path / "nowhere.yaml"))


def test_relative_inputs_start_at_data_root_and_the_run_at_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    vision = {"torchvision": {"model": "resnet18", "state_dict": "old.pt"}, "dim": 4, "preprocess": {"size": 8}}
    content = tree(
        data_root="data",
        fit={"classifier": {"path": "w.safetensors"}},
        pairs={"manifest": ["/absolute/a.parquet", "s3://bucket/b", "c/*.parquet"], "columns": {}},
        probe={"manifest": "sample"},
    )
    content["encoders"] = {"old": vision, **content["encoders"]}
    config = load_config(write(tmp_path, content))
    root = str(tmp_path / "data")
    assert config.run == str(tmp_path / "run")
    assert config.data_root == root
    assert config.encoders.new.export == f"{root}/new.pt2"
    assert config.encoders.old is not None
    assert config.encoders.old.torchvision is not None
    assert config.encoders.old.torchvision.state_dict == f"{root}/old.pt"
    assert config.fit.classifier is not None
    assert config.fit.classifier.path == f"{root}/w.safetensors"
    assert config.gallery.manifest == (f"{root}/gallery.parquet",)
    assert config.pairs.manifest == ("/absolute/a.parquet", "s3://bucket/b", f"{root}/c/*.parquet")
    assert config.probe.manifest == (f"{root}/sample",)


def test_relative_inputs_start_at_a_data_root_in_a_bucket() -> None:
    config = resolve(validate(tree(data_root="s3://bucket/data/"), where=""))
    assert config.encoders.new.export == "s3://bucket/data/new.pt2"
    assert config.gallery.manifest == ("s3://bucket/data/gallery.parquet",)


def test_resolving_twice_changes_nothing() -> None:
    once = resolve(validate(tree(data_root="data"), where=""))
    assert resolve(once) == once


def test_a_resolved_config_survives_json() -> None:
    config = resolve(validate(tree(plan={"waves": [0.3, 0.7]}), where=""))
    assert Config.model_validate(config.model_dump(mode="json")) == config


def test_a_config_cannot_be_changed() -> None:
    config = validate(tree(), where="")
    for section, name in ((config, "seed"), (config.fit, "lr"), (config.encoders.new.preprocess, "size")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, 1)


def test_the_shipped_config_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SHIPPED.parents[2])
    config = load_config(str(SHIPPED))
    assert config.encoders.new.dim == 128
    assert config.index.shards == 4
    assert config.run == os.path.abspath("runs/cifar100")
    assert config.gallery.manifest == (os.path.abspath("../shared/data/cifar100/test.parquet"),)
