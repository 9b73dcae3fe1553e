"""Launcher files: accepted by Ray's cluster launcher, and safe and affordable to bring up.

Ray's own validation is a JSON schema and a few cross-checks. It lets through a cluster that can never scale
(max_workers: 0) or whose head starts with open doors, so `problems` below checks what the project relies on.
What nodes run is in deploy/node.sh, which is run here with stand-ins for pip and Ray. All of it works
offline: only the bootstrap in a cloud, which is not called here, needs its client and credentials.
"""

import copy
import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parent.parent
FILES = ["cluster.yaml", "deploy/gcp.yaml", "deploy/on-prem.yaml"]
NODE = (ROOT / "deploy/node.sh").read_text(encoding="utf-8")
MOUNTS = {"~/.ray/auth_token": "~/.ray/auth_token", "~/.qlora.env": "~/.qlora.env", "~/project": "."}

Config = dict[str, Any]

# AWS access keys, private keys, Hugging Face and GitHub tokens, and anything as long as a token of Ray's.
SECRET = re.compile(r"(AKIA|ASIA)[A-Z0-9]{16}|-----BEGIN|\bhf_\w{20}|\bgh[pousr]_\w{20}|\b[0-9a-fA-F]{32,}\b")
# A name that secrets have, with a value that is neither left open nor taken from elsewhere.
SECRET_ASSIGNMENT = re.compile(
    r"(?:PASSWORD|SECRET_KEY|SECRET_ACCESS_KEY|AUTH_TOKEN|HF_TOKEN|aws_secret_access_key)"
    r"[\"']?[ \t]*(?:=[ \t]*|:[ \t]+)[\"']?[^\s\"'$?{~]"
)


def load(name: str = "cluster.yaml") -> Config:
    config = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    assert isinstance(config, dict)
    return config


def accept(config: Config) -> Config:
    """What `ray up` does to the file before it turns to the cloud."""
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def problems(config: Config) -> list[str]:
    """What is wrong with a file that Ray accepts; empty if nothing is."""
    prepared = accept(config)
    found = [*scaling_problems(prepared), *cloud_problems(prepared)]

    for role, arguments in (
        ("head", "head --autoscaling-config=~/ray_bootstrap_config.yaml"),
        ("worker", "worker $RAY_HEAD_IP"),
    ):
        if prepared[f"{role}_start_ray_commands"][-1] != f"bash ~/project/deploy/node.sh {arguments}":
            found.append(f"{role}: Ray is not started by node.sh, which sees to token and loopback")
        if prepared[f"{role}_setup_commands"][0] != "bash ~/project/deploy/node.sh setup":
            found.append(f"{role}: not set up by node.sh, which sees to constraints")
        commands = prepared[f"{role}_setup_commands"] + prepared[f"{role}_start_ray_commands"]
        if any("pip install" in command and "==" not in command for command in commands):
            found.append(f"{role}: unpinned packages")
    if "0.0.0.0" in str(config):
        found.append("0.0.0.0: something listens on, or is open to, every address")

    for remote, local in MOUNTS.items():
        if prepared["file_mounts"].get(remote) != local:
            found.append(f"file_mounts: {remote} does not reach the nodes")
    excluded = {pattern.strip("/") for pattern in prepared["rsync_exclude"]}
    for name in sorted({".git", ".venv", "mlruns", "results"} - excluded):
        found.append(f"rsync_exclude: {name} would be copied to every node")
    if ".gitignore" not in prepared["rsync_filter"]:
        found.append("rsync_filter: ignored files would be copied to every node")
    return found


