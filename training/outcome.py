"""All that is stored with a fitted transformation, made from held-out pairs.

network -> z, s of the held-out pairs -> offset, calibration, held-out figures, policy inputs
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa

from pipeline.arrays import Float32
from pipeline.models import calibration as calibrations
from pipeline.models import offset as offsets
from pipeline.models.calibration import fit_calibration
from pipeline.models.networks import Transformation
from pipeline.models.offset import LinearClassifier, Offset
from pipeline.models.transformation import TransformationInfo
from pipeline.planning import policy_inputs
from pipeline.storage import parquet
from training.fitting.held_out_metrics import held_out_metrics, pairs_to_pass_old, transform
from training.fitting.learner import Job, PairArrays, make_arrays
from training.fitting.linear_parts import out_of_fold_pairs
from training.simulation.build_policy_inputs import groups_of, policy_inputs_of
from training.simulation.folds import Fold

_CALIBRATED = 5000  # pairs


def describe(
    job: Job, network: Transformation, classifier: LinearClassifier | None, device: str
) -> tuple[TransformationInfo, dict[str, bytes]]:
    """The description of a fitted transformation, and its parts by file name; `device` is the config's."""
    data, fit = job.data, job.fit
    held_out = pa.concat_tables([parquet.read_parquet(uri) for uri in data.held_out_parts])
    pairs = make_arrays(held_out, job)
    z, s = transform(network, pairs, device)
    offset = _offset(job, classifier, z, s, pairs)
    served = z if offset is None else offset.apply(z, s)
    info = held_out_metrics(job, pairs, served, s)
    if job.linear is not None and not info.better_than_old:
        info = replace(info, pairs_to_pass_old=pairs_to_pass_old(pairs, job.linear, job.normalize, job.metric))
    given = None if data.classifier is None else LinearClassifier(*data.classifier)
    fold = Fold(pairs, z, s, classifier or given)
    known = policy_inputs_of(fold, served, groups_of(held_out), data.label_names, job.metric, job.seed)
    parts = {policy_inputs.PART: known.to_bytes()}
    if offset is not None:
        parts[offsets.PART] = offset.to_bytes()
    if fit.calibrate:
        calibration = fit_calibration(*_unseen(job, pairs, served), job.metric, job.seed)
        parts |= {} if calibration is None else {calibrations.PART: calibration.to_bytes()}
    return info, parts


def _offset(job: Job, classifier: LinearClassifier | None, z: Float32, s: Float32, pairs: PairArrays) -> Offset | None:
    kind, strength = job.fit.offset, job.fit.offset_strength
    if kind == "none":
        return None
    return offsets.fit_offset(kind, strength, offsets.HeldOutPairs(z, s, pairs.new), classifier, job.metric)


def _unseen(job: Job, pairs: PairArrays, served: Float32) -> tuple[Float32, Float32]:
    """Served vectors (N, d_new) of pairs that the map was not fitted on, and their new embeddings.

    These are the held-out pairs. A linear map without an offset adds training pairs, each transformed by the map that
    was fitted without its fold: calibrating the top of a ranking takes many distances.
    """
    if job.fit.kind != "linear" or job.fit.offset != "none" or job.linear is None:
        return served, pairs.new
    z, new = out_of_fold_pairs(job, job.linear, _CALIBRATED)
    return np.concatenate([served, z]), np.concatenate([pairs.new, new])
