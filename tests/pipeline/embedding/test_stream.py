"""The embedding stream: the same vectors wherever the images lie and however they are fetched, and what it took."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.arrays import Float32
from pipeline.config.load import load_config
from pipeline.config.tree import Config
from pipeline.embedding import vector_log
from pipeline.embedding.reject_rules import REJECT_REASONS
from pipeline.embedding.stream import StreamSettings, Work, embed_stream
from pipeline.embedding.vector_log import VectorLog
from pipeline.schema import UNITS, Unit, UnitAck
from pipeline.storage import objects as storage
from pipeline.storage import parquet
from pipeline.storage.retry import RETRY_CAUSES
from tests.support.galleries import NEW_DIM, digits, write_config
from tests.support.seaweed import SeaweedFS, s3_client

IMAGES = 40


def put(uri: str, data: bytes) -> str:
    """Write an image or a container as a user would, to S3 or to disk; returns its URI."""
    if storage.is_local(uri):
        Path(uri).write_bytes(data)
    else:
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        s3_client(os.environ).put_object(Bucket=bucket, Key=key, Body=data)
    return uri


def rows(uris: list[str], offsets: list[int] | None = None, lengths: list[int] | None = None) -> pa.Table:
    """A unit's rows; ids count from 0."""
    nothing = pa.nulls(len(uris), pa.int64())
    columns = [np.arange(len(uris)), uris, offsets or nothing, lengths or nothing, nothing]
    return pa.table([*columns, pa.nulls(len(uris), pa.string())], schema=UNITS)


def packed(folder: str, images: list[bytes]) -> pa.Table:
    """Rows of images in one container, with something between them."""
    offsets, content = [], b""
    for data in images:
        content += bytes(512)
        offsets.append(len(content))
        content += data
    return rows([put(f"{folder}/all.tar", content)] * len(images), offsets, [len(data) for data in images])


def run(config: Config, folder: str, units: list[pa.Table]) -> tuple[dict[int, UnitAck], VectorLog]:
    """Embed units into a new log below `folder`."""
    log = VectorLog(f"{folder}/embedded", f"{folder}/rejects", NEW_DIM, 2)
    storage.put(f"{folder}/units.parquet", parquet.parquet_bytes(UNITS, units))
    work = [Unit(1, number, f"{folder}/units.parquet", number, len(unit)) for number, unit in enumerate(units)]
    acks = {ack.unit: ack for _, ack in embed_stream([Work(config.encoders.new, log, work)], StreamSettings.of(config))}
    return acks, log


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Config:
    return load_config(write_config(tmp_path_factory.mktemp("stream")))


@dataclass(frozen=True)
class Streamed:
    """The same images as local files and, in two units, as a tar and as objects on S3."""

    needed: int
    local: UnitAck
    in_tar: UnitAck
    objects: UnitAck
    vectors: dict[str, list[Float32]]

    @property
    def acks(self) -> list[UnitAck]:
        return [self.local, self.in_tar, self.objects]


@pytest.fixture(scope="module")
def streamed(config: Config, seaweed: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Streamed]:
    images, folder, name = digits(IMAGES)[0], tmp_path_factory.mktemp("files"), f"test-{uuid.uuid4().hex}"
    seaweed.make_bucket(name)
    bucket = f"s3://{name}"

    def embed(folder: str, tables: list[pa.Table], **changes: int) -> tuple[dict[int, UnitAck], list[Float32]]:
        settings = config.model_copy(update={"fetch": config.fetch.model_copy(update=changes)})
        acks, log = run(settings, folder, tables)
        vectors = [parquet.read_parquet(log.part(1, unit)).sort_by("id")["vector"] for unit in sorted(acks)]
        return acks, [np.stack(vector.to_numpy()) for vector in vectors]

    files = rows([put(f"{folder}/{number}.png", data) for number, data in enumerate(images)])
    objects = rows([put(f"{bucket}/images/{number}.png", data) for number, data in enumerate(images)])
    local, expected = embed(str(folder), [files])
    acks, found = embed(f"{bucket}/a", [packed(bucket, images), objects])
    _, singly = embed(f"{bucket}/b", [packed(bucket, images), objects], max_gap_bytes=0, concurrency=1)
    vectors = {"local": expected, "on S3": found, "one request at a time": singly}
    yield Streamed(sum(map(len, images)), local[0], acks[0], acks[1], vectors)
    seaweed.remove_bucket(name)


@pytest.mark.parametrize("kind", ["on S3", "one request at a time"])
def test_embed_stream_of_tars_and_objects_on_s3_gives_the_vectors_of_local_files(streamed: Streamed, kind: str) -> None:
    (expected,) = streamed.vectors["local"]
    for vectors in streamed.vectors[kind]:
        np.testing.assert_array_equal(vectors, expected)


def test_embed_stream_of_a_tar_takes_one_request_for_all_images(streamed: Streamed) -> None:
    assert [ack.requests for ack in streamed.acks] == [IMAGES, 1, IMAGES]


def test_embed_stream_counts_the_bytes_that_it_needed_and_fetched(streamed: Streamed) -> None:
    gaps = [0, 512 * (IMAGES - 1), 0]
    assert [ack.bytes_fetched for ack in streamed.acks] == [streamed.needed + gap for gap in gaps]
    assert {ack.bytes_needed for ack in streamed.acks} == {streamed.needed}


