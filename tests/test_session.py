"""How a command ends and what it leaves on the screen and in its process."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from unittest.mock import patch

import numpy as np
import psutil
import pytest
import ray
import torch
from conftest import ROOT, random_examples, tiny_model
from mlflow.exceptions import MlflowException
from test_beam_engine import prompts
from test_training import tiny_bank

from inference.beam_engine import BeamSearcher
from inference.beam_search import SearchRules
from inference.engine import TransformersEngine
from qlora.base.model import load_config
from qlora.config import BaseModelSettings, DecodingSettings, InputError, TrialSettings
from qlora.served import load_served
from qlora.training import Training
from tracking.errors import TrackingAwayError
from tuning.device import this_device
from tuning.ledger import TrialRecord
from tuning.model_size import model_size
from tuning.screen import SweepScreen
from workflows import session
from workflows.session import FailedError, StoppedError
from workflows.sweep import facts


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("a.json:row 1", "has no id"), 2, "error: a.json:row 1: has no id"),
        (StoppedError("go on with --resume x"), 3, "stopped: go on with --resume x"),
        (FailedError("the proof was refused"), 1, "failed: the proof was refused"),
        (KeyboardInterrupt(), 3, "stopped: by SIGINT; run the same command again"),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full/file"),
            3,
            "stopped: no space on /full/file; free some, then run the same command again",
        ),
        (
            TrackingAwayError("the tracking server x can't be reached: refused"),
            2,
            "error: the tracking server x can't be reached: refused; start it, or set MLFLOW_TRACKING_URI",
        ),
    ],
)
def test_a_command_ends_as_its_contract_says(error, code, line, capsys, monkeypatch):
    def main() -> None:
        raise error

    monkeypatch.setattr(session, "_prepare_environment", lambda: None)
    with pytest.raises(SystemExit) as end:
        session.run(main)
    assert end.value.code == code
    said = capsys.readouterr().err.strip()
    assert said.startswith(line)
    assert "\n" not in said


@pytest.mark.ray
def test_ray_starts_and_kills_in_silence():
    """Neither its greeting nor what it tells of actors killed on purpose; other words get through."""
    code = """
import os, sys, time
from workflows import session
session._prepare_environment()
session.connect_ray()
import ray
from ray._private import worker
actor = ray.remote(num_cpus=0)(type("Sleeper", (), {"sleep": lambda self: time.sleep(60)})).remote()
task = actor.sleep.remote()
for line in ("Task X was killed by ray.kill", "a node is out of memory"):
    worker.print_to_stdstream({"lines": [line], "pid": "raylet", "is_err": False}, False)
print("own words", file=sys.stderr)
ray.kill(actor)
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stderr == "own words\n"
    assert "out of memory" in found.stdout
    assert "ray.kill" not in found.stdout


def test_what_a_server_of_ray_starts_while_the_command_ends_is_ended_too():
    """A raylet whose command is stopped at once is about to start its agents; here, a shell does."""
    mark = f"30.{os.getpid()}"
    script = f"""
import subprocess, time
from workflows import session

def start(**options):
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    subprocess.Popen(["sh", "-c", "while :; do sleep {mark} & sleep 0.003; done"], **quiet)
    time.sleep(0.3)
    raise KeyboardInterrupt

def main():
    import ray
    ray.init = start
    session.connect_ray()

session.run(main)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 3, done.stderr
    time.sleep(0.5)
    left = [
        process for process in psutil.process_iter(["cmdline"]) if mark in (process.info["cmdline"] or ())
    ]
    for process in left:
        process.kill()
    assert left == []


@pytest.mark.ray
def test_a_local_ray_listens_on_loopback_only():
    """So do its workers, and the agents that start a moment after it."""
    script = """
import time
import psutil
from workflows import session

def main():
    session.connect_ray()
    import ray
    ray.get(ray.remote(lambda: 1).remote())
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not {"ray::DashboardAgent"} & names():
        time.sleep(0.2)
    time.sleep(2)
    for process in everyone():
        for connection in process.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN:
                print(process.name(), connection.laddr.ip)

def everyone():
    return [psutil.Process(), *psutil.Process().children(recursive=True)]

def names():
    return {process.name() for process in everyone()}

session.run(main)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    listening = [line.split() for line in done.stdout.splitlines()]
    assert {"raylet", "gcs_server"} <= {name for name, _ in listening}
    assert {address for _, address in listening} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


