"""What is kept with a fitted transformation: its figures, how its vectors are served and ranked, what policies know.

    network -> z, s of the held-out pairs -> offset, calibration, figures, the policies' reference

Guarantee: all of it is made of pairs that the network has not seen. It does not know how the network was fitted.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa

from pipeline.arrays import Float32
from pipeline.config.tree import Config
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
from training.simulation.build_policy_inputs import policy_inputs_of

_CALIBRATED = 5000  # pairs


def describe(
    config: Config, job: Job, network: Transformation, classifier: LinearClassifier | None
) -> tuple[TransformationInfo, dict[str, bytes]]:
    """The description of a fitted transformation, and its parts by file name.

    Args:
        config: the run's, with the settings that were chosen.
        job: what was fitted.
        network: the outcome.
        classifier: the one that the job fitted or took; None if it needed none.
    """
    data, metric = job.data, config.gallery.metric
    held_out = pa.concat_tables([parquet.read_parquet(uri) for uri in data.held_out_parts])
    pairs = make_arrays(held_out, job)
    held_out = held_out.select([name for name in held_out.column_names if name in ("index", "group")])
    z, s = transform(config, network, pairs)
    offset = _offset(config, classifier, z, s, pairs)
    served = z if offset is None else offset.apply(z, s)
    info = held_out_metrics(config, job, pairs, served, s)
    if job.linear is not None and not info.better_than_old:
        info = replace(info, pairs_to_pass_old=pairs_to_pass_old(pairs, job.linear, job.normalize, metric))
    given = None if data.classifier is None else LinearClassifier(*data.classifier)
    known = policy_inputs_of(config, held_out, pairs, z, s, served, classifier or given, data.label_names)
    parts = {policy_inputs.PART: known.to_bytes()}
    if offset is not None:
        parts[offsets.PART] = offset.to_bytes()
    if config.fit.calibrate:
        calibration = fit_calibration(*_unseen(job, pairs, served), metric, config.seed)
        parts |= {} if calibration is None else {calibrations.PART: calibration.to_bytes()}
    return info, parts


def _offset(
    config: Config, classifier: LinearClassifier | None, z: Float32, s: Float32, pairs: PairArrays
) -> Offset | None:
    kind, strength = config.fit.offset, config.fit.offset_strength
    if kind == "none":
        return None
    return offsets.fit_offset(kind, strength, z, s, pairs.new, classifier, config.gallery.metric)


def _unseen(job: Job, pairs: PairArrays, served: Float32) -> tuple[Float32, Float32]:
    """Transformed vectors (N, d_new) of pairs that the map has not seen, as they are served, and their new embeddings.

    These are the held-out pairs; and of a linear map without an offset also training pairs, by the maps of the other
    folds: the top of a ranking takes many distances.
    """
    if job.fit.kind != "linear" or job.fit.offset != "none" or job.linear is None:
        return served, pairs.new
    z, new = out_of_fold_pairs(job, job.linear, _CALIBRATED)
    return np.concatenate([served, z]), np.concatenate([pairs.new, new])
