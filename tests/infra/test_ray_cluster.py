"""ray_cluster.yaml passes what `ray up` checks before it asks AWS anything, and says what we mean."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "ray_cluster.yaml").read_text()
CLUSTER: dict[str, Any] = yaml.safe_load(TEXT)
KINDS: dict[str, Any] = CLUSTER["available_node_types"]
WORKERS = [name for name in KINDS if name != CLUSTER["head_node_type"]]


def check(cluster: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` does first."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared: dict[str, Any] = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    return prepared


def test_validator_of_ray_accepts_the_cluster_file() -> None:
    prepared = check(CLUSTER)
    assert prepared["head_node_type"] == "head"
    assert {name: kind["max_workers"] for name, kind in prepared["available_node_types"].items()} == {
        "head": 0,
        "gpu_spot": 16,
        "cpu_spot": 32,
    }


def test_validator_refuses_invalid_cluster_files() -> None:
    with pytest.raises(jsonschema.ValidationError):
        check(CLUSTER | {"initial_workers": 2})
    with pytest.raises(ValueError, match="head_node_type"):
        check(CLUSTER | {"head_node_type": "nobody"})


def test_head_has_no_cpus() -> None:
    assert KINDS["head"]["resources"]["CPU"] == 0
    assert "GPU" not in KINDS["head"]["resources"]
    assert "InstanceMarketOptions" not in KINDS["head"]["node_config"], "the driver must not sit on a spot machine"


def test_workers_are_spot_machines_that_come_and_go() -> None:
    assert [KINDS[name]["resources"].get("GPU", 0) for name in WORKERS] == [1, 0]
    for name in WORKERS:
        assert KINDS[name]["min_workers"] == 0
        assert KINDS[name]["max_workers"] > 0
        assert KINDS[name]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert CLUSTER["idle_timeout_minutes"] <= 10
    assert CLUSTER["max_workers"] >= sum(KINDS[name]["max_workers"] for name in WORKERS)


def test_every_node_has_a_role_and_no_key_is_in_the_file() -> None:
    assert all(kind["node_config"]["IamInstanceProfile"] for kind in KINDS.values())
    assert not re.search(r"AKIA|secret|password", TEXT, re.IGNORECASE)


def test_the_project_is_installed_on_every_node_from_its_tested_versions() -> None:
    assert CLUSTER["file_mounts"]["/home/ubuntu/fastfill"] == "."
    (install,) = [line for line in CLUSTER["setup_commands"] if "--editable ." in line]
    assert "--constraint constraints.txt" in install


def test_ray_asks_for_a_token_on_every_node_and_in_every_shell() -> None:
    home = "/home/ubuntu/.ray/auth_token"  # where Ray looks for it
    assert CLUSTER["file_mounts"][home] == "~/.ray/auth_token"
    assert all("RAY_AUTH_MODE=token" in text for text in starts())
    assert any("RAY_AUTH_MODE=token" in text for text in CLUSTER["setup_commands"] if ".bashrc" in text)
    assert any("RAY_AUTH_MODE=token" in text for text in CLUSTER["worker_start_ray_commands"] if "spot_notice" in text)
    assert "--dashboard-host=127.0.0.1" in starts()[0]


def test_credentials_of_a_machine_do_not_leave_it() -> None:
    for kind in KINDS.values():
        assert kind["node_config"]["MetadataOptions"] == {"HttpTokens": "required", "HttpPutResponseHopLimit": 1}


def test_every_pip_install_pins_its_versions() -> None:
    installs = [text for text in (*CLUSTER["setup_commands"], *CLUSTER["head_setup_commands"]) if "pip install" in text]
    assert len(installs) == 3
    assert all(re.search(r"==\d+\.\d+|--constraint", text) for text in installs)


def test_cluster_file_marks_five_lines_to_edit() -> None:
    assert set(re.findall(r"# EDIT (\d):", TEXT)) == {"1", "2", "3", "4", "5"}


def test_prometheus_finds_the_metrics_agents_and_the_driver() -> None:
    assert all("--metrics-export-port=8080" in text for text in starts())
    prometheus = (ROOT / "infra" / "prometheus" / "prometheus.yml").read_text()
    assert "/run/fastfill/" in prometheus
    assert any("/run/fastfill" in line for line in CLUSTER["head_setup_commands"])


def test_spot_workers_listen_to_the_notice_of_their_end_once_ray_runs() -> None:
    commands = CLUSTER["worker_start_ray_commands"]
    (line,) = [number for number, command in enumerate(commands) if "fastfill/infra/spot_notice.py" in command]
    assert line > max(number for number, command in enumerate(commands) if "ray start" in command)
    assert "infra" not in CLUSTER["rsync_exclude"]
    assert (ROOT / "infra" / "spot_notice.py").is_file()


def starts() -> list[str]:
    lines = [*CLUSTER["head_start_ray_commands"], *CLUSTER["worker_start_ray_commands"]]
    return [line for line in lines if "ray start" in line]
