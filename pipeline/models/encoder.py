"""An encoder: maps uint8 images to float32 embeddings. Its weights are loaded without pickle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import cast

import torch
from torch import nn

from pipeline.config import tree as settings
from pipeline.config import user_functions
from pipeline.errors import ConfigError
from pipeline.models.encoder_backends import first_line, from_export, from_function, from_torchvision


class EmbeddingModel(nn.Module):
    """Pixels to embeddings: scale, normalise, encode, flatten."""

    def __init__(self, network: nn.Module, spec: settings.EncoderSettings) -> None:
        super().__init__()
        self.network = network
        self.dim = spec.dim
        preprocess = spec.preprocess
        self.scale = preprocess.pixel_range / 255.0
        self.memory_format = torch.contiguous_format
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.register_buffer("mean", torch.tensor(preprocess.mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(preprocess.std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) uint8 to (B, dim) float32."""
        pixels = images.to(torch.float32, memory_format=self.memory_format)
        if self.scale != 1.0:
            pixels = pixels * self.scale
        embeddings = self.network((pixels - self.mean) / self.std)
        return cast(torch.Tensor, embeddings).flatten(1).to(torch.float32)


def load_encoder(spec: settings.EncoderSettings, device: torch.device, key: str = "encoders.*") -> EmbeddingModel:
    """Load an encoder, and check a forward pass against the config.

    Args:
        spec: the encoder's section of the config.
        device: where it runs.
        key: name of the section, for messages.

    Raises:
        ConfigError: the model, the layer or the function does not exist, or the width is not `dim`.
        DataError: the weights are missing or do not fit.
    """
    if spec.export is not None:
        network = from_export(spec.export)
    elif spec.torchvision is not None:
        network = from_torchvision(spec.torchvision)
    else:
        network = from_function(cast(str, spec.function), key)
    if not isinstance(network, torch.fx.GraphModule):  # an exported module is frozen already and refuses eval()
        network.eval()
    model = EmbeddingModel(network, spec).to(device)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    where = f"{key}: {spec.export or spec.function or (spec.torchvision.state_dict if spec.torchvision else None)}"
    _check_width(model, spec, device, where)
    _try_channels_last(model, spec, device, where)
    return model


def _try_channels_last(model: EmbeddingModel, spec: settings.EncoderSettings, device: torch.device, where: str) -> None:
    """Use channels-last memory, the fastest for convolutions, if the network gives the same embeddings.

    A network may need contiguous activations: `view` would raise, `as_strided` would read wrong numbers.
    """
    shape = (2, spec.preprocess.channels, *cast(tuple[int, int], spec.preprocess.image_size))
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.inference_mode():
        with _trying(spec, where):
            expected = model(images)
        model.memory_format = torch.channels_last
        try:
            model.to(memory_format=torch.channels_last)
            same = torch.allclose(model(images), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().mean()))
        except Exception:  # noqa: BLE001 - the user's network may raise anything; contiguous memory works
            same = False
    if not same:
        model.memory_format = torch.contiguous_format
        model.to(memory_format=torch.contiguous_format)


def _check_width(model: EmbeddingModel, spec: settings.EncoderSettings, device: torch.device, where: str) -> None:
    height, width = cast(tuple[int, int], spec.preprocess.image_size)
    blank = torch.zeros((2, spec.preprocess.channels, height, width), dtype=torch.uint8, device=device)
    with _trying(spec, where), torch.inference_mode():
        shapes = [tuple(model(blank[:batch]).shape) for batch in (1, 2)]  # an archive may accept one batch size only
    if shapes != [(1, spec.dim), (2, spec.dim)]:
        raise ConfigError(
            "the encoder's embedding has another width", expected=f"dim {spec.dim}", found=shapes[1][1:], where=where
        )


@contextmanager
def _trying(spec: settings.EncoderSettings, where: str) -> Iterator[None]:
    """Turn any error of the encoder into a ConfigError that names its inputs.

    Raises:
        ConfigError: the encoder raised an error; for a function, with the user's own lines.
    """
    preprocess = spec.preprocess
    height, width = cast(tuple[int, int], preprocess.image_size)
    shape = f"(B, {preprocess.channels}, {height}, {width})"
    low = min((0.0 - mean) / std for mean, std in _normalisation(preprocess))
    high = max((preprocess.pixel_range - mean) / std for mean, std in _normalisation(preprocess))
    where = f"{where}, which was given float32 pixels {shape} from {low:.3g} to {high:.3g}"
    with user_functions.own_code("the encoder's module failed", where) if spec.function else nullcontext():
        try:
            yield
        except Exception as error:  # an archive or a cut network may raise anything
            if spec.function:
                raise
            raise ConfigError(
                "the encoder does not accept images of the configured shape",
                expected=shape,
                found=first_line(error),
                where=where,
                remedy="set the encoder's preprocess to its input shape, and export it for any batch size",
            ) from error


def _normalisation(preprocess: settings.PreprocessSettings) -> list[tuple[float, float]]:
    """Mean and standard deviation of each channel; a single value holds for all channels."""
    count = max(len(preprocess.mean), len(preprocess.std))
    means, stds = (values * (count if len(values) == 1 else 1) for values in (preprocess.mean, preprocess.std))
    return list(zip(means, stds, strict=True))
