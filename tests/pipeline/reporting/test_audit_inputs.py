"""The audit names each file that a resume or a reader reads, whatever happened to it.

Golden runs are damaged here. Those of 9f7897c have no digests in their Parquet files, so a flipped bit or another
valid file is only looked for in the kinds of files that had a digest then, and in runs of this version.
"""

from __future__ import annotations

import shutil
import tarfile
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest

from pipeline.errors import DataError
from pipeline.reporting.audit import audit
from pipeline.run import Run
from pipeline.storage import documents, parquet
from tests.data.make_golden_runs import HERE
from tests.support.golden import FINISHED, HALF
from tests.support.whole_run import WholeRun

FILES = (
    *("run.json", "plan/plan.json", "transformation/transformation.json", "gallery/manifest.json"),
    *("transformation/settings.json", "plan/settings.json", "index/settings.json"),
    *("gallery/part-*.parquet", "plan/**/units-*.parquet", "transformed/**/part-*.parquet"),
    *("transformation/*-*.safetensors", "embedded/wave-001/*.parquet", "embedded/wave-003/*.parquet"),
    *("index/codebook-*", "index/segments/*.faiss", "index/segments/*.parquet"),
    *("index/commits/*0.json", "index/commits/*2.json", "index/tags/candidate.json"),
)
MADE_AGAIN = (  # by the next backfill if they are gone: only a damaged one is a problem
    *("pairs/manifest.json", "pairs/part-*.parquet", "pairs/pairs.json", "pairs/train/*.parquet"),
    *("pairs/held_out/*.parquet", "pairs/old/*/*.parquet", "pairs/new/*/*.parquet"),
    *("probe-set/manifest.json", "probe-set/part-*.parquet", "probe-set/new/*/*.parquet", "probe-set/set.parquet"),
    *(
        "probe-set/reference.json",
        "reports/standing.json",
        "reports/probe-set/*.json",
        "probe-set/neighbours/*.parquet",
    ),
)
DELETED_UNPUBLISHED = "embedded/wave-003/*.parquet"  # of the half-finished run: a unit that is not done yet
WITH_DIGEST = (
    *("transformation/*-*.safetensors", "index/codebook-*", "index/segments/*.faiss", "index/segments/*.parquet"),
    *("index/commits/*0.json", "index/tags/candidate.json"),
)
OF_THIS_VERSION = (
    *("run.json", "plan/plan.json", "plan/settings.json", "gallery/manifest.json", "gallery/part-00000.parquet"),
    *("transformation/transformation.json", "transformation/model-*", "transformation/offset-*"),
    *("plan/**/units-*.parquet", "embedded/wave-003/*.parquet", "index/commits/*0.json", "index/segments/*.faiss"),
)


@cache
def template(name: str) -> Path:
    folder = Path(mkdtemp())
    with tarfile.open(HERE / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "run"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of this version; waves 1 and 2 of 3 are published."""
    run = WholeRun(Run(str(tmp_path_factory.mktemp("whole")))).write_inputs()
    run.publish(2)
    return Path(run.run.uri)


def copied(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder / "run"))


def chosen(run: Path, pattern: str) -> Path:
    return sorted(run.glob(pattern))[0]


def named(run: Path, file: Path) -> bool:
    """Whether a problem of the audit is of this file, or of the wave or folder that it belongs to."""
    problems = audit(str(run)).problems
    return any(str(file).startswith(item.where.partition(",")[0]) for item in problems)


@pytest.mark.parametrize("pattern", FILES + MADE_AGAIN)
@pytest.mark.parametrize("name", FINISHED + HALF)
def test_audit_names_a_file_that_is_cut_off(name: str, pattern: str, tmp_path: Path) -> None:
    run = copied(template(name), tmp_path)
    file = chosen(run, pattern)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert named(run, file)


@pytest.mark.parametrize("pattern", [pattern for pattern in FILES if pattern not in ("run.json", DELETED_UNPUBLISHED)])
@pytest.mark.parametrize("name", FINISHED + HALF)
def test_audit_names_a_file_that_is_gone(name: str, pattern: str, tmp_path: Path) -> None:
    run = copied(template(name), tmp_path)
    file = chosen(run, pattern)
    file.unlink()
    if pattern == "index/tags/candidate.json":  # then nothing is published
        assert audit(str(run)).problems
    else:
        assert named(run, file)


@pytest.mark.parametrize("name", FINISHED + HALF)
def test_audit_of_a_run_whose_run_json_is_gone_says_that_there_is_no_run(name: str, tmp_path: Path) -> None:
    run = copied(template(name), tmp_path)
    (run / "run.json").unlink()
    with pytest.raises(DataError, match="there is no run here"):
        audit(str(run))


@pytest.mark.parametrize("pattern", WITH_DIGEST)
@pytest.mark.parametrize("name", FINISHED + HALF)
def test_audit_names_a_file_with_a_flipped_bit(name: str, pattern: str, tmp_path: Path) -> None:
    run = copied(template(name), tmp_path)
    assert named(run, flipped(chosen(run, pattern)))


@pytest.mark.parametrize("pattern", OF_THIS_VERSION)
def test_audit_names_a_file_of_this_version_with_a_flipped_bit(whole: Path, pattern: str, tmp_path: Path) -> None:
    run = copied(whole, tmp_path)
    assert named(run, flipped(chosen(run, pattern)))


def flipped(file: Path) -> Path:
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 16
    file.write_bytes(data)
    return file


@pytest.mark.parametrize(
    ("pattern", "other"),
    [
        ("gallery/part-00000.parquet", "gallery/part-00001.parquet"),
        ("plan/**/wave-001/units-*.parquet", "plan/**/wave-002/units-*.parquet"),
        ("embedded/wave-003/unit-00000.parquet", "embedded/wave-003/unit-00001.parquet"),
        ("embedded/wave-002/unit-00000.parquet", "embedded/wave-002/unit-00001.parquet"),
        ("transformed/**/part-00000.parquet", "transformed/**/part-00001.parquet"),
        ("transformation/model-*", "transformation/offset-*"),
        ("plan/plan.json", "gallery/manifest.json"),
        ("run.json", "transformation/transformation.json"),
    ],
)
def test_audit_names_a_file_in_the_place_of_another_valid_one(
    whole: Path, pattern: str, other: str, tmp_path: Path
) -> None:
    run = copied(whole, tmp_path)
    file = chosen(run, pattern)
    shutil.copy(chosen(run, other), file)
    assert named(run, file)


def test_audit_names_a_manifest_part_that_holds_other_rows_with_the_same_ids(whole: Path, tmp_path: Path) -> None:
    run = copied(whole, tmp_path)
    file = run / "gallery/part-00000.parquet"
    table = parquet.read_parquet(str(file))
    file.write_bytes(parquet.parquet_bytes(table.schema, [table.slice(0, 7), table.slice(7)]))
    assert named(run, file)


def test_audit_of_run_json_without_its_config_names_it(whole: Path, tmp_path: Path) -> None:
    run = copied(whole, tmp_path)
    (run / "run.json").write_bytes(documents.encode({"fingerprints": {}}))
    assert named(run, run / "run.json")
