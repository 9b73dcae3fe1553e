"""deploy/kuberay: what Ray's autoscaler and the operator's schemas accept, and safe to bring up.

The schemas of KubeRay's custom resources are read from the folder that $KUBERAY_CRDS names, which holds
files such as ray.io_rayjobs.yaml, gzipped or not; without it those tests are skipped. The operator itself is
not needed: what it refuses beyond its schemas is among the rules here.
"""

import copy
import functools
import gzip
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import validate_config

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "deploy/kuberay").glob("*.yaml"))
CLUSTER = "qlora"
SECRET_NAME = re.compile(r"PASSWORD|SECRET|TOKEN(?!_PATH)|ACCESS_KEY")

Manifest = dict[str, Any]


def load(name: str) -> Manifest:
    return yaml.safe_load((ROOT / "deploy/kuberay" / name).read_text(encoding="utf-8"))


def job_of(manifest: Manifest) -> Manifest | None:
    """The job that a manifest runs, if it runs one."""
    kind, spec = manifest["kind"], manifest["spec"]
    return {"RayJob": spec, "RayCronJob": spec.get("jobTemplate")}.get(kind)


def cluster_of(manifest: Manifest) -> Manifest | None:
    """The cluster that a manifest starts, if it starts one."""
    if manifest["kind"] == "RayCluster":
        return manifest["spec"]
    return (job_of(manifest) or {}).get("rayClusterSpec")


def groups(cluster: Manifest) -> Iterator[tuple[str, Manifest]]:
    yield "head", cluster["headGroupSpec"]
    for group in cluster.get("workerGroupSpecs", []):
        yield group["groupName"], group


def problems(manifest: Manifest) -> list[str]:
    """What is wrong with a manifest that its schema accepts; empty if nothing is."""
    found = []
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,44}[a-z0-9])?", manifest["metadata"]["name"]):
        found.append("metadata: a name that the operator refuses")
    if (job := job_of(manifest)) is not None:
        found += job_problems(job)
    if manifest["kind"] == "RayCronJob" and not re.fullmatch(
        r"(\*(/\d+)?|[\d,/-]+)( (\*(/\d+)?|[\d,/-]+)){4}", manifest["spec"]["schedule"]
    ):
        found.append("schedule: not five fields of cron")
    if (cluster := cluster_of(manifest)) is not None:
        found += cluster_problems(cluster)
        for name, group in groups(cluster):
            found += [f"{name}: {problem}" for problem in pod_problems(group["template"]["spec"])]
        found += sharing_problems(cluster)
    return found


def job_problems(job: Manifest) -> list[str]:
    found = []
    selected, rules = job.get("clusterSelector"), job.get("deletionStrategy", {}).get("deletionRules", [])
    if bool(selected) == bool(job.get("rayClusterSpec")):
        found.append("job: needs a cluster of its own or one that is there")
    if selected and selected.get("ray.io/cluster") != CLUSTER:
        found.append("job: a cluster that no file here starts")
    if not selected and not job.get("shutdownAfterJobFinishes"):
        ended = {
            rule["condition"].get("jobStatus", rule["condition"].get("jobDeploymentStatus"))
            for rule in rules
            if rule["policy"] in ("DeleteCluster", "DeleteSelf")
        }
        if not {"SUCCEEDED", "FAILED", "Failed"} <= ended:
            found.append("job: its cluster outlives it")
    if rules and job.get("shutdownAfterJobFinishes"):
        found.append("job: deletionRules and shutdownAfterJobFinishes exclude each other")
    if selected and (rules or job.get("shutdownAfterJobFinishes")):
        found.append("job: would end a cluster that stays")
    if job.get("ttlSecondsAfterFinished") and not job.get("shutdownAfterJobFinishes"):
        found.append("job: ttlSecondsAfterFinished without shutdownAfterJobFinishes")
    if any(rule["policy"] == "DeleteWorkers" for rule in rules):
        found.append("job: DeleteWorkers does not go with the autoscaler")
    if "env_vars" in job.get("runtimeEnvYAML", ""):
        found.append("job: env_vars are shown by the dashboard")
    script = re.match(r"python (ray_jobs/\w+\.py) ", job.get("entrypoint", ""))
    if not script or not (ROOT / script[1]).is_file():
        found.append("job: not one of the project's commands")
    return found