def scaling_problems(prepared: Config) -> list[str]:
    found: list[str] = []
    if prepared["max_workers"] <= 0:
        found.append("max_workers: the cluster can never have a worker")
    if not prepared["idle_timeout_minutes"] > 0:
        found.append("idle_timeout_minutes: must be positive")
    for name, node in prepared["available_node_types"].items():
        if node["max_workers"] > prepared["max_workers"]:
            found.append(f"{name}: max_workers above the global one")
        if not 0 <= node["min_workers"] <= node["max_workers"]:
            found.append(f"{name}: min_workers not between 0 and max_workers")
    if prepared["provider"]["type"] == "local" and set(prepared["provider"]["worker_ips"]) & {
        prepared["provider"]["head_ip"]
    }:
        found.append("worker_ips: the head can't be a worker, too")
    return found


def cloud_problems(prepared: Config) -> list[str]:
    """Check what nodes cost, and what the world and they themselves may do, where a cloud lends them."""
    found: list[str] = []
    if prepared["provider"]["type"] == "local":
        return found
    types, head = prepared["available_node_types"], prepared["head_node_type"]
    for name, node in types.items():
        settings = node["node_config"]
        spot = "SPOT" in (
            settings.get("InstanceMarketOptions", {}).get("MarketType", "").upper(),
            settings.get("scheduling", {}).get("provisioningModel"),
        )
        if name == head:
            if spot:
                found.append(f"{name}: the head must be on demand")
            if node["resources"].get("CPU") != 0 or node["resources"].get("GPU", 0):
                found.append(f"{name}: trials could land on the head")
            continue
        if node["resources"].get("GPU") != 1:
            found.append(f"{name}: workers have one GPU each")
        if not spot:
            found.append(f"{name}: GPU workers must be Spot instances")
        if node["max_workers"] <= 0:
            found.append(f"{name}: can never start")
        if not (settings.get("IamInstanceProfile") or settings.get("serviceAccounts")):
            found.append(f"{name}: workers have no role that opens the bucket")
        elif settings.get("IamInstanceProfile", name) == types[head]["node_config"].get("IamInstanceProfile"):
            found.append(f"{name}: workers have the head's role, which may start machines")
    if not any(name != head for name in types):
        found.append("available_node_types: no worker type")
    if prepared["provider"].get("security_group", {}).get("IpPermissions"):
        found.append("security_group: ingress beyond SSH")
    if prepared["provider"].get("gcp_credentials"):
        found.append("gcp_credentials: a secret in the file")
    return found


