"""Locate, fetch, decode and preprocess the images of one unit.

Guarantee: a bad image becomes a reject with a stage and a reason, never an exception; rows keep the
order of the units file. It does not know which encoder the pixels are for, only their shape.
"""

from __future__ import annotations

import errno
import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from pipeline import storage
from pipeline.config import Preprocess
from pipeline.errors import DataError
from pipeline.schema import UNITS, Int64, Unit

Pixels = NDArray[np.uint8]

# Others are rare, and some of their readers start programs (EPS: Ghostscript).
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM")
_DAMAGED = (OSError, SyntaxError, ValueError, RuntimeError, EOFError, Image.DecompressionBombError)
_NO_PLACE = (errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP)


@dataclass(frozen=True, slots=True)
class Limits:
    """What an image may be at most, before it is decoded; guards against decompression bombs."""

    max_pixels: int
    max_bytes: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where one image lies: an object, a byte range of one, or a row of a Parquet file's image column.

    `etag` is the object's when the manifest was made, where that is known.
    """

    uri: str
    offset: int | None
    length: int | None
    row: int | None
    etag: str | None = None


class Reject(Exception):
    """One image that cannot be embedded; `reason` is a short word, maybe followed by `: detail`."""

    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(f"{stage}: {reason}")
        self.stage = stage
        self.reason = reason


@dataclass(frozen=True, slots=True)
class LoadedUnit:
    """The images of a unit, in the order of its units file.

    Attributes:
        ids: (B,) int64.
        pixels: (B, C, H, W) uint8; zeros for rejects.
        etags: the etag of each image's object at the time it was read.
        rejects: row -> why that image is rejected.
    """

    ids: Int64
    pixels: Pixels
    etags: list[str | None]
    rejects: dict[int, Reject]


def load_unit(unit: Unit, preprocess: Preprocess, limits: Limits, fetch_threads: int) -> LoadedUnit:
    """Read, decode and preprocess a unit's images.

    Raises:
        DataError: the units file is missing or damaged.
    """
    rows = storage.read_parquet(unit.rows_uri, UNITS.names, [unit.row_group])
    places = [Place(**row) for row in rows.drop_columns(["id"]).to_pylist()]
    assert preprocess.image_size is not None
    pixels = np.zeros((len(places), preprocess.channels, *preprocess.image_size), dtype=np.uint8)
    etags: list[str | None] = [None] * len(places)
    rejects: dict[int, Reject] = {}
    decode = _decoder(preprocess, limits)
    for row, (data, etag) in enumerate(_fetch(places, limits, fetch_threads)):
        etags[row] = etag
        try:
            if isinstance(data, Reject):
                raise data
            pixels[row] = decode(data)
        except Reject as reject:
            rejects[row] = reject
    return LoadedUnit(rows["id"].to_numpy(), pixels, etags, rejects)


def decode_image(data: bytes, preprocess: Preprocess, limits: Limits) -> Pixels:
    """One encoded image as (C, H, W) uint8.

    Raises:
        Reject: it is empty, not an image, truncated, too large, or of another shape than the encoder's.
    """
    return _decoder(preprocess, limits)(data)


def _decoder(preprocess: Preprocess, limits: Limits) -> Callable[[bytes], Pixels]:
    mode = "RGB" if preprocess.channels == 3 else "L"
    resize = _transform(preprocess)

    def decode(data: bytes) -> Pixels:
        image = _open(data, limits)
        _check_resized(image, preprocess, limits)
        try:
            picture = _eight_bits(image).convert(mode)
        except _DAMAGED as error:
            reason = "truncated" if "truncated" in str(error) else "damaged"
            raise Reject("decode", f"{reason}: {error}") from None
        picture = resize(picture)
        if (picture.height, picture.width) != preprocess.image_size:
            raise Reject(
                "preprocess",
                f"wrong shape: {picture.height}x{picture.width}, expected {_text(preprocess.image_size)}",
            )
        array = np.asarray(picture)
        return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)

    return decode


def _eight_bits(image: Image.Image) -> Image.Image:
    """A picture of 8 bits a channel: of 16-bit grey the upper half, as Pillow reads 16-bit colours."""
    if image.mode in ("I", "F"):
        raise Reject("decode", f"not 8 or 16 bits a channel: mode {image.mode}")
    if image.mode.startswith("I;16"):  # convert() would clip it, and nearly all of it would be white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image


def _check_resized(image: Image.Image, preprocess: Preprocess, limits: Limits) -> None:
    """Refuse a picture so long and thin that it would become too large when its shorter side is resized."""
    if isinstance(preprocess.resize, int):
        longer, shorter = max(image.size), max(1, min(image.size))
        if preprocess.resize**2 * longer // shorter > limits.max_pixels:
            raise Reject("preprocess", f"too large when resized: {image.width}x{image.height}")


def _transform(preprocess: Preprocess) -> Callable[[Image.Image], Image.Image]:
    if preprocess.resize is None and preprocess.center_crop is None:
        return lambda image: image
    from torchvision.transforms import InterpolationMode  # here: it takes seconds, and not everybody resizes
    from torchvision.transforms import v2 as transforms

    steps: list[object] = []
    if preprocess.resize is not None:
        size = list(preprocess.resize) if isinstance(preprocess.resize, tuple) else preprocess.resize
        steps.append(transforms.Resize(size, InterpolationMode(preprocess.interpolation), antialias=True))
    if preprocess.center_crop is not None:
        steps.append(transforms.CenterCrop(preprocess.center_crop))
    composed: Callable[[Image.Image], Image.Image] = transforms.Compose(steps)
    return composed


def _open(data: bytes, limits: Limits) -> Image.Image:
    if not data:
        raise Reject("decode", "empty")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError:
        most = min(limits.max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or limits.max_pixels))
        raise Reject("decode", f"too large: more than {most} pixels") from None
    except UnidentifiedImageError:
        raise Reject("decode", "not an image") from None
    except _DAMAGED as error:
        raise Reject("decode", f"damaged: {error}") from None
    if image.width * image.height > limits.max_pixels:
        raise Reject("decode", f"too large: {image.width}x{image.height}, at most {limits.max_pixels} pixels")
    return image


def _fetch(places: list[Place], limits: Limits, threads: int) -> Iterator[tuple[bytes | Reject, str | None]]:
    """The encoded bytes of each place, in order, with the etag of its object."""
    columns = _ParquetColumns({place.uri for place in places if place.row is not None}, places)
    if all(place.row is not None for place in places):
        yield from (columns.get(place, limits) for place in places)
        return
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(
            lambda place: columns.get(place, limits) if place.row is not None else _read(place, limits), places
        )


def _read(place: Place, limits: Limits) -> tuple[bytes | Reject, str | None]:
    if min(place.offset or 0, place.length or 0) < 0:
        return Reject("fetch", "missing: offset and length must not be negative"), None
    try:
        stat = storage.stat(place.uri)
        size = stat.size_bytes if place.length is None else place.length
        if size > limits.max_bytes:
            return Reject("fetch", f"too large: {size} bytes, at most {limits.max_bytes}"), stat.etag
        data = storage.read_bytes(place.uri, place.offset, place.length)
    except (FileNotFoundError, NotADirectoryError):
        return Reject("fetch", "missing"), None
    except PermissionError:
        return Reject("fetch", "forbidden"), None
    except IsADirectoryError:
        return Reject("fetch", "missing: a folder has this name"), None
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_PLACE:
            raise  # the machine's trouble, not the image's
        return Reject("fetch", f"missing: {error}"), None
    if place.length is not None and len(data) < place.length:
        return Reject("fetch", f"truncated: {len(data)} of {place.length} bytes are there"), stat.etag
    return data, stat.etag


class _ParquetColumns:
    """The wanted rows of Parquet image columns (`file.parquet#column`), read one row group at a time."""

    def __init__(self, uris: set[str], places: list[Place]) -> None:
        self._images: dict[tuple[str, int], bytes | None] = {}
        self._etags: dict[str, str] = {}
        self._failures: dict[str, Reject] = {}
        for uri in sorted(uris):
            path, _, column = uri.rpartition("#")
            wanted = np.unique([place.row for place in places if place.uri == uri])
            try:
                self._etags[uri] = storage.stat(path).etag
                self._images.update(((uri, row), data) for row, data in _parquet_rows(path, column, wanted))
            except FileNotFoundError:
                continue
            except (PermissionError, DataError) as error:
                forbidden = isinstance(error, PermissionError) or isinstance(error.__cause__, PermissionError)
                self._failures[uri] = Reject("fetch", "forbidden" if forbidden else f"damaged: {error}".splitlines()[0])

    def get(self, place: Place, limits: Limits) -> tuple[bytes | Reject, str | None]:
        """The bytes of a row, and the etag of its file."""
        assert place.row is not None
        etag = self._etags.get(place.uri)
        if (place.uri, place.row) not in self._images:
            return self._failures.get(place.uri, Reject("fetch", "missing")), etag
        data = self._images[place.uri, place.row] or b""
        if len(data) > limits.max_bytes:
            return Reject("fetch", f"too large: {len(data)} bytes, at most {limits.max_bytes}"), etag
        return data, etag


def _parquet_rows(path: str, column: str, wanted: Int64) -> Iterator[tuple[int, bytes | None]]:
    with storage.open_parquet(path) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        for group in range(file.num_row_groups):
            rows = wanted[(wanted >= starts[group]) & (wanted < starts[group + 1])]
            if len(rows):
                images = file.read_row_group(group, columns=[column])[column].take(pa.array(rows - starts[group]))
                yield from zip(rows.tolist(), images.to_pylist(), strict=True)


def _text(shape: tuple[int, int] | None) -> str:
    return "any" if shape is None else f"{shape[0]}x{shape[1]}"
