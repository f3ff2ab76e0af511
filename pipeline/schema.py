"""Column names, Arrow schemas and the format version of the files in a run.

Waves count from 1 to W. In commit w the waves up to w are embedded. In commit 0 all images are transformed but those of
wave 0, which were embedded for the fit. Units count from 0 inside their wave, shards from 0 to S-1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from pipeline.arrays import vector_type

FORMAT_VERSION = 1

DELETED = "deleted"
"""How the reason of a reject begins if the image was deleted after the manifest was made."""


LOCATION = [
    pa.field("uri", pa.string()),  # the image's object, or its container
    pa.field("offset", pa.int64()),  # bytes into the container; null if the object is the image
    pa.field("length", pa.int64()),
    pa.field("row", pa.int64()),  # row of a Parquet container's image column; null elsewhere
    pa.field("etag", pa.string()),  # of the object or container when the manifest was made, if known
]

MANIFEST = [
    pa.field("id", pa.int64(), nullable=False),
    pa.field("key", pa.string()),  # the user's own id if it is a string
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
    """A normalised manifest: MANIFEST, maybe traffic, and a vector column per entry of `dims` (its width)."""
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
    """One task of embedding: row group `row_group` of the units file `rows_uri`, which has `images` rows.

    `wave` and `unit` name its part in the vector log.
    """

    wave: int
    unit: int
    rows_uri: str
    row_group: int
    images: int


@dataclass(frozen=True, slots=True)
class UnitAck:
    """What the driver learns about a unit once its part is durable. Each duration is that of one task."""

    wave: int
    unit: int
    embedded: int
    rejected: int
    part_bytes: int
    load_seconds: float  # reading and decoding images
    embed_seconds: float  # the encoder
    write_seconds: float  # writing the part
    requests: int = 0  # requests and file reads for images alone, not for the run's own files
    bytes_fetched: int = 0  # bytes of these requests
    bytes_needed: int = 0  # bytes of the encoded images themselves
    retries: int = 0  # repeated requests, for images and for the run's own files
    changed: int = 0  # images that have changed since the manifest was made
    fetch_seconds: float = 0.0  # the part of `load_seconds` that waited for bytes
    actor: str = ""  # a unique name of the embedding actor
    retry_counts: Sequence[int] = ()  # retries by `storage.retry.RETRY_CAUSES`
    reject_counts: Sequence[int] = ()  # rejects by `embedding.reject_rules.REJECT_REASONS`
    part_digest: str = ""  # digest of the part's content; empty in parts of older versions
