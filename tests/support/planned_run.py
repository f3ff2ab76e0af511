"""A planned run with held-out pairs, a transformation and a probe set, without Ray: for what is expected of it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from pipeline.arrays import Float32, vectors_to_arrow
from pipeline.config.load import validate
from pipeline.config.tree import Config
from pipeline.models import offset
from pipeline.models.networks import TransformationNetwork
from pipeline.models.offset import Offset
from pipeline.models.transformation import TransformationInfo, save_transformation
from pipeline.planning import policy_inputs, selection_result
from pipeline.planning.plan import Plan, read_plan
from pipeline.planning.policy_inputs import HeldOutPairs, PolicyInputs, build_policy_inputs
from pipeline.planning.selection_result import Selection
from pipeline.run import Run
from pipeline.storage import objects, parquet
from tests.support.sample import draw_probe
from tests.support.synthetic_run import Known, Options, known, make_run
from training.fitting.learner import PairArrays
from training.fitting.pairs import Pairs
from training.simulation.build_policy_inputs import group_needs
from training.simulation.folds import Fold
from training.simulation.held_out import HeldOut
from training.simulation.staleness_cost import fit_learned, staleness_cost

HELD_OUT = 300


def labels_of(images: Known) -> list[str]:
    assert images.labels is not None
    return images.labels


def pairs_of(num: int = 400, seed: int = 0) -> HeldOut:
    """Pairs as they are held out, served as z is; class c is called `label c`, and group 1 has the most need."""
    images = known(num, seed=seed)
    names = tuple(sorted(set(labels_of(images))))
    labels = np.array([names.index(name) for name in labels_of(images)])
    groups = np.array(images.groups, dtype=object)
    z, new = images.transformed, images.embedded
    fold = Fold(PairArrays(images.old, new, None, labels), z, images.uncertainty, None)
    known_pairs = build_policy_inputs(
        HeldOutPairs(images.old, z, images.uncertainty, new, labels, names), None, "l2", 0
    )
    group_names, need = group_needs(z, new, labels, groups, "l2")
    known_pairs = fit_learned(fold.scored(), known_pairs, staleness_cost(z, new, labels, "l2", 0), 0)
    return HeldOut(fold, z, groups, replace(known_pairs, group_names=group_names, group_need=need))


def write_pairs(run: Run, images: Known, labelled: bool) -> pa.Table:
    """The first images as pairs that were held out, written in another order than their index."""
    names, rows = tuple(sorted(set(labels_of(images)))), np.random.default_rng(1).permutation(HELD_OUT)
    labels = [names.index(labels_of(images)[row]) if labelled else None for row in rows]
    columns = {
        "index": pa.array(rows),
        "label": pa.array(labels, pa.int32()),
        "group": pa.array([images.groups[row] if images.groups else None for row in rows], pa.string()),
        "old": vectors_to_arrow(images.old[rows]),
        "new": vectors_to_arrow(images.embedded[rows]),
    }
    table = pa.table(columns)
    objects.put(run.part("pairs/held_out", 0), parquet.parquet_bytes(table.schema, [table]))
    widths = images.old.shape[1], images.embedded.shape[1]
    classes = (len(names), 0, names) if labelled else (None, 0, None)
    pairs = Pairs(HELD_OUT, HELD_OUT, *widths, None, *classes)
    objects.put(run.path("pairs", "pairs.json"), json.dumps(asdict(pairs)).encode())
    return table


def save(run: Run, images: Known, moved: Offset | None, selected: Selection | None) -> TransformationNetwork:
    """A network that was never fitted, and what policies know of the pairs."""
    torch.manual_seed(0)
    widths = images.old.shape[1], images.embedded.shape[1]
    network = TransformationNetwork(*widths, 16).eval()
    info = TransformationInfo(*widths, None, 16, False, "alignment", 0, 1, HELD_OUT, HELD_OUT, True)
    parts = {policy_inputs.PART: _reference(images).to_bytes()}
    parts |= {} if moved is None else {offset.PART: moved.to_bytes()}
    parts |= {} if selected is None else {selection_result.PART: selected.to_json().encode()}
    save_transformation(run, network, info, parts)
    return network


def _reference(images: Known) -> PolicyInputs:
    rows = slice(0, HELD_OUT)
    sides: list[Float32] = [images.old[rows], images.transformed[rows], images.uncertainty[rows], images.embedded[rows]]
    return build_policy_inputs(HeldOutPairs(*sides), None, "l2", 0)


def planned(
    folder: Path, images: Known, labelled_pairs: bool = True, probe: int = 200, selected: Selection | None = None
) -> tuple[Config, Run, Plan]:
    """All that `fastfill plan` has made when it asks what is to be expected."""
    options = Options(embedded_waves=0, commits=False, transformation=False, new_in_manifest=True)
    config, run = make_run(folder, images, options)
    config = config.model_copy(update={"probe": config.probe.model_copy(update={"images": probe})})
    paired = replace(images, labels=[label or "none" for label in images.labels or [None] * len(images.ids)])
    write_pairs(run, paired, labelled_pairs)
    save(run, images, None, selected)
    assert (draw_probe(config, run) is None) == (probe == 0)
    plan = read_plan(run)
    assert plan is not None
    return config, run, plan


def config_of(folder: Path, **columns: str) -> Config:
    encoder = {"export": "new.pt2", "dim": 16, "preprocess": {"size": 4}}
    images = {"manifest": "images", "columns": columns}
    tree = {"run": str(folder), "encoders": {"new": encoder}, "gallery": images}
    return validate(tree | {"pairs": {"manifest": "images", "columns": {}}}, "test")
