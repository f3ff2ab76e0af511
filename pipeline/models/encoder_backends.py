"""Loads an encoder's network from an export, a torchvision architecture, or the user's own function."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import nn

from pipeline.config import tree as settings
from pipeline.config import user_functions
from pipeline.errors import ConfigError, DataError
from pipeline.models import export_archive
from pipeline.storage import objects

_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_UNREADABLE = (RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile)


def load_tensors(uri: str) -> dict[str, torch.Tensor]:
    """The named tensors of a safetensors file, or of a torch checkpoint read with weights_only.

    Raises:
        DataError: the file is missing, or neither.
    """
    try:
        if uri.endswith(".safetensors"):
            return load_safetensors(objects.read_bytes(uri))
        with objects.open_input(uri) as file:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise DataError("a weights file is missing", where=uri) from error
    except (SafetensorError, *_UNREADABLE) as error:
        raise DataError("a weights file cannot be read", found=first_line(error), where=uri) from error
    if not isinstance(tensors, dict):
        raise DataError("not a state dict", expected="names and tensors", found=type(tensors).__name__, where=uri)
    return cast(dict[str, torch.Tensor], tensors)


def from_export(uri: str) -> nn.Module:
    """The network of a `torch.export` archive.

    Raises:
        DataError: the file is missing, damaged, or holds code.
    """
    try:
        with objects.local_file(uri) as copy, _without_code(copy) as path:
            return torch.export.load(path).module()
    except FileNotFoundError as error:
        raise DataError("the encoder's file is missing", where=uri) from error
    except (AssertionError, RecursionError, *_UNREADABLE) as error:
        raise DataError(
            "the encoder is not a readable torch.export archive",
            found=first_line(error),
            where=uri,
            remedy="export it again, from a source that you trust; SECURITY.md says what an archive may contain",
        ) from error


@contextmanager
def _without_code(path: Path) -> Iterator[Path]:
    """Check an archive, and force weights_only: otherwise torch.export.load unpickles anything (torch 2.14)."""
    if not zipfile.is_zipfile(path):
        raise zipfile.BadZipFile("not a zip file")
    export_archive.check(path)
    before = os.environ.get(_WEIGHTS_ONLY)
    os.environ[_WEIGHTS_ONLY] = "1"
    try:
        yield path
    finally:
        if before is None:
            del os.environ[_WEIGHTS_ONLY]
        else:
            os.environ[_WEIGHTS_ONLY] = before


def first_line(error: Exception) -> str:
    """The first line of a loader's message."""
    if isinstance(error, pickle.UnpicklingError):  # torch's own message advises to load it anyway
        return "a damaged pickle, or one with more than tensors"
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def from_torchvision(spec: settings.TorchvisionSettings) -> nn.Module:
    """A torchvision architecture with its weights, perhaps cut at a layer.

    Raises:
        ConfigError: there is no such model or layer.
        DataError: the weights are missing, damaged, or of another model.
    """
    import torchvision  # here: it takes seconds, and an exported encoder does not need it
    from torchvision.models.feature_extraction import create_feature_extractor

    try:
        model = torchvision.models.get_model(spec.model, weights=None)
    except ValueError as error:
        raise ConfigError(
            "torchvision has no such model", found=spec.model, where="encoders.*.torchvision.model"
        ) from error
    if spec.cut_at is not None:
        try:
            model = create_feature_extractor(model.eval(), {spec.cut_at: "embedding"})
        except ValueError as error:
            raise ConfigError(
                "the model has no such layer to cut at", found=spec.cut_at, where=spec.model, remedy=str(error)
            ) from error
    tensors = load_tensors(spec.state_dict)
    wanted = model.state_dict()
    wrong = [name for name, value in wanted.items() if name not in tensors or tensors[name].shape != value.shape]
    extra = [name for name in tensors if name not in wanted] if spec.cut_at is None else []
    if wrong or extra:
        raise DataError(
            f"the weights do not fit {spec.model}",
            expected=f"a tensor of the right shape for each of {len(wanted)} names",
            found=f"missing or misshapen: {wrong[:5]}, unknown: {extra[:5]}",
            where=spec.state_dict,
        )
    model.load_state_dict({name: tensors[name] for name in wanted})
    return _Cut(model) if spec.cut_at is not None else model


class _Cut(nn.Module):
    """A feature extractor's one output."""

    def __init__(self, extractor: nn.Module) -> None:
        super().__init__()
        self.extractor = extractor

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.extractor(pixels)["embedding"])


def from_function(name: str, key: str) -> nn.Module:
    """The torch module that the user's function returns.

    Raises:
        ConfigError: it returns something else.
    """
    where = f"{key}.function: {name}"
    function = user_functions.load_function(name, "the encoder", where)
    with user_functions.own_code("the encoder's function failed", where):
        network = function()
    if not isinstance(network, nn.Module):
        raise ConfigError("the encoder's function must return a torch module", found=type(network), where=where)
    return network
