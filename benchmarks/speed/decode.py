"""Images per second and core by decoder, and whether other resizing or smaller decoding changes the search results.

One thread, from encoded bytes to (C, H, W) uint8, the encoder's input. Candidates take turns within each repeat.
Factors are over the pipeline's first decoder: Pillow, a copy by `convert`, torchvision's resize of Pillow images.
Decoders that are not installed are left out; for all of them: `pip install opencv-python-headless imagecodecs pyvips
pyvips-binary torchcodec`.

    python -m benchmarks.speed.decode [--short] [--repeats 7] [--what png jpeg]

The photographs are crops of the two that scikit-learn ships, encoded again with quality 90. The small PNGs are those
of CIFAR-100, or scikit-learn's digits if the data is missing. Recall is measured on CIFAR-100 test images, enlarged
to 256x256 with noise on top, as JPEG: decoding them at 1/2, 1/4 or 1/8 before they are resized to 32 stands for a
photograph of 2048 that becomes 256.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as transforms
from torchvision.transforms.v2 import functional

from benchmarks import small_run
from benchmarks.measure import Spread, header, interleave, table
from pipeline.config.tree import PreprocessSettings
from pipeline.embedding.decode import Limits, Pixels, decoder

DATA = Path(os.environ.get("FASTFILL_DATA", small_run.DATA))
LIMITS = Limits(max_pixels=64_000_000, max_bytes=100_000_000)
QUALITY = 90
IMAGENET = PreprocessSettings(resize=256, center_crop=224)
PACKAGES = ("pillow", "simplejpeg", "torchvision", "torchcodec", "opencv-python-headless", "imagecodecs", "pyvips")

Decode = Callable[[bytes], Pixels]


@dataclass(frozen=True, slots=True)
class Images:
    """Encoded images of one kind, and how the encoder wants them."""

    name: str
    data: list[bytes]
    preprocess: PreprocessSettings

    @property
    def title(self) -> str:
        return f"{self.name}, {np.mean([len(item) for item in self.data]) / 1000:,.1f} KB each"


def encoded(picture: Image.Image, kind: str = "JPEG") -> bytes:
    sink = io.BytesIO()
    picture.save(sink, kind, **({"quality": QUALITY} if kind == "JPEG" else {}))
    return sink.getvalue()


def photographs(count: int, width: int, height: int, kind: str = "JPEG") -> list[bytes]:
    """Crops of 500x375 at random places, enlarged where that is asked for."""
    whole = [Image.fromarray(picture) for picture in load_sample_images().images]
    rng, found = np.random.default_rng(0), []
    for number in range(count):
        picture = whole[number % len(whole)]
        left, top = (int(rng.integers(0, room + 1)) for room in (picture.width - 500, picture.height - 375))
        crop = picture.crop((left, top, left + 500, top + 375))
        found.append(encoded(crop.resize((width, height), Image.Resampling.BICUBIC), kind))
    return found


def small_pngs(count: int) -> Images:
    if DATA.exists():
        rows = next(pq.ParquetFile(DATA / "test.parquet").iter_batches(count, columns=["image"]))
        return Images("CIFAR-100 PNG of 32x32", rows["image"].to_pylist(), PreprocessSettings(size=32))
    digits = (load_digits().images[:count] * 15).astype(np.uint8)
    return Images(
        "digits as PNG of 8x8",
        [encoded(Image.fromarray(item), "PNG") for item in digits],
        PreprocessSettings(size=8, channels=1),
    )


def before(preprocess: PreprocessSettings) -> Decode:
    """Every format is tried, `convert` copies, torchvision resizes by Pillow: as `decode` did it before."""
    formats = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM")
    mode = "RGB" if preprocess.channels == 3 else "L"
    steps = []
    if preprocess.resize is not None:
        size = list(preprocess.resize) if isinstance(preprocess.resize, tuple) else preprocess.resize
        steps.append(transforms.Resize(size, InterpolationMode(preprocess.interpolation), antialias=True))
    if preprocess.center_crop is not None:
        steps.append(transforms.CenterCrop(preprocess.center_crop))
    transform = transforms.Compose(steps) if steps else lambda picture: picture

    def decode(data: bytes) -> Pixels:
        array = np.asarray(transform(Image.open(io.BytesIO(data), formats=formats).convert(mode)))
        return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)

    return decode


def ours(preprocess: PreprocessSettings, **changes: object) -> Decode:
    return decoder(preprocess.model_copy(update=changes), LIMITS)


def candidates(images: Images) -> dict[str, Decode]:
    """By name; the first is what the others are compared with."""
    preprocess = images.preprocess
    found = {"before: Pillow": before(preprocess)}
    if preprocess.resize is None:
        found["pipeline.embedding.decode"] = ours(preprocess)
    else:
        found |= {f"pipeline.embedding.decode, {name}": ours(preprocess, resample=name) for name in ("pillow", "torch")}
        gaps = (1, 1.5, 2) if images.data[0].startswith(b"\xff\xd8") else ()
        found |= {
            f"pipeline.embedding.decode, reducing_gap {gap}": ours(preprocess, reducing_gap=float(gap)) for gap in gaps
        }
    return found | whole_paths(preprocess)


def whole_paths(preprocess: PreprocessSettings) -> dict[str, Decode]:
    """Whole paths by other libraries, each as one would write it with that library alone; by name, if installed."""
    makers = {
        "torchvision.io": ("torchvision", by_torchvision),
        "torchcodec": ("torchcodec", by_torchcodec),
        "imagecodecs, torch": ("imagecodecs", by_imagecodecs),
        "OpenCV, torch": ("cv2", by_opencv),
        "OpenCV alone (INTER_AREA)": ("cv2", by_opencv_alone),
        "libvips (thumbnail)": ("pyvips", by_libvips),
    }
    return {
        name: make(preprocess)
        for name, (module, make) in makers.items()
        if importlib.util.find_spec(module) and (preprocess.resize is not None or "(" not in name)
    }


def resized(preprocess: PreprocessSettings) -> Callable[[torch.Tensor], torch.Tensor]:
    """torchvision's resize and crop of a tensor (C, H, W)."""
    interpolation = InterpolationMode(preprocess.interpolation)

    def resize(picture: torch.Tensor) -> torch.Tensor:
        if preprocess.resize is not None:
            size = [preprocess.resize] if isinstance(preprocess.resize, int) else list(preprocess.resize)
            picture = functional.resize(picture, size, interpolation, antialias=True)
        if isinstance(preprocess.center_crop, int):
            picture = functional.center_crop(picture, [preprocess.center_crop] * 2)
        return picture

    return resize


