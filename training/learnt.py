"""Which of two transformations is the better one for what is left of a gallery, and what was decided.

After a fit with embedded images (`relearn`). It is asked of images that neither transformation was fitted on: how far
their vectors are from the new encoder's, and where they have labels what is found when these vectors stand beside the
embedded ones. It does not know how they were fitted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch

from pipeline import documents
from pipeline import offset as offsets
from pipeline.config import Config
from pipeline.evaluate import evaluate
from pipeline.offset import Offset
from pipeline.probe_set import ProbeSet
from pipeline.ranking import Float64
from pipeline.run import Run
from pipeline.schema import Float32
from pipeline.transformation import apply, load_transformation, read_part
from training.folds import APPLY_BATCH
from training.knowledge import measurable
from training.learner import PairArrays

_LEAST = 50
"""Images of the probe set that are left: with fewer, held-out embedded ones are asked, and labels are not looked at."""


@dataclass(frozen=True, slots=True)
class Change:
    """A mean of the transformation that served so far, of the new one, and the standard error of the difference."""

    before: float
    after: float
    noise: float

    @classmethod
    def of(cls, before: Float64, after: Float64) -> Self:
        """From the figures of the same images, (N,) float64 each."""
        difference = before - after
        return cls(float(before.mean()), float(after.mean()), float(difference.std() / np.sqrt(len(difference))))

    def __str__(self) -> str:
        return f"{self.after:.4g}, with the one before {self.before:.4g} (± {self.noise:.2g})"


@dataclass(frozen=True, slots=True)
class Learnt:
    """What was learnt after a wave; `relearnt/wave-WWW/learnt.json`.

    Attributes:
        after_wave: the wave.
        what: `order` or `transformation`, as `config.Relearn` says; `nothing` where too few images are embedded.
        images: embedded ones that were looked at.
        error: the mean |new - z|^2; None where nothing was fitted.
        precision: mAP among the probe images, in per cent, by those that have labels; None where too few have.
    """

    after_wave: int
    what: str
    images: int
    error: Change | None = None
    precision: Change | None = None

    @classmethod
    def from_json(cls, data: bytes, where: str = "learnt.json") -> Self:
        """The inverse of `documents.encode`.

        Raises:
            DataError: the file is damaged or of another format.
        """
        tree = documents.decode(data, where)
        if "before" in tree:  # as it was kept when the error was all that counted
            old = {name: tree.pop(name, None) for name in ("before", "after", "noise")}
            tree["error"] = None if old["before"] is None else old
        return documents.build(cls, tree, where)

    @property
    def taken(self) -> bool:
        """Whether the new transformation is nearer by more than chance has it, and does not find clearly less."""
        if self.error is None or self.error.after >= self.error.before - self.error.noise:
            return False
        found = self.precision
        return found is None or found.after >= found.before - found.noise

    def __str__(self) -> str:
        """One line for people."""
        text = f"learnt on the way after wave {self.after_wave}, from {self.images:,} images: {self.what}"
        if self.error is None:
            return text
        found = "" if self.precision is None else f"; mAP {self.precision}"
        return f"{text}, {'taken' if self.taken else 'not taken'}: squared error {self.error}{found}"


def compare(
    config: Config, source: Run, tried: Run, wave: int, probe: ProbeSet | None, held_out: PairArrays
) -> tuple[Change, Change | None]:
    """What to go by: see `Learnt.error` and `Learnt.precision`.

    Args:
        config: `gallery.metric` counts.
        source: where the transformation lies that serves so far.
        tried: where the new one does.
        wave: up to which images are embedded.
        probe: images of the gallery, as that wave is embedded.
        held_out: embedded images that the new one was not fitted on, for want of a probe set.
    """
    left = np.zeros(0, np.int64) if probe is None else np.flatnonzero(probe.wave > wave)
    if probe is None or held_out.side is not None or len(left) < _LEAST:  # the probe set keeps no side information
        return Change.of(*(_errors(place, held_out) for place in (source, tried))), None
    probe = replace(probe, new=probe.targets(config.gallery.metric))
    rest = PairArrays(probe.old[left], probe.new[left], None, None)
    error = Change.of(*(_errors(place, rest) for place in (source, tried)))
    if measurable(probe.labels) is None:
        return error, None
    before, after = (_precision(config, place, probe, wave) for place in (source, tried))
    return error, Change.of(before, after)


def _vectors(place: Run, pairs: PairArrays) -> tuple[Float32, Float32]:
    """z and s of the transformation that lies there."""
    network, _ = load_transformation(place, torch.device("cpu"))
    return apply(network, pairs.old, pairs.side, torch.device("cpu"), APPLY_BATCH)


def _errors(place: Run, pairs: PairArrays) -> Float64:
    """|new - z|^2 of each pair, (N,) float64."""
    errors: Float64 = np.square(pairs.new - _vectors(place, pairs)[0]).sum(axis=1, dtype=np.float64)
    return errors


def _precision(config: Config, place: Run, probe: ProbeSet, wave: int) -> Float64:
    """Of each query that has a match, its average precision in per cent, (Q,) float64, with these waves embedded."""
    left, labelled = probe.wave > wave, probe.labels >= 0
    z, s = _vectors(place, PairArrays(probe.old[left], probe.new[left], None, None))
    part, state = read_part(place, offsets.PART), probe.new.copy()
    state[left] = z if part is None else Offset.from_bytes(part).apply(z, s)
    sides, labels = (probe.new[labelled], state[labelled]), probe.labels[labelled]
    found = evaluate(*sides, labels, labels, metric=config.gallery.metric, self_match=True).average_precision
    return 100 * found[np.isfinite(found)]
