"""`fastfill status`: figures from storage, and how they are shown."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from jobs.status import show
from pipeline.embedding import vector_log
from pipeline.embedding.reject_rules import manifest_log
from pipeline.embedding.vector_log import EmbeddedUnit
from pipeline.evaluation import quality
from pipeline.evaluation.quality import Quality
from pipeline.index import commits, tags
from pipeline.reporting.status import read_status
from pipeline.run import Run
from pipeline.schema import UNITS, Unit
from pipeline.storage import documents, objects, parquet
from tests.support.synthetic_run import Options, known, make_run
from tests.support.whole_run import WholeRun


def test_status_lists_the_log_once_and_counts_units_and_rejects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run = make_run(tmp_path, known(300), Options(waves=4, embedded_waves=3, rejects=20, unit_images=10))
    listed = []
    list_stats = objects.list_stats
    monkeypatch.setattr(objects, "list_stats", lambda uri, suffix: listed.append(uri) or list_stats(uri, suffix))
    status = read_status(run.uri)
    assert sorted(uri for uri in listed if "embedded" in uri) == [
        run.path("embedded", f"wave-00{n}") for n in (1, 2, 3)
    ]
    assert (status["gallery"], status["wave"], status["waves"]) == (300, 3, 4)
    assert status["embedded"] + status["rejected"] == 180  # waves of 30, 60, 90 and 120
    assert status["published"] == status["durable"] == status["embedded"]
    assert status["images_per_second"] == pytest.approx(10 / 2.0)  # a unit every two seconds
    assert status["eta_seconds"] == pytest.approx(120 / 5.0)


def published(tmp_path: Path) -> Run:
    """Three commits with the quality of each; prod serves the last one."""
    whole = WholeRun(Run(str(tmp_path)), num=120, num_waves=2)
    for number in range(3):
        whole.publish(number)
        quality.write_quality(whole.run, Quality(number, "", {"top1": 90.0 + number}, (), (), (), ()))
        tags.auto_promote(whole.run, number)
    return whole.run


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[Run], str]:
    """What `status` prints on a wide terminal."""
    monkeypatch.setenv("COLUMNS", "300")

    def shown(run: Run) -> str:
        show(read_status(run.uri), run)
        return capsys.readouterr().err

    return shown


def test_status_after_a_rollback_has_the_quality_of_prod_and_the_pin(
    tmp_path: Path, screen: Callable[[Run], str]
) -> None:
    run = published(tmp_path)
    before = time.time()
    tags.rollback(run, 1)
    status = read_status(run.uri)
    assert (status["commit"], status["quality_commit"], status["quality"]) == (2, 2, {"top1": 92.0})
    assert (status["prod"], status["prod_quality"]) == (1, {"top1": 91.0})
    assert status["pinned"] is not None
    since = status["pinned"]["since_unix_seconds"]
    assert since is not None
    assert before <= since <= time.time()
    said = screen(run)
    assert re.search(r"prod +│ 1, pinned by rollback since .* UTC: .* `fastfill promote`", said)
    assert re.search(r"quality of commit 1 \(prod\) +│ top-1 91\.0 % ", said)
    assert re.search(r"quality of commit 2 \(latest\) +│ top-1 92\.0 % ", said)


def test_status_of_a_prod_without_a_pin_shows_no_pin(tmp_path: Path, screen: Callable[[Run], str]) -> None:
    run = published(tmp_path)
    tags.rollback(run)
    tags.promote(run, None, blockers=[])
    status = read_status(run.uri)
    assert status["pinned"] is None
    assert status["prod_quality"] == status["quality"] == {"top1": 92.0}
    said = screen(run)
    assert "pinned" not in said
    assert "latest)" not in said


def test_status_of_a_pin_by_an_earlier_version_has_no_time(tmp_path: Path, screen: Callable[[Run], str]) -> None:
    run = published(tmp_path)
    tree = json.loads(documents.encode(tags.rollback(run)))
    del tree["pinned_unix_seconds"], tree["sha256"]
    tree["sha256"] = documents.digest(tree)
    objects.put(run.tag("prod"), json.dumps(tree).encode())
    status = read_status(run.uri)
    assert status["pinned"] == {"by": "rollback", "since_unix_seconds": None, "unpin": "fastfill promote"}
    assert "pinned by rollback: later commits" in screen(run)


def test_status_of_a_damaged_served_commit_or_a_missing_segment_says_so(
    tmp_path: Path, screen: Callable[[Run], str]
) -> None:
    run = published(tmp_path)

    def said() -> str:
        return " ".join(screen(run).replace("│", " ").split())

    assert " damaged " not in said()
    segment = Path(run.path(commits.read_commit(run, 2).segments[0].path))
    data = segment.read_bytes()
    segment.unlink()
    assert re.search(r" damaged commit 2 names a file that is missing: .*fastfill repair", said())
    segment.write_bytes(data)
    commit = Path(run.commit(2))
    commit.write_bytes(commit.read_bytes()[:40])
    assert f" damaged not a JSON file: {commit}; " in said()


def test_status_of_a_run_whose_work_took_no_time_has_no_rate(tmp_path: Path, screen: Callable[[Run], str]) -> None:
    options = Options(waves=4, embedded_waves=3, unit_images=10, seconds_per_unit=0.1)
    _, run = make_run(tmp_path, known(300), options)
    status = read_status(run.uri)
    assert status["images_per_second"] is None
    assert status["eta_seconds"] is None
    assert re.search(r"rate +│ none: less than 5 seconds of work", screen(run))


@pytest.mark.parametrize("name", ["img [/2019] x.png", "img [a] :smile: [bold].png"])
def test_status_shows_rejects_with_brackets_as_they_are(
    tmp_path: Path, screen: Callable[[Run], str], name: str
) -> None:
    run = Run(str(tmp_path / "run [a]"))
    rows = pa.table({"id": [1], **{column: pa.nulls(1, UNITS.field(column).type) for column in UNITS.names[1:]}})
    rows = rows.set_column(UNITS.names.index("uri"), "uri", pa.array([name]))
    objects.put(run.path("rows.parquet"), parquet.parquet_bytes(UNITS, [rows]))
    words = pa.array(["decode"]), pa.array([f"no image {name}"])
    unit = EmbeddedUnit(np.array([1]), np.zeros((1, 2), np.float32), pa.nulls(1, pa.string()), *words)
    vector_log.write_unit(manifest_log(run, "pairs", "old"), Unit(0, 0, run.path("rows.parquet"), 0, 1), unit)
    said = screen(run)
    assert f"{name} (no image {name})" in said
    assert "run [a]" in " ".join(said.split())
