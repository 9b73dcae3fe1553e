"""One process at a time works on a folder of results, or on a place in an object store."""

import fcntl
import multiprocessing
import threading
import time
from pathlib import Path

import pytest
from conftest import command, finished
from servers import object_store
from test_sweep import wait_for_a_report

from qlora.config import InputError
from tuning.checkpoints import Storage
from workflows import lock, session
from workflows.lock import is_held, locked


def _hold(folder: Path, is_held) -> None:
    with locked(folder):
        is_held.set()
        time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds a folder."""
    context = multiprocessing.get_context("fork")
    is_held = context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "results", is_held))
    process.start()
    assert is_held.wait(30)
    yield process
    process.kill()
    process.join()


def test_a_held_folder_is_refused_until_its_process_ends_however_it_ends(holder, tmp_path):
    folder = tmp_path / "results"
    with pytest.raises(InputError, match="is being worked on by another process"), locked(folder):
        pass
    assert is_held(folder)
    holder.kill()
    holder.join()
    assert not is_held(folder)
    with locked(folder):
        assert is_held(folder)
    assert not is_held(tmp_path / "none")


def test_a_folder_that_is_looked_at_can_be_taken(tmp_path):
    folder = tmp_path / "results"
    with locked(folder):
        (folder / "file").write_text("")
    with open(folder / ".lock", "rb") as looked_at:
        fcntl.flock(looked_at, fcntl.LOCK_SH)
        threading.Timer(0.01, lambda: fcntl.flock(looked_at, fcntl.LOCK_UN)).start()
        with locked(folder):
            assert is_held(folder)


def test_a_folder_that_stays_empty_is_removed(tmp_path):
    with locked(tmp_path / "empty"):
        pass
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "full"):
        (tmp_path / "full/file").touch()
    assert {path.name for path in (tmp_path / "full").iterdir()} == {"file", ".lock"}


def refusal(folder: Path, place: str) -> str:
    with pytest.raises(InputError) as caught, locked(folder, place):
        pass
    return str(caught.value)


def test_a_place_in_a_store_is_leased(tmp_path, monkeypatch):
    """A local folder stands for the store: a lease asks for what any file system of pyarrow's has."""
    monkeypatch.setattr(lock, "_SETTLING_SECONDS", 0.1)
    monkeypatch.setattr(lock, "_RENEWAL_SECONDS", 0.2)
    place = str(tmp_path / "store")
    with locked(tmp_path / "one", place):
        error = refusal(tmp_path / "other", place)
        assert error == f"{place}: is being worked on by another process; wait for it"
    with locked(tmp_path / "other", place):
        pass


def test_the_lease_of_a_killed_process_runs_out_while_one_waits(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lock, "_SETTLING_SECONDS", 0.1)
    monkeypatch.setattr(lock, "_LEASE_SECONDS", 1.0)
    place = Storage.at(str(tmp_path / "store"))
    place.filesystem.create_dir(place.path)
    lock._write(place, "lease", "of a process that was killed")
    began = time.monotonic()
    with locked(tmp_path / "one", place.path):
        assert time.monotonic() - began > 0.9
    said = f"waiting     1 s at most, to see whether {place.path} is worked on\n"
    assert capsys.readouterr().out == said


def test_who_waits_goes_on_as_soon_as_the_holder_has_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_SETTLING_SECONDS", 0.05)
    place = Storage.at(str(tmp_path / "store"))
    place.filesystem.create_dir(place.path)
    lock._write(place, "lease", "of another process")
    threading.Timer(0.3, (tmp_path / "store/lease").unlink).start()
    with locked(tmp_path / "one", place.path):
        assert lock._read(place) != "of another process"


def test_who_came_at_the_same_time_and_wrote_first_gives_way(tmp_path, monkeypatch):
    place = Storage.at(str(tmp_path / "store"))
    place.filesystem.create_dir(place.path)
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: lock._write(place, "lease", "another's"))
    with pytest.raises(InputError, match="started at the same time"), locked(tmp_path / "one", place.path):
        pass


def test_who_finds_anothers_lease_in_place_of_its_own_ends_and_leaves_it(tmp_path, monkeypatch):
    """As after a time in which it could not reach the store, and the other took the place over."""
    monkeypatch.setattr(lock, "_SETTLING_SECONDS", 0.01)
    monkeypatch.setattr(lock, "_RENEWAL_SECONDS", 0.05)
    place = Storage.at(str(tmp_path / "store"))
    with locked(tmp_path / "one", place.path):
        time.sleep(0.2)
        session.go_on()
        (renewed,) = lock._renewed.values()
        while renewed in lock._renewed.values():
            time.sleep(0.001)  # until a renewal is over: what is written is not to meet one
        lock._write(place, "lease", "another's")
        time.sleep(0.2)
        with pytest.raises(session.StoppedError, match=r"another process took .*store over"):
            session.go_on()
    assert lock._read(place) == "another's"
    session.go_on()


def test_a_lock_that_its_holder_has_just_removed_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "sweep"
    folder.mkdir()
    take = lock.fcntl.flock

    def late(file, kind):
        (folder / ".lock").unlink()
        take(file, kind)

    monkeypatch.setattr(lock.fcntl, "flock", late)
    with pytest.raises(InputError, match="is being worked on by another process"), locked(folder):
        pass


@pytest.mark.slow
def test_a_lease_in_an_object_store(tmp_path, monkeypatch):
    with object_store("checkpoints") as environment:
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        monkeypatch.setattr(lock, "_RENEWAL_SECONDS", 2.0)
        place = "s3://checkpoints/sweeps/one"
        with locked(tmp_path / "one", place):
            assert "is being worked on" in refusal(tmp_path / "other", place)
        with locked(tmp_path / "other", place):
            pass


@pytest.mark.slow
@pytest.mark.ray
def test_two_at_once(project):
    """A second command on a sweep is refused; one of another name goes its way, on the same store."""
    slow = ("--set", "num_samples=1", "--set", "search.epochs={choice: [60]}")
    one = command(project, "tune", "--space", "space.yaml", "--name", "first", *slow)
    wait_for_a_report(one, project, "first")
    again = command(project, "tune", "--resume", "first")
    out, _ = again.communicate(timeout=60)
    assert again.returncode == 2
    problem = "is being worked on by another process; wait for it, or choose another --name"
    assert out.splitlines()[-1] == f"error: {project}/results/first: {problem}"
    finished(command(project, "tune", "--space", "space.yaml", "--name", "other", *slow))
    finished(one)
    for name in ("first", "other"):
        assert (project / "results" / name / "summary.json").exists()
