"""The probe set: a sample of the gallery's own images, on which every snapshot is measured before `prod` moves.

    gallery/part-* (and probe.manifest) -> sampling.probe_draw -> probe-set/part-00000 -> the embedding stream
    -> probe-set/old, new -> gather, with the plan's rows of these images -> probe-set/set.parquet

Its images depend on their ids and the wanted number alone, or on the user's sample. Each is also embedded in its wave
like any other image.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline import parallel
from pipeline.arrays import Float32, Int64, vectors_from_arrow, vectors_to_arrow
from pipeline.config.method import ProbeSettings
from pipeline.config.tree import EncodersSettings
from pipeline.embedding.precompute import embedding_log, read_embeddings
from pipeline.evaluation.gallery_arrays import codes_of, count_labelled
from pipeline.manifest import normalised
from pipeline.planning.plan import Plan
from pipeline.run import PROBE_SET, Run
from pipeline.storage import objects, parquet

_FEWEST = 2  # one image alone has no neighbours
_PLANNED = ["id", "wave", "uncertainty", "vector"]
_GATHERED = ["id", "wave", "uncertainty", "label", "group", "vector", "new", "old"]


@dataclass(frozen=True, slots=True)
class ProbeSet:
    """Q images of the gallery, sorted by id: those that both encoders could read."""

    ids: Int64  # (Q,) int64
    old: Float32  # (Q, d_old) float32
    new: Float32  # (Q, d_new) float32, the new encoder on the images
    transformed: Float32  # (Q, d_new) float32, h of the old embeddings
    uncertainty: Float32  # (Q,) float32
    wave: Int64  # (Q,) int64, from 1, in which the backfill embeds the image
    labels: Int64  # (Q,) int64, an index into `label_names`, or -1 for none
    groups: Int64  # (Q,) int64, an index into `group_names`, or -1 for none
    label_names: tuple[str, ...]  # sorted
    group_names: tuple[str, ...]  # sorted

    def targets(self, metric: str) -> Float32:
        """The targets of a transformation, (Q, d_new): `new`, scaled to length 1 for cosine."""
        return self.new / np.linalg.norm(self.new, axis=1, keepdims=True) if metric == "cosine" else self.new


def embedded(probe: ProbeSettings, encoders: EncodersSettings, run: Run) -> pa.Table | None:
    """The drawn images that both encoders could read; it needs no plan.

    Returns:
        sorted by id: id, label and group (strings, null for none), old and new, and `side` if the gallery has it.
        None if there is no probe set, or fewer than two of its images have both embeddings.
    """
    if not probe.images or normalised.read_manifest(run, PROBE_SET) is None:
        return None
    found = _embedded(encoders, run)
    return found if found.num_rows >= _FEWEST else None


def gather(probe: ProbeSettings, encoders: EncodersSettings, run: Run, plan: Plan) -> ProbeSet | None:
    """The probe set with its embeddings and the plan's rows of its images; stored on the first call.

    Returns:
        None if there is no probe set, or fewer than two of its images have both embeddings.
    """
    if not probe.images or normalised.read_manifest(run, PROBE_SET) is None:
        return None
    if not is_gathered(run):
        known = _embedded(encoders, run)
        ids: Int64 = known["id"].to_numpy()
        planned = pa.concat_tables(
            parallel.each(_planned, (plan.laid_out(run), ids), range(plan.num_parts), plan.num_gallery)
        )
        planned = planned.take(pa.array(np.argsort(planned["id"].to_numpy())))
        known = known.take(pa.array(np.searchsorted(ids, planned["id"].to_numpy())))
        for name in ("label", "group", "new", "old"):
            planned = planned.append_column(name, known[name])
        planned = planned.select(_GATHERED)
        objects.put(_gathered(run), parquet.parquet_bytes(planned.schema, [planned]))
    return load(run)


def stands_alone(run: Run, plan: Plan, probe: ProbeSet) -> bool:
    """Whether quality is measured among the labelled probe images alone.

    True if they are the user's sample and other images have no label: a hit without a label is neither right nor wrong.
    """
    drawn = normalised.read_manifest(run, PROBE_SET)
    if drawn is None or not drawn.sample:
        return False
    others = count_labelled(plan.laid_out(run), plan.num_parts, plan.num_gallery, probe.ids)
    return others + int((probe.labels >= 0).sum()) < plan.num_gallery


def load(run: Run) -> ProbeSet | None:
    """The probe set as `gather` stored it; None if it is not stored or has fewer than two images."""
    if not is_gathered(run):
        return None
    table = parquet.read_parquet(_gathered(run))
    if table.num_rows < _FEWEST:
        return None
    labels, label_names = codes_of(table["label"])
    groups, group_names = codes_of(table["group"])
    return ProbeSet(
        ids=table["id"].to_numpy(),
        old=vectors_from_arrow(table["old"]),
        new=vectors_from_arrow(table["new"]),
        transformed=vectors_from_arrow(table["vector"]),
        uncertainty=table["uncertainty"].to_numpy(),
        wave=table["wave"].to_numpy().astype(np.int64),
        labels=labels,
        groups=groups,
        label_names=label_names,
        group_names=group_names,
    )


def is_used(run: Run) -> bool:
    """Whether commits of this run are measured: a probe set was drawn and is not too small."""
    if is_gathered(run):
        return len(parquet.read_parquet(_gathered(run), ["id"])) >= _FEWEST
    return normalised.read_manifest(run, PROBE_SET) is not None


def is_gathered(run: Run) -> bool:
    """Whether `gather` has stored the set; then its images are not embedded for it any more."""
    return objects.exists(_gathered(run))


def _gathered(run: Run) -> str:
    return run.path(PROBE_SET, "set.parquet")


def _embedded(encoders: EncodersSettings, run: Run) -> pa.Table:
    (rows, old), (others, new) = (
        read_embeddings(run, PROBE_SET, 0, f"{role}_embedding", embedding_log(encoders, run, PROBE_SET, role))
        for role in ("old", "new")
    )
    ids, other_ids = rows["id"].to_numpy(), others["id"].to_numpy()
    in_new, in_old = np.isin(ids, other_ids), np.isin(other_ids, ids)
    names = ["id", "label", "group", *(["side"] if "side" in rows.schema.names else [])]
    found = rows.filter(pa.array(in_new)).select(names)
    found = found.append_column("old", vectors_to_arrow(old[in_new]))
    return found.append_column("new", vectors_to_arrow(new[in_old]))


def _planned(run: Run, ids: Int64, part: int) -> pa.Table:
    """The plan's rows of the images of a part that are among `ids` (sorted)."""
    uri = run.transformed_part(part)
    there = np.flatnonzero(np.isin(parquet.read_parquet(uri, ["id"])["id"].to_numpy(), ids))
    return parquet.read_parquet(uri, _PLANNED).take(pa.array(there))
