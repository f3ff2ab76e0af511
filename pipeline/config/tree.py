"""The config of a run: one pydantic tree with a section per step. `config.load` reads it from a file.

Unknown keys are errors. Required keys have no default.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self, TypeVar

from pydantic import Field, model_validator

from pipeline.config.method import (
    EvaluateSettings,
    FitSettings,
    GateSettings,
    PlanSettings,
    ProbeSettings,
    SelectSettings,
)
from pipeline.storage.settings import Count, FetchSettings, Fraction, Section, StorageSettings

Metric = Literal["l2", "ip", "cosine"]
Side = Count | tuple[Count, Count]

_UNIT_BYTES = 64 * 2**20
_MAX_UNIT_IMAGES = 2048
_MOST_FROM_GALLERY = 20_000  # pairs
_SHARE_OF_GALLERY = 5  # one image in five is a pair
_LEAST_FROM_GALLERY = 64  # pairs, if half of the gallery has as many


class PreprocessSettings(Section):
    """How a decoded image becomes the encoder's input; the words are torchvision's.

    An image is turned upright, resized, cropped at its centre, scaled and normalised, in this order.
    """

    channels: Literal[1, 3] = 3
    """1 for grey, 3 for RGB; images are converted, and transparency is dropped."""
    resize: Side | None = None
    """Resize to [height, width]; one number is the length of the shorter side."""
    center_crop: Side | None = None
    """Cut this size out of the centre, after `resize`."""
    size: Side | None = None
    """Size that every image already has, if there is neither `resize` nor `center_crop`; others are rejected."""
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bilinear"
    """Interpolation of `resize`, with antialiasing."""
    resample: Literal["pillow", "torch"] = "torch"
    """Library that resizes: the results differ by at most 1 of 255, and torch takes half the time (decision 0004)."""
    reducing_gap: Annotated[float, Field(ge=1)] | None = None
    """Decode a JPEG at 1/2, 1/4 or 1/8 of its size if that is still this many times the resized size."""
    decoder: Literal["cpu", "device"] = "cpu"
    """With `device` the embedding actor decodes and resizes JPEGs, on a GPU with nvJPEG; never run on a GPU yet."""
    exif: Literal["apply", "ignore"] = "apply"
    """With `apply` an image is turned upright as its EXIF orientation says; with `ignore` it is not."""
    pixel_range: Literal[1, 255] = 1
    """Value of white before `mean` and `std` are applied."""
    mean: tuple[float, ...] = (0.0,)
    """Subtracted from the pixels: one number, or one per channel, in units of `pixel_range`."""
    std: tuple[Annotated[float, Field(gt=0)], ...] = (1.0,)
    """Divides the pixels: one number, or one per channel, in units of `pixel_range`."""

    @model_validator(mode="after")
    def _one_shape(self) -> Self:
        if self.image_size is None:
            raise ValueError("the input shape is unknown: give size, center_crop, or resize as [height, width]")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                raise ValueError(f"{name} has {len(values)} values: give 1 or {self.channels}, one per channel")
        if self.reducing_gap is not None and self.resize is None:
            raise ValueError("reducing_gap needs resize: it is a multiple of the resized size")
        if self.decoder == "device" and (self.reducing_gap is not None or self.resample == "pillow"):
            raise ValueError(
                "decoder: device decodes in full and resizes with torch: leave out reducing_gap and resample"
            )
        return self

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(height, width) of the encoder's input in pixels."""
        if self.center_crop is not None:
            return _pair(self.center_crop)
        if isinstance(self.resize, tuple):
            return self.resize
        return _pair(self.size) if self.size is not None else None


class TorchvisionSettings(Section):
    """An architecture of torchvision, its weights, and the layer to cut at."""

    model: str
    """Name of the architecture, such as `resnet50`."""
    state_dict: str
    """Its weights: a safetensors file, or a checkpoint that torch reads with `weights_only`."""
    cut_at: str | None = None
    """Layer whose output is the embedding, such as `flatten` or `avgpool`; none: the whole network."""


