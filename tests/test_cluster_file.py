"""cluster.yaml: accepted by Ray's cluster launcher, and safe and affordable to bring up.

Ray's own validation is a JSON schema and a few cross-checks. It lets through a cluster that can never scale
(max_workers: 0) or that listens on every address, so `problems` below checks what the project relies on. All
of it works offline: only Ray's AWS bootstrap, which is not called here, needs boto3 and credentials.
"""

import copy
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "cluster.yaml").read_text(encoding="utf-8")

Config = dict[str, Any]

# AWS access keys, private keys, Hugging Face and GitHub tokens, and anything as long as a token of Ray's.
SECRET = re.compile(r"(AKIA|ASIA)[A-Z0-9]{16}|-----BEGIN|\bhf_\w{20}|\bgh[pousr]_\w{20}|\b[0-9a-fA-F]{32,}\b")
SECRET_ASSIGNMENT = re.compile(r"RAY_AUTH_TOKEN\s*[=:]|aws_secret_access_key", re.IGNORECASE)


def load() -> Config:
    config = yaml.safe_load(TEXT)
    assert isinstance(config, dict)
    return config


def accept(config: Config) -> Config:
    """What `ray up` does to the file before it turns to the cloud."""
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def problems(config: Config) -> list[str]:
    """What is wrong with a file that Ray accepts; empty if nothing is."""
    found: list[str] = []
    prepared = accept(config)
    types: dict[str, Config] = prepared["available_node_types"]
    head = prepared["head_node_type"]

    if prepared["max_workers"] <= 0:
        found.append("max_workers: the cluster can never have a worker")
    for name, node in types.items():
        if node["max_workers"] > prepared["max_workers"]:
            found.append(f"{name}: max_workers above the global one")
        if not 0 <= node["min_workers"] <= node["max_workers"]:
            found.append(f"{name}: min_workers not between 0 and max_workers")
        spot = node["node_config"].get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        if name == head:
            if "InstanceMarketOptions" in node["node_config"]:
                found.append(f"{name}: the head must be on demand")
            if node["resources"].get("CPU") != 0 or node["resources"].get("GPU", 0):
                found.append(f"{name}: trials could land on the head")
        else:
            if node["resources"].get("GPU") != 1:
                found.append(f"{name}: workers have one GPU each")
            if not spot:
                found.append(f"{name}: GPU workers must be Spot instances")
            if node["max_workers"] <= 0:
                found.append(f"{name}: can never start")
    if not any(name != head for name in types):
        found.append("available_node_types: no worker type")
    if not prepared["idle_timeout_minutes"] > 0:
        found.append("idle_timeout_minutes: must be positive")

    for role in ("head", "worker"):
        starts = [command for command in prepared[f"{role}_start_ray_commands"] if "ray start" in command]
        if not starts:
            found.append(f"{role}: no ray start")
        for command in starts:
            if not re.search(r"\bRAY_AUTH_MODE=token\b.*\bray start\b", command, re.DOTALL):
                found.append(f"{role}: ray start without token authentication")
            if role == "head" and "--dashboard-host=127.0.0.1" not in command.split():
                found.append("head: dashboard not on the loopback address")
            if role == "head" and "--autoscaling-config" not in command:
                found.append("head: no autoscaler")
        setup = "\n".join(prepared[f"{role}_setup_commands"])
        if not re.search(r"pip install .*-c constraints\.txt '\.\[gpu\]'(\s|$)", setup):
            found.append(f"{role}: dependencies not installed from constraints.txt")
        if not re.search(r"chmod 600 ~/\.ray/auth_token", setup):
            found.append(f"{role}: token readable by others")

    if "0.0.0.0" in str(config):
        found.append("0.0.0.0: something listens on, or is open to, every address")
    if prepared["provider"].get("security_group", {}).get("IpPermissions"):
        found.append("security_group: ingress beyond SSH")

    if prepared["file_mounts"].get("~/.ray/auth_token") != "~/.ray/auth_token":
        found.append("file_mounts: the token does not reach the nodes")
    excluded = {pattern.strip("/") for pattern in prepared["rsync_exclude"]}
    for name in sorted({".git", ".venv", "mlruns", "results"} - excluded):
        found.append(f"rsync_exclude: {name} would be copied to every node")
    if ".gitignore" not in prepared["rsync_filter"]:
        found.append("rsync_filter: ignored files would be copied to every node")
    return found


