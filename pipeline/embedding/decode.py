"""Decode and preprocess the images of one unit, as `fetch` brings them.

Guarantee: a bad image becomes a reject with a stage and a reason, never an exception; rows keep the
order of the units file. It does not know which encoder the pixels are for, only their shape.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from pipeline.arrays import Int64
from pipeline.config.tree import Config, PreprocessSettings
from pipeline.embedding.fetch import WAITED, Place, Reject, fetch
from pipeline.embedding.orientation import read_turn
from pipeline.schema import UNITS, Unit
from pipeline.storage import objects, parquet
from pipeline.storage.settings import FetchSettings

Pixels = NDArray[np.uint8]
Picture = Pixels | Image.Image

# Others are rare, and some of their readers start programs (EPS: Ghostscript).
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM")
_JPEG_COLOURS = {"RGB": "RGB", "L": "GRAY"}
_BAND_PIXELS = 2**20  # converted at once: 4 MB
_BYTES_PER_PIXEL = 12  # that decoding an image takes at most, as measured: 7 of PNG, 9 of a progressive JPEG
_HEAVY = {"WEBP": 16, "AVIF": 16}  # these take more, so they may have fewer pixels


@dataclass(frozen=True, slots=True)
class Limits:
    """What an image may be at most, before it is decoded; guards against decompression bombs.

    Attributes:
        max_pixels: height times width.
        max_bytes: of the encoded image.
        root: a local folder whose links must not lead out of it; None: links are followed anywhere.
    """

    max_pixels: int
    max_bytes: int
    root: str | None = None


def image_limits(config: Config) -> Limits:
    """What the images of a run may be at most."""
    scheme, name = objects.split(config.data_root)
    root = name if scheme == "file" and not config.allow_outside else None
    return Limits(config.backfill.max_image_pixels, config.backfill.max_image_bytes, root)


@dataclass(frozen=True, slots=True)
class LoadedUnit:
    """The images of a unit, in the order of its units file.

    Attributes:
        ids: (B,) int64.
        pixels: (B, C, H, W) uint8; zeros for rejects. None where the embedding actor decodes.
        encoded: the images as they came, empty for rejects; None where they are decoded.
        etags: the etag of each image's object at the time it was read.
        rejects: row -> why that image is rejected.
        changed: images whose object is another one than when the manifest was made; those in containers are rejects.
        requests: what reading the images took of a store, or reads of files.
        bytes_fetched: what those requests brought.
        bytes_needed: the encoded images themselves.
        fetch_seconds: in which decoding waited for them.
    """

    ids: Int64
    pixels: Pixels | None
    encoded: list[bytes] | None
    etags: list[str | None]
    rejects: dict[int, Reject]
    changed: int
    requests: int
    bytes_fetched: int
    bytes_needed: int
    fetch_seconds: float


def load_unit(unit: Unit, preprocess: PreprocessSettings, limits: Limits, settings: FetchSettings) -> LoadedUnit:
    """Read, decode and preprocess a unit's images; or only read them, where the embedding actor decodes.

    Raises:
        DataError: the units file is missing or damaged, a store refuses the credentials, or a bucket is missing.
        TransientError: a store kept failing.
    """
    rows = parquet.read_parquet(unit.rows_uri, UNITS.names, [unit.row_group])
    places = [Place(**row) for row in rows.drop_columns(["id"]).to_pylist()]
    on_device, size = preprocess.decoder == "device", preprocess.image_size
    assert size is not None
    pixels = None if on_device else np.zeros((len(places), preprocess.channels, *size), dtype=np.uint8)
    encoded = [b""] * len(places) if on_device else None
    etags: list[str | None] = [None] * len(places)
    rejects: dict[int, Reject] = {}
    decode = decoder(preprocess, limits)
    before = objects.counts()
    for row, (data, etag) in enumerate(fetch(places, limits.max_bytes, settings, limits.root)):
        etags[row] = etag
        try:
            if isinstance(data, Reject):
                raise data
            if encoded is not None:
                encoded[row] = data
            elif pixels is not None:
                pixels[row] = decode(data)
        except Reject as reject:
            rejects[row] = reject
    spent = objects.counts() - before
    return LoadedUnit(
        rows["id"].to_numpy(),
        pixels,
        encoded,
        etags,
        rejects,
        changed=sum(place.is_whole and place.is_changed(etag) for place, etag in zip(places, etags, strict=True)),
        requests=sum(spent[f"requests:{kind}"] for kind in ("image", "get", "head")),
        bytes_fetched=spent["bytes:image"] + spent["bytes:get"],
        bytes_needed=spent["bytes:needed"],
        fetch_seconds=spent[WAITED] / 1e6,
    )


def decode_image(data: bytes, preprocess: PreprocessSettings, limits: Limits) -> Pixels:
    """One encoded image as (C, H, W) uint8.

    Raises:
        Reject: it is empty, not an image, truncated, too large, or of another shape than the encoder's.
    """
    return decoder(preprocess, limits)(data)


def decoder(preprocess: PreprocessSettings, limits: Limits) -> Callable[[bytes], Pixels]:
    """`decode_image` for many images: what depends on the settings alone is done once."""
    mode = "RGB" if preprocess.channels == 3 else "L"
    fit = _fit(preprocess)
    by_pillow = fit is not None and (preprocess.resample == "pillow" or preprocess.interpolation == "nearest")

    def upright(data: bytes) -> tuple[Picture, tuple[int, int] | None]:
        """A picture in full and what to resize it to; what Pillow holds besides is freed on return."""
        image = open_image(data, limits)
        check_resized(image.size, preprocess, limits)
        if image.format != "JPEG":
            _load(image)  # a PNG may say only at its end how it is turned
        turn = read_turn(image, preprocess.exif)
        resized = resized_size(turn.size(image.height, image.width), preprocess)
        if preprocess.reducing_gap is not None and resized is not None:
            height, width = turn.size(*(math.ceil(side * preprocess.reducing_gap) for side in resized))
            image.draft(None, (width, height))  # of formats other than JPEG it changes nothing
        if by_pillow:
            return turn.image(_converted(_eight_bits(image), mode)), resized
        return turn.array(_array(data, image, mode)), resized

    def decode(data: bytes) -> Pixels:
        with rejecting():
            picture, resized = upright(data)
            pixels = np.asarray(fit(picture, resized) if fit else picture)
        check_shape(pixels.shape[:2], preprocess)
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    return decode


@contextmanager
def rejecting() -> Iterator[None]:
    """Whatever one image's decoding raises is a reject of that image."""
    try:
        yield
    except Reject:
        raise
    except MemoryError:
        raise Reject("decode", "too large: there is not enough memory to decode it") from None
    # Damaged and hostile images make decoders raise anything (TypeError, struct.error, KeyError ...), and whatever it
    # is, the other images of the unit are good. An interrupt is no Exception, so it still ends the task.
    except Exception as error:  # noqa: BLE001
        raise Reject("decode", _reason(error)) from None