def cluster_problems(cluster: Manifest) -> list[str]:
    found = []
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    if not pinned or cluster.get("rayVersion") != pinned[1]:
        found.append("rayVersion: not that of constraints.txt")
    authentication = cluster.get("authOptions", {})
    if authentication.get("mode") != "token" or not authentication.get("secretName"):
        found.append("authOptions: no token from a Secret is asked for")
    if not cluster.get("enableInTreeAutoscaling"):
        found.append("enableInTreeAutoscaling: GPUs are paid for at all times")
    if cluster.get("autoscalerOptions", {}).get("version") != "v2":
        found.append("autoscalerOptions: not version v2")
    head = cluster["headGroupSpec"]
    if head.get("rayStartParams", {}).get("num-cpus") != "0":
        found.append("head: trials could land on the head")
    if head.get("serviceType", "ClusterIP") != "ClusterIP" or head.get("enableIngress"):
        found.append("head: the dashboard can be reached from outside")
    for name, group in groups(cluster):
        if group.get("resources") and set(group.get("rayStartParams", {})) & {
            "num-cpus",
            "num-gpus",
            "memory",
        }:
            found.append(f"{name}: resources in two places")
        if group["template"]["spec"].get("restartPolicy") != "Never":
            found.append(f"{name}: restartPolicy does not go with autoscaler v2")
        if name == "head":
            continue
        (container,) = group["template"]["spec"]["containers"]
        if (
            not 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
            or not group["maxReplicas"]
        ):
            found.append(f"{name}: replicas out of order")
        if group["minReplicas"]:
            found.append(f"{name}: GPUs are paid for at all times")
        if container["resources"].get("limits", {}).get("nvidia.com/gpu") != "1":
            found.append(f"{name}: workers have one GPU each")
    if not cluster.get("workerGroupSpecs"):
        found.append("workerGroupSpecs: trials have no place")
    return found


def pod_problems(pod: Manifest) -> list[str]:
    found = []
    user = pod.get("securityContext", {})
    if user.get("runAsNonRoot") is not True or not user.get("runAsUser"):
        found.append("runs as root")
    if user.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        found.append("no seccomp profile")
    if pod.get("hostNetwork") or any("hostPath" in volume for volume in pod.get("volumes", [])):
        found.append("not kept apart from its machine")
    for container in pod["containers"]:
        rights = container.get("securityContext", {})
        dropped = rights.get("capabilities", {}).get("drop")
        if (
            rights.get("allowPrivilegeEscalation") is not False
            or rights.get("privileged")
            or dropped != ["ALL"]
        ):
            found.append("may gain privileges")
        if not re.search(r":\d+\.\d+\.\d+-(cpu|cuda)$|@sha256:[0-9a-f]{64}$", container["image"]):
            found.append("image not pinned")
        if "memory" not in container.get("resources", {}).get("limits", {}):
            found.append("no limit of memory")
        for variable in container.get("env", []):
            if SECRET_NAME.search(variable["name"]) and "secretKeyRef" not in variable.get("valueFrom", {}):
                found.append(f"{variable['name']} is not from a Secret")
    return found


def sharing_problems(cluster: Manifest) -> list[str]:
    """Check that pods share a home: an address from the Secret, or a folder of a claim that all mount."""
    found, homes = [], set()
    for name, group in groups(cluster):
        pod = group["template"]["spec"]
        container = pod["containers"][0]
        named = {v["name"]: v.get("value", "") for v in container.get("env", [])}.get("QLORA_HOME")
        if not any("secretRef" in source for source in container.get("envFrom", [])):
            found.append(f"{name}: the Secret with QLORA_HOME and MLFLOW_TRACKING_URI does not reach it")
        claims = {v["name"] for v in pod.get("volumes", []) if "persistentVolumeClaim" in v}
        mounted = [m["mountPath"] for m in container.get("volumeMounts", []) if m["name"] in claims]
        if named and "://" not in named and not any(named.startswith(path) for path in mounted):
            found.append(f"{name}: QLORA_HOME is a folder that no other pod sees")
        homes.add((named, str(container.get("envFrom"))))
    if len(homes) > 1:
        found.append("pods have different homes")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_problems(path: Path):
    assert problems(load(path.name)) == []


