"""Training pairs: old and new embeddings of the same images, split into training and held-out pairs once.

    pairs/part-* (normalised manifest) -> pairs/old, pairs/new (embedded, if images are given)
    -> pairs/train/part-*, pairs/held_out/part-*

Pairs of the gallery come from gallery-pairs/ in the same way, alone or in addition to those of a manifest. The split
is stratified by label, and a function of ids, labels and seed. Training parts are stripes, so each is a random sample.
`pairs/pairs.json` is written last.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.arrays import Float32, Int64, vectors_from_arrow, vectors_to_arrow
from pipeline.config.method import ClassifierSettings, FitSettings, ProbeSettings
from pipeline.config.tree import BackfillSettings, Config, EncodersSettings, GallerySettings, PairsSettings
from pipeline.embedding import reject_rules
from pipeline.embedding.precompute import OnUnits, embed_missing, embedding_log, read_embeddings
from pipeline.embedding.stream import StreamSettings
from pipeline.embedding.vector_log import VectorLog
from pipeline.errors import DataError
from pipeline.hashing import splitmix64
from pipeline.manifest import normalised
from pipeline.models.encoder_backends import load_tensors
from pipeline.run import GALLERY_PAIRS, Run
from pipeline.sampling import pair_sample
from pipeline.storage import documents, objects, parquet
from pipeline.storage.part_files import list_parts
from training.fitting.learner import FitData

NUM_STRIPES = 16
MIN_PAIRS = 2 * NUM_STRIPES
MIN_HELD_OUT = 2
_MOST_ROWS = 2**20
_GROUP_ROWS = 16_384  # of a row group: a linear fit holds one at a time


@dataclass(frozen=True, slots=True)
class Pairs:
    """The pairs of a run, as in pairs.json.

    Attributes:
        d_side: width of the side information; None without it.
        num_classes: None without labels.
        rejected: images that could not be embedded by both encoders.
        label_names: the label of each class number; None if the numbers are the labels.
        parts: sha256 of each file of the pairs, by its path below `pairs`; empty if an earlier version wrote this.
    """

    num_train: int
    num_held_out: int
    d_old: int
    d_new: int
    d_side: int | None
    num_classes: int | None
    rejected: int
    label_names: tuple[str, ...] | None = None
    parts: dict[str, str] = field(default_factory=dict)


def build_pairs(config: Config, run: Run, on_units: OnUnits = lambda what, done, total: None) -> Pairs:
    """The training pairs: embedded, joined, split and stored, unless that is done already.

    Raises:
        ConfigError: old embeddings must be computed and there is no old encoder.
        DataError: there are too few pairs, or too many of their images cannot be read.
    """
    done = objects.read_versioned(_marker(run))
    if done is not None:
        return documents.parse(Pairs, done[0], _marker(run), documents.REDO)
    folders = pair_folders(run, config.gallery, config.pairs, config.probe)
    embed_missing(run, folders, config.encoders, StreamSettings.of(config), on_units)
    tables = [_join_folder(run, folder, config.encoders, config.backfill) for folder in folders]
    table, rejected = _together([table for table, _ in tables]), sum(bad for _, bad in tables)
    check_enough(table.num_rows, f"{', '.join(map(run.path, folders))}; {rejected} images cannot be read")
    labels, num_classes, label_names = _codes(table["label"])
    ids = table["index"].to_numpy()
    held_out = split(ids, labels, config.pairs.held_out_fraction, config.seed)
    table = table.set_column(table.schema.get_field_index("label"), "label", pa.array(labels, mask=labels < 0))
    stripes = (splitmix64(ids, config.seed + 2) % np.uint64(NUM_STRIPES)).astype(np.int64)
    parts: dict[str, str] = {}
    for stripe in range(NUM_STRIPES):
        mine = pa.array((stripes == stripe) & ~held_out)
        parts |= _put(run, "train", stripe, table.filter(mine))
    rest = table.filter(pa.array(held_out))
    parts |= _put(run, "held_out", 0, rest)
    widths = {name: _width(table, name) for name in ("old", "new", "side")}
    pairs = Pairs(
        num_train=table.num_rows - rest.num_rows,
        num_held_out=rest.num_rows,
        d_old=widths["old"] or 0,
        d_new=widths["new"] or 0,
        d_side=widths["side"],
        num_classes=num_classes,
        rejected=rejected,
        label_names=label_names,
        parts=parts,
    )
    objects.put(_marker(run), documents.encode(pairs))
    return pairs


def pair_folders(run: Run, gallery: GallerySettings, pairs: PairsSettings, probe: ProbeSettings) -> list[str]:
    """The folders of the pairs' manifests; the gallery's pairs are drawn if they are not yet (`pair_sample.draw`)."""
    given = [] if pairs.manifest is None else ["pairs"]
    if not pairs.uses_gallery:
        return given
    return given if pair_sample.draw(run, gallery, pairs, probe) is None else [*given, GALLERY_PAIRS]


def check_enough(num_pairs: int, where: str) -> None:
    """Raise a DataError if there are fewer than MIN_PAIRS pairs."""
    if num_pairs < MIN_PAIRS:
        raise DataError(
            "too few training pairs",
            expected=f"at least {MIN_PAIRS}",
            found=num_pairs,
            where=where,
            remedy="name more pairs in pairs.manifest, or raise pairs.from_gallery",
        )


def _put(run: Run, folder: str, number: int, rows: pa.Table) -> dict[str, str]:
    """Write a part; returns the sha256 of its file by its path below `pairs`."""
    groups = [rows.slice(start, _GROUP_ROWS) for start in range(0, max(1, rows.num_rows), _GROUP_ROWS)]
    data, uri = parquet.parquet_bytes(rows.schema, groups), run.part(f"pairs/{folder}", number)
    objects.put(uri, data)
    return {f"{folder}/{uri.rpartition('/')[2]}": hashlib.sha256(data).hexdigest()}


def has_pairs(run: Run) -> bool:
    """True if the run's pairs are complete."""
    return objects.exists(_marker(run))


