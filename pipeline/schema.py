"""Column names, Arrow schemas and the format version of every file in a run.

Waves count from 1 to W: commit w is the snapshot in which the waves up to w are embedded, commit 0 the one in
which everything is transformed, but for wave 0: images that were embedded for the fit, if there are some. Units count
from 0 inside their wave, shards from 0 to S-1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from pipeline.arrays import vector_type

FORMAT_VERSION = 1

DELETED = "deleted"
"""How the reason of a reject begins whose image was there when the manifest was made, and is no more."""


LOCATION = [
    pa.field("uri", pa.string()),  # the image's object, or the container it lies in
    pa.field("offset", pa.int64()),  # bytes into the container; null where the object is the image
    pa.field("length", pa.int64()),
    pa.field("row", pa.int64()),  # row of a Parquet container's image column; null for any other place
    pa.field("etag", pa.string()),  # of the object or Parquet file when the manifest was made, where that is known
]

MANIFEST = [
    pa.field("id", pa.int64(), nullable=False),
    pa.field("key", pa.string()),  # the user's own id where that is a string
    *LOCATION,
    pa.field("label", pa.string()),
    pa.field("group", pa.string()),
]

UNITS = pa.schema([pa.field("id", pa.int64()), *LOCATION])

REJECTS = pa.schema(
    [pa.field("id", pa.int64()), *LOCATION, pa.field("stage", pa.string()), pa.field("reason", pa.string())]
)

SIDECAR = pa.schema(
    [
        pa.field("id", pa.int64()),
        pa.field("kind", pa.string()),  # transformed | embedded
        pa.field("uncertainty", pa.float32()),
        pa.field("group", pa.string()),
    ]
)


def manifest_schema(dims: dict[str, int], traffic: bool = False) -> pa.Schema:
    """A normalised manifest: MANIFEST, traffic where it is given, and a vector column per entry of `dims` (widths)."""
    weight = [pa.field("traffic", pa.float32())] if traffic else []
    return pa.schema([*MANIFEST, *weight, *(pa.field(name, vector_type(dim)) for name, dim in dims.items())])


def transformed_schema(dim: int) -> pa.Schema:
    """The scored gallery: one row per image, with its wave once the cut points are known."""
    return pa.schema(
        [
            pa.field("id", pa.int64()),
            pa.field("wave", pa.int32()),
            pa.field("shard", pa.int32()),
            pa.field("priority", pa.float32()),
            pa.field("uncertainty", pa.float32()),
            *LOCATION,
            pa.field("label", pa.string()),
            pa.field("group", pa.string()),
            pa.field("vector", vector_type(dim)),
        ]
    )


def embedded_schema(dim: int) -> pa.Schema:
    """The vector log: the new encoder's output for each image of a unit."""
    return pa.schema(
        [
            pa.field("id", pa.int64()),
            pa.field("shard", pa.int32()),
            pa.field("source_etag", pa.string()),
            pa.field("vector", vector_type(dim)),
        ]
    )


@dataclass(frozen=True, slots=True)
class Unit:
    """One piece of work: row group `row_group` of the units file `rows_uri`.

    `wave` and `unit` name its part in the vector log; `images` is the number of its rows.
    """

    wave: int
    unit: int
    rows_uri: str
    row_group: int
    images: int


@dataclass(frozen=True, slots=True)
class UnitAck:
    """What is left of a unit once it is durable; the only thing the driver sees of it.

    The seconds are those of one task each: reading and decoding, the encoder, writing the part.

    Attributes:
        requests: for the images, to a store or reads of files; those for the run's own files are not in it.
        bytes_fetched: what they brought.
        bytes_needed: the encoded images themselves.
        retries: requests that failed and were repeated, for images and for the run's own files.
        changed: images that are others than when the manifest was made.
        fetch_seconds: of `load_seconds`, those in which the task waited for the images' bytes.
        actor: which embedding actor it was, any name that no other one has.
        retry_counts: the retries by `causes.RETRY_CAUSES`.
        reject_counts: the rejects by `causes.REJECT_REASONS`.
        part_digest: of the part's content; empty for a part of a version that made none.
    """

    wave: int
    unit: int
    embedded: int
    rejected: int
    part_bytes: int
    load_seconds: float
    embed_seconds: float
    write_seconds: float
    requests: int = 0
    bytes_fetched: int = 0
    bytes_needed: int = 0
    retries: int = 0
    changed: int = 0
    fetch_seconds: float = 0.0
    actor: str = ""
    retry_counts: Sequence[int] = ()
    reject_counts: Sequence[int] = ()
    part_digest: str = ""
