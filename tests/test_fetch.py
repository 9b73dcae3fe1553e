"""fetch.py: what the home keeps, brought here or removed, whether the home is a folder or at a URI."""

import os
import sys
from pathlib import Path

import pytest

import ray_jobs.fetch
from qlora.files import write_json, write_text
from workflows import session
from workflows.results import open_results


@pytest.fixture(params=["folder", "URI"])
def home(request, tmp_path, monkeypatch) -> Path:
    """A home with a finished sweep, one that is not, whose storage is elsewhere, and a study."""
    place = tmp_path / "home"
    monkeypatch.setenv("QLORA_HOME", str(place) if request.param == "folder" else place.as_uri())
    results = place / "results"
    write_json(results / "done/sweep.json", {"space": {"storage": None}})
    write_json(results / "done/summary.json", {"best": {"public_perplexity": 5.5}})
    write_text(results / "done/best/adapter.bin", "weights")
    write_text(results / "done/ray/a/checkpoint_000001/state", "x" * 2**20)
    write_json(results / "halfway/sweep.json", {"space": {"storage": str(tmp_path / "elsewhere")}})
    write_text(tmp_path / "elsewhere/halfway/ray/a/checkpoint_000001/state", "")
    write_text(tmp_path / "elsewhere/another/ray/a/checkpoint_000001/state", "")
    write_json(results / "studies/report/study.json", {})
    write_text(results / "studies/report/study.html", "page")
    write_text(results / "outputs.json", "[]")
    for age, name in enumerate(("done/sweep.json", "halfway/sweep.json", "studies/report/study.html")):
        os.utime(results / name, (4e9 - 86400 * age,) * 2)
    monkeypatch.setattr("workflows.lock._SETTLING_SECONDS", 0.01)
    monkeypatch.setattr("workflows.lock._RENEWAL_SECONDS", 0.05)
    return place


@pytest.fixture
def fetch(capsys, monkeypatch):
    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["fetch.py", *arguments])
        monkeypatch.setattr(os, "environ", {**os.environ})
        with pytest.raises(SystemExit) as end:
            session.run(ray_jobs.fetch.main)
        said = capsys.readouterr()
        return said.out if end.value.code == 0 else f"{end.value.code} {said.err.strip()}"

    return run


def test_what_the_home_keeps_is_listed_the_newest_first(home, fetch):
    assert [line.split() for line in fetch("--list").splitlines()] == [
        ["name", "state", "best", "public", "ppl", "size", "changed", "(UTC)"],
        ["done", "finished", "5.5", "1.0", "MiB", "2096-10-02", "07:06"],
        ["halfway", "unfinished", "-", "0.0", "MiB", "2096-10-01", "07:06"],
        ["studies/report", "finished", "-", "0.0", "MiB", "2096-09-30", "07:06"],
    ]


def test_an_empty_home_says_so(tmp_path, monkeypatch, fetch):
    monkeypatch.setenv("QLORA_HOME", str(tmp_path / "empty"))
    assert fetch("--list") == f"nothing is kept under {tmp_path}/empty/results\n"


def test_a_sweep_comes_here_without_its_checkpoints(home, fetch, tmp_path):
    assert fetch("done", "--to", str(tmp_path / "mine")) == f"fetched     {tmp_path}/mine/done\n"
    found = [path.relative_to(tmp_path / "mine").as_posix() for path in (tmp_path / "mine").rglob("*")]
    inner = ["best", "best/adapter.bin", "summary.json", "sweep.json"]
    assert sorted(found) == ["done", *(f"done/{name}" for name in inner)]
    assert "2 error: " in (again := fetch("done", "--to", str(tmp_path / "mine")))
    assert "is there already; name another folder" in again


def test_a_study_comes_here(home, fetch, tmp_path):
    fetch("studies/report", "--to", str(tmp_path / "mine"))
    assert (tmp_path / "mine/report/study.html").read_text() == "page"


def test_a_sweep_is_removed_with_its_checkpoints_and_nothing_else_is(home, fetch, tmp_path):
    fetch("--remove", "halfway")
    assert not (home / "results/halfway").exists()
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["another"]
    fetch("--remove", "done")
    assert sorted(path.name for path in (home / "results").iterdir()) == ["outputs.json", "studies"]


def test_a_sweep_that_is_worked_on_is_not_removed(home, fetch):
    with open_results("done") as results, results.held():
        assert "is being worked on by another process" in fetch("--remove", "done")
    assert (home / "results/done/best/adapter.bin").exists()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("none", "--to", "here"), "none: is no sweep or study under"),
        (("--remove", "none"), "none: is no sweep or study under"),
        (("--remove", "../home"), "--remove: '../home' can't be a name"),
        (("--remove", "studies/../done"), "can't be a name"),
        (("--remove", "studies"), "is no sweep or study under"),
        (("done",), "NAME and --to FOLDER go together"),
        ((), "give NAME with --to FOLDER, or --list, or --remove NAME"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(
    arguments, problem, home, fetch, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    before = set(home.rglob("*"))
    said = fetch(*arguments)
    assert said.startswith("2 error: ")
    assert problem in said
    assert set(home.rglob("*")) == before
    assert not list(Path("here").glob("*"))