class EncoderSettings(Section):
    """One encoder: its network (exactly one of `export`, `torchvision`, `function`) and its preprocessing."""

    export: str | None = None
    """A `torch.export` archive; load only archives that you trust."""
    torchvision: TorchvisionSettings | None = None
    """An architecture of torchvision with its weights."""
    function: str | None = None
    """Your own function as `module:function`; it takes no arguments and returns a torch module."""
    dim: Count
    """Width of the embedding; checked when the encoder is loaded."""
    preprocess: PreprocessSettings
    """How a decoded image becomes the encoder's input."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of matrix products and convolutions (`torch.autocast`); embeddings are float32 in any case."""
    compile: bool = False
    """Compile the network for one batch size; this needs a C++ compiler on each machine, and takes some minutes."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("export", "torchvision", "function") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of export, torchvision, function; found {given or 'none'}")
        if self.function is not None and not re.fullmatch(r"[\w.]+:\w+", self.function):
            raise ValueError(f"function: expected module:function, found {self.function!r}")
        return self


class EncodersSettings(Section):
    """The old and the new encoder."""

    old: EncoderSettings | None = None
    """The old encoder; needed only if old embeddings must be computed."""
    new: EncoderSettings
    """The new encoder."""


class ColumnNames(Section):
    """The names of a manifest's columns; leave out those that it does not have."""

    id: str | None = None
    """Unique id of an image: int64, or strings; none: the row's number."""
    image: str | None = None
    """The encoded image itself, as bytes."""
    uri: str | None = None
    """Where the image lies; if `image` is given too, a row without a uri has its image in the manifest."""
    offset: str | None = None
    """First byte of the image in the container that `uri` names."""
    length: str | None = None
    """Bytes of the image in the container that `uri` names."""
    etag: str | None = None
    """ETag of the image's object or container when the manifest was made, so that a later change is noticed."""
    old_embedding: str | None = None
    """Old embeddings: lists of float32 or float16 of one width; none: the old encoder computes them."""
    new_embedding: str | None = None
    """New embeddings; the backfill itself embeds the images in any case."""
    side: str | None = None
    """Side information for the transformation; give it in both manifests or in none."""
    label: str | None = None
    """Label of the image, for measuring quality and for the losses that need labels."""
    group: str | None = None
    """Subgroup of the image, whose quality is reported; also used by `plan.group_boost`."""
    traffic: str | None = None
    """Weight of the image, a number from 0 on, such as how often users see it; used by `plan.traffic`."""

    @model_validator(mode="after")
    def _whole_ranges(self) -> Self:
        if (self.offset is None) != (self.length is None) or (self.offset and not self.uri):
            raise ValueError("offset, length and uri go together: give all three, or leave out offset and length")
        return self

    @property
    def place(self) -> tuple[str, ...]:
        """The roles of an image's place that a file may lack, because each row has either `image` or `uri`."""
        mixed = self.image is not None and self.uri is not None
        return ("image", "uri", "offset", "length", "etag") if mixed else ()


class ManifestSettings(Section):
    """A manifest and the names of its columns."""

    manifest: str | tuple[str, ...]
    """Parquet files: a file, a folder, a glob, or a list of these."""
    columns: ColumnNames
    """The names of the manifest's columns."""


class GallerySettings(ManifestSettings):
    """The gallery to migrate."""

    metric: Metric = "l2"
    """Metric with which the gallery is searched."""


