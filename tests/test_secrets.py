"""Passwords and keys stay where they are needed: no file, no line, no list of processes has them."""

import mmap
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from conftest import command, finished
from servers import free_port
from tracking_servers import sqlite_server

pytestmark = [pytest.mark.ray, pytest.mark.slow]
CANARIES = {
    "password": "canary-of-the-server",
    "AWS_ACCESS_KEY_ID": "canary-of-the-key-id",
    "AWS_SECRET_ACCESS_KEY": "canary-of-the-secret",
    "AWS_SESSION_TOKEN": "canary-of-the-session",
    "HF_TOKEN": "canary-of-the-hub",
}


@contextmanager
def watched() -> Iterator[tuple[set[str], set[str]]]:
    """Within, kept up to date: all that the list of processes shows, and the tokens of local Rays."""
    seen: set[str] = set()
    tokens: set[str] = set()
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(0.5):
            for process in psutil.process_iter():
                try:
                    seen.add(" ".join([process.name(), *process.cmdline()]))
                    if process.name() == "gcs_server" and process.parent().parent().pid == os.getpid():
                        tokens.add(process.environ()["RAY_AUTH_TOKEN"])
                except (psutil.Error, AttributeError):
                    continue

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen, tokens
    finally:
        is_over.set()
        thread.join()


def holders(folders: list[Path], since: float, secrets: set[str]) -> list[str]:
    """The files below folders, written since a time, that hold one of the secrets."""
    found = []
    for folder in folders:
        for path in folder.rglob("*"):
            try:
                info = path.lstat()
                if not path.is_file() or path.is_symlink() or not info.st_size or info.st_mtime < since:
                    continue
                with (
                    open(path, "rb") as file,
                    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
                ):
                    found += [f"{path}: {text}" for text in secrets if content.find(text.encode()) >= 0]
            except OSError:
                continue
    return found


@contextmanager
def http_store(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Within: the address of a server; of one that is away, with its password and without."""
    away = f"127.0.0.1:{free_port()}"
    known = f"http://somebody:{CANARIES['password']}@"
    with sqlite_server(folder) as port:
        yield f"{known}127.0.0.1:{port}", known + away, f"http://{away}"


@contextmanager
def database_store(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Within: the address of a PostgreSQL; of one that is away, with its password and without."""
    database = pytest.importorskip("pgserver", reason="pip install '.[servers]'").get_server(folder / "pg")
    away = f"127.0.0.1:{free_port()}/runs"
    known = f"postgresql+psycopg2://postgres:{CANARIES['password']}@"
    _, _, place = database.get_uri().partition("@")
    try:
        yield known + place, known + away, f"postgresql+psycopg2://{away}"
    finally:
        database.cleanup()


@pytest.mark.parametrize("store", [http_store, database_store])
def test_no_canary_is_found_after_a_sweep_and_a_job(store, project, tmp_path):
    began = time.time()
    with store(tmp_path) as (address, away, told_away), watched() as (seen, tokens):
        keys = {name: text for name, text in CANARIES.items() if name != "password"}
        environment = {**keys, "MLFLOW_TRACKING_URI": address}

        def run(script: str, *arguments: str) -> str:
            return finished(command(project, script, *arguments, env=environment))

        name = f"secret_{store.__name__}"
        few = ("--set", "num_samples=2", "--set", "search.epochs={choice: [2]}")
        out = run("tune", "--space", "space.yaml", "--name", name, *few)
        model = ("--model", "models:/tiny/1")
        output = project / f"{name}.json"
        out += run("batch_infer", *model, "--input", "public.json", "--output", str(output))
        out += run("promote", "tiny")
        environment["MLFLOW_TRACKING_URI"] = away
        failed = command(project, "promote", "tiny", env=environment)
        last, _ = failed.communicate(timeout=120)
        assert failed.returncode == 2
        assert told_away in last.splitlines()[-1]
        out += last
        rays = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray"
        sessions = [path for path in rays.glob("session_2*") if path.stat().st_mtime >= began]
        assert sessions, "Ray's logs are where they are looked for"
        assert len(tokens) == 2, "each command's Ray has its own"
        secrets = {*CANARIES.values(), *tokens}
        assert holders([project, tmp_path, *sessions], began, secrets) == []
    told = [out, *seen]
    assert not [line for line in told if any(text in line for text in secrets)]
