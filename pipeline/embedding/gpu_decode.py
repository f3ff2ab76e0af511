"""Decode and resize JPEGs on the encoder's device: nvJPEG on a GPU, through torchvision. Never run on a GPU yet.

The CPU decodes other formats and colours, and JPEGs that the device refuses. A device that cannot decode even a good
JPEG is given none. A device that fails (out of memory, a CUDA error) ends the task.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from PIL import Image

from pipeline.config.tree import PreprocessSettings
from pipeline.embedding.decode import (
    Limits,
    check_resized,
    check_shape,
    decode_image,
    open_image,
    rejecting,
    resized_size,
)
from pipeline.embedding.fetch import Reject
from pipeline.embedding.orientation import Turn, read_turn

_AT_ONCE = 64  # most JPEGs in one call of the decoder
_PIXELS_AT_ONCE = 2**26  # most pixels in one call, unless it is one image: 200 MB of colours on the device
_DEVICE_FAILS = (torch.OutOfMemoryError, torch.AcceleratorError)  # whatever the image; both are RuntimeErrors

_LOG = logging.getLogger(__name__)


class DeviceDecoder:
    """Decodes images to pixels on a device; an actor makes one, which tests the device once."""

    def __init__(self, preprocess: PreprocessSettings, limits: Limits, device: torch.device) -> None:
        from torchvision.io import ImageReadMode, decode_jpeg

        self._preprocess, self._limits, self._device = preprocess, limits, device
        self._colours, mode = ("RGB", ImageReadMode.RGB) if preprocess.channels == 3 else ("L", ImageReadMode.GRAY)
        self._decode_jpeg = partial(decode_jpeg, mode=mode, device=device)
        self._takes_jpegs, self._refused = self._probe(), False

    def decode(self, encoded: Sequence[bytes]) -> tuple[torch.Tensor, dict[int, Reject]]:
        """(B, C, H, W) uint8 on the device, zeros for rejects; and row -> reject.

        Raises:
            torch.OutOfMemoryError, torch.AcceleratorError: the device fails, whatever the image.
        """
        shape = (len(encoded), self._preprocess.channels, *cast(tuple[int, int], self._preprocess.image_size))
        pixels = torch.zeros(shape, dtype=torch.uint8, device=self._device)
        rejects: dict[int, Reject] = {}
        headers: dict[int, _Header] = {}
        others, refused = list[int](), list[int]()  # rows for the CPU; those among them that the device refused
        for row, data in enumerate(encoded):
            try:
                header = self._header(data)
                if header is None:
                    others.append(row)
                else:
                    headers[row] = header
            except Reject as reject:
                rejects[row] = reject
        for rows in _together(headers):
            for row, picture in self._pictures(encoded, rows).items():
                if picture is None or picture.shape[1:] != headers[row].size:
                    others.append(row)
                    refused.append(row)
                    continue
                try:
                    pixels[row] = self._fitted(headers[row].turn.tensor(picture), headers[row].resized)
                except Reject as reject:
                    rejects[row] = reject
        on_cpu = self._on_cpu(encoded, others, rejects)
        if len(on_cpu):
            pixels[[row for row in others if row not in rejects]] = on_cpu.to(self._device, non_blocking=True)
        if not self._refused and not rejects.keys() >= set(refused):  # else the images are bad, not the device
            _LOG.warning("%s refused a JPEG that the CPU decodes; the CPU will decode such images", self._device)
            self._refused = True
        return pixels, rejects

    def _probe(self) -> bool:
        """Whether the device decodes a good JPEG: torchvision may lack nvJPEG, or the GPU may not support it."""
        sink = io.BytesIO()
        Image.new(self._colours, (16, 16)).save(sink, "jpeg")
        try:
            self._decode_jpeg(_tensor(sink.getvalue()))
        except _DEVICE_FAILS:
            raise
        except RuntimeError as error:
            _LOG.warning("%s cannot decode JPEGs, the CPU will: %s", self._device, str(error).partition("\n")[0])
            return False
        return True

    def _header(self, data: bytes) -> _Header | None:
        """None if the device's decoder does not take the image."""
        with rejecting():
            image = open_image(data, self._limits)
            if not self._takes_jpegs or image.format != "JPEG" or image.mode != self._colours:
                return None
            check_resized(image.size, self._preprocess, self._limits)
            size, turn = (image.height, image.width), read_turn(image, self._preprocess.exif)
            return _Header(size, turn, resized_size(turn.size(*size), self._preprocess))

    def _pictures(self, encoded: Sequence[bytes], rows: list[int]) -> dict[int, torch.Tensor | None]:
        """(C, H, W) uint8 of each row, all in one call; None for those that the decoder refuses."""
        data = [_tensor(encoded[row]) for row in rows]
        try:
            return dict(zip(rows, self._decode_jpeg(data), strict=True))
        except _DEVICE_FAILS:
            raise
        except RuntimeError:  # one of them is damaged; the error does not say which
            return {row: self._picture(item) for row, item in zip(rows, data, strict=True)}

    def _picture(self, data: torch.Tensor) -> torch.Tensor | None:
        try:
            return cast(torch.Tensor, self._decode_jpeg(data))
        except _DEVICE_FAILS:
            raise
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

    def _on_cpu(self, encoded: Sequence[bytes], rows: list[int], rejects: dict[int, Reject]) -> torch.Tensor:
        """(M, C, H, W) uint8 of the rows that are not rejects, for one copy to the device; adds the rejects."""
        shape = (len(rows), self._preprocess.channels, *cast(tuple[int, int], self._preprocess.image_size))
        host, count = torch.empty(shape, dtype=torch.uint8, pin_memory=self._device.type == "cuda"), 0
        for row in rows:
            try:
                host.numpy()[count] = decode_image(encoded[row], self._preprocess, self._limits)
                count += 1
            except Reject as reject:
                rejects[row] = reject
        return host[:count]


@dataclass(frozen=True, slots=True)
class _Header:
    """Height and width of a JPEG as stored, its turn, and its size after resizing, if it is resized."""

    size: tuple[int, int]
    turn: Turn
    resized: tuple[int, int] | None


def _together(headers: Mapping[int, _Header]) -> Iterator[list[int]]:
    rows, total = list[int](), 0
    for row, header in headers.items():
        height, width = header.size
        if rows and (len(rows) == _AT_ONCE or total + height * width > _PIXELS_AT_ONCE):
            yield rows
            rows, total = [], 0
        rows.append(row)
        total += height * width
    if rows:
        yield rows


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
