"""Decoding by the embedding actor: the pixels and the rejects of `images`, here on the CPU."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.photographs import photograph
from pipeline.config.tree import PreprocessSettings
from pipeline.embedding import gpu_decode
from pipeline.embedding.decode import Limits, Pixels, decode_image
from pipeline.embedding.fetch import Reject
from pipeline.embedding.gpu_decode import DeviceDecoder
from tests.support.galleries import digits

LIMITS = Limits(max_pixels=1_000_000, max_bytes=10_000_000)
SIZED = PreprocessSettings(resize=96, center_crop=80, decoder="device")


def decode(images: list[bytes], preprocess: PreprocessSettings = SIZED) -> tuple[Pixels, dict[int, Reject]]:
    pixels, rejects = DeviceDecoder(preprocess, LIMITS, torch.device("cpu")).decode(images)
    return pixels.numpy(), rejects


def outcome(data: bytes) -> Pixels | Reject:
    """What `images` makes of it."""
    try:
        return decode_image(data, SIZED, LIMITS)
    except Reject as reject:
        return reject


def saved(image: Image.Image, form: str = "jpeg") -> bytes:
    sink = io.BytesIO()
    image.save(sink, form)
    return sink.getvalue()


@pytest.mark.parametrize("channels", [1, 3])
def test_gpu_decode_of_jpegs_gives_the_pixels_of_decode(channels: int) -> None:
    preprocess = SIZED.model_copy(update={"channels": channels})
    images = [photograph(number, width, height) for number, (width, height) in enumerate([(200, 150), (130, 300)])]
    images += [saved(Image.open(io.BytesIO(images[0])).convert("L"))]
    pixels, rejects = decode(images, preprocess)
    assert not rejects
    for found, data in zip(pixels, images, strict=True):
        expected = decode_image(data, preprocess, LIMITS)
        assert np.abs(found.astype(int) - expected).max() <= 2


def test_gpu_decode_of_other_formats_gives_the_pixels_of_decode() -> None:
    preprocess = PreprocessSettings(channels=1, size=8, decoder="device")
    images = digits(5)[0]
    pixels, rejects = decode(images, preprocess)
    assert not rejects
    np.testing.assert_array_equal(pixels, [decode_image(data, preprocess, LIMITS) for data in images])


def test_gpu_decode_of_bad_images_rejects_as_decode_and_keeps_the_others() -> None:
    good = photograph(1, 200, 150)
    bad = [b"", b"nothing", good[:2000], photograph(2, 1200, 900), good[:300] + bytes(50) + good[350:]]
    images = [good, *bad, good]
    pixels, rejects = decode(images)
    for row, expected in enumerate(map(outcome, images)):
        if isinstance(expected, Reject):
            assert str(rejects[row]) == str(expected)
            assert not pixels[row].any()
        else:
            assert row not in rejects
            assert np.abs(pixels[row].astype(int) - expected).max() <= 2
    assert {1, 2, 3, 4} <= rejects.keys()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_gpu_decode_of_a_turned_jpeg_gives_the_pixels_of_decode(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    sink = io.BytesIO()
    Image.open(io.BytesIO(photograph(1, 200, 150))).save(sink, "jpeg", exif=exif)
    pixels, rejects = decode([sink.getvalue()])
    assert not rejects
    assert np.abs(pixels[0].astype(int) - decode_image(sink.getvalue(), SIZED, LIMITS)).max() <= 2


def test_decode_image_that_makes_pillow_raise_is_a_reject() -> None:
    data = bytearray(saved(Image.new("RGB", (8, 8)), "tiff"))
    data[data.index(b"\x11\x01\x04\x00") + 2] = 5  # the type of the pixels' place: a RATIONAL
    good = photograph(1, 200, 150)
    pixels, rejects = decode([bytes(data), good])
    assert rejects.keys() == {0}
    assert pixels[1].any()


def test_another_shape_than_the_encoders_is_rejected() -> None:
    _, rejects = decode([photograph(1, 200, 150)], PreprocessSettings(size=80, decoder="device"))
    assert str(rejects[0]) == "preprocess: wrong shape: 150x200, expected 80x80"


def test_more_images_than_one_call_takes_keep_their_rows() -> None:
    images = [photograph(number % 3, 100, 100) for number in range(70)]
    pixels, rejects = decode(images)
    assert not rejects
    for row in range(70):
        np.testing.assert_array_equal(pixels[row], pixels[row % 3])


def test_large_pictures_are_decoded_in_smaller_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_decode, "_PIXELS_AT_ONCE", 45_000)
    decoder = DeviceDecoder(SIZED, LIMITS, torch.device("cpu"))
    calls, decode_jpeg = [], decoder._decode_jpeg

    def counted(data: list[torch.Tensor]) -> list[torch.Tensor]:
        calls.append(len(data))
        return decode_jpeg(data)

    monkeypatch.setattr(decoder, "_decode_jpeg", counted)
    images = [photograph(number, *size) for number, size in enumerate([(200, 100), (100, 200), (300, 200), (100, 100)])]
    pixels, rejects = decoder.decode(images)
    assert calls == [2, 1, 1]
    assert not rejects
    np.testing.assert_array_equal(pixels, decode(images)[0])


def failing(error: Exception) -> Callable[..., torch.Tensor]:
    """Stands for a device that is not here: what torchvision raises on one without nvJPEG, or without memory."""

    def decode_jpeg(*args: object, **kwargs: object) -> torch.Tensor:
        raise error

    return decode_jpeg


def test_a_device_that_decodes_no_jpeg_is_tried_once_and_the_cpu_decodes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("torchvision.io.decode_jpeg", failing(RuntimeError("not compiled with nvJPEG")))
    with caplog.at_level(logging.WARNING):
        decoder = DeviceDecoder(SIZED, LIMITS, torch.device("cpu"))
        pixels = [decoder.decode([photograph(1, 200, 150)])[0] for _ in range(2)]
    assert [record.getMessage() for record in caplog.records] == [
        "cpu cannot decode JPEGs, the CPU will: not compiled with nvJPEG"
    ]
    for found in pixels:
        np.testing.assert_array_equal(found[0], decode_image(photograph(1, 200, 150), SIZED, LIMITS))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), torch.AcceleratorError("CUDA error")])
def test_a_device_that_fails_is_not_taken_for_a_damaged_image(
    monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    decoder = DeviceDecoder(SIZED, LIMITS, torch.device("cpu"))
    monkeypatch.setattr(decoder, "_decode_jpeg", failing(error))
    with pytest.raises(type(error)):
        decoder.decode([photograph(1, 200, 150)])


def test_an_image_that_only_the_device_refuses_is_decoded_on_the_cpu_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    decoder = DeviceDecoder(SIZED, LIMITS, torch.device("cpu"))
    monkeypatch.setattr(decoder, "_decode_jpeg", failing(RuntimeError("not supported")))
    with caplog.at_level(logging.WARNING):
        pixels, rejects = decoder.decode([photograph(1, 200, 150)] * 2)
    assert not rejects
    assert pixels.any(dim=(1, 2, 3)).all()
    assert len(caplog.records) == 1
