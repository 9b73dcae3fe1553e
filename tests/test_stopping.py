"""A command that is told to end ends in order, whatever tells it: nothing is lost or left running."""

import json
import os
import signal
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
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
    """Return what a stopped command printed, and how long its last process outlived the signal.

    Checks that it ended as one that can go on.
    """
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


STUDY = """
base_model: {name: BASE, quantization: none}
data: {train: train.json, public: public.json}
trial: {learning_rate: 0.01, lora_r: 4, lora_alpha: 8, lora_dropout: 0.1, batch_size: 4}
stages: ["1"]
shots: 2
beams: [1]
sampling: {top_k: 5}
max_new_tokens: 4
num_predictions: 3
"""


def rays(folder: str) -> list[list[str]]:
    """Command lines of the processes that name a Ray's temporary folder or have files open there."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            line = process.cmdline()
            named = [*line, *process.environ().values(), *(file.path for file in process.open_files())]
            if process.pid != os.getpid() and any(folder in text for text in named):
                found.append(line)
    return found


def stopped(project: Path, moment: Callable[[subprocess.Popen], bool], *asked: str) -> str:
    """The last line of a command that gets SIGTERM at a moment; no process of its Ray's is left of it."""
    with tempfile.TemporaryDirectory(prefix="q", dir="/tmp", ignore_cleanup_errors=True) as folder:
        process = command(project, *asked, env={"RAY_TMPDIR": folder})
        deadline = time.monotonic() + 120
        while not moment(process):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert rays(folder), "its processes are where they are looked for"
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 3, out
        assert "Traceback" not in out and "***" not in out, out
        deadline = time.monotonic() + 5
        while left := rays(folder):
            assert time.monotonic() < deadline, left
            time.sleep(0.1)
        return out.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("server", ["gcs_server", "raylet"])
def test_a_signal_while_ray_starts(project, server):
    def is_there(process) -> bool:
        children = psutil.Process(process.pid).children(recursive=True)
        with suppress(psutil.Error):
            return server in [child.name() for child in children]
        return False

    asked = ("tune", "--space", "space.yaml", "--name", f"at-{server}", *SLOW)
    assert stopped(project, is_there, *asked) == "stopped: by SIGTERM; run the same command again"


@pytest.mark.slow
def test_a_batch_job_that_is_told_to_end_can_go_on(project, tiny_base):
    rows = [{"id": f"r{n}", "instruction": f"翻譯：{n}"} for n in range(800)]
    (project / "many.json").write_text(json.dumps(rows), encoding="utf-8")
    options = ("--base-model", str(tiny_base), "--quantization", "none", "--input", "many.json")
    options += ("--num-beams", "1", "--max-new-tokens", "16")
    journal = project / ".told.json.work/journal.jsonl"

    def has_rows(process) -> bool:
        return journal.exists() and journal.read_bytes().count(b"\n") > 20

    last = stopped(project, has_rows, "batch_infer", *options, "--output", "told.json")
    assert last == "stopped: by SIGTERM; the job can go on: run the same command again, with --resume"
    assert not (project / "told.json").exists()
    finished(command(project, "batch_infer", *options, "--output", "told.json", "--resume"))
    finished(command(project, "batch_infer", *options, "--output", "whole.json"))
    assert (project / "told.json").read_bytes() == (project / "whole.json").read_bytes()


@pytest.mark.slow
def test_a_study_that_is_told_to_end_can_go_on(project, tiny_base):
    (project / "study.yaml").write_text(STUDY.replace("BASE", str(tiny_base)), encoding="utf-8")
    steps = project / "results/studies/told/steps"
    asked = ("study", "--study", "study.yaml", "--name", "told")
    last = stopped(project, lambda process: any(steps.glob("*.json")), *asked)
    assert last == "stopped: by SIGTERM; the study can go on: run the same command again"
    done = {path: path.read_bytes() for path in steps.glob("*.json")}
    finished(command(project, *asked))
    assert all(path.read_bytes() == content for path, content in done.items())
    with sqlite3.connect(project / "mlruns/mlflow.db") as store:
        runs = "from runs join tags using (run_uuid) where key = 'study' and value = 'told'"
        assert store.execute(f"select distinct status {runs}").fetchall() == [("FINISHED",)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "seconds"),
    [("evaluate", 0.3), ("evaluate", 2.0), ("evaluate", 5.0), ("promote", 0.3), ("promote", 2.0)],
)
def test_short_commands_that_are_told_to_end(project, tiny_base, script, seconds):
    rows = [{"id": f"r{n}", "instruction": f"翻譯：{n}", "output": "天地" * 90} for n in range(9000)]
    (project / "long.json").write_text(json.dumps(rows), encoding="utf-8")
    base = ("--base-model", str(tiny_base), "--quantization", "none")
    options = {
        "evaluate": (*base, "--data", "long.json", "--output", "long-result.json"),
        "promote": ("none-of-this-name",),
    }
    process = command(project, script, *options[script], preexec_fn=take_signals)
    began = time.monotonic()
    while time.monotonic() - began < seconds and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGHUP)
    out, _ = process.communicate(timeout=60)
    if script == "promote" and process.returncode == 2:  # it was done before the signal came
        assert out.startswith("error: ")
        return
    assert process.returncode == 3, out
    assert out.splitlines()[-1] == "stopped: by SIGHUP; run the same command again"
    assert not (project / "long-result.json").exists()


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
