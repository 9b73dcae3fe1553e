"""What deploy/compose.yaml says, run without Docker: its commands, in its environments, as processes.

PostgreSQL and the S3-like store are stood in for by packages; names of services become 127.0.0.1 and their
ports free ones. A sweep and a batch job are then handed in as docs/cluster.md does.
"""

import json
import os
import re
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import psutil
import pytest
import yaml
from clusters import needs_mounts, unpacking_alone
from servers import free_port
from test_containers import COMPOSE, interpolated

pytestmark = [pytest.mark.ray, pytest.mark.slow]
BIN = Path(sys.executable).parent
PORTS = (5000, 6379, 8265, 8333)


@dataclass(frozen=True)
class Team:
    """Services that run: their environments, the secrets that deploy/.env would hold, and Ray's folder."""

    folder: Path
    project: Path
    secrets: dict[str, str]
    services: dict[str, dict[str, Any]]
    ports: dict[int, int]
    session: Path

    def address(self, port: int) -> str:
        return f"http://127.0.0.1:{self.ports[port]}"

    def submit(self, *command: str, runtime_env: str = "{}") -> str:
        """Hand in a job as docs/cluster.md does, and return what it said. It has to succeed."""
        submit = [BIN / "ray", "job", "submit", "--address", self.address(8265), "--working-dir", "."]
        done = subprocess.run(
            [*submit, "--runtime-env-json", runtime_env, "--", *command],
            cwd=self.project,
            env={
                **plain(self.folder),
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN": self.secrets["RAY_AUTH_TOKEN"],
            },
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        assert done.returncode == 0 and "succeeded" in done.stdout, done.stdout + done.stderr
        return done.stdout

    def ask(self, port: int, path: str, key: str) -> bytes:
        """Ask a server with a name and a password, or a token."""
        request = urllib.request.Request(self.address(port) + path, headers={"Authorization": key})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read()

    @property
    def admin(self) -> str:
        return "Basic " + b64encode(f"admin:{self.secrets['MLFLOW_ADMIN_PASSWORD']}".encode()).decode()

    @property
    def bearer(self) -> str:
        return f"Bearer {self.secrets['RAY_AUTH_TOKEN']}"


def plain(folder: Path) -> dict[str, str]:
    """An environment like that of a container: nothing of whoever runs the tests, and a home of its own."""
    kept = {
        name: os.environ[name] for name in ("LANG", "LD_LIBRARY_PATH", "HF_HUB_OFFLINE") if name in os.environ
    }
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])
    return {**kept, "PATH": path, "HOME": str(folder), "CUDA_VISIBLE_DEVICES": ""}


def moved(value: Any, ports: dict[int, int]) -> Any:
    """Replace names and ports of services by 127.0.0.1 and free ports, wherever they stand."""
    if isinstance(value, dict):
        return {key: moved(part, ports) for key, part in value.items()}
    if isinstance(value, list):
        return [moved(part, ports) for part in value]
    text = str(value).replace("0.0.0.0", "127.0.0.1")
    for port, free in ports.items():
        text = re.sub(rf"\b(store|mlflow|head|localhost|127\.0\.0\.1):{port}\b", f"127.0.0.1:{free}", text)
        text = re.sub(rf"^(--[\w-]*port)={port}$", rf"\1={free}", text)
    return text


@contextmanager
def postgres(folder: Path, service: dict[str, Any]) -> Iterator[str]:
    """Within: the folder of the socket of a PostgreSQL that has the service's user and database."""
    pgserver = pytest.importorskip("pgserver", reason="pip install '.[servers]'")
    database = pgserver.get_server(folder / "postgres")
    try:
        given = service["environment"]
        database.psql(f"CREATE ROLE {given['POSTGRES_USER']} LOGIN PASSWORD '{given['POSTGRES_PASSWORD']}';")
        database.psql(f"CREATE DATABASE {given['POSTGRES_DB']} OWNER {given['POSTGRES_USER']};")
        yield parse_qs(urlsplit(database.get_uri()).query)["host"][0]
    finally:
        database.cleanup()


@contextmanager
def store(port: int, service: dict[str, Any]) -> Iterator[Any]:
    """Within: a client of an S3-like store at the port that has the service's bucket."""
    boto3, moto = pytest.importorskip("boto3"), pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=port)
    server.start()
    given = service["environment"]
    client = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        region_name="us-east-1",
        aws_access_key_id=given["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=given["AWS_SECRET_ACCESS_KEY"],
    )
    client.create_bucket(Bucket=given["S3_BUCKET"])
    try:
        yield client
    finally:
        server.stop()