def fit_data(fit: FitSettings, run: Run, pairs: Pairs) -> FitData:
    """The input of a fit: the stored parts, and the classifier that `fit.classifier` names.

    Raises:
        DataError: the classifier's file is missing, or has no weight of the new encoder's width.
    """
    return FitData(
        train_parts=list(list_parts(run.path("pairs", "train")).values()),
        held_out_parts=list(list_parts(run.path("pairs", "held_out")).values()),
        num_train=pairs.num_train,
        num_classes=pairs.num_classes,
        d_old=pairs.d_old,
        d_new=pairs.d_new,
        d_side=pairs.d_side,
        classifier=_classifier(fit.classifier, pairs.d_new),
        label_names=pairs.label_names,
    )


def split(ids: Int64, labels: NDArray[np.int32], fraction: float, seed: int) -> NDArray[np.bool_]:
    """The mask of the held-out pairs, (N,) bool.

    Pairs are sorted by label, then by hash, and every (1 / fraction)-th is held out. Each label keeps the fraction to
    within one pair. At least two pairs are held out, because retrieval needs a neighbour.
    """
    fraction = max(fraction, MIN_HELD_OUT / len(ids))
    order = np.lexsort((splitmix64(ids, seed + 1), labels))
    due = np.floor(np.arange(len(ids) + 1) * fraction + 0.5)
    held_out = np.zeros(len(ids), dtype=bool)
    held_out[order] = np.diff(due) > 0
    return held_out


def num_training(num_pairs: int, held_out_fraction: float) -> int:
    """How many of `num_pairs` pairs are for training, if none is rejected."""
    return num_pairs - max(MIN_HELD_OUT, math.floor(num_pairs * held_out_fraction + 0.5))


