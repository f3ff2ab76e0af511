"""JPEGs as cameras make them, for benchmarks: random crops of the two photographs that scikit-learn ships."""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images


def photograph(number: int, width: int = 500, height: int = 375, quality: int = 90) -> bytes:
    """A JPEG, always the same for a number: about 60 KB at 500x375."""
    random = np.random.default_rng(number)
    source = _sources()[number % 2]
    scale = random.uniform(0.6, 1.0)
    size = int(source.height * 4 / 3 * scale), int(source.height * scale)
    left, top = (int(random.integers(0, most - least + 1)) for most, least in zip(source.size, size, strict=True))
    picture = source.crop((left, top, left + size[0], top + size[1])).resize((width, height), Image.Resampling.BICUBIC)
    if random.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    sink = io.BytesIO()
    picture.save(sink, "jpeg", quality=quality)
    return sink.getvalue()


@functools.cache
def _sources() -> list[Image.Image]:
    return [Image.fromarray(image) for image in load_sample_images().images]
