"""The config sections of the method: fit, selection, plan, evaluation, probe set and gate."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from pipeline.storage.settings import Count, Fraction, Section

LossMode = Literal["alignment", "alignment+uncertainty", "alignment+discriminative", "fastfill"]
TransformationKind = Literal["linear", "residual", "fastfill"]
OffsetKind = Literal["none", "uncertainty", "confidence"]
GateMetric = Literal["top1", "top5", "map", "recall10"]

POLICY_NAMES = (
    "random",
    "uncertainty",
    "norm",
    "entropy",
    "least_confidence",
    "margin",
    "centroid",
    "class_mean",
    "neighbour_distance",
    "neighbour_residual",
    "neighbour_purity",
    "hubness",
    "learned",
)
"""The policies of `planning.policies`, the simplest first."""

EPOCHS = 80
"""Epochs of the paper's recipe."""

LOSSES: dict[TransformationKind, tuple[LossMode, ...]] = {
    "linear": ("alignment",),
    "residual": ("alignment", "alignment+discriminative"),
    "fastfill": get_args(LossMode),
}
"""The losses of each kind. The error estimate of the first two is fitted separately and does not change z."""

_OF_PAPER: dict[bool, LossMode] = {True: "fastfill", False: "alignment+uncertainty"}
"""What `loss: auto` means for `fastfill`, with labels and without."""

_SOME = Field(min_length=1)


class ClassifierSettings(Section):
    """A linear classifier on new embeddings; without this section one is fitted if it is needed."""

    path: str
    """A safetensors file with the new encoder's `weight`, and `bias` if it has one."""


class FitSettings(Section):
    """The transformation and how it is fitted; the default numbers are the paper's."""

    transformation: Literal[TransformationKind, "auto"] = "auto"
    """Kind: `linear` (least squares), `residual` (plus a small network), `fastfill` (the paper), `auto` (measured)."""
    loss: Literal[LossMode, "auto"] = "auto"
    """Loss; `auto`: `alignment`, but for `fastfill` its own with labels, and `alignment+uncertainty` without."""
    classifier: ClassifierSettings | None = None
    """The new encoder's own classifier."""
    calibrate: bool = True
    """Map the distances of transformed vectors to those of embedded vectors, so that both rank on one scale."""
    offset: OffsetKind = "none"
    """Place a transformed vector further from every query by its expected error; no effect with metric `ip`."""
    offset_strength: Annotated[float, Field(gt=0.0)] = 0.5
    """Share of the expected squared error that the offset adds."""
    lambda_disc: Annotated[float, Field(ge=0.0)] = 1.0
    """Weight of the discriminative loss."""
    label_smoothing: Fraction = 0.1
    """Label smoothing of the discriminative loss."""
    inner_width: Count = 2048
    """Width of the hidden layers of `residual` and `fastfill`."""
    steps: Count = 4000
    """Optimiser steps, for any number of pairs; one epoch is an eightieth of them."""
    epochs: Count | None = None
    """Passes over the pairs, instead of `steps`; the paper has 80."""
    warmup_epochs: Annotated[int, Field(ge=0)] = 5
    """Epochs of linear warm-up before the cosine schedule."""
    batch_size: Count = 1024
    """Pairs per step over all workers; at most an eighth of the pairs is taken."""
    lr: Annotated[float, Field(gt=0)] = 5e-4
    """Peak learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 2.0**-15
    """Weight decay."""
    freeze_batchnorm_at: Fraction = 0.5
    """Share of the epochs after which the statistics of BatchNorm stay fixed."""
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    """Precision of matrix products in the fit; `auto`: bfloat16 if the GPU or CPU computes in it."""
    num_workers: Count = 1
    """Data-parallel workers (Ray Train)."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Worker failures after which the fit gives up; -1: never. Lost nodes do not count."""

    @model_validator(mode="after")
    def _suits(self) -> Self:
        if self.transformation != "auto" and self.loss not in ("auto", *LOSSES[self.transformation]):
            known = " or ".join(LOSSES[self.transformation])
            raise ValueError(f"loss: transformation {self.transformation} takes {known}, found {self.loss}")
        return self

    def resolved(self, labelled: bool) -> Self:
        """The section with `loss: auto` replaced, unless the kind is `auto`."""
        if self.loss != "auto" or self.transformation == "auto":
            return self
        loss: LossMode = "alignment" if self.transformation != "fastfill" else _OF_PAPER[labelled]
        return self.model_copy(update={"loss": loss})

    @property
    def kind(self) -> TransformationKind:
        """The kind of the transformation, once it is chosen."""
        assert self.transformation != "auto", "the selection has not run yet"
        return self.transformation

    @property
    def mode(self) -> LossMode:
        """The loss, once it is resolved."""
        loss = self.resolved(labelled=False).loss if self.kind != "fastfill" else self.loss
        assert loss != "auto", "`resolved` was not called: the loss depends on labels"
        return loss

    @property
    def num_epochs(self) -> int:
        """Epochs of the fit, each with a checkpoint; 0 for `linear`, which has none."""
        if self.transformation == "linear":
            return 0
        return min(EPOCHS, self.steps) if self.epochs is None else self.epochs


