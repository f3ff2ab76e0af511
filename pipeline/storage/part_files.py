"""The numbered Parquet files of a folder, such as `pairs/train/part-00003.parquet`. Other files are ignored."""

from __future__ import annotations

import re

from pipeline.storage import objects

_PART = re.compile(r"/part-(\d{5,})\.parquet$")


def list_parts(folder: str) -> dict[int, str]:
    """The URIs of the parts in a folder, by number and sorted; empty if there are none."""
    found = ((_PART.search(uri), uri) for uri, _ in objects.iter_stats(folder, deep=False))
    return dict(sorted((int(match[1]), uri) for match, uri in found if match))
