"""Whole commits whose segments exist only by name, for tests of the commit protocol."""

from __future__ import annotations

from itertools import product

from pipeline.index.commits import Commit, SegmentCounts
from pipeline.index.segment_files import SegmentRef

WAVES, SHARDS = 4, 2
SAME, PROCESSOR, OTHER = "", "processor", "other"
SALTS = (SAME, PROCESSOR, OTHER)


def draft(number: int, salt: str = SAME, waves: int = WAVES) -> Commit:
    """A whole commit whose segments exist only by name: nothing here opens them.

    Of the salt PROCESSOR it holds the same images, sealed on another processor; of any other salt it holds others.
    """
    images = "" if salt in (SAME, PROCESSOR) else salt
    segments = tuple(
        SegmentRef(
            shard=shard,
            wave=wave,
            kind="embedded" if wave <= number else "transformed",
            path=f"index/segments/{wave}-{shard}{salt}.faiss",
            sha256=f"{wave}-{shard}{salt}",
            bytes=10,
            vectors=5 + wave,
            sidecar_path=f"index/segments/{wave}-{shard}{images}.parquet",
            sidecar_sha256=f"side{images}",
            rejected=int(wave <= number and shard == 0),
        )
        for wave, shard in product(range(1, waves + 1), range(SHARDS))
    )
    return Commit(
        number=number,
        parent=number - 1 if number else None,
        codebook_path="index/codebook-abc.faiss",
        codebook_sha256="abc",
        metric="l2",
        nprobe=4,
        dim=8,
        num_waves=waves,
        num_shards=SHARDS,
        segments=segments,
        counts=SegmentCounts.of(segments),
    )
