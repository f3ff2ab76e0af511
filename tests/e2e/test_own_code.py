"""A policy and an encoder of the user's own, in the folder that the console script is started in."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config.load import load_config
from pipeline.planning.plan import read_plan
from pipeline.reporting.audit import audit
from pipeline.run import Run
from tests.support.galleries import NEW_DIM

SCRIPT = Path(sys.executable).parent / "fastfill"

POLICY = """\
import numpy as np


def odd_first(scored):
    {fault}return (scored.ids % 2).astype(np.float32)
"""

ENCODER = f"""\
import torch


def tiny():
    torch.manual_seed(5)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, {NEW_DIM}))
"""


def fastfill(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The installed script, whose own folder and not the working directory is in the Python path."""
    words = [str(SCRIPT), *arguments, "--config", "run.yaml"]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=250, check=False)


@pytest.mark.skipif(not SCRIPT.exists(), reason="needs the project installed, as `make` does")
@pytest.mark.slow
def test_functions_beside_the_config_work_and_a_policy_that_fails_can_be_mended(
    tmp_path: Path, make_run: Callable[..., str]
) -> None:
    new = {"function": "own_encoder:tiny", "dim": NEW_DIM, "preprocess": {"channels": 1, "size": 8}}
    path = make_run(tmp_path, encoders__new=new, plan__policy="own_policy:odd_first", plan__waves=[0.5, 0.5])
    missing = fastfill(tmp_path, "backfill")
    assert missing.returncode == 2, missing.stderr
    assert "the policy's function cannot be found" in missing.stderr
    assert "--working-dir ." in missing.stderr
    (tmp_path / "own_encoder.py").write_text(ENCODER)
    (tmp_path / "own_policy.py").write_text(POLICY.format(fault='raise KeyError("colour")\n    '))
    failing = fastfill(tmp_path, "backfill")
    assert failing.returncode == 2, failing.stderr
    assert "the policy failed\n  found: KeyError: 'colour' (" in failing.stderr
    assert "own_policy.py, line 5)" in failing.stderr
    (tmp_path / "own_policy.py").write_text(POLICY.format(fault=""))
    mended = fastfill(tmp_path, "backfill", "--set", "plan.waves=[0.4, 0.6]")
    assert mended.returncode == 0, mended.stderr
    run = Run(load_config(path).run)
    plan = read_plan(run)
    assert plan is not None
    assert [wave.images for wave in plan.waves] == [120, 180]
    assert audit(run.uri).ok
    (tmp_path / "own_policy.py").write_text(POLICY.format(fault="scored.ids\n    "))
    changed = fastfill(tmp_path, "backfill", "--set", "plan.waves=[0.4, 0.6]")
    assert changed.returncode == 3, changed.stderr
    assert "content of plan.policy: the run has " in changed.stderr