def by_arrays(decode: Callable[[bytes], Pixels], preprocess: PreprocessSettings) -> Decode:
    """From (H, W, C) arrays."""
    resize = resized(preprocess)
    return lambda data: resize(torch.from_numpy(decode(data)).permute(2, 0, 1)).numpy()


def by_torchvision(preprocess: PreprocessSettings) -> Decode:
    import warnings

    from torchvision.io import ImageReadMode, decode_image

    warnings.filterwarnings("ignore", module="torchvision")  # it is deprecated, which the result says
    mode, resize = ImageReadMode.RGB if preprocess.channels == 3 else ImageReadMode.GRAY, resized(preprocess)
    return lambda data: resize(decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode)).numpy()


def by_torchcodec(preprocess: PreprocessSettings) -> Decode:
    from torchcodec.decoders import ImageReadMode, decode_image

    mode, resize = ImageReadMode.RGB if preprocess.channels == 3 else ImageReadMode.GRAY, resized(preprocess)
    return lambda data: resize(decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=mode)).numpy()


def by_imagecodecs(preprocess: PreprocessSettings) -> Decode:
    import imagecodecs

    def decode(data: bytes) -> Pixels:
        pixels: Pixels = np.atleast_3d(
            imagecodecs.jpeg8_decode(data) if data[:1] == b"\xff" else imagecodecs.png_decode(data)
        )
        return pixels

    return by_arrays(decode, preprocess)


