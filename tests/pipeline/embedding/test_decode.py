"""Images: found in three kinds of places, decoded as torchvision does, and a bad one is never more than a reject."""

from __future__ import annotations

import errno
import io
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as transforms
from torchvision.transforms.v2 import functional

from pipeline.config.tree import PreprocessSettings
from pipeline.embedding.decode import Limits, LoadedUnit, Pixels, decode_image, load_unit, rejecting
from pipeline.embedding.fetch import Reject
from pipeline.errors import DataError
from pipeline.schema import UNITS, Unit
from pipeline.storage import objects as storage
from pipeline.storage import parquet
from pipeline.storage.local import LocalReader
from pipeline.storage.settings import FetchSettings

SIDE = 8
PREPROCESS = PreprocessSettings(size=SIDE)
LIMITS = Limits(max_pixels=64_000_000, max_bytes=100_000)
FETCH = FetchSettings(concurrency=3)


def picture(seed: int = 0, height: int = SIDE, width: int = SIDE, channels: int = 3) -> Pixels:
    """(H, W, C) or (H, W) random pixels."""
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def encode(pixels: np.ndarray[Any, Any], kind: str = "PNG") -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, kind)
    return sink.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A small PNG that claims to be large; its stream is valid and far too short."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    stream = zlib.compress(bytes(10**6))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", stream) + chunk(b"IEND", b"")


def load(
    folder: Path, places: list[dict[str, Any]], preprocess: PreprocessSettings = PREPROCESS, limits: Limits = LIMITS
) -> LoadedUnit:
    """Load one unit whose images lie at `places`; ids count down from 100."""
    nothing = {"uri": None, "offset": None, "length": None, "row": None, "etag": None}
    rows = [{"id": 100 - number, **nothing, **place} for number, place in enumerate(places)]
    units = str(folder / "units.parquet")
    table = pa.Table.from_pylist(rows, UNITS)
    storage.put(units, parquet.parquet_bytes(UNITS, [table.slice(0, 0), table]))  # the unit is row group 1
    return load_unit(Unit(1, 1, units, 1, len(rows)), preprocess, limits, FETCH)


def write(path: Path, data: bytes) -> dict[str, Any]:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return {"uri": str(path)}


def container(path: Path, parts: list[bytes]) -> list[dict[str, Any]]:
    """Parts in one file, with something between them."""
    content, places = b"", []
    for part in parts:
        content += b"padding"
        places.append({"uri": str(path), "offset": len(content), "length": len(part)})
        content += part
    path.write_bytes(content)
    return places


def write_parquet(path: Path, parts: list[bytes | None], row_group_size: int = 3) -> list[dict[str, Any]]:
    pq.write_table(pa.table({"picture": pa.array(parts, pa.binary())}), path, row_group_size=row_group_size)
    return [{"uri": f"{path}#picture", "row": row} for row in range(len(parts))]


def said(loaded: LoadedUnit) -> dict[int, str]:
    return {row: f"{reject.stage}: {reject.reason}" for row, reject in loaded.rejects.items()}


def chw(pixels: Pixels) -> Pixels:
    return pixels.transpose(2, 0, 1)


def test_the_three_places_and_their_mixture_give_the_same_pixels_in_order(tmp_path: Path) -> None:
    pictures = [picture(seed) for seed in range(8)]
    data = [encode(item) for item in pictures]
    objects = [write(tmp_path / f"{number}.png", item) for number, item in enumerate(data)]
    ranges, rows = container(tmp_path / "all.tar", data), write_parquet(tmp_path / "all.parquet", [*data])
    mixed = [(objects, ranges, rows)[number % 3][number] for number in range(len(data))]
    wanted = np.stack([chw(item) for item in pictures])
    for places in (objects, ranges, rows, mixed):
        for step in (1, -1):
            loaded = load(tmp_path, places[::step])
            assert loaded.rejects == {}
            assert loaded.ids.tolist() == [100 - number for number in range(len(data))]
            assert np.array_equal(loaded.pixels, wanted[::step])


def test_rows_of_several_parquet_files_in_any_order_and_twice_are_each_found(tmp_path: Path) -> None:
    pictures = [picture(seed) for seed in range(10)]
    one = write_parquet(tmp_path / "one.parquet", [encode(item) for item in pictures[:5]], row_group_size=2)
    two = write_parquet(tmp_path / "two.parquet", [encode(item) for item in pictures[5:]], row_group_size=2)
    order = [7, 1, 9, 1, 0, 5, 4]
    loaded = load(tmp_path, [(one + two)[number] for number in order])
    assert np.array_equal(loaded.pixels, np.stack([chw(pictures[number]) for number in order]))


