"""A command that is told to end ends in order, whatever tells it: nothing is lost or left running."""

import json
import os
import signal
import sqlite3
import time
from pathlib import Path

import psutil
import pytest
from conftest import command, finished
from test_sweep import ledger, wait_for_a_report

pytestmark = pytest.mark.ray
SLOW = ("--set", "num_samples=2", "--set", "search.epochs={choice: [60]}", "--set", "scheduler={type: fifo}")


def take_signals() -> None:
    """Let a process that is about to start be told to end, even if these tests run below nohup."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def wait_until_it_trains(process, project: Path, name: str) -> None:
    wait_for_a_report(process, project, name)


def ended(process, started: list[psutil.Process]) -> tuple[str, float]:
    """What a stopped command printed, and how long its last process outlived the signal; checks its code."""
    began = time.monotonic()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 3, out
    _, left = psutil.wait_procs(started, timeout=5)
    assert not left, [child.cmdline() for child in left]
    return out, time.monotonic() - began


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    ],
    ids=lambda number: number.name,
)
def test_a_sweep_that_is_told_to_end_can_go_on(project, number):
    """Twice, as impatient people do: the second signal disturbs nothing."""
    name = f"stopped-{number.name}"
    process = command(
        project, "tune", "--space", "space.yaml", "--name", name, *SLOW, preexec_fn=take_signals
    )
    wait_until_it_trains(process, project, name)
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    time.sleep(0.3)
    process.send_signal(number)
    out, seconds = ended(process, started)
    print(f"{number.name}: {seconds:.1f} s")
    last = out.splitlines()[-1]
    assert last == f"stopped: by {number.name}; the sweep can go on: python ray_jobs/tune.py --resume {name}"
    assert "Traceback" not in out and "***" not in out
    with sqlite3.connect(project / "mlruns/mlflow.db") as store:
        runs = "from runs join tags using (run_uuid) where key = 'sweep' and value = ?"
        assert store.execute(f"select distinct status {runs}", (name,)).fetchall() == [("KILLED",)]


@pytest.mark.slow
def test_a_stopped_trial_goes_on_where_it_stood(project):
    """Not only from its last report; its curve is that of a sweep that was never stopped."""
    name, once = "stood", ("--set", "num_samples=1")
    process = command(project, "tune", "--space", "space.yaml", "--name", name, *SLOW, *once)
    wait_until_it_trains(process, project, name)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    (trial,) = ledger(project, name)
    stood = project / "results" / name / "ray" / trial / "checkpoint_stopped"
    reported = ledger(project, name)[trial]["curve"][-1]["step"]
    if stood.exists():  # else the signal came at a report
        assert json.loads((stood / "position.json").read_text())["step"] > reported
    finished(command(project, "tune", "--resume", name))
    assert not stood.exists()
    finished(command(project, "tune", "--space", "space.yaml", "--name", "whole", *SLOW, *once))
    (found,), (expected,) = (ledger(project, name).values() for name in (name, "whole"))
    assert [point["step"] for point in found["curve"]] == [point["step"] for point in expected["curve"]]
    for key in ("public_perplexity", "training_loss"):
        assert [point[key] for point in found["curve"]] == pytest.approx(
            [point[key] for point in expected["curve"]], rel=1e-5
        )


def test_a_command_that_is_stopped_before_it_did_anything_says_so(project):
    process = command(project, "tune", "--space", "space.yaml", "--name", "early", *SLOW)
    time.sleep(1.5)
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 3, out
    assert out.splitlines()[-1].startswith("stopped: by SIGTERM; ")


def test_a_killed_driver_leaves_no_process(project):
    process = command(project, "tune", "--space", "space.yaml", "--name", "killed", *SLOW)
    wait_until_it_trains(process, project, "killed")
    started = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    began = time.monotonic()
    _, left = psutil.wait_procs(started, timeout=30)
    print(f"all gone after {time.monotonic() - began:.1f} s")
    assert not left, [child.cmdline() for child in left]