def test_every_kind_is_there():
    kinds = [(load(path.name)["kind"], path.name) for path in FILES]
    assert sorted(kinds) == [
        ("RayCluster", "cluster.yaml"),
        ("RayCronJob", "nightly.yaml"),
        ("RayJob", "batch-infer.yaml"),
        ("RayJob", "tune.yaml"),
    ]
    assert load("cluster.yaml")["metadata"]["name"] == CLUSTER


def test_the_cluster_of_a_sweep_is_the_one_that_stays():
    assert load("tune.yaml")["spec"]["rayClusterSpec"] == load("cluster.yaml")["spec"]


def test_images_are_of_this_version():
    version = re.search(
        r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE
    )
    images = {
        container["image"]
        for name in ("cluster.yaml", "tune.yaml")
        for _, group in groups(cluster_of(load(name)) or {})
        for container in group["template"]["spec"]["containers"]
    }
    assert version and images == {f"REGISTRY/qlora-on-ray:{version[1]}-cuda"}


@pytest.mark.parametrize("name", ["cluster.yaml", "tune.yaml"])
def test_the_autoscaler_of_ray_reads_the_cluster(name: str):
    """What Ray's autoscaler makes of the resource in the head's pod."""
    resource = {"metadata": {"name": CLUSTER, "namespace": "default"}, "spec": cluster_of(load(name))}
    config = _derive_autoscaling_config_from_ray_cr(resource)
    validate_config(config)
    head, gpu = config["available_node_types"]["headgroup"], config["available_node_types"]["gpu"]
    assert (head["resources"]["CPU"], config["max_workers"], gpu["min_workers"]) == (0, 8, 0)
    assert (gpu["resources"]["CPU"], gpu["resources"]["GPU"]) == (8, 1)
    assert config["idle_timeout_minutes"] == 10


def strict(schema: Any) -> Any:
    """A schema that refuses unknown fields, as the API server does for kubectl."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    parts = {
        key: value if key in ("enum", "default", "required") else strict(value)
        for key, value in schema.items()
    }
    open_ended = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not open_ended:
        parts["additionalProperties"] = False
    return parts


@functools.cache
def schema_of(kind: str) -> dict[str, Any]:
    folder = os.environ.get("KUBERAY_CRDS")
    if not folder:
        pytest.skip("$KUBERAY_CRDS names no folder with the operator's custom resource definitions")
    (path,) = Path(folder).glob(f"ray.io_{kind.lower()}s.yaml*")
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        definition = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    return schema


def refusals(manifest: Manifest) -> list[str]:
    """What the operator's schema says about a manifest, its fields first."""
    validator = jsonschema.Draft202012Validator(schema_of(manifest["kind"]))
    assert manifest["apiVersion"] == "ray.io/v1"
    return [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message}"
        for error in validator.iter_errors(manifest)
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_schema_accepts(path: Path):
    assert refusals(load(path.name)) == []


def at(manifest: Manifest, *path: str | int) -> Any:
    for step in path:
        manifest = manifest[step]
    return manifest


def put(*path: str | int, value: Any) -> Callable[[Manifest], None]:
    """Set what stands at a path of the manifest's spec."""

    def mutate(manifest: Manifest) -> None:
        at(manifest["spec"], *path[:-1])[path[-1]] = value

    return mutate


def drop(*path: str | int) -> Callable[[Manifest], None]:
    """Remove what stands at a path of the manifest's spec."""

    def mutate(manifest: Manifest) -> None:
        del at(manifest["spec"], *path[:-1])[path[-1]]

    return mutate


HEAD = ("headGroupSpec", "template", "spec")
GPU = ("workerGroupSpecs", 0, "template", "spec")


