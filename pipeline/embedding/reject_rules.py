"""Rejects: the reasons for them, how many stop a run, and all those of a run.

An image that the new encoder cannot read stays served as transformed. An image of the gallery that the old encoder
cannot read has no vector: it is not in the plan, and is counted apart.
"""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config.tree import BackfillSettings
from pipeline.embedding import vector_log
from pipeline.embedding.vector_log import VectorLog
from pipeline.errors import DataError
from pipeline.run import Run
from pipeline.schema import REJECTS
from pipeline.storage.retry import OTHER

REJECT_REASONS = (
    ("fetch", "missing"),
    ("fetch", "forbidden"),
    ("fetch", "too large"),
    ("fetch", "truncated"),
    ("fetch", "unreadable"),
    ("fetch", "container changed"),
    ("fetch", "outside data_root"),
    ("fetch", "deleted"),
    ("fetch", "damaged"),
    ("decode", "empty"),
    ("decode", "not an image"),
    ("decode", "truncated"),
    ("decode", "damaged"),
    ("decode", "too large"),
    ("decode", "not 8 or 16 bits a channel"),
    ("preprocess", "wrong shape"),
    ("preprocess", "too large when resized"),
    ("embed", "not finite"),
    (OTHER, OTHER),
)
"""(stage, reason); the reason is the text of `Reject.reason` before its first colon."""

REMEDY = (
    "see the reasons with `fastfill status`; mend the images and run `fastfill backfill "
    "--retry-rejects`, or raise backfill.max_reject_fraction"
)


def limit(images: int, fraction: float, allowance: int) -> float:
    """The most rejects that do not stop the run, as `config.tree.BackfillSettings` defines it."""
    return max(fraction * images, allowance) if fraction else 0.0


def check(rejected: int, images: int, fraction: float, allowance: int, summary: str, where: str) -> None:
    """Raise if too many of `images` are rejected.

    Raises:
        DataError: with the summary, the counts, and where the reasons are.
    """
    if rejected <= limit(images, fraction, allowance):
        return
    anyway = f" (or {allowance}, if that is more)" if fraction and allowance else ""
    raise DataError(
        summary,
        expected=f"at most {fraction:.2%} of {images} images{anyway}",
        found=f"{rejected} rejects ({rejected / images:.2%})",
        where=where,
        remedy=REMEDY,
    )


def check_manifest(rejected: int, images: int, settings: BackfillSettings, folder: str, where: str) -> None:
    """Raise, before the fit and the plan, if too many images of the gallery or of the pairs are rejected.

    Raises:
        DataError: as `check`.
    """
    summary = f"too many images of the {folder} cannot be embedded, so the run stops before the fit and the plan"
    check(rejected, images, settings.max_reject_fraction, settings.reject_allowance, summary, where)


def manifest_log(run: Run, folder: str, role: str, dim: int = 1) -> VectorLog:
    """The vector log of a manifest's embeddings; to read rejects alone the width does not matter."""
    return VectorLog(run.path(folder, role), run.path(folder, f"{role}-rejects"), dim, num_shards=1)


def gallery_log(run: Run) -> VectorLog:
    """The vector log of the gallery's new embeddings, to read rejects without a plan."""
    return VectorLog(run.path("embedded"), run.path("rejects"), dim=1, num_shards=1)


def count_before_plan(run: Run) -> int:
    """The number of images of the gallery that the old encoder could not read."""
    return sum(vector_log.count_log_rejects(manifest_log(run, "gallery", "old")).values())


def read_all(run: Run, log: VectorLog | None) -> pa.Table:
    """The rejects of the gallery as REJECTS rows, the old encoder's first; `log` is the plan's, None without a plan."""
    before = _of_manifest(run, "gallery", "old", "old encoder")
    return before if log is None else pa.concat_tables([before, vector_log.read_rejects(log)])


def read_of_pairs(run: Run) -> pa.Table:
    """The rejects of the training pairs as REJECTS rows; an image once per encoder that could not read it."""
    folders = [(folder, role) for folder in ("pairs", "gallery-pairs") for role in ("old", "new")]
    return pa.concat_tables(_of_manifest(run, folder, role, f"pairs, {role} encoder") for folder, role in folders)


def count_rejects(stages: pa.Array, reasons: pa.Array) -> list[int]:
    """Count rejected images by REJECT_REASONS; the stage of an embedded image is empty."""
    is_reject = pc.not_equal(stages, "")
    words = pc.list_element(pc.split_pattern(pc.filter(reasons, is_reject), ":", max_splits=1), 0)
    pairs = pc.binary_join_element_wise(pc.filter(stages, is_reject), words, ":")
    found: Counter[tuple[str, str]] = Counter()
    for pair in pc.value_counts(pairs).to_pylist():
        stage, _, reason = pair["values"].partition(":")
        found[(stage, reason) if (stage, reason) in REJECT_REASONS else (OTHER, OTHER)] += pair["counts"]
    return [found[name] for name in REJECT_REASONS]


def _of_manifest(run: Run, folder: str, role: str, title: str) -> pa.Table:
    rows = vector_log.read_rejects(manifest_log(run, folder, role))
    stage = pc.binary_join_element_wise(pa.scalar(title), rows["stage"], ": ")
    return rows.set_column(REJECTS.get_field_index("stage"), "stage", stage)
