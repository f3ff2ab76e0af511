"""Encoders from real weights: the three sources, what is refused, and that no weights can bring code."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms import v2 as transforms

from pipeline.config.tree import EncoderSettings, PreprocessSettings
from pipeline.errors import ConfigError, DataError
from pipeline.models.encoder import EmbeddingModel, load_encoder
from pipeline.models.encoder_backends import load_tensors

CPU = torch.device("cpu")
SIDE, DIM = 8, 5
VISION, VISION_DIM, CUT = "squeezenet1_1", 512, "features.12.cat"


class Network(nn.Module):
    """A small encoder with a batch normalisation, which shows whether it is in eval mode."""

    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.last = nn.Linear(4 * (SIDE - 2) ** 2, dim)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(self.layers(pixels))
        return found


def network() -> nn.Module:
    torch.manual_seed(0)
    return Network()


def not_a_network() -> int:
    return 3


def images(count: int = 4, side: int = SIDE) -> torch.Tensor:
    drawn = np.random.default_rng(0).integers(0, 256, (count, 3, side, side), np.uint8)
    return torch.from_numpy(drawn)


def spec(**changes: Any) -> EncoderSettings:
    return EncoderSettings.model_validate({"dim": DIM, "preprocess": {"size": SIDE}} | changes)


def export(path: Path, batch: int | None = None) -> str:
    """The network as an archive: for any batch size from 1, or for one."""
    shapes = ({0: torch.export.Dim("batch", min=1, max=1024)},) if batch is None else None
    example = torch.zeros(batch or 2, 3, SIDE, SIDE)
    program = torch.export.export(network().eval(), (example,), dynamic_shapes=shapes)
    torch.export.save(program, path)
    return str(path)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> str:
    return export(tmp_path_factory.mktemp("export") / "encoder.pt2")


@pytest.fixture(scope="module")
def vision() -> nn.Module:
    """A torchvision model with weights of its own."""
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.get_model(VISION, weights=None)
    return model.eval()


@pytest.fixture(scope="module")
def vision_weights(tmp_path_factory: pytest.TempPathFactory, vision: nn.Module) -> dict[str, str]:
    """The model's state dict in both formats."""
    folder = tmp_path_factory.mktemp("vision")
    save_file(vision.state_dict(), folder / "weights.safetensors")
    torch.save(vision.state_dict(), folder / "weights.pt")
    return {kind: str(folder / f"weights.{kind}") for kind in ("safetensors", "pt")}


def vision_spec(state_dict: str, **changes: Any) -> EncoderSettings:
    source = {"model": VISION, "state_dict": state_dict} | changes
    return spec(torchvision=source, dim=VISION_DIM if source.get("cut_at") else 1000, preprocess={"size": 32})


