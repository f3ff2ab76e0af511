"""Turning pictures upright: as Pillow's own exif_transpose, for Pillow's pictures, arrays and tensors."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

from pipeline.embedding.orientation import read_turn

ORIENTATIONS = range(1, 9)


def turned(kind: str, orientation: Any, mode: str = "RGB", **options: Any) -> bytes:
    """An image of 6 by 9 random pixels whose EXIF data has this orientation."""
    shape = (6, 9, 3) if mode == "RGB" else (6, 9)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, kind, exif=exif, **options)
    return sink.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_read_turn_each_orientation_turns_picture_array_and_tensor_as_pillow(kind: str, orientation: int) -> None:
    image = Image.open(io.BytesIO(turned(kind, orientation)))
    image.load()
    pixels, wanted = np.array(image), np.array(ImageOps.exif_transpose(image))
    turn = read_turn(image, "apply")
    assert turn.size(*pixels.shape[:2]) == wanted.shape[:2]
    assert turn.size(*wanted.shape[:2]) == pixels.shape[:2]
    assert np.array_equal(np.asarray(turn.image(image)), wanted)
    assert np.array_equal(turn.array(pixels), wanted)
    assert np.array_equal(turn.array(pixels[..., 0]), wanted[..., 0])
    assert np.array_equal(turn.tensor(torch.from_numpy(pixels).permute(2, 0, 1)).permute(1, 2, 0).numpy(), wanted)


@pytest.mark.parametrize("orientation", [0, 9, 2**16 - 1])
def test_read_turn_orientation_that_is_none_counts_as_upright(orientation: int) -> None:
    image = Image.open(io.BytesIO(turned("JPEG", orientation)))
    assert read_turn(image, "apply").method is None


def test_read_turn_exif_ignored_is_upright() -> None:
    image = Image.open(io.BytesIO(turned("JPEG", 6)))
    assert read_turn(image, "ignore").method is None


def test_read_turn_damaged_exif_counts_as_upright() -> None:
    image = Image.open(io.BytesIO(turned("WEBP", 6).replace(b"MM\0*", b"XX\0*")))
    with pytest.raises(SyntaxError):
        image.getexif()
    assert read_turn(image, "apply").method is None
