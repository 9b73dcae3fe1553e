"""Faults from outside in the middle of a sweep: what goes on by itself goes on, what can't is resumed.

In the end the sweep is what one without a fault is.
"""

import json
import os
import secrets
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from conftest import command, finished
from test_stopping import ended
from test_sweep import ledger, wait_for_a_report
from tracking_servers import Door, sqlite_server

from qlora.checkpoint_files import MANIFEST

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SWEEP = ("--set", "num_samples=2", "--set", "search.epochs={choice: [40]}", "--set", "scheduler={type: fifo}")
SWEEP += ("--set", "search.learning_rate={choice: [3.0e-4, 1.0e-3]}")  # such that roundings don't multiply


def begin(project: Path, name: str, *more: str, **options):
    """Start a sweep and return once it trains."""
    process = command(project, "tune", "--space", "space.yaml", "--name", name, *SWEEP, *more, **options)
    wait_for_a_report(process, project, name)
    return process


def family(process: subprocess.Popen, words: str) -> list[psutil.Process]:
    """The processes that a command has started whose command line or name has these words."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        if words in child.name() or words in " ".join(child.cmdline()):
            found.append(child)
    return found


def kill_one(process: subprocess.Popen, words: str) -> None:
    (victim, *_) = family(process, words)
    victim.kill()


def gone(processes: list[psutil.Process], seconds: float = 30) -> None:
    _, left = psutil.wait_procs(processes, timeout=seconds)
    assert not left, [child.cmdline() for child in left]


@pytest.fixture(scope="module")
def whole(project) -> dict:
    """The records of the sweep without a fault."""
    finished(command(project, "tune", "--space", "space.yaml", "--name", "whole", *SWEEP))
    return ledger(project, "whole")


def check(project: Path, name: str, whole: dict) -> dict:
    """Compare a sweep with the undisturbed one; returns its summary."""
    found = ledger(project, name)
    assert found.keys() == whole.keys()
    for trial_id, expected in whole.items():
        record = found[trial_id]
        assert record["config"] == expected["config"]
        assert record["status"] == "finished"
        assert [point["step"] for point in record["curve"]] == [point["step"] for point in expected["curve"]]
        for one, other in zip(record["curve"], expected["curve"], strict=True):
            assert one["public_perplexity"] == pytest.approx(other["public_perplexity"], rel=1e-5)
    return json.loads((project / "results" / name / "summary.json").read_text())


def statuses(project: Path, name: str) -> list:
    with sqlite3.connect(project / "mlruns/mlflow.db") as store:
        runs = "from runs join tags using (run_uuid) where key = 'sweep' and value = ?"
        return store.execute(f"select status, count(*) {runs} group by 1 order by 1", (name,)).fetchall()


@pytest.mark.parametrize("victim", ["ImplicitFunc", "HostActor", "HostDirectory"])
def test_a_killed_process_of_a_trial(project, whole, victim):
    name = victim
    process = begin(project, name)
    kill_one(process, f"ray::{victim}")
    finished(process)
    check(project, name, whole)
    assert statuses(project, name) == [("FINISHED", 3)]


@pytest.mark.parametrize("victim", ["raylet", "gcs_server"])
def test_a_killed_process_of_ray(project, whole, victim):
    """The sweep ends, leaves no process, and goes on."""
    process = begin(project, victim)
    started = psutil.Process(process.pid).children(recursive=True)
    kill_one(process, f"core/src/ray/{'raylet/raylet' if victim == 'raylet' else 'gcs/gcs_server'}")
    began = time.monotonic()
    out, _ = process.communicate(timeout=180)
    print(f"{victim}: exit {process.returncode} after {time.monotonic() - began:.0f} s")
    assert process.returncode == 3, out
    assert out.splitlines()[-1] == (
        f"stopped: {victim} of the local Ray has ended; "
        f"the sweep can go on: python ray_jobs/tune.py --resume {victim}"
    )
    gone(started)
    finished(command(project, "tune", "--resume", victim))
    check(project, victim, whole)
    assert statuses(project, victim) == [("FINISHED", 3)]


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_damaged_newest_checkpoint(project, whole, damage):
    name = f"newest-{damage}"
    process = begin(project, name)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    for trial in (project / "results" / name / "ray").iterdir():
        whole_ones = sorted(path.parent for path in trial.glob(f"checkpoint_0*/{MANIFEST}"))
        for newest in whole_ones[-1:]:  # another may be on its way
            content = json.loads((newest / MANIFEST).read_text())
            file = newest / min(name for name in content if "safetensors" in name)
            if damage == "cut":
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
            else:
                file.unlink()
    out = finished(command(project, "tune", "--resume", name))
    assert "is damaged and passed over" in out
    check(project, name, whole)


@contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", folder], check=False)
    if mounted.returncode:
        pytest.skip("needs the right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path, leave_kib: int) -> None:
    """Leave so much space or less: others write there meanwhile."""
    with open(folder / "filling", "wb", buffering=0) as file, suppress(OSError):
        while (free := shutil.disk_usage(folder).free - leave_kib * 1024) > 0:
            file.write(bytes(free))


@pytest.mark.parametrize("place", ["results", "mlruns"])
def test_a_disk_that_gets_full(project, whole, place):
    """It is found in the middle: the sweep stops, leaves nothing half written, and goes on with space."""
    name = f"full-{place}"
    kept = project / "kept"
    (project / place).rename(kept)
    try:
        with small_disk(project / place, 60_000) as disk:
            if place == "mlruns":
                shutil.copytree(kept, disk, dirs_exist_ok=True)
            process = begin(project, name)
            fill(disk, 40)
            out, _ = process.communicate(timeout=180)
            print(out[-1500:])
            assert process.returncode == 3, out
            last = out.splitlines()[-1]
            assert last.startswith("stopped: no space on "), out
            assert last.endswith(f"the sweep can go on: python ray_jobs/tune.py --resume {name}")
            assert "Traceback" not in out
            again = command(project, "tune", "--resume", name)
            out, _ = again.communicate(timeout=60)
            assert again.returncode == 2, out
            assert out.splitlines()[-1].endswith("(No space left on device); free some space")
            (disk / "filling").unlink()
            finished(command(project, "tune", "--resume", name))
            assert not list((project / "results" / name).rglob("*.part"))
            check(project, name, whole)
            assert statuses(project, name) == [("FINISHED", 3)]
    finally:
        (project / place).rmdir()
        kept.rename(project / place)


def test_a_temporary_folder_that_gets_full(project, whole):
    """Ray may need it or not: the sweep ends, or stops and can go on."""
    name, place = "full-temporary", Path("/tmp/full")
    with small_disk(place, 400_000) as disk:
        environment = {"TMPDIR": str(disk), "RAY_TMPDIR": str(disk)}
        process = begin(project, name, env=environment)
        fill(disk, 40)
        out, _ = process.communicate(timeout=180)
        print(process.returncode, out)
        assert process.returncode in (0, 3), out
        assert "Traceback" not in out
        assert "Unhandled" not in out
        (disk / "filling").unlink()
        if process.returncode == 3:
            assert out.splitlines()[-1].endswith(f"python ray_jobs/tune.py --resume {name}")
            finished(command(project, "tune", "--resume", name, env=environment))
        check(project, name, whole)
    shutil.rmtree(place)  # an agent of Ray's may have come back to it


def test_an_output_folder_that_gets_full(project, tiny_base):
    rows = [{"id": f"r{n}", "instruction": f"翻譯：{n}"} for n in range(800)]
    (project / "many.json").write_text(json.dumps(rows), encoding="utf-8")
    options = ("--base-model", str(tiny_base), "--quantization", "none", "--input", "many.json")
    options += ("--num-beams", "1", "--max-new-tokens", "16")
    with small_disk(project / "out", 4000) as disk:
        job = (*options, "--output", "out/full.json")
        process = command(project, "batch_infer", *job)
        journal = disk / ".full.json.work/journal.jsonl"
        while not (journal.exists() and journal.read_bytes().count(b"\n") > 20):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        fill(disk, 4)
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 3, out
        last = out.splitlines()[-1]
        assert last.startswith("stopped: no space on ")
        assert last.endswith("the job can go on: run the same command again, with --resume")
        assert "Traceback" not in out
        again = command(project, "batch_infer", *job, "--resume")
        out, _ = again.communicate(timeout=60)
        assert again.returncode == 2, out
        assert out.splitlines()[-1].endswith("(No space left on device); free some space")
        (disk / "filling").unlink()
        finished(command(project, "batch_infer", *job, "--resume"))
        finished(command(project, "batch_infer", *options, "--output", "whole.json"))
        assert (disk / "full.json").read_bytes() == (project / "whole.json").read_bytes()
        assert sorted(path.name for path in disk.iterdir()) == ["full.json", "full.json.meta.json"]
    (project / "out").rmdir()


def test_a_place_that_can_only_be_read(project):
    kept = project / "kept"
    (project / "results").rename(kept)
    try:
        with small_disk(project / "results", 1000) as disk:
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
            process = command(project, "tune", "--space", "space.yaml", "--name", "read-only")
            out, _ = process.communicate(timeout=60)
            assert process.returncode == 2
            assert out.splitlines()[-1] == (
                f"error: {disk}: can't be written to (Read-only file system); mend that, or use another place"
            )
    finally:
        (project / "results").rmdir()
        kept.rename(project / "results")


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[int]:
    with sqlite_server(tmp_path_factory.mktemp("server")) as port:
        yield port


def test_a_tracking_server_that_is_away_for_a_minute(project, whole, server):
    door = Door(server)
    process = begin(project, "minute", env={"MLFLOW_TRACKING_URI": door.uri})
    before = reported(project, "minute")
    door.shut()
    began = time.monotonic()
    while time.monotonic() - began < 60 and process.poll() is None:
        time.sleep(0.5)
        if all(record["status"] == "finished" for record in ledger(project, "minute").values()):
            print(f"all trained after {time.monotonic() - began:.0f} s without the server")
            break
    assert reported(project, "minute") > before, "training does not wait for the server"
    time.sleep(max(0.0, 20 - (time.monotonic() - began)))
    door.open()
    finished(process)
    summary = check(project, "minute", whole)
    assert runs_of(door.uri, summary) == {"FINISHED": 3}
    door.shut()


def test_a_slow_tracking_server(project, whole, server):
    door = Door(server)
    door.delay_seconds = 5.0
    began = time.monotonic()
    process = begin(project, "slow", env={"MLFLOW_TRACKING_URI": door.uri})
    while not all(record["status"] == "finished" for record in ledger(project, "slow").values()):
        time.sleep(0.5)
    print(f"all trained after {time.monotonic() - began:.0f} s")
    out, _ = process.communicate(timeout=1500)
    assert process.returncode == 0, out
    print(f"all recorded after {time.monotonic() - began:.0f} s")
    door.delay_seconds = 0.0
    assert runs_of(door.uri, check(project, "slow", whole)) == {"FINISHED": 3}
    door.shut()


def test_a_tracking_server_that_stays_away(project, whole, server):
    door = Door(server)
    process = begin(project, "away", env={"MLFLOW_TRACKING_URI": door.uri})
    door.shut()
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 3, out
    last = out.splitlines()[-1]
    assert last.startswith(f"stopped: the tracking server {door.uri} can't be reached: Connection refused; ")
    assert last.endswith("the sweep can go on: python ray_jobs/tune.py --resume away")
    assert all(record["status"] == "finished" for record in ledger(project, "away").values())
    door.open()
    finished(command(project, "tune", "--resume", "away", env={"MLFLOW_TRACKING_URI": door.uri}))
    summary = check(project, "away", whole)
    assert runs_of(door.uri, summary) == {"FINISHED": 3}
    assert summary["host_seconds"] == {}, "no host loaded the base: there was nothing left to train"
    door.shut()


def reported(project: Path, name: str) -> int:
    return sum(len(record["curve"]) for record in ledger(project, name).values())


def runs_of(uri: str, summary: dict) -> dict[str, int]:
    """How many runs the experiment of a sweep has in each status, of those of this sweep."""
    from mlflow import MlflowClient

    found: dict[str, int] = {}
    query = f"tags.sweep = '{summary['sweep']}'"
    for run in MlflowClient(uri).search_runs([summary["mlflow_experiment_id"]], query):
        found[run.info.status] = found.get(run.info.status, 0) + 1
    return found


def test_short_memory(project, whole):
    """Ray's monitor kills workers while another process takes the memory; the sweep goes on by itself."""
    memory = psutil.virtual_memory()
    threshold = (memory.total - memory.available + (3 << 30)) / memory.total
    process = begin(project, "memory", env={"RAY_memory_usage_threshold": f"{threshold:.3f}"})
    hog = subprocess.Popen([sys.executable, "-c", "import time; x = b'x' * (4 << 30); time.sleep(4)"])
    hog.wait()
    out = finished(process)
    assert "Traceback" not in out
    check(project, "memory", whole)
    assert statuses(project, "memory") == [("FINISHED", 3)]


CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>

static long seconds(void) {
    static volatile long *jump;
    if (!jump) {
        int file = open(getenv("CLOCK_JUMP"), O_RDONLY);
        void *place = file < 0 ? MAP_FAILED : mmap(0, sizeof(long), PROT_READ, MAP_SHARED, file, 0);
        if (place == MAP_FAILED) return 0;
        jump = place;
    }
    return *jump;
}
int clock_gettime(clockid_t clock, struct timespec *time) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(clock, time);
    if (clock == CLOCK_REALTIME) time->tv_sec += seconds();
    return code;
}
int gettimeofday(struct timeval *time, void *zone) {
    struct timespec now;
    int code = clock_gettime(CLOCK_REALTIME, &now);
    time->tv_sec = now.tv_sec;
    time->tv_usec = now.tv_nsec / 1000;
    return code;
}
time_t time(time_t *place) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (place) *place = now.tv_sec;
    return now.tv_sec;
}
"""


def test_a_clock_that_jumps(project, whole, tmp_path):
    """By an hour to and fro, in all processes: the time of day alone, as an administrator or NTP sets it."""
    (tmp_path / "clock.c").write_text(CLOCK)
    build = ["gcc", "-shared", "-fPIC", "-o", tmp_path / "clock.so", tmp_path / "clock.c", "-ldl"]
    if shutil.which("gcc") is None or subprocess.run(build, check=False).returncode:
        pytest.skip("needs a C compiler")
    clock = tmp_path / "clock"
    clock.write_bytes(struct.pack("l", 0))
    fake = {"LD_PRELOAD": str(tmp_path / "clock.so"), "CLOCK_JUMP": str(clock)}
    told = subprocess.run(
        [sys.executable, "-c", "import time; print(time.time())"],
        env={**os.environ, **fake},
        capture_output=True,
        text=True,
        check=True,
    )
    assert abs(float(told.stdout) - time.time()) < 60
    process = begin(project, "clock", env=fake)
    with open(clock, "r+b", buffering=0) as file:
        for jump in (3600, -3600, 0):
            os.pwrite(file.fileno(), struct.pack("l", jump), 0)
            time.sleep(2)
    finished(process)
    check(project, "clock", whole)


@pytest.mark.parametrize("grace_seconds", ["", "15"])
def test_a_stopped_cluster_job_goes_on(grace_seconds, project, whole):
    """`ray job stop` sends SIGTERM, and SIGKILL 3 s later: what matters is done by then. Given 15 s, trials
    keep where they stand, which shows in epochs that take long beside a report.
    """
    name, settings = f"job{grace_seconds}", SWEEP
    if grace_seconds:
        rows = json.loads((project / "train.json").read_text())
        rows = [{**row, "id": f"{row['id']}-{n}"} for n in range(20) for row in rows]
        (project / "long.json").write_text(json.dumps(rows))
        settings = (*SWEEP, "--set", "data.train=long.json", "--set", "search.epochs={choice: [3]}")
        finished(command(project, "tune", "--space", "space.yaml", "--name", "long", *settings))
        whole = ledger(project, "long")
    with cluster({"RAY_JOB_STOP_WAIT_TIME_S": grace_seconds} if grace_seconds else {}) as reached:
        ray = [Path(sys.executable).with_name("ray"), "job"]
        environment = {**os.environ, **reached, "MLFLOW_TRACKING_URI": ""}
        submit = [*ray, "submit", "--no-wait", "--submission-id", "sweep", "--", sys.executable]
        arguments = ("--space", "space.yaml", "--name", name, *settings)
        script = project / "ray_jobs/tune.py"
        at = [
            "env",
            f"PYTHONPATH={project}",
            f"QLORA_HOME={project}",
            "sh",
            "-c",
            'cd "$0" && exec "$@"',
            project,
        ]
        job = [*submit[:-1], *at, sys.executable, script, *arguments]
        subprocess.run(list(map(str, job)), env=environment, check=True, capture_output=True)
        deadline = time.monotonic() + 120
        while not any(record["curve"] for record in ledger(project, name).values()):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        subprocess.run([*ray, "stop", "sweep"], env=environment, check=True, capture_output=True)
        told = subprocess.run(
            [*ray, "logs", "sweep"], env=environment, capture_output=True, text=True, check=True
        )
        print(told.stdout[-600:])
        assert f"the sweep can go on: python ray_jobs/tune.py --resume {name}" in told.stdout
        assert statuses(project, name) == [("KILLED", 3)]
        stood = list((project / "results" / name / "ray").glob("*/checkpoint_stopped"))
        assert stood or not grace_seconds
    finished(command(project, "tune", "--resume", name))
    check(project, name, whole)
    assert statuses(project, name) == [("FINISHED", 3)]


@contextmanager
def cluster(more: dict[str, str]) -> Iterator[dict[str, str]]:
    """A Ray cluster of one node, with its job server, started in an environment that has more.

    It asks for a token, whether the machine has one of its own or not. Given is what it is reached with.
    """
    ray = Path(sys.executable).with_name("ray")
    options = ["--head", "--port", "6399", "--dashboard-port", "8299", "--disable-usage-stats", "--block"]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = {**os.environ, **token, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", **more}
    head = subprocess.Popen([ray, "start", *options], env=environment, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            time.sleep(1)
            asked = [ray, "job", "list", "--address", "http://127.0.0.1:8299"]
            if subprocess.run(asked, env=environment, capture_output=True, check=False).returncode == 0:
                break
        yield {**token, "RAY_ADDRESS": "http://127.0.0.1:8299"}
    finally:
        for process in (psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        head.wait()


def test_a_second_signal_does_not_disturb_the_first(project):
    process = begin(project, "twice")
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    for _ in range(20):
        time.sleep(0.1)
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    out, _ = ended(process, started)
    assert out.splitlines()[-1].startswith("stopped: by SIGINT; the sweep can go on: ")
