"""`status`: what storage holds, listed once."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.status import read_status
from pipeline import storage
from tests.pipeline.synthetic_run import Options, known, make_run


def test_the_log_is_listed_once_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, run = make_run(tmp_path, known(300), Options(waves=4, embedded_waves=3, rejects=20, unit_images=10))
    listed = []
    list_stats = storage.list_stats
    monkeypatch.setattr(storage, "list_stats", lambda uri, suffix: listed.append(uri) or list_stats(uri, suffix))
    status = read_status(run.uri)
    assert sorted(uri for uri in listed if "embedded" in uri) == [
        run.path("embedded", f"wave-00{n}") for n in (1, 2, 3)
    ]
    assert (status["gallery"], status["wave"], status["waves"]) == (300, 3, 4)
    assert status["embedded"] + status["rejected"] == 180  # waves of 30, 60, 90 and 120
    assert status["published"] == status["durable"] == status["embedded"]
    assert status["images_per_second"] == pytest.approx(10 / 2.0)  # a unit every two seconds
    assert status["eta_seconds"] == pytest.approx(120 / 5.0)
