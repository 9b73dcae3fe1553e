"""Names and passwords of a tracking server reach no screen, log or list of processes."""

import base64
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from servers import free_port

from qlora.addresses import without_password
from qlora.config import InputError
from tracking.credentials import hide_credentials

ROOT = Path(__file__).resolve().parent.parent
TRACKING, REGISTRY = "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"
NAME, PASSWORD = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"


def test_credentials_move_out_of_addresses():
    environment = {TRACKING: "https://me:c%40n%2Fary@runs.example:8443/ml?x=1"}
    hide_credentials(environment)
    hidden = {TRACKING: "https://runs.example:8443/ml?x=1", NAME: "me", PASSWORD: "c@n/ary"}
    assert environment == hidden
    hide_credentials(environment)
    assert environment == hidden, "a second time changes nothing"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {TRACKING: ""},
        {TRACKING: "https://runs.example"},
        {TRACKING: "sqlite:////tmp/a@b.db"},
        {TRACKING: "postgresql://me:canary@db/runs", REGISTRY: "https://runs.example"},
        {TRACKING: "https://runs.example", NAME: "me", PASSWORD: "canary"},
    ],
)
def test_what_has_none_stays_as_it_is(environment):
    found = dict(environment)
    hide_credentials(found)
    assert found == environment


@pytest.mark.parametrize(
    ("tracking", "registry"),
    [
        ("https://me:canary@a", "https://you:canary@b"),
        ("https://me:canary@a", "https://me:canary2@a"),
        ("https://me:canary@a", "https://b"),  # which would be sent what is not its own
        ("https://a", "https://me:canary@b"),
        ("https://me:can/ary@a", ""),
        ("https://me:can#ary@a", ""),
        ("https://canary@a", ""),
    ],
)
def test_credentials_that_cannot_be_hidden_are_told_without_them(tracking, registry):
    with pytest.raises(InputError) as caught:
        hide_credentials({TRACKING: tracking, REGISTRY: registry})
    assert "canary" not in str(caught.value)
    assert "ary@" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_scheme_may_be_in_capitals():
    environment = {TRACKING: "HTTPS://me:canary@a"}
    hide_credentials(environment)
    assert environment == {TRACKING: "HTTPS://a", NAME: "me", PASSWORD: "canary"}


def test_one_server_may_be_named_with_and_without_them():
    environment = {TRACKING: "https://me:canary@a", REGISTRY: "https://a"}
    hide_credentials(environment)
    assert environment == {TRACKING: "https://a", REGISTRY: "https://a", NAME: "me", PASSWORD: "canary"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("API request to http://me:canary@a:1/x failed", "API request to http://a:1/x failed"),
        ("postgresql+psycopg2://me:can/a@ry@db:5/runs is away", "postgresql+psycopg2://db:5/runs is away"),
        ("mysql://db/runs?user=me&password=canary&x=1", "mysql://db/runs?user=me&password=***&x=1"),
        ("s3://b/x?secret_key=canary&region=a", "s3://b/x?secret_key=***&region=a"),
        ("s3://key:canary@b/x", "s3://b/x"),
        ("HTTPS://me:canary@a/x", "HTTPS://a/x"),
        ("http://a:5000: models:/wide@champion", "http://a:5000: models:/wide@champion"),
        ("sqlite:////home/me/mlflow.db", "sqlite:////home/me/mlflow.db"),
    ],
)
def test_texts_lose_passwords_and_nothing_else(text, expected):
    assert without_password(text) == expected


def environment(uri: str, **more: str) -> dict[str, str]:
    return {
        **os.environ,
        TRACKING: uri,
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "PYTHONPATH": str(ROOT),
        **more,
    }


@pytest.mark.parametrize(
    "uri", ["http://me:canary@127.0.0.1:1", "postgresql+psycopg2://me:canary@127.0.0.1:1/runs"]
)
def test_a_server_that_is_away_is_told_without_a_password(uri):
    """MLflow's own text, and the trace of a program that does not catch the error."""
    if "psycopg2" in uri:
        pytest.importorskip("psycopg2", reason="pip install '.[servers]'")
    program = "from tracking.registry import versions; versions('wide')"
    out = subprocess.run(
        [sys.executable, "-c", program], env=environment(uri), capture_output=True, text=True, check=False
    )
    assert out.stderr.splitlines()[-1].startswith("tracking.errors.TrackingAwayError: the tracking server")
    assert "canary" not in out.stdout + out.stderr


def test_a_server_that_refuses_the_password_is_told_on_one_line():
    asked: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def refuse() -> None:
        client, _ = listener.accept()
        asked.append(client.recv(1 << 16))
        client.sendall(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno")
        client.close()

    threading.Thread(target=refuse, daemon=True).start()
    uri = f"http://me:canary@127.0.0.1:{listener.getsockname()[1]}"
    program = """
from qlora.config import InputError
from tracking.registry import versions
try:
    versions("wide")
except InputError as error:
    print(error)"""
    out = subprocess.run(
        [sys.executable, "-c", program], env=environment(uri), capture_output=True, text=True, check=False
    )
    assert base64.b64encode(b"me:canary") in asked[0], "it was asked with the password"
    assert "refuses name and password; see MLFLOW_TRACKING_USERNAME" in out.stdout
    assert "canary" not in out.stdout + out.stderr


def test_the_pages_of_a_store_are_served_without_its_address_in_the_list_of_processes(tmp_path):
    uri, port = f"sqlite:///{tmp_path}/canary.db", free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "tracking.ui", "--port", str(port)],
        cwd=ROOT,
        env=environment(uri),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        else:
            raise AssertionError("no pages")
        lines = _arguments_of_group(server.pid)
        assert any("server" in line for line in lines)
        assert not [line for line in lines if "canary" in line]
    finally:
        os.killpg(server.pid, 15)
        server.communicate(timeout=30)


def _arguments_of_group(group: int) -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(folder.name)) == group:
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found
