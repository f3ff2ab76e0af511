"""The run's settings: one pydantic tree, read from one YAML file and `--set a.b=value` overrides.

Unknown keys are refused with the nearest valid name; what is required has no default. Relative input
paths start at `data_root`, and `data_root` and `run` start at the working directory. The resolved
tree is stored with the run (`run.json`). This module knows nothing about storage or about what the
files contain.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import ConfigError

Metric = Literal["l2", "ip", "cosine"]
LossMode = Literal["alignment", "alignment+uncertainty", "alignment+discriminative", "fastfill"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
Side = Count | tuple[Count, Count]

_UNIT_BYTES = 64 * 2**20
_MAX_UNIT_IMAGES = 2048


class Section(BaseModel):
    """Base of every section: immutable, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Preprocess(Section):
    """How a decoded image becomes the encoder's input; the words are torchvision's.

    An image is resized, cropped at its centre, scaled so that white is `pixel_range`, and
    normalised by `mean` and `std`. Without `resize` and `center_crop` every image must already
    have `size`; an image of another shape is rejected.
    """

    channels: Literal[1, 3] = 3
    resize: Side | None = None
    center_crop: Side | None = None
    size: Side | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bilinear"
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
        return self

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(height, width) of the encoder's input in pixels."""
        if self.center_crop is not None:
            return _pair(self.center_crop)
        if isinstance(self.resize, tuple):
            return self.resize
        return _pair(self.size) if self.size is not None else None


class Torchvision(Section):
    """A torchvision architecture by name, its weights, and the layer to cut at."""

    model: str
    state_dict: str
    cut_at: str | None = None
    """The module whose output is the embedding, e.g. `flatten` or `avgpool`; the whole network if unset."""


class Encoder(Section):
    """One encoder: exactly one of `export`, `torchvision`, `function`, and its preprocess."""

    export: str | None = None
    torchvision: Torchvision | None = None
    function: str | None = None
    dim: Count
    preprocess: Preprocess

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("export", "torchvision", "function") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of export, torchvision, function; found {given or 'none'}")
        if self.function is not None and not re.fullmatch(r"[\w.]+:\w+", self.function):
            raise ValueError(f"function: expected module:function, found {self.function!r}")
        return self


class Encoders(Section):
    """The old encoder (needed only where old embeddings must be computed) and the new one."""

    old: Encoder | None = None
    new: Encoder


class Columns(Section):
    """Which column of a manifest holds what; a column that is not there may be left unset."""

    id: str | None = None
    image: str | None = None
    uri: str | None = None
    offset: str | None = None
    length: str | None = None
    old_embedding: str | None = None
    new_embedding: str | None = None
    side: str | None = None
    label: str | None = None
    group: str | None = None

    @model_validator(mode="after")
    def _whole_ranges(self) -> Self:
        if (self.offset is None) != (self.length is None) or (self.offset and not self.uri):
            raise ValueError("offset and length go together, and with uri")
        if self.image is not None and self.uri is not None:
            raise ValueError("give image (bytes in the manifest) or uri (where the image lies), not both")
        return self


class Manifest(Section):
    """Parquet files (a file, a folder, a glob, or a list of these) and what their columns mean."""

    manifest: str | tuple[str, ...]
    columns: Columns


class Gallery(Manifest):
    """The gallery to move, and the metric it is searched with."""

    metric: Metric = "l2"


class Pairs(Manifest):
    """The images or embeddings that the transformation is fitted on."""

    held_out_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1


AnyManifest = TypeVar("AnyManifest", bound=Manifest)


class Classifier(Section):
    """The new encoder's own linear classifier: a safetensors file with `weight` and maybe `bias`."""

    path: str


