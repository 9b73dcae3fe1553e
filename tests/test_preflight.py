"""What would end a command in the middle or at its end is found before it begins."""

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT

from inference.predictions import beside
from qlora.config import InputError
from qlora.files import write_json
from workflows.preflight import check_output, check_room, check_temporary_folder, store_folders


def test_the_longest_name_that_an_output_may_have_can_be_written(tmp_path):
    longest = os.pathconf(tmp_path, "PC_NAME_MAX") - len("..errors.json.4194304.part")
    check_output(good := tmp_path / ("玄" * (longest // 3)))
    write_json(beside(good, "errors"), {})
    for length in (longest + 1, 300):
        with pytest.raises(InputError, match=rf"has too long a name .* use at most {longest} bytes$"):
            check_output(tmp_path / ("x" * length))


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_temporary_folder_that_ray_cannot_use_is_refused(name, tmp_path, monkeypatch):
    long = tmp_path / ("x" * 40)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(name, str(long))
    with pytest.raises(
        InputError, match=f"^{name}: {long} is too long a path for Ray's sockets; set RAY_TMP"
    ):
        check_temporary_folder()
    monkeypatch.setenv(name, "/proc/none")
    with pytest.raises(InputError, match=r"^/proc: can't be written to"):
        check_temporary_folder()
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # a cluster's nodes have folders of their own
    check_temporary_folder()


def test_the_folder_that_ray_takes_by_itself_is_tried(monkeypatch, tmp_path):
    """Python goes to another folder if /tmp is full; Ray does not."""
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tried: list[str] = []
    opened = tempfile.TemporaryFile

    def full_for_ray(dir):
        tried.append(str(dir))
        if str(dir) == "/tmp":
            raise OSError(errno.ENOSPC, "No space left on device", "/tmp")
        return opened(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", full_for_ray)
    with pytest.raises(InputError, match=r"^/tmp: can't be written to .*; free some space$"):
        check_temporary_folder()
    assert tried == [str(tmp_path), "/tmp"]


def test_a_machine_without_any_temporary_folder_gets_one_line(monkeypatch):
    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(InputError, match=r"^TMPDIR: No usable temporary directory"):
        check_temporary_folder()


def test_the_folder_of_a_store_elsewhere_is_among_those_that_are_tried(monkeypatch):
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////data/team/mlflow.db")
    assert store_folders() == [Path("/data/team")]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert store_folders() == []
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setenv("QLORA_HOME", "/data/home")
    assert store_folders() == [Path("/data/home/mlruns")]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_users_folder_gets_one_line(tmp_path):
    """Try it as an ordinary user, whom permissions hold off; root they don't."""
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o700)
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(0o755)
    script = """
import os, sys
from workflows.preflight import check_writable
from qlora.config import InputError
from pathlib import Path
os.setgid(65534); os.setuid(65534)
try:
    check_writable(Path(sys.argv[1]) / "below" / "it")
except InputError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(locked)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=60,
    )
    assert "can't be written to (Permission denied)" in done.stdout, done.stdout + done.stderr


def test_a_disk_with_less_room_than_checkpoints_take_is_named(tmp_path):
    place = tmp_path / "sweep"
    free = shutil.disk_usage(tmp_path).free
    check_room(str(place), free // 2)
    check_room("s3://bucket/sweep", 2 * free)
    with pytest.raises(
        InputError, match=rf"^{place}: .* GiB of checkpoints are to come, but .* GiB are free"
    ):
        check_room(str(place), 2 * free)
    place.mkdir()
    with open(place / "checkpoint", "wb") as file:
        file.truncate(2 * free)  # takes no space, and counts as what is to come
    check_room(str(place), 2 * free)
