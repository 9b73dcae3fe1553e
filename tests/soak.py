"""Watches what a long sweep and a long batch job take of a machine, and whether it grows.

    make soak

A sweep of 500 trials of one step, and a batch job of 100,000 rows, on a tiny base. Every few seconds the
command and all processes below it are counted, with their memory, handles and temporary files. What a fifth
of the time takes is a median; the last fifth should take what the second did. Prints a JSON line for each
job, and exits with 1 if processes, handles, temporary files or memory grew.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
import yaml
from conftest import byte_tokenizer, copy_project, tiny_model, write_course

from inference.predictions import work_folder
from tuning.ledger import Ledger

PARTS = 5
MOST_GROWTH = {
    "processes": 0.05,
    "handles": 0.1,
    "driver_handles": 0.1,
    "temporary_files": 0.1,
    "memory_mb": 0.15,
}
_LEAST_GROWTH = {
    "processes": 2,
    "handles": 100,
    "driver_handles": 20,
    "temporary_files": 50,
    "memory_mb": 100,
}
_MB = 1e6


@dataclass(frozen=True)
class Sample:
    """What a command and the processes below it take at a moment.

    memory_mb: what would be free without them (unique set sizes) in 10^6 bytes; done: rows or trials.
    """

    seconds: float
    done: int
    processes: int
    memory_mb: float
    driver_memory_mb: float
    handles: int
    driver_handles: int
    temporary_files: int
    temporary_mb: float
    disk_mb: float


def main() -> None:
    """Run what is asked for, print what it took, and exit with 1 if anything grew."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=500, help="of the sweep; 0 leaves it out")
    parser.add_argument("--rows", type=int, default=100_000, help="of the batch job; 0 leaves it out")
    parser.add_argument("--interval", type=float, default=5.0, metavar="SECONDS", help="between samples")
    arguments = parser.parse_args()
    grown = []
    with tempfile.TemporaryDirectory(prefix="soak") as folder:
        project = make_project(Path(folder), arguments.rows)
        if arguments.trials:
            samples = watch(project, sweep_command(arguments.trials), trials_done, arguments.interval)
            grown += report("tune", arguments.trials, samples)
        if arguments.rows:
            samples = watch(project, batch_command(), rows_done, arguments.interval)
            grown += report("batch_infer", arguments.rows, samples)
    sys.exit("; ".join(grown) or 0)


def make_project(folder: Path, rows: int) -> Path:
    """Make a project with a tiny base, a course whose epoch is one step, and rows to generate for."""
    copy_project(folder)
    tiny_model("llama").save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    write_course(folder)
    space = {
        "base_model": {"name": str(folder / "base"), "quantization": "none"},
        "data": {"train": "train.json", "public": "public.json"},
        "trial": {"batch_size": 16, "lora_r": 4, "epochs": 1},
        "search": {"learning_rate": {"loguniform": [1e-4, 1e-2]}},
        "num_samples": 1,
        "registered_model": "tiny",
        "scheduler": {"type": "fifo"},
        "resources_per_trial": {"cpu": 1},
    }
    (folder / "space.yaml").write_text(yaml.safe_dump(space), encoding="utf-8")
    asked = [{"id": f"r{n}", "instruction": f"翻譯第{n}句"} for n in range(rows)]
    (folder / "rows.json").write_text(json.dumps(asked), encoding="utf-8")
    (folder / "temporary").mkdir()
    return folder


def sweep_command(trials: int) -> list[str]:
    """Return the command of a sweep of so many trials."""
    return ["tune", "--space", "space.yaml", "--name", "soak", "--set", f"num_samples={trials}"]


def batch_command() -> list[str]:
    """Return the command of the batch job."""
    model = ["--base-model", "base", "--quantization", "none", "--max-new-tokens", "2", "--num-beams", "1"]
    return ["batch_infer", *model, "--input", "rows.json", "--output", "out/outputs.json"]


def trials_done(project: Path) -> int:
    """Count the trials that have ended."""
    return sum(record.has_ended for record in Ledger(project / "results/soak/trials").records.values())


def rows_done(project: Path) -> int:
    """Count the lines of the journal, but for its first; 0 once the job has removed it."""
    journal = work_folder(project / "out/outputs.json") / "journal.jsonl"
    return max(0, journal.read_bytes().count(b"\n") - 1) if journal.exists() else 0


