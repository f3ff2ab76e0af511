"""Checks of the URIs of images in a manifest, before any image is read."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import DataError
from pipeline.storage import objects
from pipeline.storage.uris import USER


def check_schemes(uris: pa.Array | pa.ChunkedArray, uri: str, first_row: int, column: str | None) -> None:
    """Refuse a URI with an unknown scheme, or with a user or password. Nulls are skipped.

    Args:
        uris: the column.
        uri: the file of the column.
        first_row: the column's first row in that file.
        column: the column's name.

    Raises:
        DataError: with the file and the row, and the URI if it holds no secret.
    """
    row = pc.index(pc.match_substring_regex(uris, USER), True).as_py()
    if row >= 0:
        raise DataError(
            "an image's uri must not hold a user or password",
            where=f"{uri}: row {first_row + row}, column {column}",
            remedy="give credentials through the environment, such as AWS_PROFILE",
        )
    bad = pc.match_substring(uris, "://")
    for scheme in objects.SCHEMES:
        bad = pc.and_not(bad, pc.starts_with(uris, f"{scheme}://"))
    row = pc.index(bad, True).as_py()
    if row >= 0:
        raise DataError(
            "an image's uri has an unknown scheme",
            expected="a local path, file:// or s3://",
            found=uris[row].as_py(),
            where=f"{uri}: row {first_row + row}, column {column}",
            remedy="copy the images to a disk or to S3, or remove the row",
        )
