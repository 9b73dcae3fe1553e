"""A tracking store that can't work is told before anything starts; a server is waited for, not for ever."""

import http.server
import socket
import threading
import time
from pathlib import Path

import pytest
import yaml
from test_inputs import good_space, nothing_heavy_happens, refused  # noqa: F401

import ray_jobs.evaluate
import ray_jobs.study
import ray_jobs.tune
from qlora.config import InputError
from tracking import address
from tracking.address import check_addresses, check_reachable
from tracking.errors import TrackingAwayError

WRONG = {
    "file:/tmp/runs": "is a folder, which can be no tracking store; use http://SERVER",
    "mlruns": "is a folder",
    "/srv/runs": "is a folder",
    "ftp://server/runs": "is of the unknown kind ftp",
    "oracle+cx_oracle://me:canary@server/runs": "is of the unknown kind oracle+cx_oracle",
    "mysql+nodriver://me:canary@127.0.0.1:1/runs": "is no address of a database",
    "mssql+pyodbc://me:canary@127.0.0.1:1/runs": "needs the Python package pyodbc",
}


@pytest.mark.parametrize("uri", WRONG)
@pytest.mark.parametrize("variable", ["MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"])
def test_an_address_that_no_store_has(uri, variable, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////tmp/none.db")
    monkeypatch.setenv(variable, uri)
    with pytest.raises(InputError, match=WRONG[uri].replace("+", r"\+")) as error:
        check_addresses()
    assert "canary" not in str(error.value)


@pytest.mark.parametrize(
    "uri", ["sqlite:////tmp/a.db", "http://127.0.0.1:1", "databricks", "databricks://profile"]
)
def test_addresses_that_a_store_can_have(uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    check_addresses()
    assert address.address() == uri


@pytest.fixture
def patience(monkeypatch):
    monkeypatch.setattr(address, "_PATIENCE_SECONDS", 3)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_a_server_that_is_only_starting_is_waited_for(patience, monkeypatch):
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    server = []

    def start() -> None:
        time.sleep(1.2)
        server.append(http.server.HTTPServer(("127.0.0.1", port), Healthy))
        server[0].handle_request()

    thread = threading.Thread(target=start)
    thread.start()
    check_reachable()
    assert server, "it is not given up before it answers"
    thread.join()
    server[0].server_close()


def test_a_server_that_is_not_there(patience, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:canary@127.0.0.1:{free_port()}")
    with pytest.raises(TrackingAwayError, match="can't be reached: Connection refused") as error:
        check_reachable()
    assert "canary" not in str(error.value)


def test_a_server_that_never_answers(patience, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(TrackingAwayError, match="it gives no answer"):
            check_reachable()


@pytest.mark.parametrize("uri", ["file:/tmp/runs", "http://127.0.0.1:1"])
def test_a_sweep_does_not_begin_without_its_store(
    uri, patience, capsys, monkeypatch, tmp_path, tiny_base, write_rows
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("QLORA_HOME", str(tmp_path))
    space = tmp_path / "space.yaml"
    space.write_text(yaml.safe_dump(good_space(tiny_base, write_rows)), encoding="utf-8")
    error = refused(ray_jobs.tune, capsys, monkeypatch, "--space", space)
    assert uri in error
    assert not list(Path(tmp_path).glob("results/*/sweep.json"))


def test_a_version_is_not_looked_for_in_a_folder(capsys, monkeypatch, write_rows, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path))
    data = write_rows([{"instruction": "x", "output": "y"}])
    options = ("--adapter", "models:/a/1", "--data", data, "--output", tmp_path / "out.json")
    assert "is a folder, which can be no tracking store" in refused(
        ray_jobs.evaluate, capsys, monkeypatch, *options
    )
