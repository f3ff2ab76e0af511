"""Whole paths from encoded bytes to the encoder's input by other libraries, for `benchmarks.decode`.

Each is what one would write with that library alone; those that are not installed are left out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import numpy as np
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from pipeline.config.tree import PreprocessSettings
from pipeline.embedding.decode import Pixels

Decode = Callable[[bytes], Pixels]


def whole_paths(preprocess: PreprocessSettings) -> dict[str, Decode]:
    """By name, of the libraries that are installed."""
    makers = {
        "torchvision.io": ("torchvision", by_torchvision),
        "torchcodec": ("torchcodec", by_torchcodec),
        "imagecodecs, torch": ("imagecodecs", by_imagecodecs),
        "OpenCV, torch": ("cv2", by_opencv),
        "OpenCV alone (INTER_AREA)": ("cv2", by_opencv_alone),
        "libvips (thumbnail)": ("pyvips", by_libvips),
    }
    return {
        name: make(preprocess)
        for name, (module, make) in makers.items()
        if importlib.util.find_spec(module) and (preprocess.resize is not None or "(" not in name)
    }


def resized(preprocess: PreprocessSettings) -> Callable[[torch.Tensor], torch.Tensor]:
    """torchvision's resize and crop of a tensor (C, H, W)."""
    interpolation = InterpolationMode(preprocess.interpolation)

    def resize(picture: torch.Tensor) -> torch.Tensor:
        if preprocess.resize is not None:
            size = [preprocess.resize] if isinstance(preprocess.resize, int) else list(preprocess.resize)
            picture = functional.resize(picture, size, interpolation, antialias=True)
        if isinstance(preprocess.center_crop, int):
            picture = functional.center_crop(picture, [preprocess.center_crop] * 2)
        return picture

    return resize


def by_arrays(decode: Callable[[bytes], Pixels], preprocess: PreprocessSettings) -> Decode:
    """From (H, W, C) arrays."""
    resize = resized(preprocess)
    return lambda data: resize(torch.from_numpy(decode(data)).permute(2, 0, 1)).numpy()


def by_torchvision(preprocess: PreprocessSettings) -> Decode:
    import warnings

    from torchvision.io import ImageReadMode, decode_image

    warnings.filterwarnings("ignore", module="torchvision")  # it is deprecated, which the result says
    mode, resize = ImageReadMode.RGB if preprocess.channels == 3 else ImageReadMode.GRAY, resized(preprocess)
    return lambda data: resize(decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode)).numpy()


def by_torchcodec(preprocess: PreprocessSettings) -> Decode:
    from torchcodec.decoders import ImageReadMode, decode_image

    mode, resize = ImageReadMode.RGB if preprocess.channels == 3 else ImageReadMode.GRAY, resized(preprocess)
    return lambda data: resize(decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=mode)).numpy()


def by_imagecodecs(preprocess: PreprocessSettings) -> Decode:
    import imagecodecs

    def decode(data: bytes) -> Pixels:
        pixels: Pixels = np.atleast_3d(
            imagecodecs.jpeg8_decode(data) if data[:1] == b"\xff" else imagecodecs.png_decode(data)
        )
        return pixels

    return by_arrays(decode, preprocess)


def opencv_array(preprocess: PreprocessSettings) -> Callable[[bytes], Pixels]:
    import cv2

    cv2.setNumThreads(1)
    flag = cv2.IMREAD_COLOR_RGB if preprocess.channels == 3 else cv2.IMREAD_GRAYSCALE
    return lambda data: np.atleast_3d(cv2.imdecode(np.frombuffer(data, np.uint8), flag))


def by_opencv(preprocess: PreprocessSettings) -> Decode:
    return by_arrays(opencv_array(preprocess), preprocess)


def by_opencv_alone(preprocess: PreprocessSettings) -> Decode:
    import cv2

    decode = opencv_array(preprocess)
    side, crop = preprocess.resize, preprocess.center_crop
    assert isinstance(side, int)
    assert isinstance(crop, int)

    def whole(data: bytes) -> Pixels:
        array: Pixels = decode(data)
        height, width = array.shape[:2]
        scale = side / min(height, width)
        size = (int(width * scale), int(height * scale))
        array = cv2.resize(array, size, interpolation=cv2.INTER_AREA)
        top, left = round((size[1] - crop) / 2), round((size[0] - crop) / 2)
        return array[top : top + crop, left : left + crop].transpose(2, 0, 1)

    return whole


def by_libvips(preprocess: PreprocessSettings) -> Decode:
    import pyvips

    pyvips.cache_set_max(0)
    side, crop = preprocess.resize, preprocess.center_crop
    assert isinstance(side, int)
    assert isinstance(crop, int)

    def whole(data: bytes) -> Pixels:
        array: Pixels = pyvips.Image.thumbnail_buffer(data, 10**7, height=side).numpy()  # landscape pictures only
        top, left = round((array.shape[0] - crop) / 2), round((array.shape[1] - crop) / 2)
        return array[top : top + crop, left : left + crop].transpose(2, 0, 1)

    return whole
