"""What runs on Kubernetes: valid to the letter, without rights that it does not need, and of one piece."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import kubernetes_validate
import pytest
import yaml
from manifests import INFRA, UID, documents, kubernetes, pods, program, ray_cluster, run
from prefect.client.schemas.objects import FlowRun
from prefect.utilities.templating import find_placeholders
from prefect.workers.base import BaseJobConfiguration
from pydantic import BaseModel, ConfigDict

VERSION = "1.34"
TEMPLATE = json.loads((INFRA / "prefect/kubernetes.json").read_text())
DEPLOYED = yaml.safe_load((INFRA.parent / "prefect.yaml").read_text())


class JobConfiguration(BaseJobConfiguration):
    """What Prefect's Kubernetes worker reads of a template: as that of prefect-kubernetes, which is not needed here."""

    namespace: str = ""
    job_manifest: dict[str, Any]
    pod_watch_timeout_seconds: int = 60
    stream_output: bool = True


def job(**values: Any) -> dict[str, Any]:
    """The Job of a flow run whose deployment sets `values`."""
    values = {"image": "registry.example.com/vc2:0.1.0"} | values
    made = asyncio.run(JobConfiguration.from_template_and_values(TEMPLATE, values, client=object()))  # type: ignore[arg-type]
    manifest = made.job_manifest
    container = manifest["spec"]["template"]["spec"]["containers"][0]
    container["args"] = (made.command or "prefect flow-run execute").split()
    container["env"] = [{"name": "PREFECT__FLOW_RUN_ID", "value": "0"}, *container["env"]]  # as the worker adds them
    # The worker insists on these two here, though they belong to the Job; Kubernetes ignores them.
    assert manifest["spec"]["template"]["spec"].pop("parallelism") == 1
    assert manifest["spec"]["template"]["spec"].pop("completions") == 1
    return manifest


def everything() -> list[Any]:
    found = [*kubernetes(), ray_cluster(), job()]
    return [pytest.param(item, id=f"{item['kind']}-{item['metadata'].get('name', 'flow-run')}") for item in found]


def each_pod() -> list[Any]:
    return [
        pytest.param(pod, id=f"{param.id}-{number}")
        for param in everything()
        for number, pod in enumerate(pods(param.values[0]))
    ]


