"""Seeded mutations of everything that a user hands in: pixels, a reject or one clear error, in little time and memory.

Each case mutates one good file again and again for its share of the minute. A failure names the seed and the number
of the mutation; `mutated` gives the same bytes for them.
"""

from __future__ import annotations

import io
import resource
import struct
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torchvision.transforms.v2.functional  # noqa: F401 - mapped before memory is limited
import yaml
from PIL import Image

from pipeline.config import tree as settings
from pipeline.config.load import load_config
from pipeline.embedding.decode import Limits, decode_image
from pipeline.embedding.fetch import Reject
from pipeline.errors import FastfillError
from pipeline.manifest.normalised import digest, scan
from pipeline.manifest.partition import write_part
from pipeline.manifest.scan_tables import index_parquet
from pipeline.manifest.scan_tars import index_tar
from pipeline.manifest.splits import Options, SourceSplit, SplitWriter
from pipeline.run import Run
from pipeline.storage import objects

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SECONDS = 4.0
"""Of each of the 14 cases."""
MOST_SECONDS = 5.0
MOST_BYTES = 600 * 2**20
FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM"]
ODD = [0, 1, 0x7F, 0x80, 0xFF]
Check = Callable[[bytes], object]


def mutated(good: bytes, seed: int, number: int) -> bytes:
    """One mutation of a file: bits, odd bytes and numbers, cuts, and pieces that are moved, doubled or left out."""
    random = np.random.default_rng([seed, number])
    data = bytearray(good)
    for _ in range(int(random.integers(1, 6))):
        if not data:
            break
        # Headers lie at the start, footers at the end, and they are what decides.
        place = int(min(random.integers(len(data)), random.integers(len(data)), random.geometric(0.02) - 1))
        place = len(data) - 1 - place if random.random() < 0.3 else place
        size = int(random.integers(1, 64))
        match int(random.integers(8)):
            case 0:
                data[place] ^= 1 << int(random.integers(8))
            case 1:
                data[place] = int(random.choice(ODD))
            case 2:
                form = ("<", ">")[int(random.integers(2))] + "HIQ"[int(random.integers(3))]
                number_ = struct.pack(form, int(random.integers(2**63)) % 2 ** (8 * struct.calcsize(form)))
                data[place : place + len(number_)] = number_
            case 3:
                data[place : place + size] = b"\xff" * size
            case 4:
                del data[place:]
            case 5:
                del data[place : place + size]
            case 6:
                data[place:place] = data[place : place + size]
            case 7:
                other = int(random.integers(len(data)))
                data[place : place + size] = data[other : other + size]
    return bytes(data)


def try_mutations(good: bytes, check: Check, allowed: tuple[type[Exception], ...], seed: int) -> int:
    """How many mutations were tried; each ends in time, with a result or an allowed error."""
    check(good)
    count, deadline = 0, time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        data, start = mutated(good, seed, count), time.process_time()
        try:
            check(data)
        except allowed:
            pass
        except BaseException as error:
            raise AssertionError(f"seed {seed}, mutation {count}: {type(error).__name__}: {error}") from error
        assert time.process_time() - start < MOST_SECONDS, f"seed {seed}, mutation {count} takes too long"
        count += 1
    return count


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """A mutation that asks for much more memory than a good file gets a MemoryError, which no case allows."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize(("seed", "kind"), list(enumerate(FORMATS)))
def test_decode_image_mutated_file_is_pixels_or_a_reject(seed: int, kind: str) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    exif, sink = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(picture).save(sink, kind, **({} if kind in ("GIF", "BMP", "PPM") else {"exif": exif}))
    preprocess = settings.PreprocessSettings(resize=16, center_crop=12)
    limits = Limits(max_pixels=10**6, max_bytes=10**6)

    def check(data: bytes) -> None:
        try:
            pixels = decode_image(data, preprocess, limits)
        except Reject as found:
            reject = found
        else:
            assert pixels.shape == (3, 12, 12)
            assert pixels.dtype == np.uint8
            return
        assert reject.stage in ("decode", "preprocess")
        assert "not enough memory" not in reject.reason, "a small file asks for much memory"
        assert pa.array([reject.reason]).to_pylist() == [reject.reason]
        assert len(reject.reason.splitlines()) == 1

    assert try_mutations(sink.getvalue(), check, (), seed) > 100


def write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_index_tar_mutated_header_is_rows_or_one_error(tmp_path: Path, form: int) -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=form) as archive:
        for name in ("a.png", "a.json", "x" * 90 + "/" + "y" * (130 if form != tarfile.USTAR_FORMAT else 30) + ".png"):
            member = tarfile.TarInfo(name)
            member.size = 7
            archive.addfile(member, io.BytesIO(b'{"a":1}'))
    options = Options(suffixes=(".png",))

    def check(data: bytes) -> None:
        uri = write(tmp_path / "a.tar", data)
        piece = SourceSplit("tar", (uri,), str(tmp_path), objects.stat(uri).etag)
        out = SplitWriter(str(tmp_path / "manifest"), piece, options)
        index_tar(piece, options, out)
        out.finish()

    assert try_mutations(sink.getvalue(), check, (FastfillError,), 100 + form) > 100


def manifest() -> bytes:
    """A manifest of 40 rows, with every kind of column."""
    rows = 40
    columns: dict[str, Any] = {
        "id": [f"image-{row}" for row in range(rows)],
        "uri": [f"images/{row}.png" for row in range(rows)],
        "offset": list(range(rows)),
        "length": [5] * rows,
        "label": [row % 3 for row in range(rows)],
        "traffic": [1.0] * rows,
        "old": pa.FixedSizeListArray.from_arrays(pa.array(np.ones(4 * rows, np.float32)), 4),
    }
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, row_group_size=16)
    return sink.getvalue()


def test_manifest_mutated_parquet_is_parts_or_one_error(tmp_path: Path) -> None:
    columns = settings.ColumnNames(
        id="id", uri="uri", offset="offset", length="length", label="label", traffic="traffic", old_embedding="old"
    )
    run, options = Run(str(tmp_path / "run")), Options(suffixes=(".png",))

    def check(data: bytes) -> None:
        uri = write(tmp_path / "a.parquet", data)
        source = settings.ManifestSettings(manifest=uri, columns=columns)
        digest(source)
        for number, part in enumerate(scan(source, {"old_embedding": 4})):
            write_part(run.part("gallery", number), part, source, 8, "/data")
        piece = SourceSplit("parquet", (uri,), str(tmp_path), objects.stat(uri).etag)
        index_parquet(piece, options, SplitWriter(str(tmp_path / "manifest"), piece, options))

    assert try_mutations(manifest(), check, (FastfillError,), 200) > 100


def test_load_config_mutated_file_is_settings_or_one_error(tmp_path: Path) -> None:
    encoder = {"export": "new.pt2", "dim": 3, "preprocess": {"size": 8, "mean": [0.5], "exif": "apply"}}
    tree = {
        "run": "runs/a",
        "data_root": "data",
        "seed": 7,
        "encoders": {"old": encoder, "new": encoder},
        "gallery": {"manifest": "gallery.parquet", "columns": {"id": "id", "uri": "uri"}, "metric": "l2"},
        "pairs": {"manifest": ["a.parquet", "b.parquet"], "columns": {"id": "id", "image": "image"}},
        "plan": {"waves": [0.25, 0.75], "traffic": False},
    }

    def check(data: bytes) -> None:
        load_config(write(tmp_path / "run.yaml", data))

    assert try_mutations(yaml.safe_dump(tree).encode(), check, (FastfillError,), 300) > 100
