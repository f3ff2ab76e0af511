"""The run's settings: one pydantic tree, a section per step.

Unknown keys are refused; what is required has no default. Reading the tree from a file is `config_file`'s.
This module knows nothing about storage or about what the files contain.
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
_SHARE_OF_GALLERY = 5  # one image in so many is a pair
_LEAST_FROM_GALLERY = 64  # pairs, as far as a small gallery has them


class PreprocessSettings(Section):
    """How a decoded image becomes the encoder's input; the words are torchvision's.

    An image is resized, cropped at its centre, scaled so that white is `pixel_range`, and
    normalised by `mean` and `std`. Without `resize` and `center_crop` every image must already
    have `size`; an image of another shape is rejected. `resample` says whose arithmetic resizes
    (decisions/0004), and with `reducing_gap` a JPEG is decoded smaller where that leaves it so many
    times the resized size. With `decoder: device` the embedding actor decodes and resizes JPEGs, by nvJPEG
    on a GPU; what is gained is cores, where these cannot keep up with the GPUs.

    `exif: apply` turns an image upright first, as its EXIF orientation says. Transparency is dropped, as Pillow's
    `convert("RGB")` drops it: the colours below it stay.
    """

    channels: Literal[1, 3] = 3
    resize: Side | None = None
    center_crop: Side | None = None
    size: Side | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bilinear"
    resample: Literal["pillow", "torch"] = "torch"
    reducing_gap: Annotated[float, Field(ge=1)] | None = None
    decoder: Literal["cpu", "device"] = "cpu"
    exif: Literal["apply", "ignore"] = "apply"
    pixel_range: Literal[1, 255] = 1
    mean: tuple[float, ...] = (0.0,)
    std: tuple[Annotated[float, Field(gt=0)], ...] = (1.0,)

    @model_validator(mode="after")
    def _one_shape(self) -> Self:
        if self.image_size is None:
            raise ValueError("the input shape is open: give size, center_crop, or resize as [height, width]")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                raise ValueError(f"{name} has {len(values)} values: give 1 or {self.channels}, one per channel")
        if self.reducing_gap is not None and self.resize is None:
            raise ValueError("reducing_gap says how small a JPEG may be decoded before it is resized: give resize")
        if self.decoder == "device" and (self.reducing_gap is not None or self.resample == "pillow"):
            raise ValueError(
                "decoder: device decodes in full and resizes as torch does: leave out reducing_gap, resample"
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
    """A torchvision architecture by name, its weights, and the layer to cut at."""

    model: str
    state_dict: str
    cut_at: str | None = None
    """The module whose output is the embedding, e.g. `flatten` or `avgpool`; the whole network if unset."""


class EncoderSettings(Section):
    """One encoder: exactly one of `export`, `torchvision`, `function`, its preprocess, and how it computes.

    `precision` is that of matrix products and convolutions (torch.autocast); embeddings are float32 in any case.
    `compile` has torch compile the network for batches of one size, which the last batch is filled up to; that takes
    a C++ compiler on each machine, and some minutes.
    """

    export: str | None = None
    torchvision: TorchvisionSettings | None = None
    function: str | None = None
    dim: Count
    preprocess: PreprocessSettings
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    compile: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("export", "torchvision", "function") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of export, torchvision, function; found {given or 'none'}")
        if self.function is not None and not re.fullmatch(r"[\w.]+:\w+", self.function):
            raise ValueError(f"function: expected module:function, found {self.function!r}")
        return self


class EncodersSettings(Section):
    """The old encoder (needed only where old embeddings must be computed) and the new one."""

    old: EncoderSettings | None = None
    new: EncoderSettings


class ColumnNames(Section):
    """Which column of a manifest holds what; a column that is not there may be left unset.

    With both `image` and `uri` each row has one of them: a row without a uri has its image's bytes in the manifest,
    and a file may have only one of the two columns.
    """

    id: str | None = None
    image: str | None = None
    uri: str | None = None
    offset: str | None = None
    length: str | None = None
    etag: str | None = None
    old_embedding: str | None = None
    new_embedding: str | None = None
    side: str | None = None
    label: str | None = None
    group: str | None = None
    traffic: str | None = None

    @model_validator(mode="after")
    def _whole_ranges(self) -> Self:
        if (self.offset is None) != (self.length is None) or (self.offset and not self.uri):
            raise ValueError("offset and length go together, and with uri")
        return self

    @property
    def place(self) -> tuple[str, ...]:
        """The roles that say where an image lies, of those that a file may be without where it has the other kind."""
        mixed = self.image is not None and self.uri is not None
        return ("image", "uri", "offset", "length", "etag") if mixed else ()


class ManifestSettings(Section):
    """Parquet files (a file, a folder, a glob, or a list of these) and what their columns mean."""

    manifest: str | tuple[str, ...]
    columns: ColumnNames


class GallerySettings(ManifestSettings):
    """The gallery to move, and the metric it is searched with."""

    metric: Metric = "l2"


class PairsSettings(Section):
    """The images or embeddings that the transformation is fitted on: from a manifest, from the gallery, or both.

    With `from_gallery` so many images of the gallery are embedded before the fit. They are pairs, and their new
    embeddings are served from the first snapshot on: no image is embedded twice. `auto` takes none if there is a
    manifest, else a fifth of the gallery, 20,000 at most, and half of a gallery of up to 128 images.
    """

    manifest: str | tuple[str, ...] | None = None
    columns: ColumnNames = ColumnNames()
    from_gallery: Literal["auto"] | Annotated[int, Field(ge=0, le=2**53)] = "auto"
    held_out_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.manifest is None and self.from_gallery == 0:
            raise ValueError("there are no pairs: give a manifest, or from_gallery above 0")
        if self.manifest is None and self.columns != ColumnNames():
            raise ValueError("columns say what a manifest's columns mean: give manifest, too")
        if self.manifest is not None and "columns" not in self.model_fields_set:
            raise ValueError("columns: required with a manifest, and not given")
        return self

    @property
    def given(self) -> ManifestSettings | None:
        """The manifest with its columns; None if there is none."""
        return None if self.manifest is None else ManifestSettings(manifest=self.manifest, columns=self.columns)

    @property
    def uses_gallery(self) -> bool:
        """Whether pairs come from the gallery, too."""
        return self.manifest is None if self.from_gallery == "auto" else self.from_gallery > 0


AnyManifest = TypeVar("AnyManifest", bound=ManifestSettings)


class BackfillSettings(Section):
    """Resources and limits of the embedding stream; free to change between two starts of a run.

    The stream starts with as many actors as the cluster has room for, and goes up to `max_actors` and down to
    `min_actors` with the cluster; without `max_actors` that is one per GPU, or on a cluster without GPUs one per
    `threads_per_actor` cores, of those that are there at the start. An actor on CPU reserves a quarter of the
    cores that it uses, so that what feeds it finds room; the operating system shares them out.

    Where a cluster is too small for `min_actors` actors, its autoscaler is asked for nodes, which may take
    `wait_seconds`. Where GPU nodes come that way, say so by `gpus_per_actor`: without it, a cluster that has no
    GPU yet counts as one without GPUs. And say by `max_actors` how many there may be once all nodes are there.

    A wave with more rejects than `max_reject_fraction` of its images is not published, and with more of the
    gallery's or of the pairs' images than that no transformation is fitted. `reject_allowance` rejects are borne
    in any case: the first waves have a handful of images, and the strangest ones. With a fraction of 0 none is.
    """

    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 256
    min_actors: Count = 1
    max_actors: Count | None = None
    cpus_per_actor: Annotated[float, Field(ge=0)] | None = None
    gpus_per_actor: Annotated[float, Field(ge=0)] | None = None
    threads_per_actor: Annotated[int, Field(ge=1, le=4096)] = 1
    wait_seconds: Annotated[float, Field(ge=0)] = 1800.0
    max_reject_fraction: Fraction = 0.05
    reject_allowance: Annotated[int, Field(ge=0)] = 5
    max_image_pixels: Count = 64_000_000
    max_image_bytes: Count = 64 * 2**20

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max_actors is not None and self.max_actors < self.min_actors:
            raise ValueError(f"max_actors ({self.max_actors}) must be at least min_actors ({self.min_actors})")
        return self


class IndexSettings(Section):
    """The FAISS index: a factory string or `auto`, and how it is sharded."""

    factory: str = "auto"
    shards: Annotated[int, Field(ge=1, le=65_536)] = 8
    nprobe: Count = 16
    train_vectors: Count = 262_144


class PublishSettings(Section):
    """`auto` moves `prod` to every commit that passes the gate; `manual` leaves it to `promote`."""

    promote: Literal["auto", "manual"] = "auto"


class TelemetrySettings(Section):
    """The driver's Prometheus endpoint; port 0 takes a free one.

    `discovery_file` is written for Prometheus's `file_sd_configs`, and removed after a good end. Prices are in any
    one currency: what a node costs per hour, its GPUs apart or not, and what a GPU costs on top.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    discovery_file: str | None = None
    linger_seconds: Annotated[float, Field(ge=0)] = 0.0
    node_hour_price: Annotated[float, Field(ge=0)] = 0.0
    gpu_hour_price: Annotated[float, Field(ge=0)] = 0.0


