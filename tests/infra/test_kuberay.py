"""The manifests for Kubernetes fit their schemas, and belong together."""

from __future__ import annotations

import copy
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.infra.kubernetes import validate

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "infra" / "kuberay"
DOCUMENTS = {
    f"{path.name}: {document['kind']} {document['metadata']['name']}": document
    for path in sorted(FOLDER.glob("*.yaml*"))
    for document in yaml.safe_load_all(path.read_text())
}
JOB: dict[str, Any] = DOCUMENTS["rayjob.yaml: RayJob fastfill"]["spec"]
CLUSTER: dict[str, Any] = JOB["rayClusterSpec"]
PODS = {"head": CLUSTER["headGroupSpec"]} | {group["groupName"]: group for group in CLUSTER["workerGroupSpecs"]}


def container(pod: str) -> dict[str, Any]:
    (found,) = PODS[pod]["template"]["spec"]["containers"]
    return dict(found)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_manifest_fits_its_schema(name: str) -> None:
    validate(DOCUMENTS[name])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "backofLimit"), 3),
        (("spec", "rayClusterSpec", "autoscalerOptions", "version"), "v3"),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "terminationGracePeriod"), 60),
        (("spec", "rayClusterSpec", "gcsFaultToleranceOptions", "redisPasword"), {}),
    ],
)
def test_kubernetes_schema_refuses_a_misspelt_key(path: tuple[str, ...], value: object) -> None:
    document = copy.deepcopy(DOCUMENTS["rayjob.yaml: RayJob fastfill"])
    node = document
    for name in path[:-1]:
        node = node[name]
    node[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        validate(document)


def test_ray_is_of_the_version_that_is_tested() -> None:
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    assert CLUSTER["rayVersion"] == pinned["ray"]
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    submitter = JOB["submitterPodTemplate"]["spec"]["containers"][0]
    images = {container(pod)["image"] for pod in PODS} | {submitter["image"]}
    assert images == {f"REGISTRY/fastfill:{version}"}


def specs() -> dict[str, dict[str, Any]]:
    """The pods of the job and of Redis, by name."""
    redis = DOCUMENTS["redis.yaml: StatefulSet fastfill-redis"]["spec"]["template"]["spec"]
    found = {name: pod["template"]["spec"] for name, pod in PODS.items()}
    return {**found, "submitter": JOB["submitterPodTemplate"]["spec"], "redis": redis}


@pytest.mark.parametrize("name", specs())
def test_a_container_is_confined(name: str) -> None:
    pod = specs()[name]
    (found,) = pod["containers"]
    context = pod.get("securityContext", {}) | found["securityContext"]
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert context["runAsNonRoot"]
    assert context["readOnlyRootFilesystem"]
    assert not context["allowPrivilegeEscalation"]
    assert context["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("name", [name for name in specs() if name != "redis"])
def test_ray_can_write_where_it_has_to(name: str) -> None:
    pod = specs()[name]
    places = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    for folder in ("/tmp", "/home/ray"):
        assert volumes[places[folder]]["emptyDir"] == {}


def test_the_autoscaler_is_confined_as_the_head_is() -> None:
    options = CLUSTER["autoscalerOptions"]
    assert options["securityContext"] == container("head")["securityContext"]
    assert options["volumeMounts"] == [{"name": "tmp", "mountPath": "/tmp"}]


def test_only_the_head_has_a_token_of_the_kubernetes_api() -> None:
    assert [name for name, pod in specs().items() if pod.get("automountServiceAccountToken", True)] == ["head"]


def test_ray_asks_for_a_token() -> None:
    assert CLUSTER["authOptions"] == {"mode": "token"}


def test_network_policy_opens_each_port_to_its_clients_alone() -> None:
    policies = {
        name.split()[-1]: document["spec"] for name, document in DOCUMENTS.items() if ": NetworkPolicy " in name
    }
    for labels in (PODS["head"]["template"]["metadata"]["labels"], {"app": "fastfill-redis"}):
        covering = [spec for spec in policies.values() if spec["podSelector"]["matchLabels"].items() <= labels.items()]
        assert [spec["policyTypes"] for spec in covering] == [["Ingress"]]
    for spec in policies.values():
        for rule in spec["ingress"]:
            assert all(peer["podSelector"]["matchLabels"] for peer in rule["from"]), "a rule for everybody"
    by_port = {rule["ports"][0]["port"]: rule["from"] for rule in policies["fastfill"]["ingress"] if "ports" in rule}
    submitter = JOB["submitterPodTemplate"]["metadata"]["labels"]
    assert submitter in [peer["podSelector"]["matchLabels"] for peer in by_port[8265]]
    assert set(by_port) == {8265, 8080}


def test_every_image_is_of_an_exact_version() -> None:
    for pod in specs().values():
        assert re.search(r":\d+\.\d+\.\d+(-\w+)?$", pod["containers"][0]["image"])


def test_head_has_no_cpus_and_both_worker_groups_scale() -> None:
    assert PODS["head"]["rayStartParams"]["num-cpus"] == "0"
    assert CLUSTER["enableInTreeAutoscaling"]
    for group in ("gpu", "cpu"):
        assert PODS[group]["minReplicas"] == 0 < PODS[group]["maxReplicas"]
    assert [container(pod)["resources"]["limits"].get("nvidia.com/gpu", 0) for pod in PODS] == [0, 1, 0]


def test_pods_have_the_time_to_drain() -> None:
    for pod in PODS.values():
        assert pod["template"]["spec"]["terminationGracePeriodSeconds"] > 30  # what Ray takes for it


def test_head_keeps_its_state_in_redis() -> None:
    redis = CLUSTER["gcsFaultToleranceOptions"]
    service = DOCUMENTS["redis.yaml: Service fastfill-redis"]
    assert redis["redisAddress"] == f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    stateful = DOCUMENTS["redis.yaml: StatefulSet fastfill-redis"]["spec"]
    assert service["spec"]["selector"] == stateful["template"]["metadata"]["labels"]


def test_secrets_are_named_and_not_given() -> None:
    known = {name.split()[-1]: document for name, document in DOCUMENTS.items() if ": Secret " in name}
    reference = CLUSTER["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]
    assert reference["key"] in known[reference["name"]]["stringData"]
    for pod in PODS:
        assert {source["secretRef"]["name"] for source in container(pod)["envFrom"]} <= set(known)
    values = [value for document in known.values() for value in document["stringData"].values()]
    assert set(values) <= {"FILL-IN", "us-west-2"}


def test_the_monitors_find_every_pod_and_the_driver() -> None:
    nodes, driver = (DOCUMENTS[f"podmonitor.yaml: PodMonitor fastfill-{name}"]["spec"] for name in ("nodes", "driver"))
    for pod in PODS:
        labels = PODS[pod]["template"]["metadata"]["labels"]
        assert nodes["selector"]["matchLabels"].items() <= labels.items()
        ports = {port["name"]: port["containerPort"] for port in container(pod)["ports"]}
        assert ports[nodes["podMetricsEndpoints"][0]["port"]] == int(PODS[pod]["rayStartParams"]["metrics-export-port"])
    ports = {port["name"]: port["containerPort"] for port in container("head")["ports"]}
    assert f"telemetry.port={ports[driver['podMetricsEndpoints'][0]['port']]}" in JOB["entrypoint"]
    assert driver["selector"]["matchLabels"]["ray.io/node-type"] == "head"  # KubeRay's own label
    jobs = {part["targetLabel"]: part["replacement"] for part in driver["podMetricsEndpoints"][0]["relabelings"]}
    assert jobs["job"] == "fastfill"  # which FastfillDriverDown goes by


def test_the_job_may_end_cleanly() -> None:
    assert yaml.safe_load(JOB["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "30"