def run_node(folder: Path, script: str, *arguments: str, settings: str = "") -> subprocess.CompletedProcess:
    """Run node.sh, as given, in a project and a home of its own.

    Stand-ins for what it calls say how they are called.
    """
    project, home = folder / "project/deploy", folder / "home"
    for place in (project, home / ".ray", home / "venv/bin"):
        place.mkdir(parents=True, exist_ok=True)
    (project / "node.sh").write_text(script)
    (home / ".ray/auth_token").write_text("token")
    (home / ".ray/auth_token").chmod(0o644)
    (home / ".qlora.env").write_text(
        settings or "# comment\nQLORA_HOME=s3://team/home\nHF_TOKEN=a $(b) 'c'\n"
    )
    for name in ("ray", "pip", "python"):
        (home / f"venv/bin/{name}").write_text(f'#!/bin/sh\necho "{name} $*"\nenv\n')
        (home / f"venv/bin/{name}").chmod(0o755)
    return subprocess.run(
        ["bash", project / "node.sh", *arguments],
        env={"HOME": str(home), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def node_problems(folder: Path, script: str = NODE) -> list[str]:
    """What is wrong with how a node is set up and how Ray starts on it; empty if nothing is."""
    found = []
    for role, arguments in (("head", ["head", "--more"]), ("worker", ["worker", "10.0.0.1", "--more"])):
        done = run_node(folder, script, *arguments)
        call, _, environment = done.stdout.partition("\n")
        given = dict(line.partition("=")[::2] for line in environment.splitlines())
        if not call.startswith("ray start ") or not call.endswith(" --more"):
            found.append(f"{role}: Ray does not start: {done.stderr}")
        if given.get("RAY_AUTH_MODE") != "token":
            found.append(f"{role}: no token is asked for")
        if given.get("RAY_USAGE_STATS_ENABLED") != "0":
            found.append(f"{role}: reports usage")
        if given.get("HF_TOKEN") != "a $(b) 'c'" or given.get("QLORA_HOME") != "s3://team/home":
            found.append(f"{role}: ~/.qlora.env does not reach Ray as it is written")
        if any(secret in call for secret in ("$(b)", "token")):
            found.append(f"{role}: a secret in the list of processes")
        if role == "head" and "--dashboard-host=127.0.0.1" not in call.split():
            found.append("head: dashboard not on the loopback address")
        if role == "head" and "--num-cpus=0" not in call.split():
            found.append("head: trials could land on the head")
        if role == "worker" and "--address=10.0.0.1:6379" not in call.split():
            found.append("worker: does not join the head")
    secrets = [folder / "home/.ray/auth_token", folder / "home/.qlora.env"]
    if any(path.stat().st_mode & 0o077 for path in secrets):
        found.append("secrets are readable by others")
    if run_node(folder, script, "head", settings="HF_TOKEN=x\n").returncode != 2:
        found.append("starts without a home for results")
    (folder / "home/.bashrc").unlink(missing_ok=True)
    installed = [run_node(folder, script, "setup").stdout for _ in range(2)]
    if not all(re.search(r"^pip install -q -c constraints\.txt \.\[gpu\]", text, re.M) for text in installed):
        found.append("setup: dependencies not installed from constraints.txt")
    if (folder / "home/.bashrc").read_text().count("RAY_AUTH_MODE=token") != 1:
        found.append("setup: can't be repeated")
    return found


@pytest.fixture(autouse=True)
def empty_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No token, key or AWS profile of whoever runs the tests."""
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize("name", FILES)
def test_ray_accepts_the_file(name: str) -> None:
    prepared = accept(load(name))
    # The head's autoscaler prepares the prepared file once more.
    accept(prepared)


@pytest.mark.parametrize("name", FILES)
def test_no_problems(name: str) -> None:
    config = load(name)
    assert problems(config) == []
    assert set(config["file_mounts"]) == set(MOUNTS)


def test_no_problems_with_nodes(tmp_path: Path) -> None:
    assert node_problems(tmp_path) == []


@pytest.mark.parametrize(
    ("written", "instead", "expected"),
    [
        (
            "--dashboard-host=127.0.0.1",
            "--dashboard-host=0.0.0.0",
            "head: dashboard not on the loopback address",
        ),
        ("--num-cpus=0", "", "head: trials could land on the head"),
        ("RAY_AUTH_MODE=token RAY_USAGE", "RAY_USAGE", "worker: no token is asked for"),
        ("RAY_USAGE_STATS_ENABLED=0", "", "head: reports usage"),
        (
            'export "${pair?}"',
            'eval export "$pair"',
            "head: ~/.qlora.env does not reach Ray as it is written",
        ),
        ("chmod 600 ~/.ray/auth_token ~/.qlora.env", ":", "secrets are readable by others"),
        ("-c constraints.txt ", "", "setup: dependencies not installed from constraints.txt"),
        ("grep -qs 'RAY_AUTH_MODE' ~/.bashrc ||", "", "setup: can't be repeated"),
        ("[[ ${QLORA_HOME:-} &&", "[[ x ||", "starts without a home for results"),
        (
            "--head --port",
            '--head --token="$(cat ~/.ray/auth_token)" --port',
            "head: a secret in the list of processes",
        ),
        ('--address="${2', '--address="x${2', "worker: does not join the head"),
    ],
)
def test_our_checks_of_nodes_find(written: str, instead: str, expected: str, tmp_path: Path) -> None:
    assert written in NODE
    assert expected in node_problems(tmp_path, NODE.replace(written, instead))


@pytest.mark.parametrize("missing", [".ray/auth_token", ".qlora.env"])
def test_a_node_says_what_it_lacks(missing: str, tmp_path: Path) -> None:
    run_node(tmp_path, NODE)
    (tmp_path / "home" / missing).unlink()
    done = subprocess.run(
        ["bash", tmp_path / "project/deploy/node.sh", "head"],
        env={"HOME": str(tmp_path / "home"), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: ~/{missing}: is missing; ")
    assert len(done.stderr.splitlines()) == 1


WRITTEN = sorted(path for path in (ROOT / "deploy").rglob("*") if path.is_file() and path.suffix != ".pyc")


@pytest.mark.parametrize("path", [ROOT / "cluster.yaml", *WRITTEN], ids=lambda path: path.name)
def test_no_secret_in_the_file(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert SECRET.search(text) is None
    assert SECRET_ASSIGNMENT.search(text) is None


@pytest.mark.parametrize(
    "text",
    ["AKIA" + "A" * 16, "hf_" + "x" * 24, "0123456789abcdef" * 4, "-----BEGIN RSA PRIVATE" + " KEY-----"],
)
def test_a_secret_would_be_seen(text: str) -> None:
    assert SECRET.search(f"  - export TOKEN={text}\n")


@pytest.mark.parametrize(
    "text", ["RAY_AUTH_TOKEN=abc", "HF_TOKEN: abc", 'PGPASSWORD: "abc"', "aws_secret_access_key = abc"]
)
def test_an_assigned_secret_would_be_seen(text: str) -> None:
    assert SECRET_ASSIGNMENT.search(text)
    open_value = text.replace("abc", "${NAME:?}")
    assert not SECRET_ASSIGNMENT.search(open_value)


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


@pytest.mark.parametrize("name", FILES)
def test_commands_are_shell(name: str) -> None:
    config = load(name)
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
    config["head_start_ray_commands"][-1] += " --dashboard-host=0.0.0.0"


def no_auth_on_workers(config: Config) -> None:
    config["worker_start_ray_commands"][-1] = "ray start --address=$RAY_HEAD_IP:6379"


def unpinned_dependencies(config: Config) -> None:
    config["worker_setup_commands"] = ["~/venv/bin/pip install torch"]


def setup_of_its_own(config: Config) -> None:
    config["setup_commands"] = ["~/venv/bin/pip install ."]


def no_role(config: Config) -> None:
    del config["available_node_types"]["gpu_24gb"]["node_config"]["IamInstanceProfile"]


def role_of_the_head(config: Config) -> None:
    types = config["available_node_types"]
    types["gpu_24gb"]["node_config"]["IamInstanceProfile"] = types["head"]["node_config"][
        "IamInstanceProfile"
    ]


def head_with_cpus(config: Config) -> None:
    config["available_node_types"]["head"]["resources"] = {"CPU": 8}


def no_environment(config: Config) -> None:
    del config["file_mounts"]["~/.qlora.env"]


def no_token(config: Config) -> None:
    del config["file_mounts"]["~/.ray/auth_token"]


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
        (open_dashboard, "0.0.0.0: something listens on, or is open to, every address"),
        (no_auth_on_workers, "worker: Ray is not started by node.sh, which sees to token and loopback"),
        (unpinned_dependencies, "worker: unpinned packages"),
        (setup_of_its_own, "worker: not set up by node.sh, which sees to constraints"),
        (no_role, "gpu_24gb: workers have no role that opens the bucket"),
        (role_of_the_head, "gpu_24gb: workers have the head's role, which may start machines"),
        (head_with_cpus, "head: trials could land on the head"),
        (no_environment, "file_mounts: ~/.qlora.env does not reach the nodes"),
        (no_token, "file_mounts: ~/.ray/auth_token does not reach the nodes"),
        (open_port, "security_group: ingress beyond SSH"),
        (everything_synced, "rsync_exclude: .venv would be copied to every node"),
    ],
)
def test_our_checks_find(mutate: Callable[[Config], None], expected: str) -> None:
    config = load()
    mutate(config)
    assert expected in problems(config)


def on_demand_in_gcp(config: Config) -> None:
    config["available_node_types"]["gpu_24gb"]["node_config"]["scheduling"] = {
        "onHostMaintenance": "TERMINATE"
    }


def no_account(config: Config) -> None:
    del config["available_node_types"]["gpu_24gb"]["node_config"]["serviceAccounts"]


def key_in_the_file(config: Config) -> None:
    config["provider"]["gcp_credentials"] = {"type": "credentials_token", "credentials": "x"}


def head_among_workers(config: Config) -> None:
    config["provider"]["worker_ips"].append(config["provider"]["head_ip"])


@pytest.mark.parametrize(
    ("name", "mutate", "expected"),
    [
        ("deploy/gcp.yaml", on_demand_in_gcp, "gpu_24gb: GPU workers must be Spot instances"),
        ("deploy/gcp.yaml", no_account, "gpu_24gb: workers have no role that opens the bucket"),
        ("deploy/gcp.yaml", head_with_cpus, "head: trials could land on the head"),
        ("deploy/gcp.yaml", key_in_the_file, "gcp_credentials: a secret in the file"),
        ("deploy/on-prem.yaml", head_among_workers, "worker_ips: the head can't be a worker, too"),
        ("deploy/on-prem.yaml", no_environment, "file_mounts: ~/.qlora.env does not reach the nodes"),
        (
            "deploy/on-prem.yaml",
            open_dashboard,
            "0.0.0.0: something listens on, or is open to, every address",
        ),
    ],
)
def test_our_checks_find_in_other_files(name: str, mutate: Callable[[Config], None], expected: str) -> None:
    config = load(name)
    mutate(config)
    assert expected in problems(config)


def test_roles_open_the_bucket_and_nothing_else() -> None:
    """The profiles of deploy/aws-roles.yaml are those that cluster.yaml names."""
    assert role_problems((ROOT / "deploy/aws-roles.yaml").read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("written", "instead", "expected"),
    [
        ("${Bucket}/*", "*/*", "BucketPolicy: opens more than the bucket"),
        ("Resource: !GetAtt WorkerRole.Arn", 'Resource: "*"', "HeadRole: hands on any role"),
        (
            "InstanceProfileName: qlora-worker",
            "InstanceProfileName: workers",
            "cluster.yaml: no profile qlora-worker",
        ),
        ("[!Ref WorkerRole, !Ref HeadRole]", "[!Ref HeadRole]", "WorkerRole: can't reach the bucket"),
    ],
)
def test_our_checks_of_roles_find(written: str, instead: str, expected: str) -> None:
    text = (ROOT / "deploy/aws-roles.yaml").read_text(encoding="utf-8")
    assert written in text
    assert expected in role_problems(text.replace(written, instead))


class Template(yaml.SafeLoader):
    """Reads CloudFormation's short forms, such as !Sub, as their plain values."""


Template.add_multi_constructor(
    "!",
    lambda loader, _, node: (
        loader.construct_scalar(node)
        if isinstance(node, yaml.ScalarNode)
        else loader.construct_sequence(node)  # type: ignore[arg-type]
    ),
)


def role_problems(text: str) -> list[str]:
    found = []
    resources = yaml.load(text, Loader=Template)["Resources"]
    policy = resources["BucketPolicy"]["Properties"]
    bucket = "arn:${AWS::Partition}:s3:::${Bucket}"
    for statement in policy["PolicyDocument"]["Statement"]:
        if statement["Resource"].removesuffix("/*") != bucket or "s3:*" in statement["Action"]:
            found.append("BucketPolicy: opens more than the bucket")
    for role in ("WorkerRole", "HeadRole"):
        if role not in policy["Roles"]:
            found.append(f"{role}: can't reach the bucket")
    if "Policies" in resources["WorkerRole"]["Properties"]:
        found.append("WorkerRole: may do more than reach the bucket")
    (head,) = resources["HeadRole"]["Properties"]["Policies"]
    for statement in head["PolicyDocument"]["Statement"]:
        if statement["Action"] == "iam:PassRole" and statement["Resource"] != "WorkerRole.Arn":
            found.append("HeadRole: hands on any role")
    made = {
        resource["Properties"]["InstanceProfileName"]
        for resource in resources.values()
        if resource["Type"] == "AWS::IAM::InstanceProfile"
    }
    for node in load()["available_node_types"].values():
        if (name := node["node_config"]["IamInstanceProfile"]["Name"]) not in made:
            found.append(f"cluster.yaml: no profile {name}")
    return found


def sky_problems(text: str) -> list[str]:
    """What is wrong with a SkyPilot task; empty if nothing is."""
    task, found = yaml.safe_load(text), []
    known = {"name", "num_nodes", "workdir", "resources", "envs", "file_mounts", "setup", "run"}
    found += [f"{key}: unknown" for key in sorted(set(task) - known)]
    for path in ("~/.ray/auth_token", "~/.qlora.env"):
        if task["file_mounts"].get(path) != path:
            found.append(f"file_mounts: {path} does not reach the nodes")
    if task["resources"].get("ports"):
        found.append("resources: ports are open to the world")
    if not task["resources"].get("use_spot") or not task["resources"].get("accelerators"):
        found.append("resources: not GPUs on spot nodes")
    if task["setup"].strip() != "bash deploy/node.sh setup":
        found.append("setup: not by node.sh, which sees to constraints")
    commands = task["run"]
    if re.search(r"\bray (start|stop)\b", commands):
        found.append("run: Ray is not started by node.sh, or SkyPilot's is ended")
    if re.search(r"\b(6380|8266)\b", commands):
        found.append("run: a port of SkyPilot's own Ray")
    for role in ("node.sh head", 'node.sh worker "$head"'):
        if role not in commands:
            found.append(f"run: no {role}")
    if "export RAY_AUTH_MODE=token" not in commands:
        found.append("run: the job is handed in without the token")
    if any(
        name in task.get("envs", {}) for name in ("HF_TOKEN", "RAY_AUTH_TOKEN", "MLFLOW_TRACKING_PASSWORD")
    ):
        found.append("envs: a secret that SkyPilot shows")
    if subprocess.run(["bash", "-n", "-c", commands], check=False, capture_output=True).returncode:
        found.append("run: not shell")
    return found


SKY = (ROOT / "deploy/skypilot.yaml").read_text(encoding="utf-8")


def test_no_problems_with_skypilot() -> None:
    assert sky_problems(SKY) == []


@pytest.mark.parametrize(
    ("written", "instead", "expected"),
    [
        (
            "setup: bash deploy/node.sh setup",
            "setup: pip install .",
            "setup: not by node.sh, which sees to constraints",
        ),
        ("bash deploy/node.sh head", "ray start --head", "run: no node.sh head"),
        (
            "bash deploy/node.sh head",
            "ray stop; bash deploy/node.sh head",
            "run: Ray is not started by node.sh, or SkyPilot's is ended",
        ),
        ("127.0.0.1:8265", "127.0.0.1:8266", "run: a port of SkyPilot's own Ray"),
        ("$head/6379", "$head/6380", "run: a port of SkyPilot's own Ray"),
        ("cpus: 8+", "ports: 8265", "resources: ports are open to the world"),
        ("use_spot: true", "use_spot: false", "resources: not GPUs on spot nodes"),
        ("  ~/.qlora.env: ~/.qlora.env\n", "", "file_mounts: ~/.qlora.env does not reach the nodes"),
        (
            "  ~/.ray/auth_token: ~/.ray/auth_token\n",
            "",
            "file_mounts: ~/.ray/auth_token does not reach the nodes",
        ),
        ("  export RAY_AUTH_MODE=token\n", "", "run: the job is handed in without the token"),
        ("envs:", "envs:\n  HF_TOKEN: null", "envs: a secret that SkyPilot shows"),
        ("  fi\n", "", "run: not shell"),
        ("num_nodes: 3", "nodes: 3", "nodes: unknown"),
    ],
)
def test_our_checks_of_skypilot_find(written: str, instead: str, expected: str) -> None:
    assert written in SKY
    assert expected in sky_problems(SKY.replace(written, instead))


def plan_of(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Ask make what it would run, with the environment built and a home of its own."""
    stamp = tmp_path / "installed"
    stamp.touch()
    return subprocess.run(
        ["make", "--no-print-directory", f"STAMP={stamp}", "BIN=bin", *arguments],
        cwd=ROOT,
        env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "planned"),
    [
        (["cluster-up"], "bin/ray up --yes cluster.yaml"),
        (["cluster-up", "CLUSTER=deploy/gcp.yaml"], "bin/ray up --yes deploy/gcp.yaml"),
        (["cluster-tunnel"], "bin/ray dashboard cluster.yaml"),
        (["cluster-down", "CLUSTER=deploy/on-prem.yaml"], "bin/ray down --yes deploy/on-prem.yaml"),
        (
            ["cluster-tune", "SPACE=a.yaml"],
            "bin/ray job submit --address http://127.0.0.1:8265 --working-dir . -- "
            "python ray_jobs/tune.py --space a.yaml",
        ),
        (
            ["cluster-infer", "MODEL=models:/a@champion", "INPUT=s3://b/test.json", "WORKERS=4"],
            "bin/ray job submit --address http://127.0.0.1:8265 --working-dir . -- "
            "python ray_jobs/batch_infer.py --model models:/a@champion --input s3://b/test.json "
            "--output results/outputs.json --workers 4",
        ),
    ],
)
def test_make_runs_what_the_document_says(arguments: list[str], planned: str, tmp_path: Path) -> None:
    for path in (".ray/auth_token", ".qlora.env"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    assert plan_of(tmp_path, "-n", *arguments).stdout == planned + "\n"
    assert f"make {arguments[0]}" in (ROOT / "docs/cluster.md").read_text(encoding="utf-8")


def test_make_asks_for_the_settings_before_the_cloud(tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").touch()
    done = plan_of(tmp_path, "cluster-up")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ~/.qlora.env: is missing; ")


def test_jobs_of_make_have_the_token(tmp_path: Path) -> None:
    (tmp_path / "ray").write_text('#!/bin/sh\necho "mode $RAY_AUTH_MODE"\n')
    (tmp_path / "ray").chmod(0o755)
    assert "mode token" in plan_of(tmp_path, "cluster-tune", f"BIN={tmp_path}").stdout


def test_the_settings_of_nodes_name_no_secret_and_one_home() -> None:
    text = (ROOT / "deploy/nodes.env").read_text(encoding="utf-8")
    given = dict(re.findall(r"^([A-Z_]+)=(.*)$", text, re.MULTILINE))
    assert given == {"QLORA_HOME": "s3://BUCKET/PATH", "MLFLOW_TRACKING_URI": "https://mlflow.example.org"}
    assert not [line for line in text.splitlines() if re.search(r"[\"' ]", line) and not line.startswith("#")]


def test_cfn_lint_accepts_the_roles() -> None:
    api = pytest.importorskip("cfnlint.api")
    text = (ROOT / "deploy/aws-roles.yaml").read_text(encoding="utf-8")
    assert [str(match) for match in api.lint(text, regions=["us-west-2"])] == []
    assert api.lint(
        text.replace("sts:AssumeRole", "[]").replace("Type: String", "Type: Text"), regions=["us-west-2"]
    )