class Config(Section):
    """Everything that decides what a run makes, and with which resources."""

    run: Annotated[str, Field(min_length=1)]
    data_root: str = "."
    allow_outside: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    encoders: EncodersSettings
    gallery: GallerySettings
    pairs: PairsSettings = PairsSettings()
    fit: FitSettings = FitSettings()
    select: SelectSettings = SelectSettings()
    plan: PlanSettings = PlanSettings()
    backfill: BackfillSettings = BackfillSettings()
    fetch: FetchSettings = FetchSettings()
    index: IndexSettings = IndexSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    probe: ProbeSettings = ProbeSettings()
    gate: GateSettings = GateSettings()
    publish: PublishSettings = PublishSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    storage: StorageSettings = StorageSettings()


def unit_images(config: Config) -> int:
    """Images per unit: as configured, or the power of two that keeps a unit's pixels within 64 MiB."""
    if config.plan.unit_images is not None:
        return config.plan.unit_images
    preprocess = config.encoders.new.preprocess
    height, width = preprocess.image_size or (1, 1)
    fitting = _UNIT_BYTES // (height * width * preprocess.channels)
    return min(_MAX_UNIT_IMAGES, 1 << max(0, fitting.bit_length() - 1))


def num_from_gallery(pairs: PairsSettings, num_gallery: int, num_probe: int = 0) -> int:
    """How many pairs come from the gallery itself: as configured, or by its size, and none of the probe set."""
    wanted = pairs.from_gallery
    if wanted != "auto":
        return wanted
    if not pairs.uses_gallery:
        return 0
    share = max(num_gallery // _SHARE_OF_GALLERY, min(_LEAST_FROM_GALLERY, num_gallery // 2))
    return max(0, min(_MOST_FROM_GALLERY, share, num_gallery - num_probe))


def sources(config: Config) -> dict[str, ManifestSettings]:
    """The manifests that are given, by the name of their folder in the run."""
    pairs = config.pairs.given
    return {"gallery": config.gallery} | ({} if pairs is None else {"pairs": pairs})


def pair_roles(config: Config) -> set[str]:
    """The roles (`label`, `group`, ...) that a column says of some pairs at least."""
    pairs = config.pairs
    columns = [
        *([pairs.columns] if pairs.manifest is not None else []),
        *([config.gallery.columns] if pairs.uses_gallery else []),
    ]
    return {role for item in columns for role in item.model_dump(exclude_none=True)}


def _pair(side: Side) -> tuple[int, int]:
    return side if isinstance(side, tuple) else (side, side)