@contextmanager
def running(
    team: Team, name: str, *more: str, before: Sequence[Any] = (), number: int = 1, **variables: str
) -> Iterator[None]:
    """Within: a service's command runs, in its environment, in the project, and answers its health check.

    `before`, `more`: what goes before its command, and its further options.
    """
    service = team.services[name]
    given = {**plain(team.folder), "PYTHONPATH": str(team.project), **service["environment"], **variables}
    said = team.folder / f"{name}-{number}.log"
    with open(said, "w") as log:
        process = subprocess.Popen(
            [*before, *service["command"], *more],
            cwd=team.project,
            env=given,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        if "healthcheck" in service:
            wait_for(service["healthcheck"]["test"][-1], process, said)
        yield
    finally:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for one in family:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()


def wait_for(url: str, process: subprocess.Popen, said: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, said.read_text()
        with suppress(OSError):
            urllib.request.urlopen(url, timeout=2).close()
            return
        time.sleep(0.5)
    raise AssertionError(said.read_text())


def states_of_nodes(team: Team) -> list[str]:
    told = json.loads(team.ask(8265, "/nodes?view=summary", team.bearer))
    return [node["raylet"].get("state") for node in told["data"]["summary"]]


def wait_for_nodes(team: Team, number: int) -> None:
    deadline = time.monotonic() + 90
    while states_of_nodes(team) != ["ALIVE"] * number:
        logs = "".join(path.read_text() for path in team.folder.glob("worker-*.log"))
        assert time.monotonic() < deadline, logs
        time.sleep(1)


@pytest.fixture(scope="module")
def team(project, tmp_path_factory) -> Iterator[Team]:
    needs_mounts()
    folder = tmp_path_factory.mktemp("team")
    session = Path(
        subprocess.check_output(["mktemp", "-d", "/tmp/rayXXXXXX"], text=True).strip()
    )  # short: sockets
    asked = re.findall(r"\$\{(\w+):\?\}", COMPOSE)
    given = {name: secrets.token_hex(24) for name in [*asked, "HF_TOKEN"]}
    ports = {port: free_port() for port in PORTS}
    config = yaml.safe_load(interpolated(COMPOSE, {**given, "WORKER_CPUS": "1"}))
    services = moved(config["services"], ports)
    (folder / "auth.ini").write_text(config["configs"]["mlflow-auth"]["content"])
    team = Team(folder, project, given, services, ports, session)
    with ExitStack() as stack:
        socket = stack.enter_context(postgres(folder, services["postgres"]))
        stack.enter_context(store(ports[8333], services["store"]))
        files = {"MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"), "PGHOST": socket}
        stack.enter_context(running(team, "mlflow", **files))
        apart = [f"--temp-dir={session}", f"--ray-client-server-port={free_port()}"]
        stack.enter_context(running(team, "head", *apart, f"--dashboard-agent-listen-port={free_port()}"))
        alone = unpacking_alone((session / "session_latest").resolve())
        for number in range(1, int(services["worker"]["deploy"]["replicas"]) + 1):
            own = f"--dashboard-agent-listen-port={free_port()}"  # one machine has two of them
            (home := folder / f"home-{number}").mkdir()
            worker = running(team, "worker", own, before=alone, number=number, HOME=str(home))
            stack.enter_context(worker)
            wait_for_nodes(team, number + 1)
        yield team
    subprocess.run(["rm", "-r", session], check=True)


def test_a_sweep_and_a_batch_job_of_the_team(team):
    space = ("--space", "space.yaml", "--name", "team", "--set", "num_samples=2")
    said = team.submit(
        "python", "ray_jobs/tune.py", *space, "--set", "search.learning_rate={choice: [1.0e-2]}"
    )
    assert "s3://qlora/home/results/team/report.html" in said
    found = json.loads(
        team.ask(5000, "/api/2.0/mlflow/registered-models/alias?name=tiny&alias=champion", team.admin)
    )
    assert found["model_version"]["version"] == "1"
    rows = [{"id": "a", "instruction": "翻譯：春夏"}, {"id": "b", "instruction": "翻譯：秋冬"}]
    (team.project / "test.json").write_text(json.dumps(rows))
    batch = ("--model", "models:/tiny@champion", "--input", "test.json", "--output", "results/outputs.json")
    team.submit("python", "ray_jobs/batch_infer.py", *batch, "--workers", "2", "--max-new-tokens", "4")
    import boto3

    given = team.services["store"]["environment"]
    client = boto3.client(
        "s3",
        endpoint_url=team.address(8333),
        region_name="us-east-1",
        aws_access_key_id=given["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=given["AWS_SECRET_ACCESS_KEY"],
    )
    outputs = json.loads(client.get_object(Bucket="qlora", Key="home/results/outputs.json")["Body"].read())
    assert [row["id"] for row in outputs] == ["a", "b"]
    kept = [entry["Key"] for entry in client.list_objects_v2(Bucket="qlora")["Contents"]]
    assert "home/results/team/summary.json" in kept
    assert any(key.startswith("mlflow/") and key.endswith("adapter_model.safetensors") for key in kept)


def test_both_workers_joined_the_head(team):
    assert states_of_nodes(team) == ["ALIVE"] * 3


@pytest.mark.parametrize(
    ("port", "path"), [(8265, "/api/jobs/"), (5000, "/api/2.0/mlflow/experiments/get?experiment_id=0")]
)
def test_nobody_gets_in_without_a_secret(team, port, path):
    for key in ("", "Bearer x", "Basic " + b64encode(b"admin:admin").decode()):
        with pytest.raises(urllib.error.HTTPError, match=r"40[13]"):
            team.ask(port, path, key)


def test_jobs_see_the_secrets_of_their_node_and_ray_shows_none(team):
    """Ray's logs, jobs and state have none of what nodes were given; a runtime environment's they have."""
    shown = secrets.token_hex(24)
    variables = json.dumps({"env_vars": {"SHOWN": shown}})
    names = ("HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY")
    code = f"import os; print('lengths', [len(os.environ[name]) for name in {names}])"
    assert "lengths [48, 48, 48]" in team.submit("python", "-c", code, runtime_env=variables)
    pages = ["/api/jobs/", "/nodes?view=summary", "/logical/actors"]
    pages += [
        f"/api/v0/{kind}?detail=true" for kind in ("actors", "tasks", "workers", "runtime_envs", "nodes")
    ]
    told = {page: team.ask(8265, page, team.bearer).decode() for page in pages}
    told |= {
        str(path): path.read_text(errors="replace") for path in team.session.rglob("*") if path.is_file()
    }
    assert len(told) > 20
    assert shown in told["/api/jobs/"] and any(
        shown in text for place, text in told.items() if "/logs/" in place
    )
    for name, secret in team.secrets.items():
        assert [place for place, text in told.items() if secret in text] == [], name
