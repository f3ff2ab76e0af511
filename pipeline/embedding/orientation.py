"""Read the EXIF orientation of a picture, and turn the picture upright as Pillow's `ImageOps.exif_transpose` does.

An orientation that cannot be read counts as upright: damaged EXIF data does not mean damaged pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Turn:
    """Turns a picture upright: first swap rows and columns, then reverse their order."""

    method: Image.Transpose | None  # the whole turn as Pillow names it; None if the picture is upright
    swaps: bool = False  # rows become columns
    rows: bool = False  # reverse the order of the rows
    columns: bool = False  # reverse the order of the columns

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the upright picture, from the size as stored."""
        return (width, height) if self.swaps else (height, width)

    def image(self, picture: Image.Image) -> Image.Image:
        """Pillow's picture upright."""
        return picture if self.method is None else picture.transpose(self.method)

    def array(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(H, W) or (H, W, C) upright, contiguous."""
        if self.method is None:
            return pixels
        turned = pixels.swapaxes(0, 1) if self.swaps else pixels
        return np.ascontiguousarray(turned[:: -1 if self.rows else 1, :: -1 if self.columns else 1])

    def tensor(self, pixels: torch.Tensor) -> torch.Tensor:
        """(C, H, W) upright."""
        turned = pixels.transpose(1, 2) if self.swaps else pixels
        return turned.flip([axis for axis, flips in ((1, self.rows), (2, self.columns)) if flips])


_UPRIGHT = Turn(None)
_TURNS = {
    2: Turn(Image.Transpose.FLIP_LEFT_RIGHT, columns=True),
    3: Turn(Image.Transpose.ROTATE_180, rows=True, columns=True),
    4: Turn(Image.Transpose.FLIP_TOP_BOTTOM, rows=True),
    5: Turn(Image.Transpose.TRANSPOSE, swaps=True),
    6: Turn(Image.Transpose.ROTATE_270, swaps=True, columns=True),
    7: Turn(Image.Transpose.TRANSVERSE, swaps=True, rows=True, columns=True),
    8: Turn(Image.Transpose.ROTATE_90, swaps=True, rows=True),
}
_SAYS = {"exif", "xmp", "Raw profile type exif", "XML:com.adobe.xmp"}


def read_turn(image: Image.Image, exif: Literal["apply", "ignore"]) -> Turn:
    """The turn of an image; none if EXIF is ignored, missing or cannot be read. Only of a JPEG the header suffices."""
    if exif == "ignore" or (image.format != "TIFF" and _SAYS.isdisjoint(image.info)):
        return _UPRIGHT
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1), _UPRIGHT)
    except Exception:  # noqa: BLE001 - Pillow raises anything on damaged EXIF data, and the pixels may be good
        return _UPRIGHT