class Fit(Section):
    """The transformation's loss, network and optimisation; the defaults are the paper's."""

    loss: LossMode = "fastfill"
    classifier: Classifier | None = None
    lambda_disc: Annotated[float, Field(ge=0.0)] = 1.0
    label_smoothing: Fraction = 0.1
    inner_width: Count = 2048
    epochs: Count = 80
    warmup_epochs: Annotated[int, Field(ge=0)] = 5
    batch_size: Count = 1024
    lr: Annotated[float, Field(gt=0)] = 5e-4
    weight_decay: Annotated[float, Field(ge=0)] = 2.0**-15
    freeze_batchnorm_at: Fraction = 0.5
    precision: Literal["float32", "bfloat16"] = "float32"
    num_workers: Count = 1
    max_failures: Annotated[int, Field(ge=-1)] = 3


class Plan(Section):
    """The order and the waves.

    `waves` is a count (fine at the start, coarser later) or the fractions of the gallery, which
    add up to 1. A unit is the piece of a wave that one task embeds and writes; by default as many
    images as fill 64 MiB once decoded, 2,048 at most.
    """

    policy: str = "uncertainty"
    waves: Count | tuple[Annotated[float, Field(gt=0.0, le=1.0)], ...] = 20
    unit_images: Count | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if isinstance(self.waves, tuple) and abs(sum(self.waves) - 1.0) > 1e-6:
            raise ValueError(f"waves: the fractions must add up to 1, these add up to {sum(self.waves):.6g}")
        if self.policy not in ("uncertainty", "random") and not re.fullmatch(r"[\w.]+:\w+", self.policy):
            raise ValueError(f"policy: expected uncertainty, random or module:function, found {self.policy!r}")
        return self


class Backfill(Section):
    """Resources and limits of the embedding stream; free to change between two starts of a run."""

    batch_size: Count = 256
    min_actors: Count = 1
    max_actors: Count = 1
    cpus_per_actor: Annotated[float, Field(ge=0)] = 1.0
    gpus_per_actor: Annotated[float, Field(ge=0)] | None = None
    threads_per_actor: Count = 1
    fetch_threads: Count = 8
    max_reject_fraction: Fraction = 0.05
    max_image_pixels: Count = 64_000_000
    max_image_bytes: Count = 64 * 2**20

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max_actors < self.min_actors:
            raise ValueError(f"max_actors ({self.max_actors}) must be at least min_actors ({self.min_actors})")
        return self


class Index(Section):
    """The FAISS index: a factory string or `auto`, and how it is sharded."""

    factory: str = "auto"
    shards: Count = 8
    nprobe: Count = 16
    train_vectors: Count = 262_144


class Evaluate(Section):
    """METHOD's protocol: 22 points, random order as the mean over 5 seeds.

    The curve takes every labelled image as a query, which is quadratic: above `max_images` a backfill
    does not measure it.
    """

    points: Annotated[int, Field(ge=2)] = 22
    random_seeds: Count = 5
    max_images: Count = 200_000


class Publish(Section):
    """`auto` moves `prod` to every commit that passes the gate; `manual` leaves it to `promote`."""

    promote: Literal["auto", "manual"] = "auto"


class Telemetry(Section):
    """The driver's Prometheus endpoint; port 0 takes a free one."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 0


class Config(Section):
    """Everything that decides what a run makes, and with which resources."""

    run: str
    data_root: str = "."
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    encoders: Encoders
    gallery: Gallery
    pairs: Pairs
    fit: Fit = Fit()
    plan: Plan = Plan()
    backfill: Backfill = Backfill()
    index: Index = Index()
    evaluate: Evaluate = Evaluate()
    publish: Publish = Publish()
    telemetry: Telemetry = Telemetry()


def unit_images(config: Config) -> int:
    """Images per unit: as configured, or the power of two that keeps a unit's pixels within 64 MiB."""
    if config.plan.unit_images is not None:
        return config.plan.unit_images
    preprocess = config.encoders.new.preprocess
    height, width = preprocess.image_size or (1, 1)
    fitting = _UNIT_BYTES // (height * width * preprocess.channels)
    return min(_MAX_UNIT_IMAGES, 1 << max(0, fitting.bit_length() - 1))