def watch(project: Path, command: list[str], done: Callable[[Path], int], interval: float) -> list[Sample]:
    """Run a command of a project to its end; returns a sample every `interval` seconds.

    Raises RuntimeError if it fails.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": str(project),
        "MLFLOW_TRACKING_URI": "",
        "CUDA_VISIBLE_DEVICES": "",
        "TMPDIR": str(project / "temporary"),
    }
    began, samples = time.monotonic(), list[Sample]()
    with open(project / "out.log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, f"ray_jobs/{command[0]}.py", *command[1:]],
            cwd=project,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            while process.poll() is None:
                time.sleep(interval)
                if (
                    sample := look(project, process.pid, time.monotonic() - began, done(project))
                ) is not None:
                    samples.append(sample)
                    print(json.dumps(asdict(sample)), file=sys.stderr, flush=True)
        finally:
            process.terminate()  # if this one is told to end; it ends its Ray
            process.wait()
    if process.returncode != 0:
        end = (project / "out.log").read_text(encoding="utf-8")[-2000:]
        raise RuntimeError(f"{command[0]} ended with {process.returncode}: {end}")
    return samples


def look(project: Path, pid: int, seconds: float, done: int) -> Sample | None:
    """Count what the processes from `pid` on take; None if the first one has ended."""
    try:
        driver = psutil.Process(pid)
        family = [driver, *driver.children(recursive=True)]
        driver_memory, driver_handles = driver.memory_full_info().uss / _MB, driver.num_fds()
    except psutil.Error:
        return None
    if not driver_handles:  # it has ended, and is waited for
        return None
    memory, handles, alive = 0.0, 0, 0
    for process in family:
        try:
            memory += process.memory_full_info().uss / _MB
            handles += process.num_fds()
            alive += 1
        except psutil.Error:  # it ended since
            continue
    temporary = files_of(project / "temporary")
    kept = sum(size for part in ("results", "mlruns", "out") for size in files_of(project / part))
    return Sample(
        seconds=round(seconds, 1),
        done=done,
        processes=alive,
        memory_mb=round(memory, 1),
        driver_memory_mb=round(driver_memory, 1),
        handles=handles,
        driver_handles=driver_handles,
        temporary_files=len(temporary),
        temporary_mb=round(sum(temporary) / _MB, 1),
        disk_mb=round(kept / _MB, 1),
    )


def files_of(folder: Path) -> list[int]:
    """Return the sizes of the files below a folder, in bytes."""
    sizes = []
    for place, _, names in os.walk(folder):  # which passes over a folder that is gone since
        for name in names:
            try:
                sizes.append(Path(place, name).lstat().st_size)
            except OSError:
                continue
    return sizes


def parts_of(samples: list[Sample]) -> list[dict[str, float]]:
    """Return the medians of each fifth of the samples taken while rows or trials came to an end."""
    most = max(one.done for one in samples)
    working = [one for one in samples if 0 < one.done < most] or samples
    size = max(1, len(working) // PARTS)
    pieces = [working[start : start + size] for start in range(0, size * PARTS, size)]
    return [
        {key: statistics.median(asdict(one)[key] for one in piece) for key in asdict(piece[0])}
        for piece in pieces
        if piece
    ]


def growth_of(parts: list[dict[str, float]]) -> dict[str, float]:
    """Return what each count grew by from the second part to the last that is more than is allowed."""
    first, last = parts[min(1, len(parts) - 1)], parts[-1]
    return {
        key: last[key] - first[key]
        for key, share in MOST_GROWTH.items()
        if last[key] - first[key] > max(share * first[key], _LEAST_GROWTH[key])
    }


def report(name: str, size: int, samples: list[Sample]) -> list[str]:
    """Print a job's figures as a JSON line; returns a line for each count that grew."""
    parts = parts_of(samples)
    growth = growth_of(parts)
    print(
        json.dumps({"job": name, "size": size, "parts": parts, "last": asdict(samples[-1]), "grown": growth})
    )
    return [f"{name}: {key} grew by {value:.1f}" for key, value in growth.items()]


if __name__ == "__main__":
    main()
