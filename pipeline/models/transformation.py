"""The files of a run's transformation: weights, further parts, and the marker that names them. `training` fits it.

It maps an old embedding to z in the new space, with s, the log of its expected error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from pipeline.arrays import Float32
from pipeline.config.method import TransformationKind
from pipeline.errors import DataError, SnapshotConflict
from pipeline.models import networks
from pipeline.models.networks import Transformation
from pipeline.run import Run
from pipeline.schema import FORMAT_VERSION
from pipeline.storage import documents, interface, objects

_WEIGHTS = "model-{}.safetensors"  # by sha256, so that two fits at once do not replace each other's files
_MARKER = "transformation.json"
APPLY_BATCH = 8192  # rows per forward pass; `apply` gives the same bits for the same number

HeldOutFigures = dict[str, float | dict[str, float]]


@dataclass(frozen=True, slots=True)
class TransformationInfo:
    """The description of a fitted transformation.

    Attributes:
        kind: as `fit.transformation`; version 0.1 had one kind, and did not write it.
        pairs_to_pass_old: estimated number of training pairs with which the linear map is as good as the old model;
            None if it is as good already, or if more pairs will not be enough.
        held_out: figures on held-out pairs: `alignment` (mean squared error per dimension), `spearman` (rank
            correlation of s with that error), `num_pairs`, and for each of `transformed`, `old_old` and `new_new` the
            retrieval figures in per cent: `top1`, `top5`, `map`, or `agreement10` without labels.
    """

    d_old: int
    d_new: int
    d_side: int | None
    inner_width: int
    normalize: bool
    loss: str
    seed: int
    epochs: int
    num_train: int
    num_held_out: int
    better_than_old: bool
    held_out: HeldOutFigures = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    kind: TransformationKind = "fastfill"
    pairs_to_pass_old: int | None = None

    def network(self) -> Transformation:
        """An unfitted transformation of this kind and shape."""
        return networks.make(self.kind, self.d_old, self.d_new, self.inner_width, self.d_side, self.normalize)


@dataclass(frozen=True, slots=True)
class _Files:
    """The sha256 of the transformation's files, from its marker."""

    weights_sha256: str | None = None
    parts: dict[str, str] = field(default_factory=dict)


def has_transformation(run: Run) -> bool:
    """Whether the run has a complete transformation."""
    return objects.exists(objects.join(run.transformation, _MARKER))


def save_transformation(
    run: Run, network: Transformation, info: TransformationInfo, parts: Mapping[str, bytes] | None = None
) -> None:
    """Write the weights and parts, then the marker that names them; from then on the transformation exists.

    Args:
        run: the run.
        network: the fitted transformation.
        info: its description.
        parts: further files by name: offset, calibration, selection, policy inputs.

    Raises:
        SnapshotConflict: the run has a transformation already.
    """
    marker = objects.join(run.transformation, _MARKER)
    if objects.exists(marker):
        raise _conflict(marker)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    weights = save_safetensors(tensors)
    sha256 = hashlib.sha256(weights).hexdigest()
    objects.put(objects.join(run.transformation, _WEIGHTS.format(sha256)), weights)
    digests = {name: _put_part(run, name, data) for name, data in (parts or {}).items()}
    document = asdict(info) | {"weights_sha256": sha256, "parts": digests}
    try:  # no attempt id: equal bytes are the same transformation
        objects.put_if_absent(marker, documents.encode(document))
    except interface.AlreadyExists:
        raise _conflict(marker) from None


def read_part(run: Run, name: str) -> bytes | None:
    """A part of the transformation; None if it has no part of this name.

    Raises:
        DataError: there is no transformation, or the part is missing or damaged.
    """
    where, tree = _read_marker(run)
    sha256 = documents.build(_Files, tree, where, _again(run)).parts.get(name)
    if sha256 is None:
        return None
    return _read_whole(run, _part_uri(run, name, sha256), sha256, f"the transformation's {name}")


def read_info(run: Run) -> TransformationInfo:
    """The description of the run's transformation; raises DataError if there is none, or it is damaged."""
    where, tree = _read_marker(run)
    return documents.build(TransformationInfo, tree, where, _again(run))


def load_transformation(run: Run, device: torch.device) -> tuple[Transformation, TransformationInfo]:
    """The network on `device`, in eval mode, and its description.

    Raises:
        DataError: there is none, or the weights are missing, damaged or of another shape.
    """
    where, tree = _read_marker(run)
    info = documents.build(TransformationInfo, tree, where, _again(run))
    expected = documents.build(_Files, tree, where, _again(run)).weights_sha256
    path = objects.join(run.transformation, _WEIGHTS.format(expected))
    weights = _read_whole(run, path, expected, "the transformation's weights")
    network = info.network()
    try:
        network.load_state_dict(load_safetensors(weights))
    except (SafetensorError, RuntimeError) as error:
        remedy = _again(run)
        raise DataError("the weights do not fit the network", found=error, where=path, remedy=remedy) from error
    return network.to(device).eval(), info


