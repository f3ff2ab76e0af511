"""Decode and resize JPEGs where the encoder runs: nvJPEG on a GPU, through torchvision.

Guarantee: a bad image becomes a reject, as in `images`; what is no JPEG of the wanted colours, or what the device's
decoder refuses, is decoded there. A device that cannot even decode a good JPEG is not asked for others, and the log
says so; one that fails (out of memory, an error of CUDA) ends the task. No GPU was at hand when this was written: tests
hold the same calls on the CPU to `images`.
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

_AT_ONCE = 64  # JPEGs in one call of the decoder, at most,
_PIXELS_AT_ONCE = 2**26  # and of so many pixels in all, or one: 200 MB of colours on the device
_DEVICE_FAILS = (torch.OutOfMemoryError, torch.AcceleratorError)  # whatever the image; both are RuntimeErrors

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Header:
    """Height and width of a JPEG as it lies in the file, what turns it upright, and what it is resized to, if it is."""

    size: tuple[int, int]
    turn: Turn
    resized: tuple[int, int] | None


class DeviceDecoder:
    """Encoded images to pixels on a device; one is made per actor, and tries the device once."""

    def __init__(self, preprocess: PreprocessSettings, limits: Limits, device: torch.device) -> None:
        from torchvision.io import ImageReadMode, decode_jpeg

        self._preprocess, self._limits, self._device = preprocess, limits, device
        self._colours, mode = ("RGB", ImageReadMode.RGB) if preprocess.channels == 3 else ("L", ImageReadMode.GRAY)
        self._decode_jpeg = partial(decode_jpeg, mode=mode, device=device)
        self._takes_jpegs, self._refused = self._probe(), False

    def decode(self, encoded: Sequence[bytes]) -> tuple[torch.Tensor, dict[int, Reject]]:
        """(B, C, H, W) uint8 on the device, zeros for rejects; and row -> why that image is rejected.

        Raises:
            torch.OutOfMemoryError, torch.AcceleratorError: the device fails, whatever the image.
        """
        shape = (len(encoded), self._preprocess.channels, *cast(tuple[int, int], self._preprocess.image_size))
        pixels = torch.zeros(shape, dtype=torch.uint8, device=self._device)
        rejects: dict[int, Reject] = {}
        headers: dict[int, _Header] = {}
        others, refused = list[int](), list[int]()  # what the CPU decodes; because the device does not
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
        if not self._refused and not rejects.keys() >= set(refused):  # else it was the images, not the device
            _LOG.warning("%s refused a JPEG that the CPU decodes; such ones are decoded there", self._device)
            self._refused = True
        return pixels, rejects

    def _probe(self) -> bool:
        """Whether the device decodes a good JPEG: torchvision may lack nvJPEG, or the GPU what that needs."""
        sink = io.BytesIO()
        Image.new(self._colours, (16, 16)).save(sink, "jpeg")
        try:
            self._decode_jpeg(_tensor(sink.getvalue()))
        except _DEVICE_FAILS:
            raise
        except RuntimeError as error:
            _LOG.warning("%s decodes no JPEGs, the CPU does it all: %s", self._device, str(error).partition("\n")[0])
            return False
        return True

    def _header(self, data: bytes) -> _Header | None:
        """None where the image is not for the device's decoder."""
        with rejecting():
            image = open_image(data, self._limits)
            if not self._takes_jpegs or image.format != "JPEG" or image.mode != self._colours:
                return None
            check_resized(image.size, self._preprocess, self._limits)
            size, turn = (image.height, image.width), read_turn(image, self._preprocess.exif)
            return _Header(size, turn, resized_size(turn.size(*size), self._preprocess))

    def _pictures(self, encoded: Sequence[bytes], rows: list[int]) -> dict[int, torch.Tensor | None]:
        """(C, H, W) uint8 of each row, all in one call; None for what the decoder refuses."""
        data = [_tensor(encoded[row]) for row in rows]
        try:
            return dict(zip(rows, self._decode_jpeg(data), strict=True))
        except _DEVICE_FAILS:
            raise
        except RuntimeError:  # of one that is damaged; which one it does not say
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
        """(M, C, H, W) uint8 of those rows that are no rejects, for one copy to the device; adds the rejects."""
        shape = (len(rows), self._preprocess.channels, *cast(tuple[int, int], self._preprocess.image_size))
        host, count = torch.empty(shape, dtype=torch.uint8, pin_memory=self._device.type == "cuda"), 0
        for row in rows:
            try:
                host.numpy()[count] = decode_image(encoded[row], self._preprocess, self._limits)
                count += 1
            except Reject as reject:
                rejects[row] = reject
        return host[:count]


def _together(headers: Mapping[int, _Header]) -> Iterator[list[int]]:
    """The rows of one call each: all pictures of a call are in memory at once, in full."""
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
