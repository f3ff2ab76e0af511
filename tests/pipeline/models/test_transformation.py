"""The transformation's network, its artifact on disk, and applying it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.arrays import Float32
from pipeline.config.method import TransformationKind
from pipeline.errors import ConfigError, DataError, SnapshotConflict
from pipeline.models.device import resolve_device
from pipeline.models.networks import TransformationNetwork
from pipeline.models.transformation import (
    HeldOutFigures,
    TransformationInfo,
    apply,
    has_transformation,
    load_transformation,
    read_info,
    save_transformation,
)
from pipeline.run import Run
from pipeline.storage import documents, objects

CPU = torch.device("cpu")


def _info(d_side: int | None = None) -> TransformationInfo:
    held_out: HeldOutFigures = {"alignment": 0.5, "transformed": {"top1": 40.0, "top5": 60.0, "map": 20.0}}
    return TransformationInfo(
        d_old=6,
        d_new=5,
        d_side=d_side,
        inner_width=16,
        normalize=False,
        loss="fastfill",
        seed=3,
        epochs=2,
        num_train=90,
        num_held_out=10,
        better_than_old=True,
        held_out=held_out,
    )


def _trained(info: TransformationInfo) -> TransformationNetwork:
    """A network whose running statistics are not the initial ones."""
    torch.manual_seed(0)
    network = info.network()
    side = None if info.d_side is None else torch.randn(64, info.d_side)
    network(3 * torch.randn(64, info.d_old) + 1, side)
    return network.eval()


def _old(num: int = 50, dim: int = 6) -> Float32:
    return np.random.default_rng(0).normal(size=(num, dim)).astype(np.float32)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Run, TransformationNetwork]:
    run, network = Run(str(tmp_path / "run")), _trained(_info())
    save_transformation(run, network, _info())
    return run, network


@pytest.mark.parametrize(
    ("d_old", "d_new", "d_side", "count"), [(128, 128, 128, 5_712_129), (384, 768, 384, 15_026_689)]
)
def test_network_has_the_published_number_of_parameters(d_old: int, d_new: int, d_side: int, count: int) -> None:
    network = TransformationNetwork(d_old, d_new, 2048, d_side)
    assert sum(parameter.numel() for parameter in network.parameters()) == count


def test_loaded_transformation_equals_the_saved_one(saved: tuple[Run, TransformationNetwork]) -> None:
    run, network = saved
    loaded, info = load_transformation(run, CPU)
    assert has_transformation(run)
    assert info == _info() == read_info(run)
    assert not loaded.training
    for expected, found in zip(apply(network, _old(), None, CPU, 8), apply(loaded, _old(), None, CPU, 8), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("d_side", [None, 4])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", ["linear", "residual", "fastfill"])
def test_each_kind_is_loaded_as_it_was_saved_bit_for_bit(
    tmp_path: Path, kind: TransformationKind, normalize: bool, d_side: int | None
) -> None:
    run, info = Run(str(tmp_path / "run")), replace(_info(d_side), kind=kind, normalize=normalize)
    network = info.network()
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(1 + torch.rand_like(tensor))
    save_transformation(run, network.eval(), info)
    loaded, found = load_transformation(run, CPU)
    assert found == info
    side = None if d_side is None else _old(dim=d_side)
    for one, other in zip(apply(network, _old(), side, CPU, 8), apply(loaded, _old(), side, CPU, 8), strict=True):
        np.testing.assert_array_equal(one, other)
    assert type(loaded) is type(network)


def test_a_marker_without_a_kind_is_of_the_network(saved: tuple[Run, TransformationNetwork]) -> None:
    marker = Path(saved[0].transformation, "transformation.json")
    tree = json.loads(marker.read_text())
    del tree["kind"], tree["sha256"], tree["checked_by"]
    marker.write_text(json.dumps(tree))
    network, info = load_transformation(saved[0], CPU)
    assert info.kind == "fastfill"
    assert isinstance(network, TransformationNetwork)


def test_info_survives_json() -> None:
    assert documents.parse(TransformationInfo, documents.encode(_info(d_side=4)), "marker") == _info(d_side=4)


def test_tampered_weights_are_refused(saved: tuple[Run, TransformationNetwork]) -> None:
    (weights,) = Path(saved[0].transformation).glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        load_transformation(saved[0], CPU)


def test_missing_weights_are_refused(saved: tuple[Run, TransformationNetwork]) -> None:
    for weights in Path(saved[0].transformation).glob("*.safetensors"):
        weights.unlink()
    with pytest.raises(DataError, match="missing"):
        load_transformation(saved[0], CPU)


def test_weights_of_another_shape_are_refused(saved: tuple[Run, TransformationNetwork]) -> None:
    marker = Path(saved[0].transformation, "transformation.json")
    marker.write_bytes(documents.encode(json.loads(marker.read_text()) | {"inner_width": 8}))
    with pytest.raises(DataError, match="do not fit"):
        load_transformation(saved[0], CPU)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format_version": 1}'])
def test_a_marker_that_is_not_a_description_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"not a (JSON|transformation)"):
        documents.parse(TransformationInfo, text.encode(), "marker")


def test_another_format_is_refused() -> None:
    text = json.dumps(json.loads(documents.encode(_info())) | {"format_version": 99})
    with pytest.raises(DataError, match="another format"):
        documents.parse(TransformationInfo, text.encode(), "marker")


def test_a_run_without_transformation_says_what_to_do(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    assert not has_transformation(run)
    with pytest.raises(DataError, match="fastfill fit"):
        load_transformation(run, CPU)


def test_weights_without_marker_do_not_count_and_are_replaced(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    objects.put(objects.join(run.transformation, "model-0.safetensors"), b"from a fit that died")
    assert not has_transformation(run)
    save_transformation(run, _trained(_info()), _info())
    assert load_transformation(run, CPU)[1] == _info()


def test_two_fits_at_once_keep_the_first_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, first, second = Run(str(tmp_path)), _trained(_info()), _trained(_info())
    with torch.no_grad():
        next(second.parameters()).add_(1)
    put = objects.put_if_absent

    def other_first(uri: str, data: bytes) -> None:
        """Between the weights of the second one and its marker."""
        monkeypatch.setattr(objects, "put_if_absent", put)
        save_transformation(run, first, _info())
        put(uri, data)

    monkeypatch.setattr(objects, "put_if_absent", other_first)
    with pytest.raises(SnapshotConflict):
        save_transformation(run, second, _info())
    loaded, _ = load_transformation(run, CPU)
    assert torch.equal(next(loaded.parameters()), next(first.parameters()))


def test_a_second_transformation_is_refused(saved: tuple[Run, TransformationNetwork]) -> None:
    with pytest.raises(SnapshotConflict, match="already"):
        save_transformation(saved[0], saved[1], _info())


def test_in_eval_mode_a_row_does_not_depend_on_its_batch() -> None:
    network = _trained(_info())
    whole, single = apply(network, _old(), None, CPU, 50), apply(network, _old(), None, CPU, 1)
    assert whole[0].shape == (50, 5)
    assert whole[1].shape == (50,)
    assert whole[0].dtype == whole[1].dtype == np.float32
    for expected, found in zip(whole, single, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_apply_gives_the_same_bits_again() -> None:
    network = _trained(_info())
    for first, second in zip(apply(network, _old(), None, CPU, 7), apply(network, _old(), None, CPU, 7), strict=True):
        np.testing.assert_array_equal(first, second)


def test_apply_to_nothing_is_empty() -> None:
    z, s = apply(_trained(_info()), _old(0), None, CPU, 8)
    assert z.shape == (0, 5)
    assert s.shape == (0,)


def test_apply_refuses_another_width() -> None:
    with pytest.raises(DataError, match="another shape"):
        apply(_trained(_info()), _old(dim=7), None, CPU, 8)


def test_apply_refuses_missing_unexpected_or_wrong_side_information() -> None:
    with pytest.raises(DataError, match="side information"):
        apply(_trained(_info(d_side=4)), _old(), None, CPU, 8)
    with pytest.raises(DataError, match="side information"):
        apply(_trained(_info()), _old(), _old(dim=4), CPU, 8)
    with pytest.raises(DataError, match="another shape"):
        apply(_trained(_info(d_side=4)), _old(), _old(dim=5), CPU, 8)


def test_apply_refuses_a_result_that_is_not_finite() -> None:
    old = _old()
    old[3, 2] = np.inf
    with pytest.raises(DataError, match="not finite"):
        apply(_trained(_info()), old, None, CPU, 8)


def test_side_information_changes_the_result() -> None:
    network = _trained(_info(d_side=4))
    z = [apply(network, _old(), side, CPU, 50)[0] for side in (_old(dim=4), -_old(dim=4))]
    assert np.abs(z[0] - z[1]).max() > 1e-3


def test_for_cosine_z_has_unit_length_and_lengths_of_inputs_do_not_matter() -> None:
    torch.manual_seed(0)
    network = TransformationNetwork(6, 5, 16, normalize=True).eval()
    z, s = apply(network, _old(), None, CPU, 50)
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, rtol=1e-5)
    for expected, found in zip((z, s), apply(network, 10 * _old(), None, CPU, 50), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("shapes_z", [True, False])
def test_the_gradient_of_s_reaches_z_only_where_it_may(shapes_z: bool) -> None:
    network = TransformationNetwork(6, 5, 16)
    network.uncertainty_shapes_z = shapes_z
    network(torch.tensor(_old()))[1].sum().backward()
    assert network.uncertainty.weight.grad is not None
    assert (network.embedding.weight.grad is not None) == shapes_z


def test_resolve_device_gives_the_devices_by_name() -> None:
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_gpu_that_is_not_there_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="this machine has no such GPU"):
        resolve_device(f"cuda:{torch.cuda.device_count()}")
