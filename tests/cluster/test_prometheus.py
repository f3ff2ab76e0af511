"""A real Prometheus watches a real backfill: every query is answered, and an alert fires and resolves.

The run is small (digits, an encoder that is made slow, on a Ray cluster of three nodes on this machine), its images
and its files lie in a real S3 server behind a proxy that spoils some requests, and three images are no images: so
that retries and rejects have something to show. Prometheus runs on the committed rules and alerts with all their
durations shortened alike, a minute to two seconds, and scrapes every two seconds. What it recorded is drawn, dashboard
by dashboard: into docs/dashboards with

    FASTFILL_DASHBOARDS_TO=docs/dashboards python -m pytest -m slow tests/cluster/test_prometheus.py
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.grafana.render import render
from tests.faults.scene import IMAGES, ROOT, Scene, processes, ray_nodes
from tests.infra.metrics import DASHBOARDS, metrics_of, queries_of
from tests.support.faulty_proxy import Fault, FaultyProxy
from tests.support.prometheus import CONFIGS, Prometheus
from tests.support.seaweed import SeaweedFS, s3_client

pytestmark = pytest.mark.slow

NO_IMAGES = (20, 150, 290)  # rows of the gallery
MARK = "FASTFILL_TEST_SCENE"
SETTINGS: dict[str, Any] = {
    "encoders.new.export": "null",
    "encoders.new.function": "tests.support.own_functions:slow_encoder",
    "fit.transformation": "fastfill",
    "fit.epochs": 60,
    "plan.unit_images": 8,
    "backfill.batch_size": 8,
    "backfill.max_actors": 2,
    "backfill.min_actors": 2,
    "evaluate.max_images": 1000,
    "telemetry.node_hour_price": 3600,  # a unit of money for every second of a node
    "telemetry.linger_seconds": 20,
    "fetch.timeout_seconds": 5,
}

WITHOUT_DATA = {
    ("Pipeline", "GPU"): "this machine has none",
}
"""(dashboard, panel) of which a run here can produce no data, and why."""


def shortened(text: str) -> str:
    """Rules or alerts with two seconds for every minute, and two minutes for every hour."""
    return re.sub(r"\b(\d+)(m|h)\b", lambda found: f"{int(found[1]) * (2 if found[2] == 'm' else 120)}s", text)


@dataclass
class Watched(Scene):
    """With the folder of the Ray session, and what tells this cluster's processes from others on this machine."""

    session: str = ""
    mark: str = ""


class Watch(threading.Thread):
    """Asks every question every two seconds, and remembers which of them ever had an answer with data."""

    def __init__(self, prometheus: Prometheus, questions: set[str]) -> None:
        super().__init__(daemon=True)
        self._prometheus, self.left, self.errors = prometheus, set(questions), dict[str, str]()
        self._stop_asking = threading.Event()

    def run(self) -> None:
        while not self._stop_asking.wait(2):
            for question in sorted(self.left):
                try:
                    if self._prometheus.query(question):
                        self.left.remove(question)
                except AssertionError as error:
                    self.errors[question] = str(error)

    def finish(self) -> None:
        self._stop_asking.set()
        self.join(30)