def load_config(path: str, overrides: tuple[str, ...] = ()) -> Config:
    """Read, override, validate and resolve a config file.

    Args:
        path: the YAML file.
        overrides: `a.b=value` items; the value is read as YAML.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, a value is out of its range.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError("cannot read the config file", found=error.strerror, where=path) from error
    except yaml.YAMLError as error:
        raise ConfigError("the config file is not valid YAML", found=error, where=path) from error
    if not isinstance(tree, dict):
        raise ConfigError("the config file is not a mapping", expected="keys and values", found=tree, where=path)
    for item in overrides:
        _override(tree, item)
    return resolve(validate(tree, where=path))


def validate(tree: dict[str, object], where: str) -> Config:
    """Validate a raw tree; every problem is listed with its key, and unknown keys with the nearest name.

    Raises:
        ConfigError: with one line per problem.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problems = [_explain(item["loc"], item["type"], item["msg"]) for item in error.errors()]
        raise ConfigError(
            f"{len(problems)} problem(s) in the config:\n" + "\n".join(f"  - {line}" for line in problems),
            where=where,
            remedy="fix the keys above; docs and jobs/configs/cifar100.yaml show every section",
        ) from error


def resolve(config: Config) -> Config:
    """The same config with `run` and every input path absolute."""
    root = _absolute(config.data_root, os.getcwd())

    def rooted(path: str) -> str:
        return _absolute(path, root)

    def encoder(item: Encoder | None) -> Encoder | None:
        if item is None or item.function is not None:
            return item
        if item.export is not None:
            return item.model_copy(update={"export": rooted(item.export)})
        assert item.torchvision is not None
        vision = item.torchvision.model_copy(update={"state_dict": rooted(item.torchvision.state_dict)})
        return item.model_copy(update={"torchvision": vision})

    def manifest(item: AnyManifest) -> AnyManifest:
        paths = (item.manifest,) if isinstance(item.manifest, str) else item.manifest
        return item.model_copy(update={"manifest": tuple(rooted(path) for path in paths)})

    fit = config.fit
    if fit.classifier is not None:
        fit = fit.model_copy(update={"classifier": Classifier(path=rooted(fit.classifier.path))})
    encoders = Encoders.model_construct(old=encoder(config.encoders.old), new=encoder(config.encoders.new))
    return config.model_copy(
        update={
            "run": _absolute(config.run, os.getcwd()),
            "data_root": root,
            "encoders": encoders,
            "gallery": manifest(config.gallery),
            "pairs": manifest(config.pairs),
            "fit": fit,
        }
    )


def _absolute(path: str, root: str) -> str:
    if "://" in path or path.startswith("/"):
        return path.rstrip("/") or "/"
    if "://" in root:
        return f"{root.rstrip('/')}/{path}"
    return os.path.abspath(os.path.join(root, os.path.expanduser(path)))


def _override(tree: dict[str, object], item: str) -> None:
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise ConfigError("--set takes key=value", expected="a.b=value", found=item)
    node: dict[str, object] = tree
    *parents, last = key.split(".")
    for name in parents:
        child = node.setdefault(name, {})
        if child is None:
            child = node[name] = {}
        if not isinstance(child, dict):
            raise ConfigError("--set goes through a key that holds a value", found=child, where=f"{item}: {name}")
        node = child
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError("the value of --set is not valid YAML", found=text, where=key) from error


def _explain(location: tuple[int | str, ...], kind: str, message: str) -> str:
    where = ".".join(str(part) for part in location)
    if kind == "missing":
        return f"{where}: required, and not given"
    if kind != "extra_forbidden":
        return f"{where}: {message.removeprefix('Value error, ')}" if where else message
    names = _names_beside(location)
    near = difflib.get_close_matches(str(location[-1]), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"valid here: {', '.join(names)}"
    return f"{where}: unknown key; {hint}"


def _names_beside(location: tuple[int | str, ...]) -> list[str]:
    """The valid names of the section in which `location` lies."""
    model: type[BaseModel] = Config
    for part in location[:-1]:
        field = model.model_fields.get(str(part))
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        sections = [item for item in candidates if isinstance(item, type) and issubclass(item, BaseModel)]
        model = sections[0] if sections else model
    return list(model.model_fields)


def _pair(side: Side) -> tuple[int, int]:
    return side if isinstance(side, tuple) else (side, side)
