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
def mlflow_server(folder: Path) -> Iterator[str]:
    """Within: the address of a server whose state is in the folder.

    Needs the extra `servers`, or the test is skipped.
    """
    pgserver = pytest.importorskip("pgserver", reason="pip install '.[servers]'")
    boto3, moto = pytest.importorskip("boto3"), pytest.importorskip("moto.server")
    database = pgserver.get_server(folder / "postgres")
    bucket = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=free_port())
    bucket.start()
    host, port = bucket.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    boto3.client(
        "s3",
        endpoint_url=f"http://{host}:{port}",
        region_name="us-east-1",
        aws_access_key_id="key",
        aws_secret_access_key="secret",
    ).create_bucket(Bucket="models")
    uri = f"http://127.0.0.1:{free_port()}"
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen(
            [
                Path(sys.executable).with_name("mlflow"),
                "server",
                "--host",
                "127.0.0.1",
                "--port",
                uri.rpartition(":")[2],
                "--workers",
                "1",
                "--backend-store-uri",
                database.get_uri().replace("postgresql://", "postgresql+psycopg2://"),
                "--artifacts-destination",
                "s3://models",
            ],
            env={
                **os.environ,
                **keys,
                "MLFLOW_S3_ENDPOINT_URL": f"http://{host}:{port}",
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            },
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_for(uri, server, folder)
        yield uri
    finally:
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


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
