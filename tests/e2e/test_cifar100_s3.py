"""The whole CIFAR-100 backfill from and to a real S3 server, as objects and as tars: the bytes of a local run."""

from __future__ import annotations

import io
import json
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.index import commits, tags
from pipeline.run import Run
from pipeline.storage import objects, parquet
from tests.support.cifar100 import CONFIG, WAVES, fastfill, options, pairs_of, settings
from tests.support.seaweed import SeaweedFS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

TAR_IMAGES = 1000
FIT_FIRST = ("pairs", "transformation")  # the same transformation for all: it has nothing to do with where images are


@dataclass(frozen=True)
class Data:
    """CIFAR-100's test images, in the order of their file."""

    images: list[bytes]
    labels: list[str]

    def name(self, row: int) -> str:
        """Sorts like the rows: units are cut in the order of the places, and a batch is part of a unit."""
        return f"{row:05d}.png"


@pytest.fixture(scope="module")
def data(cifar100: Path) -> Data:
    table = pq.read_table(cifar100 / "test.parquet", columns=["image", "label"])
    return Data(table["image"].to_pylist(), [str(label) for label in table["label"].to_pylist()])


def as_objects(data: Data, bucket: str) -> str:
    """One object per image, and a manifest of their prefix; gives the manifest's folder."""
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda row: objects.put(f"{bucket}/images/{data.name(row)}", data.images[row]), range(10_000)))
    fastfill("manifest", f"{bucket}/images/", "--to", f"{bucket}/manifest")
    return f"{bucket}/manifest"


def as_tars(data: Data, bucket: str) -> str:
    """WebDataset shards, and a manifest of them; gives the manifest's folder."""
    for start in range(0, len(data.images), TAR_IMAGES):
        sink = io.BytesIO()
        with tarfile.open(fileobj=sink, mode="w") as tar:
            for row in range(start, start + TAR_IMAGES):
                for suffix, content in (("png", data.images[row]), ("cls", data.labels[row].encode())):
                    member = tarfile.TarInfo(f"{row:05d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        objects.put(f"{bucket}/shards/{start // TAR_IMAGES:02d}.tar", sink.getvalue())
    fastfill("manifest", f"{bucket}/shards/", "--to", f"{bucket}/manifest")
    return f"{bucket}/manifest"


@pytest.mark.parametrize("layout", [as_objects, as_tars])
def test_a_run_from_and_to_s3_publishes_the_bytes_of_a_local_run(
    local_cifar100: Run, data: Data, cifar100: Path, seaweed: SeaweedFS, bucket: str, layout: Any
) -> None:
    manifest = layout(data, bucket)
    places = pa.concat_tables([parquet.read_parquet(uri) for uri in objects.list_files(manifest, ".parquet")])
    assert places.num_rows == 10_000
    run = Run(f"{bucket}/run")
    for folder in FIT_FIRST:
        for uri in objects.list_files(local_cifar100.path(folder)):
            objects.put(run.uri + uri.removeprefix(local_cifar100.uri), objects.read_bytes(uri))
    columns = {name: name for name in ("uri", "etag")} | {"id": "key", "image": "null", "group": "null"}
    columns |= {name: name for name in ("offset", "length", "label") if name in places.schema.names}
    words = {f"gallery.columns.{role}": name for role, name in columns.items()} | {"gallery.manifest": manifest}
    if "label" not in columns:
        words["gallery.columns.label"] = "null"
    start = time.monotonic()
    fastfill("backfill", "--config", CONFIG, *options(settings(run.uri, cifar100, pairs_of(local_cifar100), **words)))
    print(f"{layout.__name__}: {time.monotonic() - start:.0f} s")
    for number in tags.list_commits(local_cifar100):
        expected, found = (commits.read_commit(item, number) for item in (local_cifar100, run))
        assert found.content() == expected.content()
        for ref in found.segments:
            assert objects.sha256(run.path(ref.path)) == ref.sha256
    assert tags.list_commits(run)[-1] == WAVES
    report = json.loads(fastfill("audit", "--json", "--config", CONFIG, "--set", f"run={run.uri}"))
    assert report["ok"], report["problems"]
