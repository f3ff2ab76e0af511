"""Decode and preprocess the images of a unit; a bad image becomes a reject with a stage and a reason."""

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
from pipeline.config.tree import BackfillSettings, PreprocessSettings
from pipeline.embedding.fetch import WAITED, Place, Reject, fetch
from pipeline.embedding.orientation import read_turn
from pipeline.schema import UNITS, Unit
from pipeline.storage import objects, parquet
from pipeline.storage.settings import FetchSettings

Pixels = NDArray[np.uint8]
Picture = Pixels | Image.Image

# Other formats are rare, and some of their readers start programs (EPS: Ghostscript).
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM")
_JPEG_COLOURS = {"RGB": "RGB", "L": "GRAY"}
_BAND_PIXELS = 2**20  # converted at once: 4 MB
_BYTES_PER_PIXEL = 12  # peak of decoding; measured: PNG 7, progressive JPEG 9
_HEAVY = {"WEBP": 16, "AVIF": 16}  # bytes per pixel of formats that take more; they may have fewer pixels


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits that are checked before an image is decoded; they guard against decompression bombs."""

    max_pixels: int  # height times width
    max_bytes: int  # of the encoded image
    # A local folder; links must not lead out of it. None: links may lead anywhere.
    root: str | None = None


@dataclass(frozen=True, slots=True)
class LoadedUnit:
    """The images of a unit, in the order of its units file."""

    ids: Int64  # (B,)
    pixels: Pixels | None  # (B, C, H, W) uint8, zeros for rejects; None if the embedding actor decodes
    encoded: list[bytes] | None  # the encoded images, empty for rejects; None if they are decoded here
    etags: list[str | None]  # of each image's object when it was read
    rejects: dict[int, Reject]  # row -> reject
    changed: int  # images whose object changed after the manifest was made; those in containers are rejects
    requests: int  # to a store, or reads of files
    bytes_fetched: int  # by these requests
    bytes_needed: int  # size of the encoded images
    fetch_seconds: float  # in which decoding waited for images


def image_limits(backfill: BackfillSettings, data_root: str, allow_outside: bool) -> Limits:
    """The limits for the images of a run."""
    scheme, name = objects.split(data_root)
    root = name if scheme == "file" and not allow_outside else None
    return Limits(backfill.max_image_pixels, backfill.max_image_bytes, root)


def load_unit(unit: Unit, preprocess: PreprocessSettings, limits: Limits, settings: FetchSettings) -> LoadedUnit:
    """Read, decode and preprocess the images of a unit; with `decoder: device` only read them.

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
    """Decode one image to (C, H, W) uint8.

    Raises:
        Reject: it is empty, not an image, truncated, too large, or of another shape than the encoder's.
    """
    return decoder(preprocess, limits)(data)


def decoder(preprocess: PreprocessSettings, limits: Limits) -> Callable[[bytes], Pixels]:
    """Make `decode_image` for many images; work that depends on the settings alone is done once."""
    mode = "RGB" if preprocess.channels == 3 else "L"
    fit = _fit(preprocess)
    by_pillow = fit is not None and (preprocess.resample == "pillow" or preprocess.interpolation == "nearest")

    def upright(data: bytes) -> tuple[Picture, tuple[int, int] | None]:
        """A decoded upright picture, and the size to resize it to; Pillow's own copy is freed on return."""
        image = open_image(data, limits)
        check_resized(image.size, preprocess, limits)
        if image.format != "JPEG":
            _load(image)  # a PNG may carry its orientation at its end
        turn = read_turn(image, preprocess.exif)
        resized = resized_size(turn.size(image.height, image.width), preprocess)
        if preprocess.reducing_gap is not None and resized is not None:
            height, width = turn.size(*(math.ceil(side * preprocess.reducing_gap) for side in resized))
            image.draft(None, (width, height))  # affects JPEG alone
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
    """Turn any exception of decoding one image into a reject of that image."""
    try:
        yield
    except Reject:
        raise
    except MemoryError:
        raise Reject("decode", "too large: there is not enough memory to decode it") from None
    # Damaged and hostile images make decoders raise anything (TypeError, struct.error, KeyError ...), but the other
    # images of the unit are good. An interrupt is not an Exception, so it still ends the task.
    except Exception as error:  # noqa: BLE001
        raise Reject("decode", _reason(error)) from None


