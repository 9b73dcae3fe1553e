"""An MLflow server as a team would have it: runs in PostgreSQL, files, which clients get through it, in an
S3-like store.
"""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def object_store(name: str) -> Iterator[dict[str, str]]:
    """Within: the environment by which clients reach an S3-like store that has a bucket of this name.

    Needs the extra `servers`, or the test is skipped.
    """
    boto3, moto = pytest.importorskip("boto3"), pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=free_port())
    server.start()
    host, port = server.get_host_and_port()
    client = boto3.client(
        "s3",
        endpoint_url=f"http://{host}:{port}",
        region_name="us-east-1",
        aws_access_key_id="key",
        aws_secret_access_key="secret",
    )
    client.create_bucket(Bucket=name)
    try:
        yield {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        }
    finally:
        server.stop()


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """Within: the address of a server whose state is in the folder.

    Needs the extra `servers`, or the test is skipped.
    """
    pgserver = pytest.importorskip("pgserver", reason="pip install '.[servers]'")
    database = pgserver.get_server(folder / "postgres")
    uri = f"http://127.0.0.1:{free_port()}"
    store = database.get_uri().replace("postgresql://", "postgresql+psycopg2://")
    command = [Path(sys.executable).with_name("mlflow"), "server", "--workers", "1"]
    command += ["--host", "127.0.0.1", "--port", uri.rpartition(":")[2]]
    command += ["--backend-store-uri", store, "--artifacts-destination", "s3://models"]
    with object_store("models") as keys, open(folder / "server.log", "w") as log:
        environment = {
            **os.environ,
            **keys,
            "MLFLOW_S3_ENDPOINT_URL": keys["AWS_ENDPOINT_URL"],
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        server = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_for(uri, server, folder)
            yield uri
        finally:
            server.terminate()
            server.wait(30)
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


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