@pytest.mark.ray
def test_a_local_ray_starts_no_worker_before_one_is_asked_for():
    """Ray would start one a core, and none of them could do any work here: see workflows.session."""
    script = """
import time
import psutil
from workflows import session
session._prepare_environment()
session.connect_ray()
time.sleep(3)
workers = [one for one in psutil.Process().children(recursive=True) if one.name() in ("ray::IDLE", "python")]
print(sum("default_worker.py" in " ".join(one.cmdline()) or one.name() == "ray::IDLE" for one in workers))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False, timeout=120
    )
    assert done.stdout == "0\n", done.stderr


def test_the_process_keeps_its_random_state(tiny_base, tmp_path, tokenizer):
    """Training, serving, searching, sampling, measuring: none of it moves what callers draw from."""
    with torch.random.fork_rng([]):
        bank, model = tiny_bank(), tiny_model("llama")
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    before = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    training = Training(bank, random_examples(6), TrialSettings(lora_r=4, batch_size=4))
    training.advance(10_000)
    bank.base_name = str(tiny_base)
    bank.save(training.adapter, tmp_path)
    load_served(BaseModelSettings(name=str(tiny_base)), str(tmp_path))
    model_size(load_config(str(tiny_base)))
    this_device("cpu")
    for rules in (SearchRules(2, 3, eos_tokens=(2,)), SearchRules(1, 3, eos_tokens=(2,), do_sample=True)):
        dict(BeamSearcher(model, rules).search(prompts()[:3]))
    sampling = DecodingSettings(num_beams=1, max_new_tokens=3, do_sample=True)
    list(TransformersEngine(model, tokenizer, sampling, 8, attention="sdpa").generate(prompts()[:3]))
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()


def test_a_user_without_a_name_is_a_number(monkeypatch):
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr(facts.getpass, "getuser", nobody)
    assert facts.user_name() == str(os.getuid())


RECORDS = [TrialRecord("a", {"epochs": 1}, "running"), TrialRecord("b", {"epochs": 2}, "pending")]
SHOW = """
from tuning import screen
from tuning.ledger import TrialRecord
RECORDS = [TrialRecord("a", {"epochs": 1}, "running"), TrialRecord("b", {"epochs": 2}, "pending")]
screen._SECONDS_BETWEEN_FRAMES = 0
show = screen.SweepScreen(2, 9.0)
"""


def test_a_table_is_printed_where_there_is_no_terminal(capsys):
    screen = SweepScreen(2, 9.0)
    screen.update(RECORDS)
    assert capsys.readouterr().out == "", "not more often than every twenty seconds"
    screen.note(["out of memory: passes of 64 tokens from here on"] * 2)
    screen.close(RECORDS)
    out = capsys.readouterr().out
    assert "0/2 trials ended, 1 running" in out
    assert out.count("note: out of memory") == 1
    assert "\x1b" not in out


def test_a_table_is_redrawn_in_place_on_a_terminal():
    """A whole screen of frames leaves one table behind: each frame moves back over the one before."""
    code = """
for _ in range(5):
    show.update(RECORDS)
show.close(RECORDS)
"""
    shown = in_a_terminal([sys.executable, "-c", SHOW + code])
    assert shown.count("0/2 trials ended") >= 5
    ups = shown.count("\x1b[1A")
    assert ups >= 4 * (shown.rpartition("0/2")[0].count("\n") // 6)
    assert "\x1b[2K" in shown


def test_the_terminal_is_given_back_whatever_happens():
    code = """
try:
    show.update(RECORDS)
    raise OSError("the tracking server went away")
except OSError:
    show.stop()
"""
    shown = in_a_terminal([sys.executable, "-c", SHOW + code])
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "the cursor is shown again"


def in_a_terminal(command: list[str]) -> str:
    """Return what a command writes on a pseudo-terminal."""
    import pty

    shown = []

    def read(descriptor: int) -> bytes:
        data = os.read(descriptor, 1024)
        shown.append(data)
        return data

    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "TERM": "xterm", "COLUMNS": "160"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.chdir(ROOT)
        assert pty.spawn(command, read) == 0
    return b"".join(shown).decode()


def test_a_signal_while_a_command_that_is_done_ends_changes_nothing(monkeypatch):
    monkeypatch.setattr(session, "_end_ray", lambda: os.kill(os.getpid(), signal.SIGTERM))
    with patch.dict(os.environ), pytest.raises(SystemExit) as ended:
        session.run(lambda: None)
    assert ended.value.code == 0


def test_a_signal_while_a_command_loads_is_told_in_one_line():
    script = (
        "import os, signal; from workflows.stopping import leave_at_signals; "
        "leave_at_signals(); os.kill(os.getpid(), signal.SIGTERM)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    told = "stopped: by SIGTERM; run the same command again\n"
    assert (done.returncode, done.stderr) == (3, told)


def test_what_a_tracking_server_refuses_is_told_in_one_line(capsys):
    def refused() -> None:
        raise MlflowException("The run is in the deleted state.")

    with patch.dict(os.environ), pytest.raises(SystemExit) as ended:
        session.run(refused)
    assert ended.value.code == 1
    assert (
        capsys.readouterr().err == "failed: the tracking server refuses: The run is in the deleted state.\n"
    )


def test_what_is_stopped_can_go_on():
    full = OSError(errno.ENOSPC, "No space left on device", "/full")
    ray_lost = ray.exceptions.RayActorError()
    for error in (KeyboardInterrupt(), session.StoppedError("x"), TrackingAwayError("x"), full, ray_lost):
        assert session.can_go_on(error)
    for error in (session.FailedError("x"), ValueError("x")):
        assert not session.can_go_on(error)


def test_a_command_that_ends_leaves_nothing_undone(tmp_path):
    """Its process is left without Python's own ending, but not before others have done their work."""
    script = tmp_path / "command.py"
    script.write_text(
        f"""
import atexit, sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
from workflows.session import FailedError, run

def late():
    time.sleep(0.5)
    print("thread", end=" ")

def main():
    atexit.register(lambda: print("registered", end=" "))
    threading.Thread(target=late).start()
    print("main", end=" ")
    raise FailedError("as it should")

run(main)
""",
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "main thread registered ")
    assert done.stderr == "failed: as it should\n"


@pytest.mark.parametrize("address", ["ray://10.0.0.1:10001", "http://127.0.0.1:8265"])
def test_an_address_through_which_no_command_runs_is_refused(address, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(InputError, match=f"^RAY_ADDRESS: {address} is not a node's address; run .* as a job"):
        session.connect_ray()


def test_a_cluster_that_is_not_there_is_told_in_one_line(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    words = r"^RAY_ADDRESS: 127.0.0.1:1 can't be joined \(.*refused.*\); if it asks for a token, set "
    with pytest.raises(InputError, match=words):
        session.connect_ray()
