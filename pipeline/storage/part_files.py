"""The numbered Parquet files of a folder, such as `pairs/train/part-00003.parquet`.

Guarantee: only files with exactly the name of a part are given, so a copy that somebody made beside one is never read
twice. Does not know what is in them.
"""

from __future__ import annotations

import re

from pipeline.storage import objects

_PART = re.compile(r"/part-(\d{5,})\.parquet$")


def list_parts(folder: str) -> dict[int, str]:
    """The URIs of the parts right in a folder by their numbers, sorted; empty if there are none."""
    found = ((_PART.search(uri), uri) for uri, _ in objects.iter_stats(folder, deep=False))
    return dict(sorted((int(match[1]), uri) for match, uri in found if match))