def test_etags_say_which_version_of_an_object_was_read(tmp_path: Path) -> None:
    good = write(tmp_path / "a.png", encode(picture()))
    gone = {"uri": str(tmp_path / "gone.png")}
    row = write_parquet(tmp_path / "b.parquet", [encode(picture())])[0]
    wanted = [storage.stat(str(tmp_path / name)).etag for name in ("a.png", "b.parquet")]
    assert load(tmp_path, [good, gone, row]).etags == [wanted[0], None, wanted[1]]
    write(tmp_path / "a.png", encode(picture(1)))
    assert load(tmp_path, [good]).etags != wanted[:1]


def test_a_container_that_was_made_anew_gives_rejects_and_never_another_image(tmp_path: Path) -> None:
    images = [encode(picture(seed)) for seed in range(3)]
    assert len({len(data) for data in images}) == 1  # so that each place still holds a whole image
    tar, rows = tmp_path / "a.tar", tmp_path / "a.parquet"

    def write_both(parts: list[bytes], seconds: int) -> list[dict[str, Any]]:
        places = container(tar, parts) + write_parquet(rows, list(parts))
        for path in (tar, rows):
            os.utime(path, (seconds, seconds))
        return [place | {"etag": storage.stat(place["uri"].partition("#")[0]).etag} for place in places]

    planned = write_both(images, 1)
    loaded = load(tmp_path, planned)
    assert (loaded.rejects, loaded.changed) == ({}, 0)
    write_both([images[1], images[0], images[2]], 2)
    alone = write(tmp_path / "alone.png", images[1]) | {"etag": "of-another-one"}
    unknown = [place | {"etag": None} for place in planned]
    loaded = load(tmp_path, [*planned, alone, *unknown])
    remedy = "make the manifest again, and start a new run with --new-run"
    assert said(loaded) == dict.fromkeys(range(6), f"fetch: container changed: {remedy}")
    assert not loaded.pixels[:6].any()
    assert loaded.changed == 1
    for row, seed in zip(range(6, 13), [1, 1, 0, 2, 1, 0, 2], strict=True):
        assert (loaded.pixels[row] == chw(picture(seed))).all()


def test_a_place_that_the_disk_cannot_read_is_a_reject_and_its_neighbours_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = container(tmp_path / "a.tar", [encode(picture(seed)) for seed in range(3)])
    places += [write(tmp_path / f"{seed}.png", encode(picture(seed))) for seed in range(3)]
    bad = places[1]["offset"]

    class Disk(LocalReader):
        """One bad sector, and one bad file: nothing here breaks a disk for real."""

        def whole(self, name: str, most_bytes: int) -> tuple[bytes, str]:
            if name.endswith("1.png"):
                raise OSError(errno.EIO, "Input/output error")
            return super().whole(name, most_bytes)

        def spans(self, name: str, spans: list[tuple[int, int]]) -> Iterator[tuple[bytes, str]]:
            for span in spans:
                if span[0] <= bad < span[1]:
                    raise OSError(errno.EIO, "Input/output error")
                yield from super().spans(name, [span])

    monkeypatch.setattr(storage, "_reader", lambda *_: Disk())
    loaded = load(tmp_path, places)
    assert said(loaded) == {1: "fetch: unreadable: EIO", 4: "fetch: unreadable: EIO"}
    for row in (0, 2, 3, 5):
        assert (loaded.pixels[row] == chw(picture(row % 3))).all()


