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
from tracking_servers import Door, sqlite_server

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


def test_no_canary_is_found_after_a_sweep_and_a_job(project, tmp_path):
    began = time.time()
    with sqlite_server(tmp_path) as port, watched() as (seen, tokens):
        door = Door(port)
        address = door.uri.replace("//", f"//somebody:{CANARIES['password']}@")
        keys = {name: text for name, text in CANARIES.items() if name != "password"}
        environment = {**keys, "MLFLOW_TRACKING_URI": address}

        def run(script: str, *arguments: str) -> str:
            return finished(command(project, script, *arguments, env=environment))

        few = ("--set", "num_samples=2", "--set", "search.epochs={choice: [2]}")
        out = run("tune", "--space", "space.yaml", "--name", "secret", *few)
        model = ("--model", "models:/tiny/1")
        out += run("batch_infer", *model, "--input", "public.json", "--output", str(project / "o.json"))
        out += run("promote", "tiny")
        door.shut()
        away = command(project, "promote", "tiny", env=environment)
        last, _ = away.communicate(timeout=120)
        assert away.returncode == 2
        assert door.uri in last.splitlines()[-1]
        out += last
        rays = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray"
        sessions = [path for path in rays.glob("session_2*") if path.stat().st_mtime >= began]
        assert sessions, "Ray's logs are where they are looked for"
        assert len(tokens) == 2, "each command's Ray has its own"
        secrets = {*CANARIES.values(), *tokens}
        assert holders([project, tmp_path, *sessions], began, secrets) == []
    told = [out, *seen]
    assert not [line for line in told if any(text in line for text in secrets)]