class PairsSettings(Section):
    """The pairs that the transformation is fitted on: from a manifest, from the gallery, or from both.

    Pairs of the gallery are embedded before the fit, and served as embedded from the first snapshot on.
    """

    manifest: str | tuple[str, ...] | None = None
    """Parquet files with `pairs.columns`; none: all pairs come from the gallery."""
    columns: ColumnNames = ColumnNames()
    """The names of the manifest's columns."""
    from_gallery: Literal["auto"] | Annotated[int, Field(ge=0, le=2**53)] = "auto"
    """How many images of the gallery are pairs; `auto`: none with a manifest, else a fifth, 20,000 at most."""
    held_out_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of the pairs that is measured on and never trained on; stratified by label."""

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.manifest is None and self.from_gallery == 0:
            raise ValueError("there are no pairs: give a manifest, or from_gallery above 0")
        if self.manifest is None and self.columns != ColumnNames():
            raise ValueError("pairs.columns needs pairs.manifest: give the manifest, or leave the columns out")
        if self.manifest is not None and "columns" not in self.model_fields_set:
            raise ValueError("columns: required with a manifest, and not given")
        return self

    @property
    def given(self) -> ManifestSettings | None:
        """The manifest with its columns; None if there is none."""
        return None if self.manifest is None else ManifestSettings(manifest=self.manifest, columns=self.columns)

    @property
    def uses_gallery(self) -> bool:
        """Whether some pairs come from the gallery."""
        return self.manifest is None if self.from_gallery == "auto" else self.from_gallery > 0

    def num_from_gallery(self, num_gallery: int, num_probe: int = 0) -> int:
        """How many pairs come from the gallery: `from_gallery`, or by the gallery's size without its probe set."""
        if self.from_gallery != "auto":
            return self.from_gallery
        if not self.uses_gallery:
            return 0
        share = max(num_gallery // _SHARE_OF_GALLERY, min(_LEAST_FROM_GALLERY, num_gallery // 2))
        return max(0, min(_MOST_FROM_GALLERY, share, num_gallery - num_probe))


AnyManifest = TypeVar("AnyManifest", bound=ManifestSettings)


class BackfillSettings(Section):
    """Resources and limits of embedding. May change between two starts of a run."""

    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 256
    """Most images per forward pass; another size changes vectors by rounding errors."""
    min_actors: Count = 1
    """Fewest embedding actors."""
    max_actors: Count | None = None
    """Most embedding actors; none: one per GPU, or one per `threads_per_actor` cores, of those there at the start."""
    cpus_per_actor: Annotated[float, Field(ge=0)] | None = None
    """Cores that Ray reserves for an actor on CPU; none: a quarter of `threads_per_actor`."""
    gpus_per_actor: Annotated[float, Field(ge=0)] | None = None
    """GPUs per actor; none: 1 if the cluster has a GPU at the start, so set it if an autoscaler adds GPU nodes."""
    threads_per_actor: Annotated[int, Field(ge=1, le=4096)] = 1
    """Threads of a forward pass on CPU."""
    wait_seconds: Annotated[float, Field(ge=0)] = 1800.0
    """Longest wait for the autoscaler if the cluster is too small for `min_actors`."""
    max_reject_fraction: Fraction = 0.05
    """Most rejects as a share of a wave, of the pairs or of the gallery; with more, nothing is published or fitted."""
    reject_allowance: Annotated[int, Field(ge=0)] = 5
    """Up to this many rejects per wave never stop the run (unless `max_reject_fraction` is 0)."""
    max_image_pixels: Count = 64_000_000
    """An image with more pixels is rejected (WebP and AVIF: three quarters); decoding takes up to 12 bytes a pixel."""
    max_image_bytes: Count = 64 * 2**20
    """An image whose file is larger is rejected."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max_actors is not None and self.max_actors < self.min_actors:
            raise ValueError(f"max_actors ({self.max_actors}) must be at least min_actors ({self.min_actors})")
        return self


class IndexSettings(Section):
    """The FAISS index."""

    factory: str = "auto"
    """FAISS factory string, such as `IVF4096,SQ8`; `auto` chooses by the size of the gallery."""
    shards: Annotated[int, Field(ge=1, le=65_536)] = 8
    """Number of shards, and so of segments per wave."""
    nprobe: Count = 16
    """Inverted lists that a query scans, in commits that are made from now on."""
    train_vectors: Count = 262_144
    """Most vectors that train the quantizer and the codec; drawn from the pairs."""


class PublishSettings(Section):
    """Publishing of snapshots."""

    promote: Literal["auto", "manual"] = "auto"
    """With `auto`, `prod` moves to every commit that passes the gate; with `manual`, use `fastfill promote`."""


class TelemetrySettings(Section):
    """The driver's Prometheus endpoint. Prices are in any one currency."""

    host: str = "127.0.0.1"
    """Address of the endpoint."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of the endpoint; 0: a free one, which the command prints."""
    discovery_file: str | None = None
    """File for Prometheus's `file_sd_configs`; removed if the command ends without an error."""
    linger_seconds: Annotated[float, Field(ge=0)] = 0.0
    """How long the endpoint stays up after the end; twice the scrape interval shows the last figures."""
    node_hour_price: Annotated[float, Field(ge=0)] = 0.0
    """Price of a node per hour."""
    gpu_hour_price: Annotated[float, Field(ge=0)] = 0.0
    """Price of a GPU per hour, if the node's price does not include it."""


class Config(Section):
    """The config of a run."""

    run: Annotated[str, Field(min_length=1)]
    """Folder of the run, local or `s3://`; everything that the run makes lies below it."""
    data_root: str = "."
    """Folder at which relative input paths start."""
    allow_outside: bool = False
    """Read images below `data_root` even if a link or `..` leads out of it; otherwise they are rejected."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the fit, the held-out split, ties in the plan, and random orders."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    """Device of encoders and transformation; `auto`: a GPU if there is one."""
    encoders: EncodersSettings
    """The old and the new encoder."""
    gallery: GallerySettings
    """The gallery to migrate."""
    pairs: PairsSettings = PairsSettings()
    """The pairs that the transformation is fitted on."""
    fit: FitSettings = FitSettings()
    """The transformation and how it is fitted."""
    select: SelectSettings = SelectSettings()
    """The choice of transformation, offset and order by measurement."""
    plan: PlanSettings = PlanSettings()
    """The order of images and the waves."""
    backfill: BackfillSettings = BackfillSettings()
    """Resources and limits of embedding."""
    fetch: FetchSettings = FetchSettings()
    """How images are read."""
    index: IndexSettings = IndexSettings()
    """The FAISS index."""
    evaluate: EvaluateSettings = EvaluateSettings()
    """The quality curve."""
    probe: ProbeSettings = ProbeSettings()
    """The probe set, on which every snapshot is measured."""
    gate: GateSettings = GateSettings()
    """The quality that a snapshot needs to become `prod`."""
    publish: PublishSettings = PublishSettings()
    """Publishing of snapshots."""
    telemetry: TelemetrySettings = TelemetrySettings()
    """The driver's Prometheus endpoint."""
    storage: StorageSettings = StorageSettings()
    """Access to object storage."""

    @property
    def unit_images(self) -> int:
        """Images per unit: `plan.unit_images`, or the largest power of two that fits into 64 MiB; 2,048 at most."""
        if self.plan.unit_images is not None:
            return self.plan.unit_images
        preprocess = self.encoders.new.preprocess
        height, width = preprocess.image_size or (1, 1)
        fitting = _UNIT_BYTES // (height * width * preprocess.channels)
        return min(_MAX_UNIT_IMAGES, 1 << max(0, fitting.bit_length() - 1))

    @property
    def sources(self) -> dict[str, ManifestSettings]:
        """The manifests that the config names, by the name of their folder in the run."""
        pairs = self.pairs.given
        return {"gallery": self.gallery} | ({} if pairs is None else {"pairs": pairs})

    @property
    def pair_roles(self) -> set[str]:
        """The roles (`label`, `group`, ...) for which at least some pairs have a column."""
        columns = [
            *([self.pairs.columns] if self.pairs.manifest is not None else []),
            *([self.gallery.columns] if self.pairs.uses_gallery else []),
        ]
        return {role for item in columns for role in item.model_dump(exclude_none=True)}


def _pair(side: Side) -> tuple[int, int]:
    return side if isinstance(side, tuple) else (side, side)