def test_every_kind_of_bad_image_is_a_reject_and_its_neighbours_are_loaded(tmp_path: Path) -> None:
    whole = encode(picture())
    (tmp_path / "folder.png").mkdir()
    cases: list[tuple[dict[str, Any], str]] = [
        (write(tmp_path / "truncated.png", whole[: len(whole) // 2]), "decode: truncated"),
        (write(tmp_path / "text.png", b"This is a text.\n"), "decode: not an image"),
        (write(tmp_path / "bomb.png", png_header(30_000, 30_000)), "decode: too large: more than 64000000 pixels"),
        (write(tmp_path / "empty.png", b""), "decode: empty"),
        ({"uri": str(tmp_path / "missing.png")}, "fetch: missing"),
        ({"uri": str(tmp_path / "text.png" / "below.png")}, "fetch: missing"),
        ({"uri": str(tmp_path / "folder.png")}, "fetch: missing: a folder"),
        ({"uri": f"{tmp_path}/{'x' * 300}.png"}, "fetch: missing: "),
        ({"uri": f"{tmp_path}/nul\0.png"}, "fetch: missing: "),
        (write(tmp_path / "huge.png", whole + bytes(LIMITS.max_bytes)), "fetch: too large: "),
        (write(tmp_path / "tall.png", encode(picture(height=9))), "preprocess: wrong shape: 9x8, expected 8x8"),
        (write(tmp_path / "postscript.png", encode(picture(), "EPS")), "decode: not an image"),
        ({"uri": str(tmp_path / "good.png"), "offset": 0, "length": 9999}, f"fetch: truncated: {len(whole)} of 9999"),
        ({"uri": str(tmp_path / "good.png"), "offset": 9999, "length": 10}, "fetch: truncated: 0 of 10"),
        ({"uri": str(tmp_path / "good.png"), "offset": -1, "length": 10}, "fetch: missing: offset"),
        ({"uri": str(tmp_path / "good.png"), "offset": 0, "length": -1}, "fetch: missing: offset"),
        ({"uri": str(tmp_path / "good.png"), "offset": 0, "length": 10**6}, "fetch: too large: 1000000 bytes"),
        ({"uri": f"{tmp_path}/rows.parquet#picture", "row": 0}, "decode: empty"),
        ({"uri": f"{tmp_path}/rows.parquet#picture", "row": 1}, "decode: not an image"),
        ({"uri": f"{tmp_path}/rows.parquet#picture", "row": 2}, "fetch: too large: "),
        ({"uri": f"{tmp_path}/rows.parquet#picture", "row": 3}, "fetch: missing"),
        ({"uri": f"{tmp_path}/gone.parquet#picture", "row": 0}, "fetch: missing"),
        ({"uri": f"{tmp_path}/text.png#picture", "row": 0}, "fetch: damaged: not a readable Parquet file"),
    ]
    good = write(tmp_path / "good.png", whole)
    write_parquet(tmp_path / "rows.parquet", [None, b"text", bytes(LIMITS.max_bytes + 1)])
    loaded = load(tmp_path, [item for place, _ in cases for item in (place, good)])
    assert sorted(loaded.rejects) == list(range(0, 2 * len(cases), 2))
    for number, (_, wanted) in enumerate(cases):
        assert said(loaded)[2 * number].startswith(wanted)
        assert not loaded.pixels[2 * number].any()
    assert (loaded.pixels[1::2] == chw(picture())).all()


@contextmanager
def nobody() -> Iterator[None]:
    """Not root, who may read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_an_image_that_may_not_be_read_is_a_reject() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others than root
        folder = Path(name)
        places = [write(folder / "good.png", encode(picture())), write(folder / "closed.png", encode(picture()))]
        places += write_parquet(folder / "closed.parquet", [encode(picture())])
        nothing = {"offset": None, "length": None, "row": None, "etag": None}
        table = pa.Table.from_pylist([{"id": 1, **nothing, **place} for place in places], UNITS)
        pq.write_table(table, folder / "units.parquet")
        folder.chmod(0o755)
        for closed in ("closed.png", "closed.parquet"):
            (folder / closed).chmod(0)
        with nobody():
            loaded = load_unit(Unit(1, 0, f"{folder}/units.parquet", 0, 3), PREPROCESS, LIMITS, FETCH)
    assert said(loaded) == {1: "fetch: forbidden", 2: "fetch: forbidden"}


def test_a_unit_of_rejects_only_has_zeros_for_pixels(tmp_path: Path) -> None:
    loaded = load(tmp_path, [{"uri": f"{tmp_path}/{number}.png"} for number in range(3)])
    assert loaded.pixels.shape == (3, 3, SIDE, SIDE)
    assert len(loaded.rejects) == 3


def test_a_missing_units_file_is_an_error_and_no_reject(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing"):
        load_unit(Unit(1, 0, str(tmp_path / "nowhere.parquet"), 0, 1), PREPROCESS, LIMITS, FETCH)


@contextmanager
def little_memory(megabytes: int) -> Iterator[None]:
    """Let this process grow by so much and no more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + megabytes * 2**20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize(
    ("data", "preprocess", "wanted"),
    [
        (png_header(30_000, 30_000), PREPROCESS, "decode: too large: more than 64000000 pixels"),
        (png_header(9_000, 9_000), PREPROCESS, "decode: too large: 9000x9000, at most 64000000 pixels"),
        (
            png_header(60_000_000, 1),
            PreprocessSettings(resize=256, center_crop=224),
            "preprocess: too large when resized",
        ),
    ],
)
def test_a_decompression_bomb_is_refused_before_it_is_decoded(
    data: bytes, preprocess: PreprocessSettings, wanted: str
) -> None:
    start = time.perf_counter()
    with little_memory(megabytes=50), pytest.raises(Reject) as caught:
        decode_image(data, preprocess, LIMITS)
    assert str(caught.value).startswith(wanted)
    assert len(data) < 2000
    assert time.perf_counter() - start < 5


def test_the_limit_on_pixels_is_exact() -> None:
    decode_image(encode(picture()), PREPROCESS, Limits(SIDE * SIDE, 10**6))
    with pytest.raises(Reject, match="8x8, at most 63 pixels"):
        decode_image(encode(picture()), PREPROCESS, Limits(SIDE * SIDE - 1, 10**6))


FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM"]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(FORMATS),
    cut=st.integers(0, 2000),
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6),
)
def test_decode_image_of_any_mutated_bytes_decodes_or_rejects(
    kind: str, cut: int, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(encode(picture(), kind)[:cut])
    for place, value in changes:
        if place < len(data):
            data[place] = value
    with suppress(Reject):  # no other exception may come out
        assert decode_image(bytes(data), PREPROCESS, LIMITS).shape == (3, SIDE, SIDE)


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200))
def test_bytes_that_are_no_image_are_rejected(data: bytes) -> None:
    with pytest.raises(Reject):
        decode_image(data, PREPROCESS, LIMITS)


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    resize=st.one_of(st.integers(1, 40), st.tuples(st.integers(1, 40), st.integers(1, 40))),
    crop=st.one_of(st.integers(1, 40), st.tuples(st.integers(1, 40), st.integers(1, 40))),
    interpolation=st.sampled_from(["nearest", "bilinear", "bicubic"]),
    kind=st.sampled_from(["PNG", "JPEG"]),
)
def test_resize_and_crop_give_what_torchvision_gives(
    height: int, width: int, resize: Any, crop: Any, interpolation: Any, kind: str
) -> None:
    data = encode(picture(height * width, height, width), kind)
    decoded = Image.open(io.BytesIO(data))
    steps = transforms.Compose(
        [transforms.Resize(resize, InterpolationMode(interpolation)), transforms.CenterCrop(crop)]
    )

    def found(resample: Any) -> Pixels:
        settings = {"resize": resize, "center_crop": crop, "interpolation": interpolation, "resample": resample}
        return decode_image(data, PreprocessSettings(**settings), LIMITS)

    by_pillow = chw(np.asarray(steps(decoded)))
    by_torch = steps(torch.from_numpy(chw(np.array(decoded)))).numpy()
    assert np.array_equal(found("pillow"), by_pillow)
    expected = by_pillow if interpolation == "nearest" else by_torch
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":  # without AVX2 torchvision resizes in floats
        assert np.abs(found("torch").astype(int) - expected).max(initial=0) <= 1
    else:
        assert np.array_equal(found("torch"), expected)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_torch_and_pillow_resize_a_photograph_to_within_one_of_255(interpolation: Any) -> None:
    pixels = np.add.outer(np.sin(np.arange(75) / 9), np.cos(np.arange(100) / 7))[..., None] * [40, 30, 20] + 128
    noise = np.random.default_rng(0).normal(0, 20, pixels.shape)
    data = encode((pixels + noise).clip(0, 255).astype(np.uint8))
    by_torch, by_pillow = (
        decode_image(
            data, PreprocessSettings(resize=36, center_crop=32, interpolation=interpolation, resample=resample), LIMITS
        ).astype(int)
        for resample in ("torch", "pillow")
    )
    assert np.abs(by_torch - by_pillow).max() == 1
    assert np.abs(by_torch - by_pillow).mean() < 0.02


