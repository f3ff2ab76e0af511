"""A linear fit over parts by Ray: the same as over all rows, for any partition, and saved like any other fit."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.errors import DataError
from pipeline.models.networks import LinearTransformation
from pipeline.models.transformation import load_transformation
from pipeline.planning.policy_inputs import load_policy_inputs
from pipeline.run import Run
from pipeline.storage import objects, parquet
from tests.support.pairs import CPU, D_NEW, D_OLD, PARTS, fit_config, fit_job, read_pairs, synthetic_fit_data
from training import fit as fitting
from training.fit import fit
from training.fitting import trainer
from training.fitting.learner import Epoch, Job
from training.fitting.linear_fit import LinearFit, fit_linear, over_arrays

pytestmark = pytest.mark.usefixtures("ray_cluster")


def silent(what: str, done: int, total: int) -> None:
    """Say nothing."""


def over_parts(job: Job) -> LinearFit:
    found = fitting._with_linear(job, silent).linear
    assert found is not None
    return found


def assert_same(found: LinearFit, expected: LinearFit) -> None:
    for name, tensor in expected.network.state_dict().items():
        torch.testing.assert_close(found.network.state_dict()[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_linear_fit_over_parts_equals_the_fit_over_all_rows(tmp_path: Path, metric: str) -> None:
    data = synthetic_fit_data(tmp_path)
    job = fit_job(fit_config(tmp_path, metric=metric, transformation="linear"), data)
    told: list[tuple[int, int]] = []
    found = fitting._with_linear(job, lambda what, done, total: told.append((done, total))).linear
    assert found is not None
    assert told == [(part, 2 * PARTS) for part in range(1, 2 * PARTS + 1)]
    pairs = read_pairs(data.train_parts, job)
    indices = np.sort(pa.concat_tables(parquet.read_parquet(uri) for uri in data.train_parts)["index"].to_numpy())
    one_pass = over_arrays(indices, pairs.old, pairs.new, None, job.normalize)
    assert_same(found, fit_linear(one_pass, LinearTransformation(D_OLD, D_NEW, None, job.normalize)))


def test_another_partition_into_parts_row_groups_and_float16_is_the_same_fit(tmp_path: Path) -> None:
    data = synthetic_fit_data(tmp_path)
    table = pa.concat_tables(parquet.read_parquet(uri) for uri in data.train_parts)
    half = {name: pa.list_(pa.float16(), width) for name, width in (("old", D_OLD), ("new", D_NEW))}
    for name, kind in half.items():
        flat = pa.array(np.asarray(table[name].combine_chunks().flatten()).astype(np.float16))
        column = pa.FixedSizeListArray.from_arrays(flat, type=kind)
        table = table.set_column(table.schema.get_field_index(name), name, column)
    found = []
    for cuts in ([0, 512], [0, 1, 1, 300, 512]):
        parts = []
        for number, (start, end) in enumerate(itertools.pairwise(cuts)):
            rows = table.slice(start, end - start)
            groups = [rows.slice(at, 100) for at in range(0, max(1, rows.num_rows), 100)]
            parts.append(str(tmp_path / f"{len(cuts)}-{number}.parquet"))
            objects.put(parts[-1], parquet.parquet_bytes(rows.schema, groups))
        job = fit_job(fit_config(tmp_path, transformation="linear"), replace(data, train_parts=data.train_parts))
        found.append(over_parts(replace(job, data=replace(data, train_parts=parts))))
    assert_same(*found)


def test_a_width_that_is_not_the_pairs_is_refused(tmp_path: Path) -> None:
    data = synthetic_fit_data(tmp_path)
    job = fit_job(fit_config(tmp_path, transformation="linear"), replace(data, d_old=D_OLD + 1))
    with pytest.raises(DataError, match="width"):
        over_parts(job)


def test_a_linear_fit_is_measured_saved_and_loaded_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "TorchTrainer", None)  # no epochs, so Ray Train is not started
    config, data = fit_config(tmp_path, transformation="linear"), synthetic_fit_data(tmp_path, labelled=False)
    run = Run(str(tmp_path / "run"))
    info = fit(config, run, data, on_epoch=lambda figures: pytest.fail("there are no epochs"))
    network, stored = load_transformation(run, CPU)
    assert stored == info
    assert (info.kind, info.epochs, info.loss) == ("linear", 0, "alignment")
    again = over_parts(fit_job(config, data)).network.state_dict()
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor, again[name], rtol=0, atol=0, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("kind", "loss"), [("linear", "alignment"), ("residual", "alignment+discriminative")])
def test_ray_train_fits_other_kinds_with_a_classifier(tmp_path: Path, kind: str, loss: str, workers: int) -> None:
    config = fit_config(tmp_path, transformation=kind, loss=loss, epochs=4, num_workers=workers, offset="confidence")
    run, told = Run(str(tmp_path / "run")), list[Epoch]()
    info = fit(config, run, synthetic_fit_data(tmp_path), on_epoch=told.append)
    assert info.kind == kind
    assert info.better_than_old
    assert len(told) == (0 if kind == "linear" else 4)
    known = load_policy_inputs(run)
    assert known is not None
    assert known.classifier_weight is not None
