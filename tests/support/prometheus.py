"""A real Prometheus for tests: where it is found, and one that runs on rules and targets of a test's choice.

It is Debian's package `prometheus`, which brings `promtool`. Where it is missing it is installed with apt-get, as
CI does it; where that cannot be done, tests that need it are skipped and say so.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, Self
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "infra" / "prometheus"
_INSTALL_SECONDS = 240


@functools.cache
def find(program: str) -> str:
    """The path of `prometheus` or `promtool`; skips the test where there is none and none can be installed."""
    found = shutil.which(program)
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        for words in (["update"], ["install", "--yes", "--no-install-recommends", "prometheus"]):
            environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            subprocess.run(
                ["apt-get", *words], env=environment, capture_output=True, timeout=_INSTALL_SECONDS, check=False
            )
        found = shutil.which(program)
    if found is None:
        pytest.skip(f"needs `{program}` (apt-get install prometheus), and it cannot be installed here")
    return found


def promtool(*words: str) -> str:
    """What promtool says, errors included; it has to end well."""
    done = subprocess.run(
        [find("promtool"), *words], cwd=CONFIGS, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


class Prometheus:
    """A server on this machine, on a free port, with a configuration file and a folder of its own."""

    def __init__(self, config: Path, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self._words = [find("prometheus"), f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}"]
        self._words += [f"--web.listen-address={self.address}", "--log.level=warn"]
        self._log = folder / "prometheus.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(self._words, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            assert self._process.poll() is None, self._log.read_text()
            try:
                with urlopen(f"http://{self.address}/-/ready", timeout=5):
                    return self
            except URLError:
                time.sleep(0.2)
        raise AssertionError(f"not ready in 30 seconds:\n{self._log.read_text()}")

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait(timeout=30)

    def ask(self, path: str, **parameters: str) -> Any:
        """The `data` of an answer of its API; an error of a query comes with its own words."""
        try:
            with urlopen(f"http://{self.address}/api/v1/{path}?{urlencode(parameters)}", timeout=30) as answer:
                return json.load(answer)["data"]
        except URLError as error:
            body = getattr(error, "read", bytes)().decode()
            raise AssertionError(f"{path} {parameters}: {error} {body}") from error

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The samples of an instant query, now."""
        found: list[dict[str, Any]] = self.ask("query", query=expression)["result"]
        return found

    def alerts(self) -> dict[str, str]:
        """The state (`pending`, `firing`) of each alert that is not inactive, by name."""
        return {alert["labels"]["alertname"]: alert["state"] for alert in self.ask("alerts")["alerts"]}
