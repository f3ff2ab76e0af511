"""Calibration and figures that are stored with a fitted transformation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.models.calibration import read_calibration
from pipeline.models.transformation import read_info
from pipeline.run import Run
from tests.support.pairs import fit_config, synthetic_fit_data
from training.fit import fit


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_fit_of_linear_keeps_a_calibration_that_stretches_shrunk_vectors(tmp_path: Path, metric: str) -> None:
    config, run = fit_config(tmp_path, metric=metric, transformation="linear"), Run(str(tmp_path / "run"))
    fit(config, run, synthetic_fit_data(tmp_path))
    found = read_calibration(run)
    assert found is not None
    far = -9  # the middle of all ranks, which grow by about 8 % a knot: ridge shrinks z, so its key is too small
    assert found.expected[far] > found.observed[far]
    keys = np.linspace(found.observed[0], found.observed[-1], 50).astype(np.float32)
    assert (np.diff(found.apply(keys)) >= 0).all()


@pytest.mark.usefixtures("ray_cluster")
def test_fit_without_calibrate_keeps_no_calibration(tmp_path: Path) -> None:
    config, run = fit_config(tmp_path, transformation="linear", calibrate=False), Run(str(tmp_path / "run"))
    fit(config, run, synthetic_fit_data(tmp_path))
    assert read_calibration(run) is None


@pytest.mark.usefixtures("ray_cluster")
def test_fit_that_is_as_good_as_the_old_model_names_no_number_of_pairs(tmp_path: Path) -> None:
    config, run = fit_config(tmp_path, transformation="linear"), Run(str(tmp_path / "run"))
    info = fit(config, run, synthetic_fit_data(tmp_path))
    assert read_info(run) == info
    if info.better_than_old:
        assert info.pairs_to_pass_old is None
