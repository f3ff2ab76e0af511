"""The torch device of the `device` setting."""

from __future__ import annotations

import torch

from pipeline.errors import ConfigError


def resolve_device(setting: str) -> torch.device:
    """The torch device of `auto`, `cpu`, `cuda` or `cuda:<index>` on this machine.

    Raises:
        ConfigError: the GPU does not exist.
    """
    available = torch.cuda.device_count()
    if setting == "auto":
        return torch.device("cuda" if available else "cpu")
    device = torch.device(setting)
    if device.type == "cuda" and (device.index or 0) >= available:
        raise ConfigError(
            "this machine has no such GPU",
            expected=setting,
            found=f"{available} GPU(s) that torch {torch.__version__} can use",
            where="device",
            remedy="set device to auto or cpu, or run where there is a GPU",
        )
    return device
