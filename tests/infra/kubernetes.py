"""The schemas that our manifests have to fit, unknown fields refused.

Kubernetes's own are those of the package kubernetes-validate. KubeRay's are written here from its API reference
(ray-project/kuberay, docs/reference/api.md, ray.io/v1, commit 0057210ed5a94e830c864af372577328c3542b44): the names and
types of all fields of a RayJob down to the pods, whose templates are Kubernetes's. The PodMonitor's is only of the
fields that are used here, from the prometheus-operator's reference of monitoring.coreos.com/v1.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
from typing import Any

import jsonschema

KUBERNETES = "1.33"

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}


def choice(*values: str) -> Schema:
    return {"enum": list(values)}


def record(required: tuple[str, ...] = (), **fields: Schema) -> Schema:
    """An object with these fields and no others."""
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def items(schema: Schema) -> Schema:
    return {"type": "array", "items": schema}


def kubernetes(name: str) -> Schema:
    """One of Kubernetes's own types."""
    return {"$ref": f"#/$defs/io.k8s.{name}"}


POD = kubernetes("api.core.v1.PodTemplateSpec")
CREDENTIAL = record(value=TEXT, valueFrom=kubernetes("api.core.v1.EnvVarSource"))

AUTOSCALER = record(
    resources=kubernetes("api.core.v1.ResourceRequirements"),
    image=TEXT,
    imagePullPolicy=choice("Always", "IfNotPresent", "Never"),
    securityContext=kubernetes("api.core.v1.SecurityContext"),
    idleTimeoutSeconds=NUMBER,
    upscalingMode=choice("Default", "Aggressive", "Conservative"),
    version=choice("v1", "v2"),
    env=items(kubernetes("api.core.v1.EnvVar")),
    envFrom=items(kubernetes("api.core.v1.EnvFromSource")),
    volumeMounts=items(kubernetes("api.core.v1.VolumeMount")),
)
HEAD = record(
    ("template",),
    template=POD,
    headService=kubernetes("api.core.v1.Service"),
    enableIngress=FLAG,
    rayStartParams=TEXTS,
    serviceType=TEXT,
)
WORKERS = record(
    ("groupName", "template"),
    suspend=FLAG,
    groupName=TEXT,
    replicas=NUMBER,
    minReplicas=NUMBER,
    maxReplicas=NUMBER,
    idleTimeoutSeconds=NUMBER,
    rayStartParams=TEXTS,
    template=POD,
    scaleStrategy=record(workersToDelete=items(TEXT)),
    numOfHosts=NUMBER,
)
CLUSTER = record(
    ("headGroupSpec",),
    suspend=FLAG,
    managedBy=TEXT,
    authOptions=record(mode=choice("disabled", "token"), secretName=TEXT, enableK8sTokenAuth=FLAG),
    autoscalerOptions=AUTOSCALER,
    headServiceAnnotations=TEXTS,
    enableInTreeAutoscaling=FLAG,
    gcsFaultToleranceOptions=record(
        ("redisAddress",),
        redisUsername=CREDENTIAL,
        redisPassword=CREDENTIAL,
        externalStorageNamespace=TEXT,
        redisAddress=TEXT,
    ),
    headGroupSpec=HEAD,
    rayVersion=TEXT,
    workerGroupSpecs=items(WORKERS),
)
JOB = record(
    activeDeadlineSeconds=NUMBER,
    backoffLimit=NUMBER,
    rayClusterSpec=CLUSTER,
    submitterPodTemplate=POD,
    metadata=TEXTS,
    clusterSelector=TEXTS,
    submitterConfig=record(backoffLimit=NUMBER),
    managedBy=TEXT,
    entrypoint=TEXT,
    runtimeEnvYAML=TEXT,
    jobId=TEXT,
    submissionMode=choice("K8sJobMode", "HTTPMode", "InteractiveMode"),
    entrypointResources=TEXT,
    entrypointNumCpus={"type": "number"},
    entrypointNumGpus={"type": "number"},
    ttlSecondsAfterFinished=NUMBER,
    shutdownAfterJobFinishes=FLAG,
    suspend=FLAG,
)
MONITOR = record(
    ("selector", "podMetricsEndpoints"),
    selector=kubernetes("apimachinery.pkg.apis.meta.v1.LabelSelector"),
    podMetricsEndpoints=items(
        record(
            ("port",),
            port=TEXT,
            path=TEXT,
            interval={"type": "string", "pattern": r"^\d+[smh]$"},
            relabelings=items(record(targetLabel=TEXT, replacement=TEXT, sourceLabels=items(TEXT), regex=TEXT)),
        )
    ),
)
OWN = {("ray.io/v1", "RayJob"): JOB, ("monitoring.coreos.com/v1", "PodMonitor"): MONITOR}


@functools.cache
def _definitions() -> Schema:
    folder = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema"
    found: Schema = json.loads((folder / f"v{KUBERNETES}.0-local-strict" / "_definitions.json").read_text())
    return found["$defs"]  # type: ignore[no-any-return]


def validate(document: Schema) -> None:
    """Raises jsonschema.ValidationError where a manifest does not fit its kind's schema."""
    kind = document["apiVersion"], document["kind"]
    if kind in OWN:
        metadata = kubernetes("apimachinery.pkg.apis.meta.v1.ObjectMeta")
        schema = record(("spec",), apiVersion=TEXT, kind=TEXT, metadata=metadata, spec=OWN[kind])
    else:
        group, _, version = document["apiVersion"].rpartition("/")
        schema = kubernetes(f"api.{group.removesuffix('.k8s.io') or 'core'}.{version}.{document['kind']}")
    jsonschema.Draft202012Validator({**schema, "$defs": _definitions()}).validate(document)