class SelectSettings(Section):
    """The choice that `fit.transformation: auto` makes, by simulated backfills on held-out data.

    Each recipe (kind, loss, its lambda, inner width, epochs) is fitted once per fold, on the other folds. A recipe is
    chosen only if it is better than all simpler ones by more than one standard error. An empty list means the value in
    `fit`.
    """

    transformations: Annotated[tuple[TransformationKind, ...], _SOME] = ("linear", "residual", "fastfill")
    """Kinds to choose from."""
    minutes: Annotated[float, Field(gt=0.0)] | None = None
    """Time for recipes after the first; none: a tenth of the backfill's estimated duration, at least one minute."""
    losses: Annotated[tuple[LossMode, ...], _SOME] = ("alignment+uncertainty", "fastfill")
    """Losses to choose from for `fastfill`."""
    lambdas: Annotated[tuple[Annotated[float, Field(ge=0.0)], ...], _SOME] = (0.1, 1.0)
    """Values of `fit.lambda_disc` to choose from, for losses that have it."""
    inner_widths: tuple[Count, ...] = ()
    """Values of `fit.inner_width` to choose from."""
    epochs: tuple[Count, ...] = ()
    """Values of `fit.epochs` to choose from."""
    offsets: Annotated[tuple[OffsetKind, ...], _SOME] = ("none", "confidence")
    """Offsets to choose from; `confidence` only if there is a classifier, or labels to fit one."""
    strengths: Annotated[tuple[Annotated[float, Field(gt=0.0)], ...], _SOME] = (0.5,)
    """Values of `fit.offset_strength` to choose from."""
    policies: tuple[str, ...] = ()
    """Policies to choose from; empty: all whose inputs are there."""
    metrics: Annotated[tuple[GateMetric, ...], _SOME] = ("top1", "map")
    """The mean of the areas under these metrics decides; without labels it is `recall10`."""
    measured_on: Literal["pairs", "probe"] = "pairs"
    """Data of the simulated backfill: held-out `pairs`, or the `probe` set if the pairs differ from the gallery."""
    folds: Annotated[int, Field(ge=2)] = 3
    """Fits of each recipe."""
    finalists: Count = 3
    """How many of the best recipes go into the second round, in which every order is tried; two more always do."""
    max_pairs: Count = 100_000
    """Most pairs that take part."""
    max_measured: Annotated[int, Field(ge=100)] = 5000
    """Most pairs of a fold that are gallery and queries of a simulated backfill."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        if unknown := [name for name in self.policies if name not in POLICY_NAMES]:
            raise ValueError(f"policies: expected some of {', '.join(POLICY_NAMES)}, found {', '.join(unknown)}")
        return self


class PlanSettings(Section):
    """The order of images and the waves."""

    policy: str = "auto"
    """Order of the images: a policy, `module:function`, `selected`, or `auto` (`selected` if there is one)."""
    traffic: bool = False
    """Weight the priority of an image by its `traffic` column: popular images first."""
    group_boost: Annotated[float, Field(ge=0.0)] = 0.0
    """Raise the priority of the groups that suffer most on held-out pairs, up to 1 + this many times."""
    waves: (
        Literal["auto"] | Annotated[int, Field(ge=1, le=100_000)] | tuple[Annotated[float, Field(gt=0.0, le=1.0)], ...]
    ) = "auto"
    """Number of waves (later ones are larger), or their fractions; `auto`: 20, fewer for a small gallery."""
    unit_images: Count | None = None
    """Images that one task embeds and writes; none: as many as fill 64 MiB when decoded, 2,048 at most."""
    deleted_images: Literal["keep", "drop"] = "keep"
    """Whether an image that was deleted since the manifest was made stays in the index with its transformed vector."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if isinstance(self.waves, tuple) and abs(sum(self.waves) - 1.0) > 1e-6:
            raise ValueError(f"waves: the fractions must add up to 1, but add up to {sum(self.waves):.6g}")
        if self.policy not in (*POLICY_NAMES, "auto", "selected") and not re.fullmatch(r"[\w.]+:\w+", self.policy):
            names = ", ".join(POLICY_NAMES)
            raise ValueError(f"policy: expected one of {names}, or module:function, found {self.policy!r}")
        return self


