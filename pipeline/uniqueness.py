"""No key and no image is in a manifest twice; images with the same content are allowed, and counted."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow.compute as pc

from pipeline.duplicates import Repeats, Row, find_repeats
from pipeline.errors import DataError
from pipeline.pieces import HASH, Options


def check_unique(parts: list[str], num_rows: int, folder: str) -> None:
    """Raises DataError where an image or a key is there twice."""
    images = find_repeats(parts, ["uri", "offset"], ["key"], num_rows)
    remedy = "name every source once, none inside another; then run again with --replace"
    if images.num_rows:
        found = _differences(images, _place, lambda row: f"key {row['key']!r}")
        raise DataError(
            "an image is there more than once", expected="each once", found=found, where=folder, remedy=remedy
        )
    keys = find_repeats(parts, ["key"], ["uri", "offset"], num_rows)
    if keys.num_rows:
        found = _differences(keys, lambda row: repr(row["key"]), _place)
        remedy = "rename one, or give sources a common parent so that keys have longer paths; then --replace"
        raise DataError("a key is there more than once", expected="each once", found=found, where=folder, remedy=remedy)


def _differences(repeats: Repeats, same: Callable[[Row], str], other: Callable[[Row], str]) -> str:
    first = repeats.examples[0]
    return f"{repeats.num_rows:,} repeated, such as {same(first[0])}: {other(first[0])} and {other(first[1])}"


def _place(row: Row) -> str:
    return str(row["uri"]) if row["offset"] is None else f"{row['uri']} at {row['offset']}"


def find_identical(parts: list[str], num_rows: int, options: Options) -> dict[str, object]:
    """Images with the same content: by hash, or by etag and size of objects (a local file's etag is its time)."""
    if options.hash:
        by, found = [HASH.name], find_repeats(parts, [HASH.name], ["key"], num_rows)
    else:
        by = ["etag", "size_bytes"]
        whole = pc.is_null(pc.field("offset")) & pc.starts_with(pc.field("uri"), "s3://")
        found = find_repeats(parts, by, ["key", "uri", "offset"], num_rows, only=whole)
    return {"by": by, "images": found.num_rows, "examples": [[row["key"] for row in rows] for rows in found.examples]}
