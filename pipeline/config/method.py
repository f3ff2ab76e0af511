"""Settings that decide what a backfill is worth: how it is fitted and chosen, in which order, how it is judged.

Part of `pipeline.config.tree`, which has the rest.
"""

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
"""Those of `pipeline.planning.policies`, the simplest first."""

EPOCHS = 80
"""Of the paper's recipe."""

LOSSES: dict[TransformationKind, tuple[LossMode, ...]] = {
    "linear": ("alignment",),
    "residual": ("alignment", "alignment+discriminative"),
    "fastfill": get_args(LossMode),
}
"""What each kind can be fitted by: the error estimate of the first two is fitted apart, and does not shape z."""

_OF_PAPER: dict[bool, LossMode] = {True: "fastfill", False: "alignment+uncertainty"}
"""With labels, and without."""

_SOME = Field(min_length=1)


class ClassifierSettings(Section):
    """The new encoder's own linear classifier: a safetensors file with `weight` and maybe `bias`."""

    path: str


class FitSettings(Section):
    """The transformation's kind, loss, network and optimisation; the numbers are the paper's.

    With `transformation: auto` what is fitted is chosen by measurement, see `select`. `linear` is least squares, and
    has nothing else to set; `residual` adds a small network to it; `fastfill` is the paper's. `loss: auto` is the first
    loss that the kind takes, and for `fastfill` the whole loss if there are labels. Without `epochs` the
    fit takes `steps` optimiser steps, however many pairs there are, and an epoch is an eightieth of them; with it an
    epoch is a pass over the pairs, as in the paper.

    `calibrate` maps the distances of transformed vectors to those that their embeddings would have, so that both kinds
    rank on one scale. `offset` adds a constant per image before that: transformed vectors are served a little
    further from every query, the more the less certain they are, `confidence` by the new encoder's classifier,
    `uncertainty` by s. `offset_strength` is the share of the expected squared error that is added to their squared
    distances.
    """

    transformation: Literal[TransformationKind, "auto"] = "auto"
    loss: Literal[LossMode, "auto"] = "auto"
    classifier: ClassifierSettings | None = None
    calibrate: bool = True
    offset: OffsetKind = "none"
    offset_strength: Annotated[float, Field(gt=0.0)] = 0.5
    lambda_disc: Annotated[float, Field(ge=0.0)] = 1.0
    label_smoothing: Fraction = 0.1
    inner_width: Count = 2048
    steps: Count = 4000
    epochs: Count | None = None
    warmup_epochs: Annotated[int, Field(ge=0)] = 5
    batch_size: Count = 1024
    lr: Annotated[float, Field(gt=0)] = 5e-4
    weight_decay: Annotated[float, Field(ge=0)] = 2.0**-15
    freeze_batchnorm_at: Fraction = 0.5
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    num_workers: Count = 1
    max_failures: Annotated[int, Field(ge=-1)] = 3

    @model_validator(mode="after")
    def _suits(self) -> Self:
        if self.transformation != "auto" and self.loss not in ("auto", *LOSSES[self.transformation]):
            known = " or ".join(LOSSES[self.transformation])
            raise ValueError(f"loss: transformation {self.transformation} takes {known}, found {self.loss}")
        return self

    def resolved(self, labelled: bool) -> Self:
        """With the loss that `auto` means, for a kind that is not `auto`."""
        if self.loss != "auto" or self.transformation == "auto":
            return self
        loss: LossMode = "alignment" if self.transformation != "fastfill" else _OF_PAPER[labelled]
        return self.model_copy(update={"loss": loss})

    @property
    def kind(self) -> TransformationKind:
        """The transformation, once it is chosen."""
        assert self.transformation != "auto", "the selection comes first"
        return self.transformation

    @property
    def mode(self) -> LossMode:
        """The loss, once it is resolved."""
        loss = self.resolved(labelled=False).loss if self.kind != "fastfill" else self.loss
        assert loss != "auto", "whether there are labels decides: `resolved` comes first"
        return loss

    @property
    def num_epochs(self) -> int:
        """Parts of the fit after which it is measured, reported and can go on; 0 if nothing is learnt by steps."""
        if self.transformation == "linear":
            return 0
        return min(EPOCHS, self.steps) if self.epochs is None else self.epochs