def open_image(data: bytes, limits: Limits) -> Image.Image:
    """Open an image and read its header alone. Call it inside `rejecting`: damage makes Pillow raise anything.

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


def check_resized(size: tuple[int, int], preprocess: PreprocessSettings, limits: Limits) -> None:
    """Refuse a picture, (width, height), that is so long and thin that resizing makes it too large.

    Raises:
        Reject: it is.
    """
    longer, shorter = max(size), max(1, min(size))
    if isinstance(preprocess.resize, int) and preprocess.resize**2 * longer // shorter > limits.max_pixels:
        raise Reject("preprocess", f"too large when resized: {size[0]}x{size[1]}")


def resized_size(size: tuple[int, int], preprocess: PreprocessSettings) -> tuple[int, int] | None:
    """(height, width) of a picture after `resize`, as torchvision computes it; None without resizing."""
    if not isinstance(preprocess.resize, int):
        return preprocess.resize
    side = int(preprocess.resize * max(size) / max(1, min(size)))
    return (preprocess.resize, side) if size[0] <= size[1] else (side, preprocess.resize)


def check_shape(shape: Sequence[int], preprocess: PreprocessSettings) -> None:
    """Refuse a resized and cropped picture that is not the encoder's (height, width).

    Raises:
        Reject: it has another shape.
    """
    if tuple(shape) != preprocess.image_size:
        raise Reject("preprocess", f"wrong shape: {shape[0]}x{shape[1]}, expected {_text(preprocess.image_size)}")


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()).encode("utf-8", "backslashreplace").decode()[:200]
    said = f"{type(error).__name__} {text}" if isinstance(error, LookupError | TypeError) or not text else text
    return f"{'truncated' if 'truncated' in said else 'damaged'}: {said}"


def _array(data: bytes, image: Image.Image, mode: str) -> Pixels:
    """(H, W) or (H, W, C) of an image whose header is read; most JPEGs are decoded without Pillow's overhead."""
    if image.format == "JPEG" and image.mode == mode:
        # Our own buffer: if the two libraries read a header differently, the limits still hold.
        pixels = np.empty((image.height, image.width, len(mode)), dtype=np.uint8)
        least = {"min_height": image.height, "min_width": image.width}  # smaller than the file's after draft()
        with suppress(ValueError):  # damaged, perhaps only a little: Pillow decides, and gives the reason
            found: Pixels = simplejpeg.decode_jpeg(data, _JPEG_COLOURS[mode], buffer=pixels, **least)
            if found.shape == pixels.shape:
                return found
    return _in_bands(_eight_bits(image), mode)


def _in_bands(image: Image.Image, mode: str) -> Pixels:
    """(H, W) or (H, W, C), converted a band of rows at a time, so that memory holds no second whole picture."""
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
    _check_depth(image)
    image.load()


def _converted(image: Image.Image, mode: str) -> Image.Image:
    image.load()
    return image if image.mode == mode else image.convert(mode)


def _check_depth(image: Image.Image) -> None:
    if image.mode in ("I", "F"):
        raise Reject("decode", f"not 8 or 16 bits a channel: mode {image.mode}")


def _eight_bits(image: Image.Image) -> Image.Image:
    """A picture of 8 bits a channel; 16-bit grey keeps its upper byte, as Pillow does with 16-bit colours."""
    _check_depth(image)
    if image.mode.startswith("I;16"):  # convert() would clip it to nearly all white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image


def _fit(preprocess: PreprocessSettings) -> Callable[[Picture, tuple[int, int] | None], Picture] | None:
    """Resize and crop with Pillow's arithmetic or torch's, by the type of the picture.

    torch resizes bytes in whole numbers: the same pixels on every processor. On a processor without AVX2, torchvision
    resizes in floats: other pixels, and 12 more bytes per pixel.
    """
    if preprocess.resize is None and preprocess.center_crop is None:
        return None
    import torch  # here: it takes seconds to import, and some settings do not resize
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


def _text(shape: tuple[int, int] | None) -> str:
    return "any" if shape is None else f"{shape[0]}x{shape[1]}"