@pytest.fixture(scope="module")
def scene(seaweed: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A cluster with a dashboard, a proxy that spoils nothing yet, and a gallery with three objects of another kind."""
    mark = uuid.uuid4().hex
    environment = {MARK: mark, "PYTHONPATH": str(ROOT), **seaweed.environment()}
    with FaultyProxy(seaweed.endpoint, enabled=False) as proxy, ray_nodes(environment) as cluster:
        session = cluster.head_node.get_session_dir_path()
        folder = tmp_path_factory.mktemp("watched")
        scene = Watched(folder, seaweed, proxy, cluster.address, session=session, mark=mark)
        scene.write()
        client = s3_client(seaweed.environment())
        for row in NO_IMAGES:
            client.put_object(Bucket="gallery", Key=f"images/{row:04d}.png", Body=b"no image")
        yield scene


@pytest.fixture
def prometheus(scene: Watched, tmp_path: Path) -> Iterator[Prometheus]:
    """On the committed configuration: only the places of the two discovery files and the durations are others."""
    for name in ("rules.yml", "alerts.yml"):
        (tmp_path / name).write_text(shortened((CONFIGS / name).read_text()))
    text = (CONFIGS / "prometheus.yml").read_text().replace("15s", "2s")
    places = {"/run/fastfill/*.json": f"{tmp_path}/driver.json", "/tmp/ray/": f"{scene.session}/"}
    for place, here in places.items():
        assert place in text
        text = text.replace(place, here)
    (tmp_path / "prometheus.yml").write_text(text)
    with Prometheus(tmp_path / "prometheus.yml", tmp_path) as server:
        yield server


def embedding_actors(mark: str) -> list[int]:
    """Those of this test's cluster: others may run on this machine."""
    return [pid for pid in processes("EmbedStage") if f"{MARK}={mark}".encode() in _environment(pid)]


def _environment(pid: int) -> bytes:
    try:
        return Path("/proc", str(pid), "environ").read_bytes()
    except OSError:
        return b""


def wait_until(condition: Callable[[], object], seconds: float, what: str, driver: subprocess.Popen[str]) -> None:
    """Poll once a second; the driver has to live."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert driver.poll() is None, f"the driver ended before: {what}\n{driver.communicate()[0]}"
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(1)


def value(prometheus: Prometheus, expression: str) -> float:
    found = prometheus.query(expression)
    return float(found[0]["value"][1]) if found else 0.0


def alert_rules() -> dict[str, str]:
    (group,) = yaml.safe_load((CONFIGS / "alerts.yml").read_text())["groups"]
    return {rule["alert"]: shortened(rule["expr"]) for rule in group["rules"]}


@pytest.mark.timeout(420)
def test_prometheus_answers_every_query_and_its_alert_fires_and_resolves(
    scene: Watched, prometheus: Prometheus, tmp_path: Path
) -> None:
    panels = [(DASHBOARDS[name][0], title, query) for name in DASHBOARDS for title, query in queries_of(name)]
    metrics = {metric for expression in alert_rules().values() for metric in metrics_of(expression)}
    for expression in alert_rules().values():
        prometheus.query(expression)  # an alert that is not due gives nothing, but is answered
    start = time.time()
    watch = Watch(prometheus, {query for _, _, query in panels} | metrics)
    watch.start()
    scene.proxy.inject(Fault.ERROR_BEFORE, "GET", "/images/01", times=20)  # those of rows 100 to 199
    scene.proxy.inject(Fault.SLOW_DOWN, "PUT", "/embedded/", times=3)
    settings = {**SETTINGS, "telemetry.discovery_file": f"{tmp_path}/driver.json"}
    words = [word for key, setting in settings.items() for word in ("--set", f"{key}={setting}")]
    driver = scene.start("watched", *words)
    try:
        units = "sum(fastfill_units_total)"
        wait_until(lambda: value(prometheus, units) >= 6, 150, "six units", driver)
        assert "FastfillNoProgress" not in {name for name, state in prometheus.alerts().items() if state == "firing"}

        actors = embedding_actors(scene.mark)
        assert actors
        for pid in actors:
            os.kill(pid, signal.SIGSTOP)
        try:
            wait_until(lambda: prometheus.alerts().get("FastfillNoProgress") == "firing", 90, "the alert fires", driver)
        finally:
            for pid in actors:
                os.kill(pid, signal.SIGCONT)
        wait_until(lambda: "FastfillNoProgress" not in prometheus.alerts(), 60, "the alert resolves", driver)
        output, _ = driver.communicate(timeout=180)
        assert driver.returncode == 0, output
    finally:
        driver.kill()
        watch.finish()

    drawn = Path(os.environ.get("FASTFILL_DASHBOARDS_TO", tmp_path))
    for name in DASHBOARDS:
        render(f"http://{prometheus.address}", name, start, time.time(), drawn / f"{name}.png")
        assert (drawn / f"{name}.png").stat().st_size > 10_000
    assert watch.errors == {}
    without = {(board, title) for board, title, query in panels if query in watch.left}
    assert without == set(WITHOUT_DATA), f"nothing for {sorted(without)}"
    assert metrics & watch.left == set()
    run = value(prometheus, "max_over_time(fastfill_images_rejected[10m])")
    assert run == len(NO_IMAGES)
    assert value(prometheus, "max_over_time(fastfill_backfilled_fraction[10m])") > 0.98
    assert value(prometheus, "sum(max_over_time(fastfill_units_total[10m]))") == IMAGES / SETTINGS["plan.unit_images"]