def opencv_array(preprocess: PreprocessSettings) -> Callable[[bytes], Pixels]:
    import cv2

    cv2.setNumThreads(1)
    flag = cv2.IMREAD_COLOR_RGB if preprocess.channels == 3 else cv2.IMREAD_GRAYSCALE
    return lambda data: np.atleast_3d(cv2.imdecode(np.frombuffer(data, np.uint8), flag))


def by_opencv(preprocess: PreprocessSettings) -> Decode:
    return by_arrays(opencv_array(preprocess), preprocess)


def by_opencv_alone(preprocess: PreprocessSettings) -> Decode:
    import cv2

    decode = opencv_array(preprocess)
    side, crop = preprocess.resize, preprocess.center_crop
    assert isinstance(side, int)
    assert isinstance(crop, int)

    def whole(data: bytes) -> Pixels:
        array: Pixels = decode(data)
        height, width = array.shape[:2]
        scale = side / min(height, width)
        size = (int(width * scale), int(height * scale))
        array = cv2.resize(array, size, interpolation=cv2.INTER_AREA)
        top, left = round((size[1] - crop) / 2), round((size[0] - crop) / 2)
        return array[top : top + crop, left : left + crop].transpose(2, 0, 1)

    return whole


def by_libvips(preprocess: PreprocessSettings) -> Decode:
    import pyvips

    pyvips.cache_set_max(0)
    side, crop = preprocess.resize, preprocess.center_crop
    assert isinstance(side, int)
    assert isinstance(crop, int)

    def whole(data: bytes) -> Pixels:
        array: Pixels = pyvips.Image.thumbnail_buffer(data, 10**7, height=side).numpy()  # landscape pictures only
        top, left = round((array.shape[0] - crop) / 2), round((array.shape[1] - crop) / 2)
        return array[top : top + crop, left : left + crop].transpose(2, 0, 1)

    return whole


def works(decode: Decode, data: bytes) -> str | None:
    """What a decoder says against a kind of image; None if it takes it."""
    try:
        decode(data)
    except Exception as error:  # noqa: BLE001 - any library's own
        return f"{type(error).__name__}: {error}"
    return None


def rates(images: Images, repeats: int) -> str:
    """A table of all candidates that take these images."""
    usable, refusals = {}, []
    for name, decode in candidates(images).items():
        refusal = works(decode, images.data[0])
        if refusal is None:
            usable[name] = decode
        else:
            refusals.append(f"{name}: {refusal.splitlines()[0][:80]}")
    runs = {name: (lambda decode=decode: [decode(item) for item in images.data]) for name, decode in usable.items()}
    seconds = interleave(runs, repeats, warm_up=1)
    reference = next(iter(usable))
    rows = []
    for name, decode in usable.items():
        differences = [np.abs(decode(item).astype(int) - usable[reference](item)) for item in images.data[:10]]
        factors = [base / own for base, own in zip(seconds[reference], seconds[name], strict=True)]
        rows.append(
            [
                name,
                Spread.of(len(images.data) / taken for taken in seconds[name]).text(",.0f"),
                f"{statistics.median(factors):.2f}",
                max(int(item.max()) for item in differences),
                f"{np.mean([item.mean() for item in differences]):.4f}",
            ]
        )
    head = ["decoder", "images/s and core", "x before", "largest difference", "mean difference"]
    left_out = f"\n\nNot for these: {'; '.join(refusals)}." if refusals else ""
    return f"## {images.title}\n\n{table(head, rows)}{left_out}"


def enlarged(count: int, side: int) -> tuple[list[bytes], NDArray[np.int32]]:
    """JPEGs of `side` made from CIFAR-100 test images, with noise so that there is detail to lose; and labels."""
    rng, found = np.random.default_rng(0), []
    rows = pq.read_table(DATA / "test.parquet", columns=["image", "label"])  # sorted by label
    rows = rows.take(rng.permutation(rows.num_rows)[:count])
    for data in rows["image"].to_pylist():
        picture = Image.open(io.BytesIO(data)).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        noisy = np.asarray(picture) + rng.normal(0, 12, (side, side, 3))
        found.append(encoded(Image.fromarray(noisy.clip(0, 255).astype(np.uint8))))
    return found, rows["label"].to_numpy()