def jpeg(pixels: Pixels, **options: Any) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "JPEG", **options)
    return sink.getvalue()


def by_pillow(data: bytes, channels: int) -> Pixels | None:
    """What Pillow alone decodes, (C, H, W); none where it says that the image is damaged."""
    try:
        array = np.asarray(Image.open(io.BytesIO(data), formats=["JPEG"]).convert("RGB" if channels == 3 else "L"))
    except (OSError, SyntaxError, ValueError):
        return None
    return array[None] if channels == 1 else chw(array)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=300, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    grey=st.booleans(),
    channels=st.sampled_from([1, 3]),
    options=st.fixed_dictionaries(
        {
            "quality": st.integers(1, 100),
            "subsampling": st.integers(0, 2),
            "progressive": st.booleans(),
            "restart_marker_blocks": st.integers(0, 3),
        }
    ),
    cut=st.one_of(st.none(), st.integers(0, 4000)),
    changes=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=4),
)
def test_a_jpeg_whole_or_damaged_is_decoded_or_rejected_as_by_pillow(
    shape: tuple[int, int],
    grey: bool,
    channels: Any,
    options: dict[str, Any],
    cut: int | None,
    changes: list[tuple[int, int]],
) -> None:
    data = bytearray(jpeg(picture(1, *shape, channels=1 if grey else 3), **options)[:cut])
    for place, value in changes:
        if place < len(data):
            data[place] = value
    wanted = by_pillow(bytes(data), channels)
    if wanted is None:
        with pytest.raises(Reject):
            decode_image(bytes(data), PreprocessSettings(size=shape, channels=channels), LIMITS)
    else:
        preprocess = PreprocessSettings(size=wanted.shape[1:], channels=channels)
        assert np.array_equal(decode_image(bytes(data), preprocess, LIMITS), wanted)