def _join_folder(run: Run, folder: str, encoders: EncodersSettings, backfill: BackfillSettings) -> tuple[pa.Table, int]:
    """The pairs of a manifest, and how many of its images cannot be read; a DataError if these are too many."""
    rows = normalised.read_manifest(run, folder)
    assert rows is not None, f"the {folder} manifest is normalised before its images are embedded"
    logs = {role: embedding_log(encoders, run, folder, role) for role in ("old", "new")}
    table = pa.concat_tables([_join(run, folder, part, logs) for part in range(len(rows.rows))])
    rejected = rows.num_rows - table.num_rows
    reject_rules.check_manifest(rejected, rows.num_rows, backfill, folder, run.path(folder))
    return table, rejected


def _together(tables: list[pa.Table]) -> pa.Table:
    """All pairs. The gallery's pairs get new ids that the manifest's pairs do not use: ids of both may collide."""
    table, *others = tables
    for other in others:
        order = pa.array(np.argsort(other["index"].to_numpy(), kind="stable"))
        numbers = np.arange(table.num_rows + other.num_rows)
        free = np.setdiff1d(numbers, table["index"].to_numpy())[: other.num_rows]
        place = other.schema.get_field_index("index")
        table = pa.concat_tables([table, other.take(order).set_column(place, "index", pa.array(free))])
    return table


def _join(run: Run, folder: str, part: int, logs: dict[str, VectorLog]) -> pa.Table:
    """One part's pairs: index, label, group, old, new, and side if given; rows without both embeddings are left out."""
    rows, old = read_embeddings(run, folder, part, "old_embedding", logs["old"])
    other, new = read_embeddings(run, folder, part, "new_embedding", logs["new"])
    both = np.intersect1d(rows["id"].to_numpy(), other["id"].to_numpy())
    left, right = _places(rows, both), _places(other, both)
    columns = {
        "index": pa.array(both),
        "label": rows["label"].take(pa.array(left)),
        "group": rows["group"].take(pa.array(left)),
        "old": vectors_to_arrow(old[left]),
        "new": vectors_to_arrow(new[right]),
    }
    if "side" in rows.schema.names:
        columns["side"] = vectors_to_arrow(vectors_from_arrow(rows["side"])[left])
    return pa.table(columns)


def _places(rows: pa.Table, ids: Int64) -> Int64:
    there = rows["id"].to_numpy()
    order = np.argsort(there, kind="stable")
    return order[np.searchsorted(there[order], ids)]


def _codes(labels: pa.ChunkedArray) -> tuple[NDArray[np.int32], int | None, tuple[str, ...] | None]:
    """Labels as class numbers, -1 for none; the number of classes; and their names if they were numbered here.

    Integer labels are kept, as they may be rows of a classifier. Other labels, and integers of _MOST_ROWS or more
    (product numbers, say), are numbered in sorted order.
    """
    names = [name for name in pc.unique(labels).to_pylist() if name is not None]
    if not names:
        return np.full(len(labels), -1, dtype=np.int32), None, None
    numbers = all(name.isdecimal() and int(name) < _MOST_ROWS for name in names)
    codes = {name: int(name) if numbers else code for code, name in enumerate(sorted(names))}
    lookup = np.array([codes.get(name, -1) for name in labels.to_pylist()], dtype=np.int32)
    return lookup, max(codes.values()) + 1, None if numbers else tuple(sorted(names))


def _width(table: pa.Table, name: str) -> int | None:
    return table.schema.field(name).type.list_size if name in table.schema.names else None


def _classifier(spec: ClassifierSettings | None, d_new: int) -> tuple[Float32, Float32 | None] | None:
    if spec is None:
        return None
    tensors = load_tensors(spec.path)
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if weight is None or weight.ndim != 2 or weight.shape[1] != d_new:
        raise DataError(
            "the classifier does not fit the new encoder",
            expected=f"a tensor `weight` of shape (num_classes, {d_new})",
            found={name: tuple(value.shape) for name, value in tensors.items()},
            where=spec.path,
        )
    return weight.float().numpy(), None if bias is None else bias.float().numpy()


def _marker(run: Run) -> str:
    return run.path("pairs", "pairs.json")
