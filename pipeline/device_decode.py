"""Decode and resize JPEGs where the encoder runs: nvJPEG on a GPU, through torchvision.

Guarantee: a bad image becomes a reject, as in `images`; what is no JPEG of the wanted colours, or what the device's
decoder refuses, is decoded there. No GPU was at hand when this was written: tests hold the same calls on the CPU
to `images`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import numpy as np
import torch
from PIL import Image

from pipeline.config import Preprocess
from pipeline.images import Limits, Reject, check_shape, decode_image, open_image, resized_size

_AT_ONCE = 64  # JPEGs in one call of the decoder; they are of any size, and all of them are in memory


class DeviceDecoder:
    """Encoded images to pixels on a device."""

    def __init__(self, preprocess: Preprocess, limits: Limits, device: torch.device) -> None:
        from torchvision.io import ImageReadMode, decode_jpeg

        self._preprocess, self._limits, self._device = preprocess, limits, device
        self._colours, mode = ("RGB", ImageReadMode.RGB) if preprocess.channels == 3 else ("L", ImageReadMode.GRAY)
        self._decode_jpeg = partial(decode_jpeg, mode=mode, device=device)

    def decode(self, encoded: Sequence[bytes]) -> tuple[torch.Tensor, dict[int, Reject]]:
        """(B, C, H, W) uint8 on the device, zeros for rejects; and row -> why that image is rejected."""
        height, width = cast(tuple[int, int], self._preprocess.image_size)
        pixels = torch.zeros(
            (len(encoded), self._preprocess.channels, height, width), dtype=torch.uint8, device=self._device
        )
        rejects: dict[int, Reject] = {}
        for first in range(0, len(encoded), _AT_ONCE):
            rows = range(first, min(first + _AT_ONCE, len(encoded)))
            self._decode_some(encoded, rows, pixels, rejects)
        return pixels, rejects

    def _decode_some(
        self, encoded: Sequence[bytes], rows: range, pixels: torch.Tensor, rejects: dict[int, Reject]
    ) -> None:
        headers: dict[int, Image.Image] = {}
        for row in rows:
            try:
                image = open_image(encoded[row], self._limits)
                if image.format == "JPEG" and image.mode == self._colours:
                    headers[row] = image
                else:
                    pixels[row] = self._on_cpu(encoded[row])
            except Reject as reject:
                rejects[row] = reject
        for row, picture in self._pictures(encoded, list(headers)).items():
            try:
                if picture is None or picture.shape[1:] != (headers[row].height, headers[row].width):
                    pixels[row] = self._on_cpu(encoded[row])
                else:
                    pixels[row] = self._fitted(picture, resized_size(headers[row], self._preprocess, self._limits))
            except Reject as reject:
                rejects[row] = reject

    def _pictures(self, encoded: Sequence[bytes], rows: list[int]) -> dict[int, torch.Tensor | None]:
        """(C, H, W) uint8 of each row, all in one call; None for what the decoder refuses."""
        data = {row: torch.frombuffer(bytearray(encoded[row]), dtype=torch.uint8) for row in rows}
        if not data:
            return {}
        try:
            return dict(zip(data, self._decode_jpeg(list(data.values())), strict=True))
        except RuntimeError:  # of one that is damaged; which one it does not say
            return {row: self._picture(item) for row, item in data.items()}

    def _picture(self, data: torch.Tensor) -> torch.Tensor | None:
        try:
            return cast(torch.Tensor, self._decode_jpeg(data))
        except RuntimeError:
            return None

    def _fitted(self, picture: torch.Tensor, size: tuple[int, int] | None) -> torch.Tensor:
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional

        if size is not None:
            interpolation = InterpolationMode(self._preprocess.interpolation)
            picture = functional.resize(picture, list(size), interpolation, antialias=True)
        if self._preprocess.center_crop is not None:
            picture = functional.center_crop(picture, list(cast(tuple[int, int], self._preprocess.image_size)))
        check_shape(picture.shape[1:], self._preprocess)
        return picture

    def _on_cpu(self, data: bytes) -> torch.Tensor:
        return torch.from_numpy(np.array(decode_image(data, self._preprocess, self._limits)))
