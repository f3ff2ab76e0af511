"""What holds on this machine holds on another processor, and a run may move between the two.

The other processor is this one with the libraries' oldest kernels (`tests.support.kernels`): matrix products and
convolutions then differ in their last bits.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config.load import load_config
from pipeline.embedding import vector_log
from pipeline.equality import same_vectors
from pipeline.index import commits, tags
from pipeline.index.codebook import Codebook
from pipeline.index.segment import Segment, as_stored, decode_segment
from pipeline.planning.plan import Plan, read_plan
from pipeline.run import Run
from pipeline.storage import objects
from tests.support import kernels
from tests.support.galleries import write_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not kernels.differ_here(), reason="this machine has no other kernels"),
]

ROOT = Path(__file__).resolve().parents[2]
NUMERICS = [
    *("pipeline/test_equality.py", "pipeline/models", "pipeline/embedding/test_decode.py"),
    *("pipeline/embedding/test_embedder.py", "pipeline/index/test_segment.py", "pipeline/index/test_seal.py"),
    *(
        "pipeline/serving/test_searcher.py",
        "pipeline/serving/test_export.py",
        "pipeline/serving/test_search_by_kind.py",
    ),
    *(
        "pipeline/planning/test_policies.py",
        "pipeline/planning/test_policy_inputs.py",
        "pipeline/planning/test_score.py",
    ),
    *("pipeline/planning/test_distribution_shift.py", "pipeline/planning/test_expected_curve.py"),
    *("pipeline/evaluation", "pipeline/reporting/test_audit.py", "benchmarks/speed/test_fit.py", "training"),
]
KERNELS = "import json; from tests.support import kernels; print(json.dumps([kernels.in_use(), kernels.roundings()]))"


def python(*arguments: str, other: bool, exit_code: int = 0) -> str:
    """What a process of its own prints, with the other kernels or with this machine's own."""
    env = kernels.environment() if other else None
    found = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert found.returncode == exit_code, f"{found.stdout[-6000:]}\n{found.stderr[-6000:]}"
    return found.stdout


def test_the_other_kernels_round_every_product_differently() -> None:
    own, other = (json.loads(python("-c", KERNELS, other=other)) for other in (False, True))
    for one, another in zip(own, other, strict=True):
        assert {name for name in one if one[name] == another[name]} == set()


def test_the_suite_passes_with_other_kernels(tmp_path: Path) -> None:
    files = [str(Path("tests", name)) for name in NUMERICS]
    options = [
        "-q",
        "-p",
        "tests.support.kernels",
        "-m",
        "not slow",
        "--basetemp",
        str(tmp_path / "other"),
        "--durations=15",
    ]
    print(python("-m", "pytest", *options, *files, other=True))


def test_run_begun_on_another_processor_is_finished_here_and_whole(tmp_path: Path) -> None:
    path = write_config(tmp_path, index__factory="PCA16,IVF4,SQ8", index__nprobe=4)

    def fastfill(command: str, *arguments: str, other: bool) -> Any:
        return json.loads(python("-m", "jobs.cli", command, "--config", path, "--json", *arguments, other=other))

    fastfill("fit", other=True)
    fastfill("plan", other=False)
    half = ("-m", "jobs.cli", "backfill", "--config", path, "--stop-when", "fraction>=0.3")
    python(*half, other=True, exit_code=3)  # the gate refuses what such encoders give, which is not asked here
    run = Run(load_config(path).run)
    published, plan = tags.list_commits(run), read_plan(run)
    assert plan is not None
    assert 1 < len(published) < 6
    log = plan.log(run)  # the stream was ahead of what is published: the rest is still to be embedded
    ahead = [uri for (wave, _), uri in vector_log.part_files(log.parts_uri).items() if wave > published[-1]]
    objects.delete_files(ahead)
    begun = {uri: objects.sha256(uri) for uri in objects.list_files(run.path("embedded"))}

    fastfill("backfill", other=False)

    assert tags.list_commits(run) == list(range(6))
    now = {uri: objects.sha256(uri) for uri in objects.list_files(run.path("embedded"))}
    assert begun.items() < now.items()
    report = fastfill("audit", other=False)
    assert (report["ok"], report["problems"]) == (True, [])
    assert fastfill("audit", other=True)["ok"]
    assert_sealed_alike(run, plan, published[-1])


def assert_sealed_alike(run: Run, plan: Plan, number: int) -> None:
    """Segments that are made anew here hold what those of the other processor hold."""
    commit = commits.read_commit(run, number)
    codebook = Codebook.open(run, commit.codebook_path, commit.codebook_sha256)
    same: list[bool] = []
    for wave in range(1, number + 1):
        ids, vectors = vector_log.read_wave(plan.log(run), wave)
        kept = as_stored(codebook, vectors)
        for ref in (ref for ref in commit.segments if ref.wave == wave):
            found, stored = decode_segment(codebook, Segment.open(run, codebook, ref))
            rows = np.searchsorted(ids, found)
            np.testing.assert_array_equal(ids[rows], found)
            errors = [np.linalg.norm(side - vectors[rows], axis=1) for side in (stored, kept[rows])]
            np.testing.assert_allclose(*errors, rtol=1e-3)
            same += same_vectors(stored, kept[rows]).tolist()
    assert np.mean(same) > 0.98
