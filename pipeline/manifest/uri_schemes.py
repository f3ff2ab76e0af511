"""Whether URIs of images, as a manifest has them, are of a store that can be read.

For `partition` and `table_index`, which check manifests before any image is read. It does not look whether anything
is there.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import DataError
from pipeline.storage import objects
from pipeline.storage.uris import USER


def check_schemes(uris: pa.Array | pa.ChunkedArray, uri: str, first_row: int, column: str | None) -> None:
    """Refuse a URI of another scheme than `storage.SCHEMES`, or with a user or password; nulls are passed over.

    Args:
        uris: the column.
        uri: of the file that it lies in.
        first_row: of the column, in that file.
        column: its name.

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
            "an image's uri is of a store that cannot be read",
            expected="a local path, file:// or s3://",
            found=uris[row].as_py(),
            where=f"{uri}: row {first_row + row}, column {column}",
            remedy="copy the images to a disk or to S3, or remove the row",
        )