@torch.inference_mode()
def embed(encoder: EncoderSettings, batch: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = load_encoder(encoder, CPU)(batch)
    return found


@torch.inference_mode()
def expected(batch: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = network().eval()(batch.float() / 255)
    return found


def test_an_exported_encoder_gives_what_its_module_gives(archive: str) -> None:
    torch.testing.assert_close(embed(spec(export=archive), images()), expected(images()))


def test_an_exported_encoder_takes_any_batch_size(archive: str) -> None:
    model = load_encoder(spec(export=archive), CPU)
    whole = model(images(300))
    torch.testing.assert_close(whole[:1], model(images(300)[:1]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole[:8], model(images(300)[:8]), rtol=1e-4, atol=1e-5)


def test_a_function_of_the_users_own_gives_what_its_module_gives() -> None:
    encoder = spec(function=f"{__name__}:network")
    torch.testing.assert_close(embed(encoder, images()), expected(images()))


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_a_torchvision_model_gives_what_its_weights_give(
    vision: nn.Module, vision_weights: dict[str, str], kind: str
) -> None:
    with torch.inference_mode():
        wanted = vision(images(side=32).float() / 255)
    torch.testing.assert_close(embed(vision_spec(vision_weights[kind]), images(side=32)), wanted)


def test_a_torchvision_model_can_be_cut_at_a_layer(vision_weights: dict[str, str]) -> None:
    pooled = vision_spec(vision_weights["pt"], cut_at=CUT)
    seen: list[torch.Tensor] = []
    model = torchvision.models.get_model(VISION, weights=None)
    model.load_state_dict(torch.load(vision_weights["pt"], weights_only=True))
    model.eval().features[12].register_forward_hook(lambda module, inputs, output: seen.append(output.flatten(1)))
    with torch.inference_mode():
        model(images(side=32).float() / 255)
    torch.testing.assert_close(embed(pooled, images(side=32)), seen[0])


def test_weights_of_layers_behind_the_cut_may_be_missing(tmp_path: Path, vision: nn.Module) -> None:
    kept = {name: value for name, value in vision.state_dict().items() if not name.startswith("classifier")}
    save_file(kept, tmp_path / "cut.safetensors")
    load_encoder(vision_spec(str(tmp_path / "cut.safetensors"), cut_at=CUT), CPU)
    with pytest.raises(DataError, match=r"missing or misshapen: .*classifier"):
        load_encoder(vision_spec(str(tmp_path / "cut.safetensors")), CPU)


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path: Path, vision: nn.Module) -> None:
    weights = vision.state_dict()
    first = next(iter(weights))
    for bad in ({first: torch.zeros(3)}, {"another": torch.zeros(3)}):
        save_file(weights | bad, tmp_path / "bad.safetensors")
        with pytest.raises(DataError, match=f"do not fit(.|\n)*{next(iter(bad))}"):
            load_encoder(vision_spec(str(tmp_path / "bad.safetensors")), CPU)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "resnet999"}, "torchvision has no such model"),
        ({"cut_at": "no.such.layer"}, "no such layer"),
    ],
)
def test_a_model_or_layer_that_is_not_there_is_a_config_error(
    vision_weights: dict[str, str], changes: dict[str, str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        load_encoder(vision_spec(vision_weights["pt"], **changes), CPU)


@pytest.mark.parametrize(
    "name", ["no_such_module:network", f"{__name__}:no_such_function", f"{__name__}:not_a_network"]
)
def test_a_function_that_gives_no_network_is_a_config_error(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        load_encoder(spec(function=name), CPU)


def raises() -> nn.Module:
    raise ValueError("no weights here")


class _Failing(nn.Module):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        raise TypeError("no picture")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("raises", "the encoder's function failed\n  found: ValueError: no weights here"),
        ("_Failing", "the encoder's module failed\n  found: TypeError: no picture"),
    ],
)
def test_a_function_that_raises_is_a_config_error_with_the_line(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"{said} \(.*test_encoder\.py, line \d+\)"):
        load_encoder(spec(function=f"{__name__}:{name}"), CPU)


class _FailsOnNoise(nn.Module):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        if pixels.std() > 0:
            raise RuntimeError("too bright")
        return pixels.flatten(1)[:, :DIM]


class _GivesTwo(nn.Module):
    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return pixels, pixels


@pytest.mark.parametrize("name", ["_Failing", "_FailsOnNoise", "_GivesTwo"])
def test_load_encoder_whose_module_raises_names_the_encoder_and_what_it_was_given(name: str) -> None:
    preprocess = {"size": SIDE, "mean": [0.5, 0.5, 0.25], "std": [0.5]}
    given = rf"float32 pixels \(B, 3, {SIDE}, {SIDE}\) from -1 to 1\.5"
    said = rf"the encoder's module failed\n(.|\n)*where: encoders\.old: {__name__}:{name}, which was given {given}"
    with pytest.raises(ConfigError, match=said):
        load_encoder(spec(function=f"{__name__}:{name}", preprocess=preprocess), CPU, "encoders.old")


class _WantsContiguous(nn.Module):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        if not pixels.is_contiguous():
            raise TypeError("not contiguous")
        return pixels.flatten(1)[:, :DIM]


def test_load_encoder_that_raises_on_channels_last_alone_is_used_without() -> None:
    model = load_encoder(spec(function=f"{__name__}:_WantsContiguous"), CPU)
    assert model.memory_format == torch.contiguous_format


def test_another_width_than_configured_is_a_config_error(archive: str) -> None:
    with pytest.raises(ConfigError, match=r"expected: dim 6\n  found: \(5,\)"):
        load_encoder(spec(export=archive, dim=6), CPU)


def test_another_image_shape_than_exported_is_a_config_error(archive: str) -> None:
    with pytest.raises(
        ConfigError, match=r"does not accept images of the configured shape\n  expected: \(B, 3, 9, 9\)"
    ):
        load_encoder(spec(export=archive, preprocess={"size": SIDE + 1}), CPU)


@pytest.mark.parametrize("batch", [2, 4])
def test_an_archive_of_one_batch_size_is_refused_when_it_is_loaded(tmp_path: Path, batch: int) -> None:
    with pytest.raises(ConfigError, match="any batch size"):
        load_encoder(spec(export=export(tmp_path / "fixed.pt2", batch)), CPU)


@pytest.mark.parametrize("kind", ["pt2", "safetensors", "pt"])
def test_missing_weights_are_a_data_error(tmp_path: Path, kind: str) -> None:
    uri = str(tmp_path / f"nowhere.{kind}")
    with pytest.raises(DataError, match=f"missing(.|\n)*nowhere.{kind}"):
        load_encoder(spec(export=uri) if kind == "pt2" else vision_spec(uri), CPU)


@pytest.mark.parametrize("content", [b"", b"hello, world", b"\x80\x02garbage"])
@pytest.mark.parametrize("kind", ["pt2", "safetensors", "pt"])
def test_a_file_that_is_no_weights_is_a_data_error(tmp_path: Path, kind: str, content: bytes) -> None:
    path = tmp_path / f"bad.{kind}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"bad.{kind}"):
        load_encoder(spec(export=str(path)) if kind == "pt2" else vision_spec(str(path)), CPU)


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_a_truncated_file_is_a_data_error(vision_weights: dict[str, str], tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"half.{kind}"
    whole = Path(vision_weights[kind]).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read"):
        load_tensors(str(path))


def test_a_checkpoint_that_is_no_state_dict_is_a_data_error(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(DataError, match="not a state dict"):
        load_tensors(str(tmp_path / "list.pt"))


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("torch_format", [True, False])
def test_a_pickle_with_code_is_refused_and_the_code_does_not_run(tmp_path: Path, torch_format: bool) -> None:
    bad, touched = tmp_path / "bad.pt", tmp_path / "touched"
    if torch_format:
        torch.save({"weight": Payload(touched)}, bad)
    else:
        bad.write_bytes(pickle.dumps({"weight": Payload(touched)}))
    with pytest.raises(DataError, match="more than tensors"):
        load_tensors(str(bad))
    assert not touched.exists()
    pickle.loads(pickle.dumps(Payload(touched)))  # noqa: S301 - the payload works
    assert touched.exists()


@pytest.mark.parametrize("where", ["data/sample_inputs/model.pt", "data/constants/opaque_obj_0"])
def test_an_archive_with_code_is_refused_and_the_code_does_not_run(tmp_path: Path, archive: str, where: str) -> None:
    sink, touched = io.BytesIO(), tmp_path / "touched"
    torch.save(Payload(touched), sink)
    with zipfile.ZipFile(archive) as good, zipfile.ZipFile(tmp_path / "bad.pt2", "w") as bad:
        root = good.namelist()[0].split("/")[0]
        for name in good.namelist():
            if name != f"{root}/{where}":
                bad.writestr(name, good.read(name))
        bad.writestr(f"{root}/{where}", sink.getvalue())
    before = dict(os.environ)
    with pytest.raises(DataError, match=r"not a readable torch\.export archive"):
        load_encoder(spec(export=str(tmp_path / "bad.pt2")), CPU)
    assert not touched.exists()
    assert dict(os.environ) == before


@settings(max_examples=20, deadline=None)
@given(
    pixel_range=st.sampled_from([1, 255]),
    mean=st.lists(st.floats(0, 1), min_size=3, max_size=3),
    std=st.lists(st.floats(0.1, 2), min_size=3, max_size=3),
)
def test_pixels_are_scaled_and_normalised_as_torchvision_does(
    pixel_range: int, mean: list[float], std: list[float]
) -> None:
    preprocess = PreprocessSettings(
        size=SIDE,
        pixel_range=pixel_range,  # type: ignore[arg-type] - drawn from the two that are valid
        mean=tuple(value * pixel_range for value in mean),
        std=tuple(value * pixel_range for value in std),
    )
    model = EmbeddingModel(nn.Identity(), spec(export="unused", preprocess=preprocess))
    picture = images(1)
    wanted = transforms.Normalize(mean, std)(transforms.functional.to_dtype(picture, torch.float32, scale=True))
    torch.testing.assert_close(model(picture), wanted.flatten(1), rtol=1e-5, atol=1e-5)


def test_one_mean_holds_for_all_channels() -> None:
    each = EmbeddingModel(nn.Identity(), spec(export="unused", preprocess={"size": 8, "mean": [0.5] * 3}))
    one = EmbeddingModel(nn.Identity(), spec(export="unused", preprocess={"size": 8, "mean": [0.5]}))
    assert torch.equal(each(images()), one(images()))


def test_embeddings_are_float32_of_the_configured_width_and_carry_no_gradient(archive: str) -> None:
    model = load_encoder(spec(export=archive), CPU)
    found = model(images())
    assert (tuple(found.shape), found.dtype, found.requires_grad) == ((4, DIM), torch.float32, False)


class Strided(Network):
    """One that counts on contiguous activations, as code with `view` or `as_strided` does."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.by = by

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        found = self.layers[:3](pixels)
        rows, width = len(found), 4 * (SIDE - 2) ** 2
        found = found.view(rows, width) if self.by == "view" else found.as_strided((rows, width), (width, 1))
        return self.last(found)


@pytest.mark.parametrize("by", ["view", "as_strided"])
def test_a_network_that_counts_on_contiguous_activations_gives_what_it_gives(
    by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    network = Strided(by).eval()
    monkeypatch.setattr("pipeline.models.encoder.from_function", lambda name, key: network)
    model = load_encoder(EncoderSettings(function="own:code", dim=DIM, preprocess=PreprocessSettings(size=SIDE)), CPU)
    images = torch.randint(0, 256, (3, 3, SIDE, SIDE), dtype=torch.uint8)
    with torch.inference_mode():
        torch.testing.assert_close(model(images), network(images / 255.0))
        assert model.memory_format == torch.contiguous_format


def test_a_network_of_convolutions_keeps_channels_last(archive: str) -> None:
    assert load_encoder(spec(export=archive), CPU).memory_format == torch.channels_last