def strictly(found: dict[str, Any]) -> None:
    """Without `strict` a misspelt field would pass."""
    try:
        kubernetes_validate.validate(found, VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        pytest.fail(f"{found['kind']}: {'.'.join(map(str, error.path))}: {error.message}")


@pytest.mark.parametrize("found", [*everything()])
def test_every_object_is_valid(found: dict[str, Any]) -> None:
    if found["kind"] == "RayCluster":
        RayCluster.model_validate(found)
    else:
        strictly(found)


@pytest.mark.parametrize("pod", each_pod())
def test_no_pod_has_rights_that_it_does_not_need(pod: dict[str, Any]) -> None:
    """The `restricted` profile of Kubernetes, which the namespace enforces; limits of memory; no folder of the host."""
    strictly({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod["spec"]})
    spec = pod["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] in (UID, 999)
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not any(spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC"))
    assert not any("hostPath" in volume for volume in spec.get("volumes", []))
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert "memory" in container["resources"]["limits"]


@pytest.mark.parametrize("pod", each_pod())
def test_a_secret_is_referred_to_and_never_written_down(pod: dict[str, Any]) -> None:
    for container in [*pod["spec"]["containers"], *pod["spec"].get("initContainers", [])]:
        for setting in container.get("env", []):
            if any(word in setting["name"] for word in ("PASSWORD", "TOKEN", "AUTH_STRING", "ACCESS_KEY")):
                is_name = setting["name"].endswith(("_SECRET_NAME", "_SECRET_KEY"))
                assert is_name or set(setting) == {"name", "valueFrom"}, setting["name"]


def test_whoever_talks_to_kubernetes_is_known() -> None:
    """Accounts exist, and only the worker and Ray's head, whose autoscaler asks for machines, get a token."""
    accounts = {found["metadata"]["name"]: found for found in kubernetes() if found["kind"] == "ServiceAccount"}
    may_talk = set()
    for param in everything():
        for pod in pods(param.values[0]):
            name = pod["spec"].get("serviceAccountName")
            assert name is None or name in accounts, name
            account = accounts.get(name or "", {})
            if pod["spec"].get("automountServiceAccountToken", account.get("automountServiceAccountToken", True)):
                may_talk.add(name)
    assert may_talk == {"vc2-worker", "vc2-ray-head"}


def test_the_worker_may_run_jobs_in_its_namespace_and_nothing_else() -> None:
    assert not [found for found in kubernetes() if found["kind"].startswith("ClusterRole")]
    (role,) = (found for found in kubernetes() if found["kind"] == "Role")
    allowed = {(resource, verb) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]}
    assert {
        ("jobs", "create"),
        ("jobs", "delete"),
        ("jobs", "watch"),
        ("pods", "watch"),
        ("pods/log", "get"),
        ("events", "list"),
    } <= allowed
    assert not [pair for pair in allowed if pair[0] in ("secrets", "*", "pods/exec") or pair[1] == "*"]


def test_every_name_that_is_referred_to_exists() -> None:
    """ConfigMaps and Secrets, with their keys, claims, and the labels by which services and rules find pods."""
    (said,) = documents(INFRA / "kubernetes/kustomization.yaml")
    in_file = (INFRA / "kubernetes/secrets.env.example").read_text().splitlines()
    keys = {line.split("=")[0] for line in in_file if line and not line.startswith("#")}
    known = {("vc2-prefect", key) for key in keys} | {("vc2-ray", "auth_token")}
    settings = {made["name"] for made in said["configMapGenerator"]}
    roles = set()
    for param in everything():
        for pod in pods(param.values[0]):
            roles.add(pod.get("metadata", {}).get("labels", {}).get("vc2.dev/role"))
            for container in [*pod["spec"]["containers"], *pod["spec"].get("initContainers", [])]:
                for setting in container.get("env", []):
                    if reference := setting.get("valueFrom", {}).get("secretKeyRef"):
                        assert (reference["name"], reference["key"]) in known
                for source in container.get("envFrom", []):
                    assert source.get("configMapRef", {}).get("name") in {*settings, None}
                    assert source.get("secretRef", {}).get("optional", True) is True
    assert roles == {"database", "server", "worker", "flow-run", "ray"}
    text = json.dumps([found for found in kubernetes() if found["kind"] in ("Service", "NetworkPolicy")])
    assert ray_cluster()["spec"]["authOptions"] == {"mode": "token", "secretName": "vc2-ray"}
    for role in roles - {"worker", "flow-run"}:
        assert f'"vc2.dev/role": "{role}"' in text, role
    assert f"http://{ray_cluster()['metadata']['name']}-head-svc:8265" in json.dumps(said["configMapGenerator"])


def test_nobody_reaches_a_pod_unless_a_rule_says_so() -> None:
    rules = {found["metadata"]["name"]: found["spec"] for found in kubernetes() if found["kind"] == "NetworkPolicy"}
    assert rules["nobody-comes-in"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    (database,) = rules["database"]["ingress"]
    assert database["from"] == [{"podSelector": {"matchLabels": {"vc2.dev/role": "server"}}}]
    assert rules["database"]["egress"] == []


def test_kustomize_puts_it_together(tmp_path: Path) -> None:
    """Where kubectl is at hand: images and the namespace are set everywhere, secrets come from the file."""
    kubectl = program("kubectl")
    if kubectl is None:
        pytest.skip("no kubectl")
    for name in ("kubernetes", "kuberay"):
        shutil.copytree(INFRA / name, tmp_path / name)
    shutil.copy(INFRA / "kubernetes/secrets.env.example", tmp_path / "kubernetes/secrets.env")
    made = [
        found
        for name in ("kubernetes", "kuberay")
        for found in yaml.safe_load_all(run(kubectl, "kustomize", str(tmp_path / name)))
    ]
    images = {
        container["image"]
        for found in made
        for pod in pods(found)
        for container in [*pod["spec"]["containers"], *pod["spec"].get("initContainers", [])]
    }
    assert images == {
        "registry.example.com/vc2:0.1.0", "registry.example.com/vc2-train:0.1.0", "postgres:16.4-bookworm"
    }  # fmt: skip
    assert {found["metadata"].get("namespace", "vc2") for found in made} == {"vc2"}
    for found in made:
        if found["kind"] != "RayCluster":
            strictly(found)


# ---- flow runs: the base job template of the work pool ----


def test_a_template_has_no_gaps() -> None:
    """Each placeholder is a variable, each variable is used, and each has a title for the UI's form."""
    properties = TEMPLATE["variables"]["properties"]
    used = {place.name for place in find_placeholders(TEMPLATE["job_configuration"])}
    assert used == set(properties)
    assert all("title" in said for said in properties.values())


def test_deployments_for_processes_run_on_kubernetes_too() -> None:
    """One prefect.yaml: what it says for a process pool, command and folder, is what a Job is told."""
    for deployment in DEPLOYED["deployments"]:
        asked = deployment["work_pool"].get("job_variables", {})
        assert set(asked) <= set(TEMPLATE["variables"]["properties"]), deployment["name"]
        made = job(**json.loads(json.dumps(asked).replace("{{ here.stdout }}", "/vc2")))
        container = made["spec"]["template"]["spec"]["containers"][0]
        assert container["args"] == ["python", "-m", "flows.tied", "prefect.engine"]
        assert container["workingDir"] == "/vc2"
        strictly(made)


def test_a_job_may_ask_for_gpus() -> None:
    """And then bears the taint of their machines; one without leaves them to others."""
    gpus = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    values = {"memory": "512Gi", "shm_size": "64Gi", "node_selector": {"gpu": "a100"}, "grace_seconds": 600}
    made = job(gpu_count=8, tolerations=[gpus], **values)
    strictly(made)
    spec = made["spec"]["template"]["spec"]
    assert spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert spec["tolerations"] == [gpus] and not job()["spec"]["template"]["spec"]["tolerations"]
    assert spec["nodeSelector"] == {"gpu": "a100"} and spec["terminationGracePeriodSeconds"] == 600
    assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "64Gi"}} in spec["volumes"]


def test_prefects_own_worker_takes_the_template() -> None:
    """Where prefect-kubernetes is installed, as in the image."""
    worker = pytest.importorskip("prefect_kubernetes.worker", reason="prefect-kubernetes is part of the image alone")
    values = {"image": "vc2", "command": "python -m flows.tied prefect.engine", "working_dir": "/vc2"}
    made = asyncio.run(
        worker.KubernetesWorkerJobConfiguration.from_template_and_values(TEMPLATE, values, client=object())
    )
    made.prepare_for_flow_run(FlowRun(flow_id=uuid4(), name="brave-fox"))
    spec = made.job_manifest["spec"]["template"]["spec"]
    for name in ("parallelism", "completions"):  # as in `job`
        spec.pop(name)
    strictly(made.job_manifest)
    names = [setting["name"] for setting in spec["containers"][0]["env"]]
    assert {"PREFECT__FLOW_RUN_ID", "RAY_AUTH_TOKEN"} <= set(names) and len(names) == len(set(names))


# ---- the Ray cluster: KubeRay's schema is in no registry, so what we use of it is written down here ----


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class AutoscalerOptions(Part):
    version: Literal["v1", "v2"]
    idleTimeoutSeconds: int
    resources: dict[str, dict[str, str]]
    securityContext: dict[str, Any]


class AuthOptions(Part):
    mode: Literal["disabled", "token"]
    secretName: str


class HeadGroup(Part):
    rayStartParams: dict[str, str]  # strings all: numbers are refused
    template: dict[str, Any]


class WorkerGroup(HeadGroup):
    groupName: str
    replicas: int
    minReplicas: int
    maxReplicas: int


class ClusterSpec(Part):
    rayVersion: str
    enableInTreeAutoscaling: bool
    autoscalerOptions: AutoscalerOptions
    authOptions: AuthOptions
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]


class RayCluster(Part):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: dict[str, str]
    spec: ClusterSpec


def test_the_cluster_has_the_gpus_of_the_paper() -> None:
    cluster = RayCluster.model_validate(ray_cluster())
    (gpus,) = (group for group in cluster.spec.workerGroupSpecs if group.groupName == "gpu")
    (container,) = gpus.template["spec"]["containers"]
    assert gpus.maxReplicas * int(container["resources"]["limits"]["nvidia.com/gpu"]) == 32
    assert cluster.spec.headGroupSpec.rayStartParams["num-cpus"] == "0"
    for group in [cluster.spec.headGroupSpec, *cluster.spec.workerGroupSpecs]:
        for container in group.template["spec"]["containers"]:
            # Without probes of ours KubeRay adds its own, which call a program that the image has not.
            assert "httpGet" in container["readinessProbe"] and "httpGet" in container["livenessProbe"]