def test_a_jpeg_in_cmyk_becomes_the_colours_that_pillow_gives() -> None:
    sink = io.BytesIO()
    Image.fromarray(picture()).convert("CMYK").save(sink, "JPEG", quality=95)
    assert np.array_equal(decode_image(sink.getvalue(), PREPROCESS, LIMITS), by_pillow(sink.getvalue(), 3))


def held(orientation: int, kind: str = "JPEG", mode: str = "RGB", height: int = 40, width: int = 60) -> bytes:
    """A picture from a camera that was held this way."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    sink = io.BytesIO()
    Image.fromarray(smooth(height, width)).convert(mode).save(sink, kind, exif=exif)
    return sink.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "P")])
@pytest.mark.parametrize("resample", ["torch", "pillow"])
def test_decode_image_with_an_orientation_gives_what_an_upright_image_gives(
    orientation: int, kind: str, mode: str, resample: Any
) -> None:
    data = held(orientation, kind, mode)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    settings = {"resize": 20, "center_crop": (16, 24), "resample": resample}
    wanted = decode_image(encode(upright), PreprocessSettings(**settings), LIMITS)
    assert np.array_equal(decode_image(data, PreprocessSettings(**settings), LIMITS), wanted)
    assert np.array_equal(decode_image(data, PreprocessSettings(size=upright.shape[:2]), LIMITS), chw(upright))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_decode_image_exif_ignore_leaves_the_picture_on_its_side(kind: str) -> None:
    data = held(6, kind)
    wanted = chw(np.asarray(Image.open(io.BytesIO(data))))
    assert np.array_equal(decode_image(data, PreprocessSettings(size=(40, 60), exif="ignore"), LIMITS), wanted)


def test_decode_image_reduced_jpeg_on_its_side_is_decoded_no_smaller_than_the_gap_allows() -> None:
    data = held(6, height=400, width=600)
    settings = {"resize": (150, 100), "center_crop": (150, 100)}
    reduced = decode_image(data, PreprocessSettings(**settings, reducing_gap=2), LIMITS)
    exact = decode_image(data, PreprocessSettings(**settings), LIMITS)
    assert 0 < np.abs(reduced.astype(int) - exact.astype(int)).mean() < 2


@pytest.mark.parametrize("tag", [256, 257, 273])
@pytest.mark.parametrize("resample", ["torch", "pillow"])
def test_decode_image_tiff_with_rational_size_or_offset_is_a_reject(tag: int, resample: Any) -> None:
    data = bytearray(encode(picture(), "TIFF"))
    (start,) = struct.unpack_from("<I", data, 4)
    (entries,) = struct.unpack_from("<H", data, start)
    places = range(start + 2, start + 2 + 12 * entries, 12)
    place = next(place for place in places if struct.unpack_from("<H", data, place)[0] == tag)
    struct.pack_into("<HII", data, place + 2, 5, 1, len(data))
    data += struct.pack("<II", 8, 1)
    with pytest.raises(Reject, match=r"^decode: damaged: "):
        decode_image(bytes(data), PreprocessSettings(resize=SIDE, center_crop=SIDE, resample=resample), LIMITS)


@pytest.mark.parametrize(
    "error", [TypeError("x"), KeyError("x"), struct.error("x"), RecursionError("x"), LookupError()]
)
def test_rejecting_any_error_is_a_reject_with_one_line(error: Exception) -> None:
    with pytest.raises(Reject, match=r"^decode: damaged: [^\n]+$"), rejecting():
        raise error


def test_rejecting_memory_that_is_missing_is_a_reject_and_an_interrupt_is_not() -> None:
    with pytest.raises(Reject, match=r"^decode: too large: "), rejecting():
        raise MemoryError
    with pytest.raises(KeyboardInterrupt), rejecting():
        raise KeyboardInterrupt


def test_rejecting_error_that_is_no_unicode_can_be_stored() -> None:
    with pytest.raises(Reject) as caught, rejecting():
        raise ValueError("a\nname \udcff")
    assert pa.array([caught.value.reason]).to_pylist() == ["damaged: a name \\udcff"]


SMALL_FILE_LARGE_PICTURE = """
import io, resource, sys
from PIL import Image, ImageOps
from pipeline.config.tree import PreprocessSettings
from pipeline.embedding.decode import Limits, decode_image
def image(side):
    sink = io.BytesIO()
    Image.new(sys.argv[2], (side, side)).save(sink, sys.argv[1])
    return sink.getvalue()
