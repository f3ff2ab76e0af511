"""Tars in memory, as a data set packs images into shards."""

from __future__ import annotations

import io
import tarfile

Members = list[tuple[str, bytes]]


def pack(members: Members, kind: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of regular files."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=kind) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return sink.getvalue()