def _reason(error: Exception) -> str:
    """What a decoder says, in one line that can be stored as UTF-8."""
    text = " ".join(str(error).split()).encode("utf-8", "backslashreplace").decode()[:200]
    said = f"{type(error).__name__} {text}" if isinstance(error, LookupError | TypeError) or not text else text
    return f"{'truncated' if 'truncated' in said else 'damaged'}: {said}"


def _array(data: bytes, image: Image.Image, mode: str) -> Pixels:
    """(H, W) or (H, W, C): what Pillow gives, which has read a JPEG's header; of most JPEGs without its overhead."""
    if image.format == "JPEG" and image.mode == mode:
        # Ours, so that no header which Pillow reads otherwise makes it larger than the limits allow.
        pixels = np.empty((image.height, image.width, len(mode)), dtype=np.uint8)
        least = {"min_height": image.height, "min_width": image.width}  # less than all of it after draft()
        with suppress(ValueError):  # damaged, perhaps only a little: Pillow decides, and says why
            found: Pixels = simplejpeg.decode_jpeg(data, _JPEG_COLOURS[mode], buffer=pixels, **least)
            if found.shape == pixels.shape:
                return found
    return _in_bands(_eight_bits(image), mode)


def _in_bands(image: Image.Image, mode: str) -> Pixels:
    """(H, W) or (H, W, C), converted some rows at a time: no second whole picture is in memory."""
    image.load()
    width, height = image.size
    rows = max(1, _BAND_PIXELS // max(1, width))
    if rows >= height:
        return np.array(_converted(image, mode))
    pixels = np.empty((height, width, 3) if mode == "RGB" else (height, width), dtype=np.uint8)
    for top in range(0, height, rows):
        bottom = min(height, top + rows)
        pixels[top:bottom] = np.asarray(_converted(image.crop((0, top, width, bottom)), mode))
    return pixels


def _load(image: Image.Image) -> None:
    """Decode it, the first picture alone if there are several."""
    _check_depth(image)
    image.load()


def _converted(image: Image.Image, mode: str) -> Image.Image:
    """A picture in the colours that the encoder takes; transparency is dropped, as `convert` does it."""
    image.load()
    return image if image.mode == mode else image.convert(mode)


def _check_depth(image: Image.Image) -> None:
    if image.mode in ("I", "F"):
        raise Reject("decode", f"not 8 or 16 bits a channel: mode {image.mode}")


def _eight_bits(image: Image.Image) -> Image.Image:
    """A picture of 8 bits a channel: of 16-bit grey the upper half, as Pillow reads 16-bit colours."""
    _check_depth(image)
    if image.mode.startswith("I;16"):  # convert() would clip it, and nearly all of it would be white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image


def check_resized(size: tuple[int, int], preprocess: PreprocessSettings, limits: Limits) -> None:
    """Refuse a picture, (width, height), so long and thin that resizing would make it too large.

    Raises:
        Reject: it is.
    """
    longer, shorter = max(size), max(1, min(size))
    if isinstance(preprocess.resize, int) and preprocess.resize**2 * longer // shorter > limits.max_pixels:
        raise Reject("preprocess", f"too large when resized: {size[0]}x{size[1]}")


def resized_size(size: tuple[int, int], preprocess: PreprocessSettings) -> tuple[int, int] | None:
    """(height, width) of a picture after `resize`, as torchvision computes it; None where there is no resizing."""
    if not isinstance(preprocess.resize, int):
        return preprocess.resize
    side = int(preprocess.resize * max(size) / max(1, min(size)))
    return (preprocess.resize, side) if size[0] <= size[1] else (side, preprocess.resize)


def _fit(preprocess: PreprocessSettings) -> Callable[[Picture, tuple[int, int] | None], Picture] | None:
    """Resize and crop a picture in the arithmetic of what it is: Pillow's or torch's.

    torch resizes bytes in whole numbers: the same pixels on every processor. torchvision does it in floats on a
    processor without AVX2: other pixels, and 12 bytes more per pixel.
    """
    if preprocess.resize is None and preprocess.center_crop is None:
        return None
    import torch  # here: they take seconds, and not everybody resizes
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional

    interpolation = InterpolationMode(preprocess.interpolation)
    crop = preprocess.center_crop

    def tensor(array: Pixels) -> torch.Tensor:
        return torch.from_numpy(array if array.flags.writeable else array.copy()).permute(2, 0, 1)

    def resize(item: Image.Image | torch.Tensor, size: list[int]) -> Image.Image | torch.Tensor:
        if isinstance(item, Image.Image):
            picture: Image.Image = functional.resize(item, size, interpolation)
            return picture
        if list(item.shape[1:]) == size:
            return item
        batch: torch.Tensor = torch.nn.functional.interpolate(
            item[None], size=size, mode=interpolation.value, antialias=True
        )
        return batch[0]

    def fit(picture: Picture, resized: tuple[int, int] | None) -> Picture:
        item = picture if isinstance(picture, Image.Image) else tensor(np.atleast_3d(picture))
        if resized is not None:
            item = resize(item, list(resized))
        if crop is not None:
            item = functional.center_crop(item, [crop, crop] if isinstance(crop, int) else list(crop))
        return item if isinstance(item, Image.Image) else item.permute(1, 2, 0).numpy()

    return fit


def open_image(data: bytes, limits: Limits) -> Image.Image:
    """An image of which only the header is read; inside `rejecting`, for damage makes Pillow raise anything.

    Raises:
        Reject: it is empty, not an image, or has more pixels than the limits allow.
    """
    if not data:
        raise Reject("decode", "empty")
    most = limits.max_pixels
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError:
        most = min(most, 2 * (Image.MAX_IMAGE_PIXELS or most))
        raise Reject("decode", f"too large: more than {most} pixels") from None
    except UnidentifiedImageError:
        raise Reject("decode", "not an image") from None
    if (heavy := _HEAVY.get(image.format or "")) is not None:
        most = most * _BYTES_PER_PIXEL // heavy
    if image.width * image.height > most:
        kind = "" if heavy is None else f" of {image.format}"
        raise Reject("decode", f"too large: {image.width}x{image.height}, at most {most} pixels{kind}")
    return image


def check_shape(shape: Sequence[int], preprocess: PreprocessSettings) -> None:
    """Refuse a picture that is not (height, width) as the encoder takes it, once it is resized and cropped.

    Raises:
        Reject: it is of another shape.
    """
    if tuple(shape) != preprocess.image_size:
        raise Reject("preprocess", f"wrong shape: {shape[0]}x{shape[1]}, expected {_text(preprocess.image_size)}")


def _text(shape: tuple[int, int] | None) -> str:
    return "any" if shape is None else f"{shape[0]}x{shape[1]}"