@pytest.fixture(autouse=True)
def empty_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No token, key or AWS profile of whoever runs the tests."""
    monkeypatch.setenv("HOME", str(tmp_path))


def test_ray_accepts_the_file() -> None:
    prepared = accept(load())
    assert prepared["head_node_type"] == "head"
    # The head's autoscaler prepares the prepared file once more.
    accept(prepared)


def test_no_problems() -> None:
    assert problems(load()) == []


def test_mounted_paths_are_this_project() -> None:
    mounts = load()["file_mounts"]
    assert set(mounts) == {"~/.ray/auth_token", "~/project"}
    assert (ROOT / mounts["~/project"]).samefile(ROOT)


def test_no_secret_in_the_file() -> None:
    assert SECRET.search(TEXT) is None
    assert SECRET_ASSIGNMENT.search(TEXT) is None


@pytest.mark.parametrize(
    "text",
    ["AKIA" + "A" * 16, "hf_" + "x" * 24, "0123456789abcdef" * 4, "-----BEGIN RSA PRIVATE" + " KEY-----"],
)
def test_a_secret_would_be_seen(text: str) -> None:
    assert SECRET.search(f"  - export TOKEN={text}\n")


def test_workers_get_the_image_of_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the command that rewrites the autoscaler's copy of the file, with a stand-in for the metadata
    service.
    """
    curl = tmp_path / "curl"
    curl.write_text(
        '#!/bin/sh\ncase "$*" in\n*/api/token) echo session ;;\n'
        "*'metadata-token: session'*/meta-data/ami-id) printf ami-0123 ;;\n*) exit 22 ;;\nesac\n"
    )
    curl.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    config = load()
    bootstrap = tmp_path / "ray_bootstrap_config.yaml"
    bootstrap.write_text(json.dumps(accept(config)))  # Ray writes it as one line of JSON.
    (command,) = [
        command
        for command in config["head_start_ray_commands"]
        if bootstrap.name in command and "AMI" in command
    ]
    for _ in range(2):
        subprocess.run(["bash", "-c", command], check=True, timeout=30)
    rewritten = yaml.safe_load(bootstrap.read_text())
    assert {node["node_config"]["ImageId"] for node in rewritten["available_node_types"].values()} == {
        "ami-0123"
    }
    assert rewritten["head_start_ray_commands"] == config["head_start_ray_commands"]
    curl.write_text("#!/bin/sh\nexit 22\n")
    assert subprocess.run(["bash", "-c", command], check=False, timeout=30).returncode != 0


def test_commands_are_shell() -> None:
    config = load()
    for key in [key for key in config if key.endswith("_commands")]:
        for command in config[key]:
            subprocess.run(["bash", "-n", "-c", command], check=True, timeout=30)


def unknown_key(config: Config) -> None:
    config["max_worker"] = 3


def no_head_node_type(config: Config) -> None:
    # Left out, it would come from Ray's defaults, which name a type that this file does not have.
    del config["head_node_type"]


def negative_max_workers(config: Config) -> None:
    config["max_workers"] = -1


def min_above_global_max(config: Config) -> None:
    config["available_node_types"]["gpu_24gb"]["min_workers"] = config["max_workers"] + 1


def no_node_config(config: Config) -> None:
    del config["available_node_types"]["gpu_24gb"]["node_config"]


def unknown_head_node_type(config: Config) -> None:
    config["head_node_type"] = "heads"


@pytest.mark.parametrize(
    ("mutate", "message"),
    [
        (unknown_key, "'max_worker' was unexpected"),
        (no_head_node_type, "`head_node_type` must be one of"),
        (unknown_head_node_type, "`head_node_type` must be one of"),
        (negative_max_workers, "-1 is less than the minimum"),
        (min_above_global_max, "smaller than the sum of `min_workers`"),
        (no_node_config, "'node_config' is a required property"),
    ],
)
def test_ray_refuses(mutate: Callable[[Config], None], message: str) -> None:
    config = load()
    mutate(config)
    with pytest.raises(Exception, match=message):
        accept(config)


def no_workers(config: Config) -> None:
    config["max_workers"] = 0


def spot_head(config: Config) -> None:
    config["available_node_types"]["head"]["node_config"]["InstanceMarketOptions"] = {"MarketType": "spot"}


def on_demand_worker(config: Config) -> None:
    del config["available_node_types"]["gpu_80gb"]["node_config"]["InstanceMarketOptions"]


def min_above_own_max(config: Config) -> None:
    config["available_node_types"]["gpu_80gb"]["min_workers"] = 3


def type_above_global_max(config: Config) -> None:
    config["available_node_types"]["gpu_24gb"]["max_workers"] = config["max_workers"] + 1


def open_dashboard(config: Config) -> None:
    commands = config["head_start_ray_commands"]
    commands[:] = [command.replace("127.0.0.1", "0.0.0.0") for command in commands]


def no_auth_on_workers(config: Config) -> None:
    commands = config["worker_start_ray_commands"]
    commands[:] = [command.replace("export RAY_AUTH_MODE=token;", "") for command in commands]


def unpinned_dependencies(config: Config) -> None:
    commands = config["setup_commands"]
    commands[:] = [command.replace("-c constraints.txt ", "") for command in commands]


def open_port(config: Config) -> None:
    rule = {"FromPort": 8265, "ToPort": 8265, "IpProtocol": "tcp", "IpRanges": [{"CidrIp": "10.0.0.0/8"}]}
    config["provider"]["security_group"] = {"IpPermissions": [rule]}


def everything_synced(config: Config) -> None:
    config["rsync_exclude"] = []


@pytest.mark.parametrize(
    ("mutate", "expected"),
    [
        (no_workers, "max_workers: the cluster can never have a worker"),
        (spot_head, "head: the head must be on demand"),
        (on_demand_worker, "gpu_80gb: GPU workers must be Spot instances"),
        (min_above_own_max, "gpu_80gb: min_workers not between 0 and max_workers"),
        (type_above_global_max, "gpu_24gb: max_workers above the global one"),
        (open_dashboard, "head: dashboard not on the loopback address"),
        (no_auth_on_workers, "worker: ray start without token authentication"),
        (unpinned_dependencies, "worker: dependencies not installed from constraints.txt"),
        (open_port, "security_group: ingress beyond SSH"),
        (everything_synced, "rsync_exclude: .venv would be copied to every node"),
    ],
)
def test_our_checks_find(mutate: Callable[[Config], None], expected: str) -> None:
    config = load()
    mutate(config)
    assert expected in problems(config)
