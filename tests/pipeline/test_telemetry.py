"""The driver's endpoint: on this machine only, with the figures of the run, and never a reason to fail."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import MagicMock
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from prometheus_client import Counter, Gauge
from prometheus_client.parser import text_string_to_metric_families

from pipeline import backfill as driver
from pipeline import telemetry
from pipeline.config import Telemetry
from pipeline.object_store import COUNTS
from pipeline.progress import Progress, Reading
from pipeline.schema import UnitAck


@pytest.fixture(scope="module")
def endpoint() -> str:
    return telemetry.serve(Telemetry())


def scrape(url: str) -> dict[str, float]:
    """Every sample, by its name and its stage where it has one."""
    with urlopen(url, timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        samples = [sample for family in families for sample in family.samples]
    stages = {sample.name: sample.labels.get("stage") for sample in samples}
    assert set().union(*(sample.labels for sample in samples)) <= {"stage", "le"}  # no ids, no URIs
    return {f"{s.name}:{s.labels['stage']}" if stages[s.name] else s.name: s.value for s in samples}


def progress(**changes: float | Reading | None) -> Progress:
    figures = {"gallery": 200, "durable": 120, "rejected": 4, "published": 50, "wave": 3, "waves": 7}
    return Progress(**{**figures, "images_per_second": 19.0, **changes})  # type: ignore[arg-type] - ints and floats


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield taken.getsockname()[1]


def test_the_endpoint_gives_the_figures_of_the_run(endpoint: str) -> None:
    telemetry.observe_progress(progress())
    found = scrape(endpoint)
    assert {name: found[f"fastfill_{name}"] for name in ("gallery_images", "images_durable", "images_published")} == {
        "gallery_images": 200,
        "images_durable": 120,
        "images_published": 50,
    }
    assert found["fastfill_images_rejected"] == 4
    assert found["fastfill_backfilled_fraction"] == 0.25
    assert (found["fastfill_wave_published"], found["fastfill_waves"]) == (3, 7)
    assert (found["fastfill_images_per_second"], found["fastfill_eta_seconds"]) == (19, 4)


def test_units_add_up(endpoint: str) -> None:
    before = scrape(endpoint)
    for wave in (1, 2):
        telemetry.observe_unit(UnitAck(wave, 0, 30, 2, 1000, 0.5, 2.0, 0.25, 7, 900, 600, 3, 1))
    found = scrape(endpoint)

    def grown(name: str) -> float:
        return found[name] - before.get(name, 0)

    assert grown("fastfill_images_embedded_total") == 60
    assert grown("fastfill_vector_log_bytes_total") == 2000
    for name, wanted in (("fetch_requests", 14), ("fetch_bytes", 1800), ("fetch_bytes_needed", 1200)):
        assert grown(f"fastfill_{name}_total") == wanted
    assert grown("fastfill_retries_total") == 6
    assert grown("fastfill_images_changed_total") == 2
    for stage, seconds in (("load", 1.0), ("embed", 4.0), ("write", 0.5)):
        assert grown(f"fastfill_stage_seconds_count:{stage}") == 2
        assert grown(f"fastfill_stage_seconds_sum:{stage}") == seconds


def test_what_the_driver_repeats_itself_is_counted_with_its_tasks(endpoint: str) -> None:
    before = scrape(endpoint)
    telemetry.observe_unit(UnitAck(1, 0, 30, 2, 1000, 0.5, 2.0, 0.25, 7, 900, 600, 3, 1))
    telemetry.observe_driver(4)
    assert scrape(endpoint)["fastfill_retries_total"] - before["fastfill_retries_total"] == 7


def test_the_driver_counts_each_of_its_own_retries_once(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A publisher and a stream that only fail now and then, in place of the real ones."""
    publisher, tracker = MagicMock(), MagicMock()
    publisher.__enter__.return_value = publisher
    publisher.submit.side_effect = lambda _: COUNTS.add("retries:InternalError", 3) or MagicMock()
    tracker.progress.side_effect = lambda _: progress(reading=Reading(images=32, retries=3))
    tracker.whole_waves.side_effect = [[], [1], [2]]
    monkeypatch.setattr(driver, "Publisher", lambda *_: publisher)
    monkeypatch.setattr(driver, "Tracker", lambda *_: tracker)
    acks = [
        (0, UnitAck(wave, 0, 16, 0, 1000, 0.5, 2.0, 0.25, 7, 900, 600, retries, 0))
        for wave, retries in ((1, 1), (2, 2))
    ]
    monkeypatch.setattr(driver, "embed_stream", lambda *_: iter(acks))
    before = scrape(endpoint)["fastfill_retries_total"]
    COUNTS.add("retries:InternalError")  # before it began
    found = driver.backfill(MagicMock(), MagicMock(), MagicMock(), lambda _: None)
    assert found.reading.retries == 3 + 3 * 3  # of the units, and of commits 0 to 2
    assert scrape(endpoint)["fastfill_retries_total"] - before == 3 + 3 * 3


def test_without_a_rate_there_are_figures_all_the_same(endpoint: str) -> None:
    telemetry.observe_progress(progress(images_per_second=None, durable=121))
    assert scrape(endpoint)["fastfill_images_durable"] == 121


def test_the_endpoint_listens_on_this_machine_only(endpoint: str) -> None:
    assert endpoint.startswith("http://127.0.0.1:")
    with pytest.raises(URLError):  # another address of this machine, which only a server for all would answer
        urlopen(endpoint.replace("127.0.0.1", "127.0.0.2"), timeout=5)


def test_a_free_port_that_is_asked_for_is_taken() -> None:
    with taken_port() as port:
        pass
    assert telemetry.serve(Telemetry(port=port)) == f"http://127.0.0.1:{port}/metrics"


def test_a_port_that_is_taken_is_replaced_by_a_free_one_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with taken_port() as port, caplog.at_level(logging.WARNING, "pipeline.telemetry"):
        url = telemetry.serve(Telemetry(port=port))
        assert f":{port}/" not in url
        assert "fastfill_gallery_images" in scrape(url)
    assert f"port {port} cannot be had" in caplog.text


def test_every_metric_has_our_prefix_a_base_unit_and_is_declared_once() -> None:
    declared = [value for value in vars(telemetry).values() if hasattr(value, "_name") and hasattr(value, "collect")]
    names = [metric._name for metric in declared]
    assert len(set(names)) == len(names) == len(list(telemetry.REGISTRY.collect()))
    for metric in declared:
        assert metric._name.startswith("fastfill_")
        assert not metric._name.endswith(("_ms", "_kb", "_mb", "_minutes", "_percent", "_total"))
        assert metric._documentation.endswith(".")
        assert isinstance(metric, Counter | Gauge) or metric._name.endswith("_seconds")
