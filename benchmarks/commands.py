"""Owns runs of the project's commands as people run them, each in a process of its own, and their figures."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from tuning.ledger import Ledger, TrialRecord

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class CommandRun:
    """A command's own process, without Ray's: wall clock, CPU time in seconds, and the most memory in GiB."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    memory_gib: float = 0.0
    ended_at: float = 0.0  # seconds since 1970, as a ledger's times


@dataclass
class SweepRun:
    """A sweep's command, and its trials."""

    command: CommandRun
    records: list[TrialRecord] = field(default_factory=list)
    # by kind of work, of all devices together
    host_seconds: dict[str, float] = field(default_factory=dict)

    @property
    def trial_seconds(self) -> float:
        """Return the seconds from the first trial's start to the last one's end."""
        return max(record.ended_at or 0.0 for record in self.records) - self.first_start

    @property
    def first_start(self) -> float:
        """Return when the first trial started, in seconds since 1970."""
        return min(record.started_at or 0.0 for record in self.records)

    @property
    def start_up_seconds(self) -> float:
        """Return the seconds from the command's start to the first trial's."""
        return self.first_start - (self.command.ended_at - self.command.seconds)


def run_command(arguments: list[str], environment: dict[str, str]) -> CommandRun:
    """Run one of ray_jobs/'s commands. Raises CalledProcessError with the end of what it said on stderr."""
    started = time.time()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, **environment, "PYTHONUNBUFFERED": "1"},
            stdout=said,
            stderr=subprocess.STDOUT,
        )
        run, watcher = CommandRun(), None
        watcher = threading.Thread(target=_watch, args=(process, run), daemon=True)
        watcher.start()
        code = process.wait()
        run.ended_at = time.time()
        run.seconds = run.ended_at - started
        watcher.join()
        if code:
            said.seek(0)
            print(said.read()[-4000:], file=sys.stderr)
            raise subprocess.CalledProcessError(code, arguments)
    return run


def run_sweep_command(
    space: dict[str, Any], name: str, environment: dict[str, str] | None = None
) -> SweepRun:
    """Run a sweep with a tracking store of its own, and take its results away."""
    name = f"{name}-{os.getpid()}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "space.yaml"
        file.write_text(yaml.safe_dump(space), encoding="utf-8")
        try:
            run = run_command(
                ["ray_jobs/tune.py", "--space", str(file), "--name", name],
                {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", **(environment or {})},
            )
            results = ROOT / "results" / name
            summary = json.loads((results / "summary.json").read_text(encoding="utf-8"))
            return SweepRun(run, list(Ledger(results / "trials").records.values()), summary["host_seconds"])
        finally:
            shutil.rmtree(ROOT / "results" / name, ignore_errors=True)


def run_inference_command(
    arguments: list[str], environment: dict[str, str] | None = None
) -> tuple[CommandRun, dict[str, Any]]:
    """Run batch inference; returns what it says of itself, too."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "outputs.json"
        run = run_command(["ray_jobs/batch_infer.py", *arguments, "--output", str(output)], environment or {})
        return run, json.loads(output.with_name("outputs.json.meta.json").read_text(encoding="utf-8"))


def _watch(process: "subprocess.Popen[str]", run: CommandRun) -> None:
    try:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            with watched.oneshot():
                times = watched.cpu_times()
                run.cpu_seconds = times.user + times.system
                run.memory_gib = max(run.memory_gib, watched.memory_info().rss / 2**30)
            time.sleep(0.2)
    except psutil.NoSuchProcess:
        return  # it ended between two looks