@pytest.mark.parametrize(
    ("name", "mutate", "message"),
    [
        (
            "cluster.yaml",
            put("enableInTreeAutoscalling", value=True),
            "'enableInTreeAutoscalling' was unexpected",
        ),
        ("cluster.yaml", put("enableInTreeAutoscaling", value="yes"), "'yes' is not of type 'boolean'"),
        ("cluster.yaml", put("autoscalerOptions", "version", value="v3"), "'v3' is not one of"),
        ("cluster.yaml", put("authOptions", "mode", value="password"), "'password' is not one of"),
        ("cluster.yaml", put("authOptions", "secret", value="x"), "'secret' was unexpected"),
        (
            "cluster.yaml",
            put("headGroupSpec", "rayStartParams", "num-cpus", value=0),
            "0 is not of type 'string'",
        ),
        ("cluster.yaml", drop("headGroupSpec"), "'headGroupSpec' is a required property"),
        ("cluster.yaml", put(*GPU, "containers", 0, "envFroms", value=[]), "'envFroms' was unexpected"),
        (
            "cluster.yaml",
            put("workerGroupSpecs", 0, "maxReplicas", value="8"),
            "'8' is not of type 'integer'",
        ),
        ("tune.yaml", put("ttl", value=60), "'ttl' was unexpected"),
        (
            "tune.yaml",
            put("deletionStrategy", "deletionRules", 0, "policy", value="Delete"),
            "'Delete' is not one of",
        ),
        (
            "tune.yaml",
            put("deletionStrategy", "deletionRules", 0, "condition", "jobStatus", value="STOPPED"),
            "'STOPPED' is not one of",
        ),
        ("batch-infer.yaml", put("entrypoint", value=["python"]), "['python'] is not of type 'string'"),
        ("nightly.yaml", drop("schedule"), "'schedule' is a required property"),
        ("nightly.yaml", put("entrypoint", value="python"), "'entrypoint' was unexpected"),
    ],
)
def test_the_schema_refuses(name: str, mutate: Callable[[Manifest], None], message: str):
    manifest = load(name)
    mutate(manifest)
    assert message in " ".join(refusals(manifest))


CLAIM = [{"name": "cache", "persistentVolumeClaim": {"claimName": "qlora"}}]