def embed(data: list[bytes], decode: Decode, model: torch.nn.Module) -> torch.Tensor:
    """(N, 128) float32 by CIFAR-100's `new.pt2`."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)))
    pixels = torch.from_numpy(np.stack([decode(item) for item in data]))
    with torch.inference_mode():
        return torch.cat([model((part.float() - mean) / std) for part in pixels.split(256)])


def neighbours(queries: torch.Tensor, gallery: torch.Tensor, k: int = 10) -> torch.Tensor:
    """(N, k) rows of the gallery by Euclidean distance; an image does not find itself."""
    distances = torch.cdist(queries, gallery, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    return distances.topk(k, largest=False).indices


def recall(count: int) -> str:
    """How the gallery's decoding changes retrieval, with queries decoded in full."""
    data, labels = enlarged(count, side=256)
    model = torch.export.load(DATA / "new.pt2").module()
    full = PreprocessSettings(resize=(32, 32))
    exact = embed(data, before(full), model)
    wanted, truth = neighbours(exact, exact), torch.tensor(labels)
    variants: dict[str, Decode] = {"before: Pillow, in full": before(full), "torch, in full": ours(full)}
    variants |= {f"torch, reducing_gap {gap}": ours(full, reducing_gap=gap) for gap in (1.0, 1.5, 2.0, 4.0)}
    rows = []
    for name, decode in variants.items():
        gallery = embed(data, decode, model)
        found = neighbours(exact, gallery)
        shift = torch.nn.functional.cosine_similarity(exact, gallery)
        agreement = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(wanted.tolist(), found.tolist(), strict=True)])
        top1 = 100 * (truth[found[:, 0]] == truth).float().mean()
        hits = 100 * (truth[found] == truth[:, None]).float().mean()
        rows.append(
            [
                name,
                f"{1 - shift.mean():.2e}",
                f"{1 - shift.min():.2e}",
                f"{agreement:.4f}",
                f"{top1:.1f}",
                f"{hits:.2f}",
            ]
        )
    head = ["gallery decoded", "1 - cosine, mean", "largest", "same 10 neighbours", "top-1", "of the 10 of the class"]
    return (
        f"## Retrieval, {count:,} CIFAR-100 test images as JPEG of 256x256, resized to 32, `new.pt2`\n\n"
        f"Queries always by the first line's decoding.\n\n{table(head, rows)}"
    )


def png(short: bool, repeats: int) -> str:
    return rates(small_pngs(300 if short else 2000), repeats)


def jpeg(short: bool, repeats: int) -> str:
    return rates(Images("JPEG of 500x375", photographs(12 if short else 60, 500, 375), IMAGENET), repeats)


def large_jpeg(short: bool, repeats: int) -> str:
    return rates(Images("JPEG of 2000x1500", photographs(2 if short else 8, 2000, 1500), IMAGENET), repeats)


def large_png(short: bool, repeats: int) -> str:
    return rates(Images("PNG of 500x375", photographs(6 if short else 20, 500, 375, "PNG"), IMAGENET), repeats)


def retrieval(short: bool, repeats: int) -> str:
    if not DATA.exists():
        return f"No measurement of retrieval: {DATA} is not there."
    return recall(300 if short else 1500)


PARTS = {"png": png, "jpeg": jpeg, "large-jpeg": large_jpeg, "large-png": large_png, "retrieval": retrieval}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="fewer images and 3 repeats")
    parser.add_argument("--repeats", type=int, help="7, or 3 with --short")
    parser.add_argument("--what", nargs="+", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{header(PACKAGES)} One thread; median (lowest - highest).", flush=True)
    for name in arguments.what:
        print(f"\n{PARTS[name](arguments.short, arguments.repeats or (3 if arguments.short else 7))}", flush=True)


if __name__ == "__main__":
    main()
