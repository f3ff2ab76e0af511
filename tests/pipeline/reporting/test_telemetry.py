"""The driver's endpoint: on this machine only, with the figures of the run, and never a reason to fail."""

from __future__ import annotations

import json
import logging
import socket
from collections import Counter as Counts
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import MagicMock
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from prometheus_client import Counter, Gauge
from prometheus_client.parser import text_string_to_metric_families

from pipeline.backfill import driver
from pipeline.config.load import load_config
from pipeline.config.tree import TelemetrySettings
from pipeline.embedding.reject_rules import REJECT_REASONS
from pipeline.index.commits import Commit
from pipeline.index.commits import SegmentCounts as Vectors
from pipeline.index.segment_files import SegmentRef
from pipeline.reporting import telemetry
from pipeline.reporting.progress import Progress, Reading
from pipeline.schema import UnitAck
from pipeline.storage.retry import COUNTS, RETRY_CAUSES
from tests.support.galleries import write_config


@pytest.fixture(scope="module")
def endpoint() -> str:
    return telemetry.serve(TelemetrySettings())


LABELS = {
    "stage": {"load", "fetch", "decode", "preprocess", "embed", "write", "seal", "publish", "measure", "other"},
    "cause": set(RETRY_CAUSES),
    "reason": {reason for _, reason in REJECT_REASONS},
    "kind": {"get", "put", "head", "list", "delete", "image", "transformed", "embedded"},
    "direction": {"get", "put"},
    "gallery": {"old_old", "transformed", "new_new"},
    "measure": {"top1", "top5", "map", "agreement10", "recall10", "own", "slot_share", "negative_flips", "group_gap"},
}
"""Every value that a label may have; `wave` is a number, and `le` the histograms' own."""


