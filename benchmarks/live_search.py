"""Best public and unseen perplexity of whole sweeps: ways to search beside that of wide.yaml, seed by seed.

    python benchmarks/live_search.py --out FOLDER --train FILE --public FILE --unseen FILE \\
        [--ways wide stages] [--seeds 1 2 3 4 5] [--gpu-seconds 105] [--gpus 2]

Each sweep is ray_jobs/tune.py, run whole in a process of its own with a home below --out, and stops by itself
when its trials have spent --gpu-seconds. The unseen examples are its holdout. There is a lane a GPU, and a
lane's sweeps run one after another. What has finished is not run again, and one that was stopped goes on, so
the work can be done in parts. benchmarks/extraction.py writes a task to run it on.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.commands import ROOT
from benchmarks.report import print_report

_OWN_ORDER = "search.seed={randint: [0, 1000000]}"
WAYS = {  # what each changes of wide.yaml
    "wide": ["num_samples=16"],
    "prior": ["num_samples=16", "searcher.type=prior"],
    "stages": [
        "num_samples=7",
        "searcher.type=prior",
        "scheduler={type: fifo}",
        'search.epochs={choice: ["1+1+1"]}',
        _OWN_ORDER,
    ],
}


@dataclass(frozen=True)
class Sweep:
    """One sweep: its way and its seed, and the home that it runs in."""

    way: str
    seed: int
    home: Path

    @property
    def name(self) -> str:
        """Return what it is called."""
        return f"{self.way}-{self.seed}"

    @property
    def results(self) -> Path:
        """Return the folder of its results."""
        return self.home / "results" / self.name

    def summary(self) -> dict[str, Any] | None:
        """Return its summary; None while it has none."""
        path = self.results / "summary.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def main() -> None:
    """Run what is missing, print each sweep's figures, and the comparison last."""
    arguments = _arguments()
    sweeps = [
        Sweep(way, seed, arguments.out / f"{way}-{seed}")
        for seed in arguments.seeds
        for way in arguments.ways
    ]
    waiting, lock = [sweep for sweep in sweeps if sweep.summary() is None], threading.Lock()

    def lane(gpu: int) -> None:
        while True:
            with lock:
                if not waiting:
                    return
                sweep = waiting.pop(0)
            started = time.monotonic()
            code = _run(sweep, gpu, arguments)
            line = {"sweep": sweep.name, "code": code, "seconds": round(time.monotonic() - started, 1)}
            print(json.dumps({**line, **figures(sweep)}), flush=True)

    lanes = [threading.Thread(target=lane, args=(gpu,)) for gpu in range(arguments.gpus)]
    for one in lanes:
        one.start()
    for one in lanes:
        one.join()
    _compare(sweeps, arguments)


def figures(sweep: Sweep) -> dict[str, Any]:
    """Return what a finished sweep found; empty for one that has not finished."""
    summary = sweep.summary()
    if summary is None:
        return {}
    best, reached = summary["best"], [one["curve"] for one in summary["trials"] if one["curve"]]
    return {
        "public": best["public_perplexity"],
        "unseen": summary["holdout"]["perplexity"],
        "best_trial": min(point["public_perplexity"] for curve in reached for point in curve),
        "members": len(best["members"] or [None]),
        "gpu_seconds": round(summary["spent"]["gpu_seconds"], 1),
    }


def _run(sweep: Sweep, gpu: int, arguments: argparse.Namespace) -> int:
    """Run a sweep, or go on with it, on one GPU; returns the command's exit status."""
    (sweep.home / "mlruns").mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "QLORA_HOME": str(sweep.home.resolve()),
        "CUDA_VISIBLE_DEVICES": str(gpu),
        "RAY_TMPDIR": f"{tempfile.gettempdir()}/live-{gpu}",  # two local Rays would meet in one folder
    }
    Path(environment["RAY_TMPDIR"]).mkdir(exist_ok=True)
    changes = {
        "data.train": arguments.train.resolve(),
        "data.public": arguments.public.resolve(),
        "data.holdout": arguments.unseen.resolve(),
        "data.train_examples": arguments.train_examples,
        "seed": sweep.seed,
        "budget": f"{{gpu_seconds: {arguments.gpu_seconds}}}",
    }
    command = [sys.executable, "ray_jobs/tune.py"]
    if (sweep.results / "sweep.json").exists():
        command += ["--resume", sweep.name]
    else:
        command += ["--space", "search_spaces/wide.yaml", "--name", sweep.name]
        for change in [*WAYS[sweep.way], *(f"{key}={value}" for key, value in changes.items() if value)]:
            command += ["--set", change]
    with open(sweep.home / "log.txt", "a", encoding="utf-8") as log:
        return subprocess.run(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False
        ).returncode


def _compare(sweeps: Sequence[Sweep], arguments: argparse.Namespace) -> None:
    """Print median, mean and spread of each way, and the line that benchmarks end with."""
    found = {way: [figures(one) for one in sweeps if one.way == way] for way in arguments.ways}
    medians = {}
    for way, all_figures in found.items():
        there = [one for one in all_figures if one]
        for key in ("public", "unseen") if there else ():
            values = [one[key] for one in there]
            spread = f"{statistics.mean(values):.4f} +- {statistics.pstdev(values):.4f}"
            medians[way, key] = statistics.median(values)
            print(f"{way:<8} {key:<7} median {medians[way, key]:.4f}, mean {spread}, {len(values)} sweeps")
    first, *others = arguments.ways
    if (first, "public") in medians and others and (others[-1], "public") in medians:
        print_report(
            "live_search",
            medians[others[-1], "public"],
            medians[first, "public"],
            "median public perplexity",
            {**{key: str(value) for key, value in vars(arguments).items()}, "figures": found},
            higher_is_better=False,
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="where homes are kept between runs")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--public", type=Path, required=True)
    parser.add_argument("--unseen", type=Path, required=True, help="examples that nothing is chosen on")
    parser.add_argument("--train-examples", type=int, help="only the first so many")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["wide", "stages"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--gpu-seconds", type=float, default=105)
    parser.add_argument("--gpus", type=int, default=1, help="lanes, one a GPU")
    return parser.parse_args()


if __name__ == "__main__":
    main()