class SelectSettings(Section):
    """What `fit.transformation: auto` chooses between: the area of curves on held-out pairs decides.

    Each recipe (kind, loss, `lambda_disc` where the loss has that term, inner width, epochs) is fitted once per fold,
    on the other folds; of what a fold holds out, at most `max_measured` pairs are gallery and queries of a simulated
    backfill. The simplest comes first, which is `linear`; others are tried while there is time: `minutes`, by default a
    tenth of what the backfill is estimated to take, and at least one. A recipe is taken only if it is better than all
    simpler ones by more than one standard error.

    `metrics` says what counts, as their mean; without labels it is `recall10`, as in `gate`. `losses` and `lambdas` are
    of `fastfill`. Where a list of `fit`'s settings is empty, `fit` says it; with no policies, all that can be are
    tried.

    With `measured_on: probe` the probe set is gallery and queries instead, a share of it for each fold: for pairs that
    do not look like the gallery. Give it labels (`probe.manifest`), and some thousand images.
    """

    transformations: Annotated[tuple[TransformationKind, ...], _SOME] = ("linear", "residual", "fastfill")
    minutes: Annotated[float, Field(gt=0.0)] | None = None
    losses: Annotated[tuple[LossMode, ...], _SOME] = ("alignment+uncertainty", "fastfill")
    lambdas: Annotated[tuple[Annotated[float, Field(ge=0.0)], ...], _SOME] = (0.1, 1.0)
    inner_widths: tuple[Count, ...] = ()
    epochs: tuple[Count, ...] = ()
    offsets: Annotated[tuple[OffsetKind, ...], _SOME] = ("none", "confidence")
    strengths: Annotated[tuple[Annotated[float, Field(gt=0.0)], ...], _SOME] = (0.5,)
    policies: tuple[str, ...] = ()
    metrics: Annotated[tuple[GateMetric, ...], _SOME] = ("top1", "map")
    measured_on: Literal["pairs", "probe"] = "pairs"
    folds: Annotated[int, Field(ge=2)] = 3
    finalists: Count = 3
    max_pairs: Count = 100_000
    max_measured: Annotated[int, Field(ge=100)] = 5000

    @model_validator(mode="after")
    def _known(self) -> Self:
        if unknown := [name for name in self.policies if name not in POLICY_NAMES]:
            raise ValueError(f"policies: expected some of {', '.join(POLICY_NAMES)}, found {', '.join(unknown)}")
        return self


class PlanSettings(Section):
    """The order and the waves.

    `policy: auto` is the order that the selection chose, and `uncertainty` if nothing was selected. `selected` is the
    same, but an error if nothing was.

    `waves` is a count (fine at the start, coarser later) or the fractions of the gallery, which
    add up to 1; `auto` is 20, and fewer for a small gallery, so that the first one has about 32 images. Images that
    are embedded for the fit (`pairs.from_gallery`) are not in them. A unit is the piece of a wave that one task embeds
    and writes; by default as many images as fill 64 MiB once decoded, 2,048 at most. An image that was deleted since
    the manifest was made is a reject; with `deleted_images: drop` its vector also leaves the index when its wave is
    published.

    With `traffic`, what it costs to leave an image transformed counts as often as `gallery.columns.traffic` says.
    With `group_boost`, it counts up to 1 + group_boost times for the groups (`pairs.columns.group`) that suffer most
    on held-out pairs, so that the worst one catches up early.
    """

    policy: str = "auto"
    traffic: bool = False
    group_boost: Annotated[float, Field(ge=0.0)] = 0.0
    waves: (
        Literal["auto"] | Annotated[int, Field(ge=1, le=100_000)] | tuple[Annotated[float, Field(gt=0.0, le=1.0)], ...]
    ) = "auto"
    unit_images: Count | None = None
    deleted_images: Literal["keep", "drop"] = "keep"

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if isinstance(self.waves, tuple) and abs(sum(self.waves) - 1.0) > 1e-6:
            raise ValueError(f"waves: the fractions must add up to 1, these add up to {sum(self.waves):.6g}")
        if self.policy not in (*POLICY_NAMES, "auto", "selected") and not re.fullmatch(r"[\w.]+:\w+", self.policy):
            names = ", ".join(POLICY_NAMES)
            raise ValueError(f"policy: expected one of {names}, or module:function, found {self.policy!r}")
        return self