data = image(4000)
preprocess, limits = PreprocessSettings(resize=256, center_crop=224), Limits(16_000_000, 2**26)
decode_image(image(300), preprocess, limits)
from pathlib import Path
Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024
before = status("VmRSS")
decode_image(data, preprocess, limits)
print((status("VmHWM") - before) / 16e6)
"""


@pytest.mark.parametrize(
    ("kind", "mode", "most"),
    [("GIF", "P", 5), ("PNG", "RGB", 8.5), ("PNG", "RGBA", 8.5), ("JPEG", "CMYK", 8.5), ("TIFF", "RGB", 12)],
)
def test_decode_image_small_file_with_a_large_picture_takes_few_bytes_per_pixel(
    kind: str, mode: str, most: float
) -> None:
    code = [sys.executable, "-c", SMALL_FILE_LARGE_PICTURE, kind, mode]
    found = subprocess.run(code, capture_output=True, text=True, check=True)
    assert float(found.stdout) < most


def test_decode_image_formats_whose_decoder_holds_more_may_have_fewer_pixels() -> None:
    data = encode(picture(height=20, width=20), "WEBP")
    assert decode_image(data, PreprocessSettings(size=20), Limits(534, 10**6)).shape == (3, 20, 20)
    with pytest.raises(Reject, match="decode: too large: 20x20, at most 399 pixels of WEBP"):
        decode_image(data, PreprocessSettings(size=20), Limits(533, 10**6))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_decode_image_animation_gives_its_first_picture_and_decodes_no_other(kind: str) -> None:
    frames = [Image.fromarray(np.full((SIDE, SIDE, 3), value, np.uint8)) for value in (10, 90, 200)]
    sink = io.BytesIO()
    frames[0].save(sink, kind, save_all=True, append_images=frames[1:])
    found = decode_image(sink.getvalue(), PREPROCESS, LIMITS)
    assert np.abs(found.astype(int) - 10).max() <= 3


def test_load_unit_unknown_scheme_fifo_and_link_are_rejects_of_their_own(tmp_path: Path) -> None:
    data, good = tmp_path / "data", encode(picture())
    os.mkfifo(tmp_path / "fifo")
    outside = write(tmp_path / "outside.png", good)
    data.mkdir()
    (data / "link.png").symlink_to(tmp_path / "outside.png")
    places = [
        {"uri": "http://somewhere/a.png"},
        {"uri": str(tmp_path / "fifo")},
        {"uri": str(tmp_path / "fifo"), "offset": 3, "length": 4},
        {"uri": f"{data}/link.png"},
        {"uri": f"{data}/link.png", "offset": 0, "length": len(good)},
        outside,
        write(data / "inside.png", good),
    ]
    loaded = load(tmp_path, places, limits=Limits(64_000_000, 100_000, str(data)))
    link = f"fetch: outside data_root: {tmp_path}/outside.png (allow_outside: true reads it)"
    assert said(loaded) == {
        0: "fetch: missing: http:// cannot be read, only local paths and s3://",
        1: "fetch: unreadable: a FIFO, not a file",
        2: "fetch: unreadable: a FIFO, not a file",
        3: link,
        4: link,
    }


def test_most_jpegs_are_decoded_without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    colour, grey, large = jpeg(picture()), jpeg(picture(channels=1)), jpeg(picture(height=20, width=30))
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("Pillow has decoded it"))
    decode_image(colour, PREPROCESS, LIMITS)
    decode_image(grey, PreprocessSettings(size=SIDE, channels=1), LIMITS)
    decode_image(large, PreprocessSettings(resize=8, center_crop=8), LIMITS)


def smooth(height: int, width: int) -> Pixels:
    """A picture without detail, so that decoding it smaller loses little."""
    rows, columns = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(rows / 80), np.cos(columns / 100), np.sin((rows + columns) / 120)], axis=-1)
    return (waves * 100 + 128).astype(np.uint8)


@pytest.mark.parametrize("resample", ["torch", "pillow"])
@pytest.mark.parametrize(
    ("gap", "decoded"), [(1.0, (100, 151)), (1.5, (100, 151)), (2.0, (200, 301)), (9.0, (400, 601))]
)
def test_with_a_reducing_gap_a_jpeg_is_decoded_no_smaller_than_that(
    resample: Any, gap: float, decoded: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    module, name = (torch.nn.functional, "interpolate") if resample == "torch" else (functional, "resize")
    resize = getattr(module, name)

    def look(picture: Any, *arguments: Any, **words: Any) -> Any:
        seen.append(functional.get_size(picture))
        return resize(picture, *arguments, **words)

    monkeypatch.setattr(module, name, look)
    data = jpeg(smooth(400, 601), quality=95)
    settings = {"resize": 64, "center_crop": 64, "resample": resample}
    reduced = decode_image(data, PreprocessSettings(**settings, reducing_gap=gap), LIMITS)
    exact = decode_image(data, PreprocessSettings(**settings), LIMITS)
    assert [tuple(size) for size in seen] == [decoded, (400, 601)]
    assert np.abs(reduced.astype(int) - exact.astype(int)).mean() < 1
    assert np.array_equal(reduced, exact) == (decoded == (400, 601))


def test_a_reducing_gap_changes_nothing_in_other_formats() -> None:
    data = encode(smooth(200, 200))
    settings = {"resize": 40, "center_crop": 40}
    reduced = decode_image(data, PreprocessSettings(**settings, reducing_gap=1), LIMITS)
    assert np.array_equal(reduced, decode_image(data, PreprocessSettings(**settings), LIMITS))


def test_an_image_of_the_right_shape_is_not_touched() -> None:
    assert np.array_equal(decode_image(encode(picture()), PREPROCESS, LIMITS), chw(picture()))


def test_grey_and_colour_become_what_the_encoder_takes() -> None:
    grey, colour = picture(channels=1), picture()
    as_grey, as_colour = PreprocessSettings(size=SIDE, channels=1), PREPROCESS
    assert np.array_equal(decode_image(encode(grey), as_grey, LIMITS), grey[None])
    assert np.array_equal(decode_image(encode(grey), as_colour, LIMITS), np.stack([grey] * 3))
    luma = np.asarray(Image.fromarray(colour).convert("L"))
    assert np.array_equal(decode_image(encode(colour), as_grey, LIMITS), luma[None])
    transparent = np.dstack([colour, picture(1, channels=1)])
    assert np.array_equal(decode_image(encode(transparent), as_colour, LIMITS), chw(colour))


def test_grey_of_16_bits_keeps_its_upper_8_and_is_not_clipped_to_white() -> None:
    deep = np.random.default_rng(0).integers(0, 2**16, (SIDE, SIDE), np.uint16)
    found = decode_image(encode(deep), PreprocessSettings(size=SIDE, channels=1), LIMITS)
    assert np.array_equal(found, (deep >> 8).astype(np.uint8)[None])


def test_floating_point_pixels_are_rejected() -> None:
    with pytest.raises(Reject, match="not 8 or 16 bits a channel"):
        decode_image(encode(picture(channels=1).astype(np.float32), "TIFF"), PREPROCESS, LIMITS)