def scrape(url: str) -> dict[str, float]:
    """Every sample, by its name, and behind colons the values of its labels, as these are sorted: no ids, no URIs."""
    with urlopen(url, timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        samples = [sample for family in families for sample in family.samples]
    for sample in samples:
        for label, value in sample.labels.items():
            assert value.isdecimal() if label == "wave" else label == "le" or value in LABELS[label], sample
    return {":".join([s.name, *(s.labels[label] for label in sorted(s.labels))]): s.value for s in samples}


def retries(found: dict[str, float]) -> float:
    return sum(value for name, value in found.items() if name.startswith("fastfill_retries_total:"))


def unit(*counts: int, wave: int = 1, actor: str = "", rejects: dict[tuple[str, str], int] | None = None) -> UnitAck:
    """30 images embedded and 2 rejected, with so many retries by cause."""
    rejected = [(rejects or {}).get(name, 0) for name in REJECT_REASONS]
    return UnitAck(wave, 0, 30, 2, 1000, 0.5, 2.0, 0.25, 7, 900, 600, sum(counts), 1, 0.125, actor, counts, rejected)


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


def test_telemetry_adds_up_the_counts_of_units(endpoint: str) -> None:
    before = scrape(endpoint)
    for wave in (1, 2):
        telemetry.observe_unit(unit(1, 0, 2, wave=wave))
    found = scrape(endpoint)

    def grown(name: str) -> float:
        return found[name] - before.get(name, 0)

    assert grown("fastfill_units_total") == 2
    assert grown("fastfill_images_embedded_total") == 60
    assert grown("fastfill_vector_log_bytes_total") == 2000
    for name, wanted in (("fetch_requests", 14), ("fetch_bytes", 1800), ("fetch_bytes_needed", 1200)):
        assert grown(f"fastfill_{name}_total") == wanted
    assert grown("fastfill_retries_total:slow_down") == 2
    assert grown("fastfill_retries_total:timeout") == 4
    assert retries(found) - retries(before) == 6
    assert grown("fastfill_images_changed_total") == 2
    for stage, seconds in (("load", 1.0), ("embed", 4.0), ("write", 0.5), ("fetch", 0.25), ("decode", 0.75)):
        assert grown(f"fastfill_stage_seconds_count:{stage}") == 2
        assert grown(f"fastfill_stage_seconds_sum:{stage}") == pytest.approx(seconds)  # of floats that others added to


def test_telemetry_counts_the_drivers_retries_with_those_of_its_tasks(endpoint: str) -> None:
    before = scrape(endpoint)
    telemetry.observe_unit(unit(0, 3))
    telemetry.observe_driver(Counts({"retries:InternalError": 4, "requests:put": 6, "bytes:put": 70}))
    found = scrape(endpoint)
    assert retries(found) - retries(before) == 7
    assert found["fastfill_driver_requests_total:put"] - before.get("fastfill_driver_requests_total:put", 0) == 6
    assert found["fastfill_driver_bytes_total:put"] - before.get("fastfill_driver_bytes_total:put", 0) == 70


def test_the_driver_counts_each_of_its_own_retries_once(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A publisher and a stream that only fail now and then, in place of the real ones."""
    publisher, tracker = MagicMock(), MagicMock()
    publisher.__enter__.return_value = publisher
    publisher.stopped = None
    publisher.submit.side_effect = lambda _: COUNTS.add("retries:InternalError", 3) or MagicMock()
    publisher.initial_commit.side_effect = lambda: publisher.submit(0)
    publisher.submit_all.side_effect = lambda waves: [publisher.submit(wave) for wave in waves]
    tracker.progress.side_effect = lambda *_: progress(reading=Reading(images=32, retries=3))
    tracker.whole_waves.side_effect = [[], [1], [2]]
    monkeypatch.setattr(driver, "open_publisher", lambda *_: publisher)
    monkeypatch.setattr(driver, "Tracker", lambda *_: tracker)
    acks = [(0, unit(count, wave=wave)) for wave, count in ((1, 1), (2, 2))]
    monkeypatch.setattr(driver, "embed_stream", lambda *_: iter(acks))
    monkeypatch.setattr(driver.log_pairs, "write", lambda *_: [])
    before = retries(scrape(endpoint))
    COUNTS.add("retries:InternalError")  # before it began
    found = driver.backfill(MagicMock(data_root="/data"), MagicMock(), MagicMock(), lambda _: None)
    assert found.reading.retries == 3 + 3 * 3  # of the units, and of commits 0 to 2
    assert retries(scrape(endpoint)) - before == 3 + 3 * 3


def test_rejects_are_counted_by_stage_and_reason(endpoint: str) -> None:
    name = "fastfill_rejects_total:not an image:decode"
    before = scrape(endpoint).get(name, 0)
    telemetry.observe_unit(unit(rejects={("decode", "not an image"): 2}))
    assert scrape(endpoint)[name] - before == 2


def test_actors_are_counted_once_and_forgotten_when_they_give_nothing_more(endpoint: str) -> None:
    actors, before = telemetry._Actors(), scrape(endpoint)["fastfill_embed_actors_seen_total"]
    for actor, seconds in (("a", 0), ("b", 1), ("a", 2), ("", 3)):
        actors.see(actor, seconds)
    found = scrape(endpoint)
    assert (found["fastfill_embed_actors"], found["fastfill_embed_actors_seen_total"] - before) == (2, 2)
    actors.see("a", 302)
    assert scrape(endpoint)["fastfill_embed_actors"] == 1


def test_a_driver_that_goes_on_knows_how_old_the_snapshot_is_and_what_it_holds(endpoint: str) -> None:
    segment = SegmentRef(0, 1, "embedded", "p", "s", 500, 90, "q", "t", rejected=5)
    counts = Vectors.of([segment, SegmentRef(0, 2, "transformed", "p", "s", 300, 10, "q", "t")])
    commit = Commit(1, 0, "", "", "l2", 1, 2, 2, 1, (segment, segment), counts, created_unix_seconds=7.5)
    telemetry.observe_commit(commit)
    found = scrape(endpoint)
    assert found["fastfill_snapshot_published_timestamp_seconds"] == 7.5
    assert (found["fastfill_index_vectors:embedded"], found["fastfill_index_vectors:transformed"]) == (85, 15)
    assert (found["fastfill_index_segments"], found["fastfill_index_bytes"]) == (2, 1000)


def test_telemetry_has_the_metrics_of_the_fit_and_the_curve(endpoint: str) -> None:
    telemetry.observe_epoch(
        {"epoch": 3, "epochs": 8, "loss": 0.5, "alignment": 0.25, "lr": 1e-3, "images_per_second": 9}
    )
    telemetry.observe_held_out({"alignment": 0.1, "old_old": {"map": 20.0}, "transformed": {"agreement10": 40.0}})
    telemetry.observe_curve({"published": {"points": [{"commit": 4, "fraction": 0.5, "top1": 50.0, "map": 30.0}]}})
    found = scrape(endpoint)
    assert (found["fastfill_fit_epoch"], found["fastfill_fit_epochs"], found["fastfill_fit_loss"]) == (4, 8, 0.5)
    assert found["fastfill_held_out_quality_ratio:old_old:map"] == 0.2
    assert found["fastfill_held_out_quality_ratio:transformed:agreement10"] == 0.4
    assert found["fastfill_wave_quality_ratio:top1:4"] == 0.5


def test_telemetry_of_cost_uses_the_prices_of_the_settings(endpoint: str) -> None:
    before = scrape(endpoint)
    telemetry.observe_machines(
        TelemetrySettings(node_hour_price=2.0, gpu_hour_price=0.5), nodes=3, gpus=4, seconds=1800
    )
    found = scrape(endpoint)
    names = ("node_seconds", "gpu_seconds", "cost")
    grown = [found[f"fastfill_{name}_total"] - before[f"fastfill_{name}_total"] for name in names]
    assert grown == [5400, 7200, 3 * 2.0 * 0.5 + 4 * 0.5 * 0.5]
    assert (found["fastfill_cluster_nodes"], found["fastfill_cluster_gpus"]) == (3, 4)


@pytest.mark.usefixtures("ray_cluster")
def test_the_machines_of_the_cluster_are_counted_while_the_endpoint_is_served(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path), ("telemetry.node_hour_price=3600",))
    with telemetry.serving(config.telemetry, config.run) as url:
        before = scrape(url)
    found = scrape(url)
    grown = found["fastfill_node_seconds_total"] - before["fastfill_node_seconds_total"]
    assert found["fastfill_cluster_nodes"] == 1
    assert 0 < grown == pytest.approx(found["fastfill_cost_total"] - before["fastfill_cost_total"])


def test_discovery_file_names_the_endpoint_until_a_good_end(tmp_path: Path) -> None:
    discovery = tmp_path / "targets" / "driver.json"
    config = load_config(write_config(tmp_path), (f"telemetry.discovery_file={discovery}",))
    with telemetry.serving(config.telemetry, config.run) as url:
        (target,) = json.loads(discovery.read_text())
    assert target["labels"] == {"run": "run"}
    assert [f"http://{address}/metrics" for address in target["targets"]] == [url]
    assert not discovery.exists()
    with pytest.raises(RuntimeError, match="a driver dies"), telemetry.serving(config.telemetry, config.run):
        raise RuntimeError("a driver dies")
    assert discovery.exists()


def test_the_quality_on_the_probe_set_is_that_of_the_latest_commit_alone(endpoint: str) -> None:
    telemetry.observe_probe({"top1": 48.5, "recall10": 61.0, "slot_share": 1.2})
    telemetry.observe_probe({"top1": 50.5, "recall10": 64.0})
    found = scrape(endpoint)
    assert found["fastfill_probe_quality_ratio:top1"] == pytest.approx(0.505)
    assert found["fastfill_probe_quality_ratio:recall10"] == pytest.approx(0.64)
    assert "fastfill_probe_quality_ratio:slot_share" not in found


def test_telemetry_without_a_rate_has_all_other_metrics(endpoint: str) -> None:
    telemetry.observe_progress(progress(images_per_second=None, durable=121))
    assert scrape(endpoint)["fastfill_images_durable"] == 121


def test_the_endpoint_listens_on_this_machine_only(endpoint: str) -> None:
    assert endpoint.startswith("http://127.0.0.1:")
    with pytest.raises(URLError):  # another address of this machine, which only a server for all would answer
        urlopen(endpoint.replace("127.0.0.1", "127.0.0.2"), timeout=5)


def test_endpoint_on_all_interfaces_gives_an_address_for_other_machines() -> None:
    url = telemetry.serve(TelemetrySettings(host="0.0.0.0"))
    assert "0.0.0.0" not in url
    assert "fastfill_gallery_images" in scrape(url)


def test_a_free_port_that_is_asked_for_is_taken() -> None:
    with taken_port() as port:
        pass
    assert telemetry.serve(TelemetrySettings(port=port)) == f"http://127.0.0.1:{port}/metrics"


def test_a_port_that_is_taken_is_replaced_by_a_free_one_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with taken_port() as port, caplog.at_level(logging.WARNING, "pipeline.reporting.telemetry"):
        url = telemetry.serve(TelemetrySettings(port=port))
        assert f":{port}/" not in url
        assert "fastfill_gallery_images" in scrape(url)
    assert f"port {port} is not available" in caplog.text


def test_every_metric_has_our_prefix_a_base_unit_and_is_declared_once() -> None:
    declared = [value for value in vars(telemetry).values() if hasattr(value, "_name") and hasattr(value, "collect")]
    names = [metric._name for metric in declared]
    assert len(set(names)) == len(names) == len(list(telemetry.REGISTRY.collect()))
    for metric in declared:
        assert metric._name.startswith("fastfill_")
        assert not metric._name.endswith(("_ms", "_kb", "_mb", "_minutes", "_percent", "_total"))
        assert metric._documentation.endswith(".")
        assert isinstance(metric, Counter | Gauge) or metric._name.endswith("_seconds")
