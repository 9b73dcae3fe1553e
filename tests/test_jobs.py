"""Submitted jobs: they run in a copy of the project that is lost with them; what they make is in the home."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from clusters import kill_all
from conftest import command, finished
from servers import object_store
from test_faults import SWEEP, check, cluster
from test_sweep import ledger

pytestmark = [pytest.mark.ray, pytest.mark.slow]
RAY = Path(sys.executable).with_name("ray")


def begin(address: str, project: Path, env: dict[str, str], script: str, *arguments: str) -> None:
    """Submit a command as a job."""
    given = ["--working-dir", str(project), "--runtime-env-json", json.dumps({"env_vars": env}), "--no-wait"]
    given += ["--submission-id", script, "--", sys.executable, f"ray_jobs/{script}.py", *arguments]
    ask({"RAY_ADDRESS": address}, "submit", *given)


def submit(address: str, project: Path, env: dict[str, str], script: str, *arguments: str) -> tuple[str, str]:
    """Run a command as a job; returns its status and its log."""
    begin(address, project, env, script, *arguments)
    environment, deadline = {"RAY_ADDRESS": address}, time.monotonic() + 400
    while not (status := ended_as(ask(environment, "status", script))):
        assert time.monotonic() < deadline, ask(environment, "logs", script)
        time.sleep(1)
    return status, ask(environment, "logs", script)


def ask(environment: dict[str, str], *arguments: str) -> str:
    job = [RAY, "job", *arguments]
    asked = subprocess.run(
        job, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert asked.returncode == 0 or arguments[0] == "status", asked.stdout + asked.stderr
    return asked.stdout


def ended_as(status: str) -> str:
    found = [name for name in ("SUCCEEDED", "FAILED", "STOPPED") if name in status.upper()]
    return found[0] if found else ""


def wait_for_a_report_away(
    project: Path, name: str, env: dict[str, str], folder: Path, said: Callable[[], str]
) -> None:
    """Fetch a sweep again and again until one of its trials has reported; `said` tells why it does not."""
    deadline = time.monotonic() + 200
    while True:
        assert time.monotonic() < deadline, said()
        time.sleep(1)
        target = folder / f"look-{time.monotonic()}"
        command(project, "fetch", name, "--to", str(target / "results"), env=env).communicate(timeout=60)
        if any(one["curve"] for one in ledger(target, name).values()):
            return


@pytest.fixture(scope="module")
def whole(project) -> dict:
    """The records of a sweep that ran on without a job."""
    finished(command(project, "tune", "--space", "space.yaml", "--name", "whole", *SWEEP))
    return ledger(project, "whole")


@pytest.fixture(params=["URI of a folder", "S3"])
def away(request, tmp_path) -> Iterator[tuple[str, dict[str, str]]]:
    """A home at a URI, and the environment of all nodes by which it is reached."""
    if request.param == "S3":
        with object_store("team") as keys:
            yield "s3://team/home", keys
    else:
        yield (tmp_path / "home").as_uri(), {}


def test_a_sweep_goes_on_in_another_job_of_another_package_once_its_head_is_gone(
    away, project, whole, tmp_path
):
    place, keys = away
    env = {"QLORA_HOME": place, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    here = {**keys, "QLORA_HOME": place}
    with cluster(keys) as address:
        begin(address, project, env, "tune", "--space", "space.yaml", "--name", "away", *SWEEP)
        wait_for_a_report_away(
            project, "away", here, tmp_path, lambda: ask({"RAY_ADDRESS": address}, "logs", "tune")
        )
    (project / "space.yaml").write_text((project / "space.yaml").read_text() + "# ,\n")  # another package
    assert not (project / "results/away").exists()
    with cluster(keys) as address:
        status, log = submit(address, project, env, "tune", "--resume", "away")
    assert status == "SUCCEEDED", log
    assert f"report      {place}/results/away/report.html" in log
    assert "away  finished" in " ".join(finished(command(project, "fetch", "--list", env=here)).split("\n"))
    finished(command(project, "fetch", "away", "--to", str(tmp_path / "mine/results"), env=here))
    summary = check(tmp_path / "mine", "away", whole)
    assert summary["best"]["checkpoint"] == "results/away/best"
    assert (tmp_path / "mine/results/away/best/adapter_model.safetensors").exists()
    finished(command(project, "fetch", "--remove", "away", env=here))
    assert "nothing is kept" in finished(command(project, "fetch", "--list", env=here))


def test_of_two_resumes_at_once_one_goes_on_and_the_other_gives_way(project, whole, tmp_path):
    """Two machines, each with a copy of the project; the first sweep was killed and its lease is there."""
    other = tmp_path / "other"
    shutil.copytree(project, other, ignore=shutil.ignore_patterns("results", "mlruns"))
    with object_store("team") as keys:
        env = {
            **keys,
            "QLORA_HOME": "s3://team/home",
            "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        }
        first = command(project, "tune", "--space", "space.yaml", "--name", "two", *SWEEP, env=env)
        wait_for_a_report_away(project, "two", env, tmp_path, lambda: str(first.poll()))
        kill_all(first)
        both = [command(folder, "tune", "--resume", "two", env=env) for folder in (project, other)]
        said = [process.communicate(timeout=400)[0] for process in both]
        assert sorted(process.returncode for process in both) == [0, 2], said
        (refused,) = [text for text, process in zip(said, both, strict=True) if process.returncode]
        assert re.search(
            r"^error: s3://team/home/results/two\S*: is being worked on by another", refused, re.M
        )
        finished(command(project, "fetch", "two", "--to", str(tmp_path / "mine/results"), env=env))
    check(tmp_path / "mine", "two", whole)


def test_a_job_without_a_home_says_so_before_anything_starts(project):
    with cluster({}) as address:
        status, log = submit(address, project, {}, "tune", "--space", "space.yaml", "--name", "lost")
    assert status == "FAILED"
    assert "error: QLORA_HOME: is not set: a job's own folder is lost with it; name s3://BUCKET/PATH" in log
    assert "Traceback" not in log