@pytest.mark.parametrize(
    ("name", "mutate", "expected"),
    [
        ("cluster.yaml", drop("authOptions"), "authOptions: no token from a Secret is asked for"),
        (
            "cluster.yaml",
            put("authOptions", "mode", value="disabled"),
            "authOptions: no token from a Secret is asked for",
        ),
        (
            "cluster.yaml",
            drop("authOptions", "secretName"),
            "authOptions: no token from a Secret is asked for",
        ),
        ("cluster.yaml", drop("rayVersion"), "rayVersion: not that of constraints.txt"),
        ("cluster.yaml", put("rayVersion", value="2.51.0"), "rayVersion: not that of constraints.txt"),
        (
            "cluster.yaml",
            put("enableInTreeAutoscaling", value=False),
            "enableInTreeAutoscaling: GPUs are paid for at all times",
        ),
        ("cluster.yaml", drop("autoscalerOptions", "version"), "autoscalerOptions: not version v2"),
        (
            "cluster.yaml",
            put("headGroupSpec", "rayStartParams", value={}),
            "head: trials could land on the head",
        ),
        (
            "cluster.yaml",
            put("headGroupSpec", "serviceType", value="LoadBalancer"),
            "head: the dashboard can be reached from outside",
        ),
        (
            "cluster.yaml",
            put("headGroupSpec", "enableIngress", value=True),
            "head: the dashboard can be reached from outside",
        ),
        (
            "cluster.yaml",
            put("headGroupSpec", "resources", value={"CPU": "0"}),
            "head: resources in two places",
        ),
        (
            "cluster.yaml",
            put(*HEAD, "restartPolicy", value="Always"),
            "head: restartPolicy does not go with autoscaler v2",
        ),
        ("cluster.yaml", put("workerGroupSpecs", value=[]), "workerGroupSpecs: trials have no place"),
        ("cluster.yaml", put("workerGroupSpecs", 0, "minReplicas", value=9), "gpu: replicas out of order"),
        (
            "cluster.yaml",
            put("workerGroupSpecs", 0, "minReplicas", value=1),
            "gpu: GPUs are paid for at all times",
        ),
        (
            "cluster.yaml",
            drop(*GPU, "containers", 0, "resources", "limits", "nvidia.com/gpu"),
            "gpu: workers have one GPU each",
        ),
        (
            "cluster.yaml",
            drop(*GPU, "containers", 0, "resources", "limits", "memory"),
            "gpu: no limit of memory",
        ),
        ("cluster.yaml", drop(*GPU, "securityContext", "runAsNonRoot"), "gpu: runs as root"),
        ("cluster.yaml", put(*HEAD, "securityContext", "runAsUser", value=0), "head: runs as root"),
        ("cluster.yaml", drop(*HEAD, "securityContext", "seccompProfile"), "head: no seccomp profile"),
        ("cluster.yaml", put(*GPU, "hostNetwork", value=True), "gpu: not kept apart from its machine"),
        ("cluster.yaml", drop(*GPU, "containers", 0, "securityContext"), "gpu: may gain privileges"),
        (
            "cluster.yaml",
            put(*GPU, "containers", 0, "image", value="qlora-on-ray:latest"),
            "gpu: image not pinned",
        ),
        ("cluster.yaml", put(*GPU, "containers", 0, "image", value="qlora-on-ray"), "gpu: image not pinned"),
        (
            "cluster.yaml",
            put(*HEAD, "containers", 0, "env", value=[{"name": "HF_TOKEN", "value": "x"}]),
            "head: HF_TOKEN is not from a Secret",
        ),
        (
            "cluster.yaml",
            drop(*GPU, "containers", 0, "envFrom"),
            "gpu: the Secret with QLORA_HOME and MLFLOW_TRACKING_URI does not reach it",
        ),
        (
            "cluster.yaml",
            put(*HEAD, "containers", 0, "env", value=[{"name": "QLORA_HOME", "value": "/home/qlora"}]),
            "head: QLORA_HOME is a folder that no other pod sees",
        ),
        (
            "cluster.yaml",
            put(*HEAD, "containers", 0, "env", value=[{"name": "QLORA_HOME", "value": "s3://b/p"}]),
            "pods have different homes",
        ),
        ("tune.yaml", drop("deletionStrategy"), "job: its cluster outlives it"),
        ("tune.yaml", drop("deletionStrategy", "deletionRules", 1), "job: its cluster outlives it"),
        (
            "tune.yaml",
            put("shutdownAfterJobFinishes", value=True),
            "job: deletionRules and shutdownAfterJobFinishes exclude each other",
        ),
        (
            "tune.yaml",
            put("ttlSecondsAfterFinished", value=9),
            "job: ttlSecondsAfterFinished without shutdownAfterJobFinishes",
        ),
        (
            "tune.yaml",
            put("deletionStrategy", "deletionRules", 0, "policy", value="DeleteWorkers"),
            "job: DeleteWorkers does not go with the autoscaler",
        ),
        ("tune.yaml", drop("rayClusterSpec"), "job: needs a cluster of its own or one that is there"),
        (
            "tune.yaml",
            put("runtimeEnvYAML", value="env_vars: {HF_TOKEN: x}"),
            "job: env_vars are shown by the dashboard",
        ),
        (
            "tune.yaml",
            put("entrypoint", value="python tune.py --space x"),
            "job: not one of the project's commands",
        ),
        (
            "batch-infer.yaml",
            put("clusterSelector", "ray.io/cluster", value="other"),
            "job: a cluster that no file here starts",
        ),
        (
            "batch-infer.yaml",
            put("shutdownAfterJobFinishes", value=True),
            "job: would end a cluster that stays",
        ),
        ("nightly.yaml", put("schedule", value="every night"), "schedule: not five fields of cron"),
        (
            "nightly.yaml",
            put("jobTemplate", "entrypoint", value="sleep 1"),
            "job: not one of the project's commands",
        ),
    ],
)
def test_our_checks_find(name: str, mutate: Callable[[Manifest], None], expected: str):
    manifest = copy.deepcopy(load(name))
    mutate(manifest)
    assert expected in problems(manifest)


def test_a_claim_that_all_pods_mount_is_a_home():
    manifest = load("cluster.yaml")
    for _, group in groups(manifest["spec"]):
        pod = group["template"]["spec"]
        pod["volumes"] = CLAIM
        pod["containers"][0]["volumeMounts"] = [{"name": "cache", "mountPath": "/shared"}]
        pod["containers"][0]["env"] = [{"name": "QLORA_HOME", "value": "/shared/qlora"}]
    assert problems(manifest) == []


def test_a_name_that_the_operator_refuses_is_found():
    manifest = load("tune.yaml")
    manifest["metadata"]["name"] = "Tune_" * 12
    assert "metadata: a name that the operator refuses" in problems(manifest)