class EvaluateSettings(Section):
    """METHOD's protocol: 22 points, random order as the mean over 5 seeds.

    The curve takes every labelled image as a query, which is quadratic: above `max_images` a backfill
    does not measure it.
    """

    points: Annotated[int, Field(ge=2, le=10_001)] = 22
    random_seeds: Annotated[int, Field(ge=1, le=1000)] = 5
    max_images: Count = 200_000


class SampleColumnNames(Section):
    """Which column of `probe.manifest` holds what; `id` as in `gallery.columns.id`."""

    id: str = "id"
    label: str = "label"
    group: str | None = None


class ProbeSettings(Section):
    """The probe set: images of the gallery that every snapshot is measured on before `prod` moves.

    As many as `images`, but no more than a tenth of the gallery where that is 200 or more; they are embedded before
    the plan, and again in their waves. The set is drawn once, when the run starts. With 0 there is none: only
    the held-out pairs are looked at.

    Labels cost people's time, and few galleries have them; some hundreds of images can be labelled by hand. With
    `manifest` (Parquet files, as in `gallery`) the set is all images of the gallery that it names by their ids, however
    many `images` says, with its labels, and its groups where a column is named. They go before the gallery's own; null
    is no label. Take the images by chance: the sample stands for the gallery. Where any image of the gallery is without
    a label, top-1 and top-5 are measured among the labelled images of the sample alone, where fewer compete: they are
    higher than in the whole gallery, and compare one state with another.
    """

    images: Annotated[int, Field(ge=0)] = 1000
    manifest: str | tuple[str, ...] | None = None
    columns: SampleColumnNames = SampleColumnNames()


class GateSettings(Section):
    """What keeps a snapshot from `prod`, by its figures on the probe set; in per cent, and none is not looked at.

    A figure counts as beyond a limit only where it is so by more than its noise: three standard errors, of the
    difference per query where two snapshots are compared; two below the old model while images are transformed. Where
    the gallery or the sample of `probe.manifest` has labels quality is top-1, else it is `recall10`: of an image's ten
    nearest probe images under the new model, the share that is nearest also by what the snapshot stores of them.
    `min_own` is of a wave's probe images, those whose own vector is stored under their id; it needs no labels.

    A refusal that the backfill itself may mend (transformed vectors that are worse than the old ones, or crowd out the
    others; a fall over several waves) never stops it.
    On any other, `stop` ends the backfill, and `go_on` embeds and publishes all, without moving `prod`; both with
    exit code 3, the latter where the last snapshot is refused too.
    """

    on_refusal: Literal["stop", "go_on"] = "stop"
    max_fall: Annotated[float, Field(ge=0)] = 1.0
    min_own: Annotated[float, Field(ge=0, le=100)] | None = 90.0
    min_slot_share: Annotated[float, Field(ge=0)] | None = 0.1
    max_slot_share: Annotated[float, Field(gt=0)] | None = 10.0
    max_negative_flips: Annotated[float, Field(ge=0, le=100)] | None = None
    max_group_gap: Annotated[float, Field(ge=0, le=100)] | None = None