def test_embed_stream_times_the_fetch_within_the_load(streamed: Streamed) -> None:
    assert all(0 <= ack.fetch_seconds < ack.load_seconds for ack in streamed.acks)
    assert all(ack.fetch_seconds > 0 for ack in (streamed.in_tar, streamed.objects))  # a store takes its time


def test_embed_stream_names_the_one_actor_of_all_units(streamed: Streamed) -> None:
    assert all(len(ack.actor) == 16 for ack in streamed.acks)
    assert streamed.in_tar.actor == streamed.objects.actor


def test_embed_stream_without_faults_counts_no_retry_and_no_reject(streamed: Streamed) -> None:
    assert {ack.retries for ack in streamed.acks} == {0}
    assert all(len(ack.retry_counts) == len(RETRY_CAUSES) and not any(ack.reject_counts) for ack in streamed.acks)


def test_images_that_changed_or_went_since_the_manifest_was_made_are_told_apart(config: Config, bucket: str) -> None:
    images = digits(6)[0]
    uris = [put(f"{bucket}/{number}.png", data) for number, data in enumerate(images[:4])]
    etags = [storage.stat(uri).etag for uri in uris]
    unquoted = etags[3].strip('"')
    table = rows([*uris, f"{bucket}/never.png"]).set_column(5, "etag", pa.array([*etags[:3], unquoted, None]))
    put(uris[1], images[5])
    storage.delete_files([uris[2]])
    acks, log = run(config, f"{bucket}/run", [table])
    ack = acks[0]
    assert (ack.embedded, ack.rejected, ack.changed) == (3, 2, 1)
    counts = {name: count for name, count in zip(REJECT_REASONS, ack.reject_counts, strict=True) if count}
    assert counts == {("fetch", "deleted"): 1, ("fetch", "missing"): 1}
    rejects = vector_log.read_rejects(log).to_pylist()
    assert {row["id"]: (row["stage"], row["reason"]) for row in rejects} == {
        2: ("fetch", "deleted: was there when the manifest was made"),
        4: ("fetch", "missing"),
    }
    part = {row["id"]: row for row in parquet.read_parquet(log.part(1, 0)).to_pylist()}
    assert part[0]["source_etag"] == etags[0]
    assert part[1]["source_etag"] == storage.stat(uris[1]).etag != etags[1]


def test_images_that_the_actor_decodes_give_the_same_vectors_and_rejects(config: Config, tmp_path: Path) -> None:
    images = [*digits(IMAGES)[0], b"no image"]
    files = rows([put(f"{tmp_path}/{number}.png", data) for number, data in enumerate(images)] + [f"{tmp_path}/none"])
    tree = config.model_dump(mode="json")
    tree["encoders"]["new"]["preprocess"]["decoder"] = "device"
    found = []
    for name, settings in {"cpu": config, "device": Config.model_validate(tree)}.items():
        (ack,), log = (
            list(run(settings, f"{tmp_path}/{name}", [files])[0].values()),
            VectorLog(f"{tmp_path}/{name}/embedded", f"{tmp_path}/{name}/rejects", NEW_DIM, 2),
        )
        rejects = vector_log.read_rejects(log).select(["id", "stage", "reason"])
        found.append((parquet.read_parquet(log.part(1, 0)), rejects, ack.embedded, ack.rejected, ack.bytes_needed))
    assert found[0] == found[1]
    assert found[0][2:4] == (IMAGES, 2)


def test_images_of_all_four_kinds_in_one_unit_give_the_vectors_of_local_files(
    config: Config, bucket: str, tmp_path: Path
) -> None:
    images = digits(12)[0]
    local = rows([put(f"{tmp_path}/{number}.png", data) for number, data in enumerate(images)])
    objects = [put(f"{bucket}/{number}.png", images[number]) for number in (3, 4, 5)]
    tar, length = put(f"{bucket}/some.tar", b"".join(images[6:9])), [len(image) for image in images]
    storage.put(f"{bucket}/column.parquet", parquet.parquet_bytes(*one_table({"image": images[9:]})))
    places: dict[str, list[object]] = {
        "uri": [*local["uri"].to_pylist()[:3], *objects, *[tar] * 3, *[f"{bucket}/column.parquet#image"] * 3],
        "offset": [*[None] * 6, 0, length[6], length[6] + length[7], *[None] * 3],
        "length": [*[None] * 6, *length[6:9], *[None] * 3],
        "row": [*[None] * 9, 0, 1, 2],
    }
    mixed = pa.table({"id": np.arange(12), **places, "etag": [None] * 12}, schema=UNITS)
    found = []
    for name, unit in {"local": local, "mixed": mixed}.items():
        acks, log = run(config, f"{tmp_path}/{name}", [unit])
        assert acks[0].rejected == 0
        found.append(parquet.read_parquet(log.part(1, 0), ["id", "vector"]))
    assert found[0] == found[1]


def one_table(columns: dict[str, object]) -> tuple[pa.Schema, list[pa.Table]]:
    table = pa.table(columns)
    return table.schema, [table]