def verify(run: Run) -> list[tuple[str, DataError]]:
    """The damaged or missing files of the run's transformation, with the error of each."""
    where = objects.join(run.transformation, _MARKER)
    try:
        where, tree = _read_marker(run)
        files = documents.build(_Files, tree, where, _again(run))
        documents.build(TransformationInfo, tree, where, _again(run))
    except DataError as error:
        return [(where, error)]
    named = {_part_uri(run, name, sha256): sha256 for name, sha256 in files.parts.items()}
    named[objects.join(run.transformation, _WEIGHTS.format(files.weights_sha256))] = files.weights_sha256 or ""
    found = []
    for uri, sha256 in named.items():
        try:
            _read_whole(run, uri, sha256, "the transformation's files")
        except DataError as error:
            found.append((uri, error))
    return found


def apply(
    network: Transformation, old: Float32, side: Float32 | None, device: torch.device, batch_size: int
) -> tuple[Float32, Float32]:
    """Transform N old embeddings; the same bits for the same `batch_size`, device and number of threads.

    Args:
        network: on `device`, in eval mode.
        old: (N, d_old) float32.
        side: (N, d_side) float32, or None without side information.
        device: device of the network.
        batch_size: rows per forward pass.

    Returns:
        z (N, d_new) float32 and s (N,) float32; row i belongs to `old[i]`.

    Raises:
        DataError: an input has a wrong shape, or the result is not finite.
    """
    _check_shape("old", old, (len(old), network.d_old))
    if (side is None) != (network.d_side is None):
        raise DataError(
            "the side information does not fit the transformation",
            expected="none" if network.d_side is None else f"vectors of width {network.d_side}",
            found="none" if side is None else f"shape {side.shape}",
        )
    if side is not None:
        _check_shape("side", side, (len(old), network.d_side))
    z = np.empty((len(old), network.d_new), dtype=np.float32)
    s = np.empty(len(old), dtype=np.float32)
    with torch.inference_mode():
        for start in range(0, len(old), batch_size):
            rows = slice(start, start + batch_size)
            batch = [torch.tensor(item[rows], device=device) for item in (old, side) if item is not None]
            z_batch, s_batch = network(*batch)
            z[rows], s[rows] = z_batch.cpu().numpy(), s_batch.cpu().numpy()
    broken = int((~(np.isfinite(z).all(axis=1) & np.isfinite(s))).sum())
    if broken:
        raise DataError("the transformation's output is not finite", expected="numbers", found=f"{broken} bad rows")
    return z, s


def _put_part(run: Run, name: str, data: bytes) -> str:
    sha256 = hashlib.sha256(data).hexdigest()
    objects.put(_part_uri(run, name, sha256), data)
    return sha256


def _part_uri(run: Run, name: str, sha256: str) -> str:
    stem, _, ending = name.partition(".")
    return objects.join(run.transformation, f"{stem}-{sha256}.{ending}")


def _read_whole(run: Run, path: str, sha256: str | None, what: str) -> bytes:
    """Read a file of the transformation and check its sha256."""
    try:
        data = objects.read_bytes(path)
    except FileNotFoundError:
        raise DataError(f"{what} are missing", where=path, remedy=_again(run)) from None
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise DataError(f"{what} are damaged", expected=sha256, found=found, where=path, remedy=_again(run))
    return data


def _again(run: Run) -> str:
    return f"delete {run.transformation} and run `fastfill fit` again"


def _check_shape(name: str, values: Float32, expected: tuple[int, int | None]) -> None:
    if values.shape != expected:
        raise DataError(f"the {name} embeddings have another shape", expected=expected, found=values.shape)


def _read_marker(run: Run) -> tuple[str, documents.Tree]:
    where = objects.join(run.transformation, _MARKER)
    try:
        return where, documents.decode(objects.read_bytes(where), where, _again(run))
    except FileNotFoundError:
        raise DataError(
            "the run has no transformation", expected=where, where=run.uri, remedy="run `fastfill fit` first"
        ) from None


def _conflict(marker: str) -> SnapshotConflict:
    return SnapshotConflict(
        "the run has a transformation already", where=marker, remedy="use it, or start another run for another fit"
    )
