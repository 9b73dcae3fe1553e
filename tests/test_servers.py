"""Runs and registry on an MLflow server with PostgreSQL and an S3-like store, as a team would have it. Needs the extra `servers`."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import test_registry
from test_registry import base  # noqa: F401

from tracking import registry, runs

pgserver = pytest.importorskip("pgserver", reason="pip install '.[servers]'")
boto3 = pytest.importorskip("boto3")
moto = pytest.importorskip("moto.server")

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A server whose runs are in PostgreSQL and whose files, which clients get through it, are in a bucket."""
    folder = tmp_path_factory.mktemp("server")
    database = pgserver.get_server(folder / "postgres")
    bucket = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=free_port())
    bucket.start()
    host, port = bucket.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1", aws_access_key_id="key",
                 aws_secret_access_key="secret").create_bucket(Bucket="models")
    uri = f"http://127.0.0.1:{free_port()}"
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen(
            [Path(sys.executable).with_name("mlflow"), "server", "--host", "127.0.0.1", "--port", uri.rpartition(":")[2], "--workers", "1",
             "--backend-store-uri", database.get_uri().replace("postgresql://", "postgresql+psycopg2://"), "--artifacts-destination",
             "s3://models"],
            env={**os.environ, **keys, "MLFLOW_S3_ENDPOINT_URL": f"http://{host}:{port}", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    patch = pytest.MonkeyPatch()
    patch.setenv("MLFLOW_TRACKING_URI", uri)
    patch.setattr(runs, "PROJECT_ROOT", folder)
    try:
        wait_for(uri, server, folder)
        yield folder
    finally:
        patch.undo()
        server.terminate()
        server.wait(30)
        bucket.stop()
        database.cleanup()


def wait_for(uri: str, server: subprocess.Popen, folder: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert server.poll() is None, (folder / "server.log").read_text()
        try:
            urllib.request.urlopen(f"{uri}/health", timeout=2)
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError((folder / "server.log").read_text())


def test_a_model_serves_from_the_store(store, base):  # noqa: F811
    test_registry.test_a_model_serves_in_a_new_process_what_the_engine_generates(store, base)


def test_champions_and_the_way_back(store, base):  # noqa: F811
    test_registry.test_the_better_adapter_is_champion_and_there_is_a_way_back(store, base)


def test_uses_are_linked(store, base):  # noqa: F811
    test_registry.test_uses_are_linked_to_the_version_that_made_them(store, base)


def test_a_sweeps_runs_and_files(store, tmp_path):
    (tmp_path / "report.html").write_text("<p>report</p>")
    tracker = runs.start_sweep("night", "team", {"seed": 0}, {"train": ("train.json", "d" * 64, 3), "public": ("public.json", "e" * 64, 2)})
    tracker.note({"hardware": "two cores"}, [tmp_path / "report.html"])
    with tracker.system_metrics():
        time.sleep(0.5)
    tracker.end("FINISHED", {"zero_shot_public_perplexity": 9.0})
    client = runs.connect()
    run = client.get_run(tracker.parent_run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["hardware"] == "two cores"
    assert run.data.metrics["zero_shot_public_perplexity"] == 9.0
    assert {entry.dataset.name for entry in run.inputs.dataset_inputs} == {"train.json", "public.json"}
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["report.html"]
    assert runs.start_sweep("night", "team", {}, {}).parent_run_id == tracker.parent_run_id
    with pytest.raises(Exception, match="models:/"):
        registry.fetch_adapter("models:/nobody@champion")