class EvaluateSettings(Section):
    """The quality curve (docs/method.md)."""

    points: Annotated[int, Field(ge=2, le=10_001)] = 22
    """Points of the curve, from fraction 0 to 1."""
    random_seeds: Annotated[int, Field(ge=1, le=1000)] = 5
    """Permutations whose mean is the random order."""
    max_images: Count = 200_000
    """A larger gallery has no measured curve, and `plan` estimates from a sample of this size."""


class SampleColumnNames(Section):
    """The names of the columns of `probe.manifest`."""

    id: str = "id"
    """Id of the image, as in `gallery.columns.id`; each once."""
    label: str = "label"
    """Label of the image; null: none."""
    group: str | None = None
    """Subgroup of the image; none: the gallery's own."""


class ProbeSettings(Section):
    """The probe set: images of the gallery on which every snapshot is measured. It is drawn once, at the start."""

    images: Annotated[int, Field(ge=0)] = 1000
    """Number of images, at most a tenth of the gallery or 200, whichever is larger; 0: no probe set."""
    manifest: str | tuple[str, ...] | None = None
    """Parquet files that name the probe set by ids, with labels that override the gallery's; `images` has no effect."""
    columns: SampleColumnNames = SampleColumnNames()
    """The names of the manifest's columns."""


class GateSettings(Section):
    """Limits of a snapshot's quality on the probe set. A limit that is none is not checked.

    A figure is beyond its limit only if it is so by more than its noise: three standard errors, or two below the old
    model while images are transformed. Quality is top-1 if there are labels, else `recall10`.
    """

    on_refusal: Literal["stop", "go_on"] = "stop"
    """Whether a refused snapshot ends the backfill, or only keeps `prod` where it is; exit code 3."""
    max_fall: Annotated[float, Field(ge=0)] = 1.0
    """Most percentage points of quality that a snapshot may lose against an earlier one."""
    min_own: Annotated[float, Field(ge=0, le=100)] | None = 90.0
    """Least share, in per cent, of a wave's probe images whose own vector is stored under their id."""
    min_slot_share: Annotated[float, Field(ge=0)] | None = 0.1
    """Least share of transformed vectors in the nearest 10, over their share in the index."""
    max_slot_share: Annotated[float, Field(gt=0)] | None = 10.0
    """Largest share of transformed vectors in the nearest 10, over their share in the index."""
    max_negative_flips: Annotated[float, Field(ge=0, le=100)] | None = None
    """Most queries, in per cent of those that the old model answers, that the snapshot answers wrongly."""
    max_group_gap: Annotated[float, Field(ge=0, le=100)] | None = None
    """Largest gap in top-1, in percentage points, between the best and the worst group of at least 10 queries."""
