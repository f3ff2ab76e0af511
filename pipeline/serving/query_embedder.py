"""Embed the images of queries with the new encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.arrays import Float32
    from pipeline.config.tree import BackfillSettings, EncoderSettings


def embed_queries(
    encoder: EncoderSettings, settings: BackfillSettings, device: str, images: list[bytes], names: list[str]
) -> Float32:
    """The embeddings of encoded images, (N, d) float32; `names` identify the images in messages.

    Raises:
        DataError: an image cannot be embedded.
    """
    import numpy as np

    from pipeline.embedding.decode import Limits, decode_image
    from pipeline.embedding.embedder import Embedder
    from pipeline.embedding.fetch import Reject
    from pipeline.errors import DataError

    limits = Limits(settings.max_image_pixels, settings.max_image_bytes)
    pixels = []
    for data, name in zip(images, names, strict=False):
        try:
            pixels.append(decode_image(data or b"", encoder.preprocess, limits))
        except Reject as reject:
            raise DataError("a query image cannot be embedded", found=reject, where=name) from None
    return Embedder(encoder, device, settings.batch_size, settings.threads_per_actor).embed(np.stack(pixels))
