"""Best public and unseen perplexity of whole sweeps: wide.yaml's beside random search and ASHA, seed by seed.

    python benchmarks/live_search.py --out FOLDER --train FILE --public FILE --unseen FILE \\
        [--ways asha stages] [--seeds 1 2 3 4 5] [--budgets 105:6:1+1+1,1+1+3 ...] [--gpus 2]

Each sweep is ray_jobs/tune.py, run whole in a process of its own with a home below --out, and stops by itself
when its trials have spent its GPU-seconds. The unseen examples are its holdout. There is a lane a GPU. Its
sweeps run one after another or, with --overlap, each begins its budget's and so many more seconds after the
one before began, so that one starts and another registers while a third one's trials have the GPU. What has
finished is not run again, and one that was stopped goes on, so the work can be done in parts. The first way
is what the others are compared with, and has the highest of the budgets. --picture FILE draws what was found.
benchmarks/arithmetic.py writes a task to run it on.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.commands import ROOT
from benchmarks.report import print_report

_STOPPED = [
    "num_samples=16",
    "scheduler={type: asha, grace_period: 6.25, reduction_factor: 4}",
    "search.epochs={choice: [1, 2, 3, 1+1, 1+1+3]}",
    "search.seed={choice: [0]}",
]
WAYS = {  # what each changes of wide.yaml
    "asha": ["searcher={type: random}", *_STOPPED],
    "prior": _STOPPED,
    "stages": [],  # trials and epochs by budget
}
_CALLED = {"asha": "random search and ASHA, 16 trials", "prior": "prior and ASHA, 16 trials"}
_COLOURS = ("#7f8c8d", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9")


@dataclass(frozen=True)
class Budget:
    """GPU-seconds that a sweep may spend; trials of `stages` that fit into them, and choices of epochs."""

    gpu_seconds: float
    trials: int
    epochs: tuple[str, ...]

    @classmethod
    def of(cls, words: str) -> "Budget":
        """Read SECONDS:TRIALS:EPOCHS[,EPOCHS]. Raises ValueError."""
        seconds, trials, epochs = words.split(":")
        return cls(float(seconds), int(trials), tuple(epochs.split(",")))


@dataclass(frozen=True)
class Sweep:
    """One sweep: its way, its seed and what it may spend; homes of all are below `out`."""

    way: str
    seed: int
    budget: Budget
    out: Path

    @property
    def label(self) -> str:
        """Return what it is called beside those of other ways and budgets, whatever their seeds."""
        epochs = " and ".join(self.budget.epochs)
        called = f"{self.budget.trials} trials of {epochs}" if self.way == "stages" else _CALLED[self.way]
        return f"{called}, {self.budget.gpu_seconds:g} s"

    @property
    def name(self) -> str:
        """Return what its folders are called."""
        epochs = "_".join(self.budget.epochs).replace("+", "-")  # names have few other marks
        fitting = f"-{self.budget.trials}-of-{epochs}" if self.way == "stages" else ""
        return f"{self.way}-{self.seed}-{self.budget.gpu_seconds:g}s{fitting}"

    @property
    def home(self) -> Path:
        """Return the home that it runs in."""
        return self.out / self.name

    @property
    def changes(self) -> list[str]:
        """Return what it changes of wide.yaml by its way and its budget."""
        trials, epochs = self.budget.trials, f"search.epochs={{choice: {list(self.budget.epochs)}}}"
        fitting = [f"num_samples={trials}", epochs] if self.way == "stages" else []
        return [*WAYS[self.way], *fitting, f"budget={{gpu_seconds: {self.budget.gpu_seconds}}}"]

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
    most, *less = sorted(arguments.budgets, key=lambda budget: -budget.gpu_seconds)
    sweeps = [
        Sweep(way, seed, budget, arguments.out)
        for budget in (most, *less)
        for seed in arguments.seeds
        for way in (arguments.ways if budget is most else arguments.ways[1:])
    ]
    missing = {sweep.name: sweep for sweep in sweeps if sweep.summary() is None}  # some are of two budgets
    waiting, lock = deque(missing.values()), threading.Lock()
    until = time.monotonic() + arguments.minutes * 60

    def run(sweep: Sweep, gpu: int) -> None:
        started = time.monotonic()
        code = _run(sweep, gpu, arguments)
        line = {"sweep": sweep.name, "code": code, "seconds": round(time.monotonic() - started, 1)}
        print(json.dumps({**line, **figures(sweep)}), flush=True)

    def lane(gpu: int) -> None:
        running: list[threading.Thread] = []
        while True:
            with lock:
                if not waiting or time.monotonic() > until:
                    break
                sweep = waiting.popleft()
            running.append(threading.Thread(target=run, args=(sweep, gpu)))
            running[-1].start()
            alone = arguments.overlap is None
            running[-1].join(None if alone else sweep.budget.gpu_seconds + arguments.overlap)
        for one in running:
            one.join()

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
        "RAY_TMPDIR": tempfile.mkdtemp(prefix="live-"),  # two local Rays would meet in one folder
    }
    changes = {
        "data.train": arguments.train.resolve(),
        "data.public": arguments.public.resolve(),
        "data.holdout": arguments.unseen.resolve(),
        "data.train_examples": arguments.train_examples,
        "seed": sweep.seed,
    }
    command = [sys.executable, "ray_jobs/tune.py"]
    if (sweep.results / "sweep.json").exists():
        command += ["--resume", sweep.name]
    else:
        command += ["--space", "search_spaces/wide.yaml", "--name", sweep.name]
        for change in [*sweep.changes, *(f"{key}={value}" for key, value in changes.items() if value)]:
            command += ["--set", change]
    with open(sweep.home / "log.txt", "a", encoding="utf-8") as log:
        return subprocess.run(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False
        ).returncode


def _compare(sweeps: Sequence[Sweep], arguments: argparse.Namespace) -> None:
    """Print median, mean and spread of each way and budget, and the line that benchmarks end with."""
    medians = dict[tuple[Budget, str, str], float]()
    found = dict[str, list[dict[str, Any]]]()
    for budget, way in itertools.product(arguments.budgets, arguments.ways):
        those = [sweep for sweep in sweeps if (sweep.way, sweep.budget) == (way, budget)]
        if not (there := [one for one in map(figures, those) if one]):
            continue
        found[name := those[0].label] = there
        for key in ("public", "unseen"):
            values = [one[key] for one in there]
            medians[budget, way, key] = statistics.median(values)
            spread = f"{statistics.mean(values):.4f} +- {statistics.pstdev(values):.4f}"
            median = f"median {statistics.median(values):.4f}"
            print(f"{name:<30} {key:<7} {median}, mean {spread}, {len(values)} sweeps")
    if arguments.picture:
        draw(found, arguments.picture)
    most = max(arguments.budgets, key=lambda budget: budget.gpu_seconds)
    first, last = (medians.get((most, way, "public")) for way in (arguments.ways[0], arguments.ways[-1]))
    if len(arguments.ways) > 1 and first is not None and last is not None:
        print_report(
            "live_search",
            last,
            first,
            "median public perplexity",
            {**{key: str(value) for key, value in vars(arguments).items()}, "figures": found},
            higher_is_better=False,
        )


def draw(found: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Draw each sweep's public and unseen perplexity over the GPU-seconds that its trials had, and medians.

    `found` holds the figures of sweeps by what they are called in the legend, which tells the medians, too.
    """
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        longest = max((one["gpu_seconds"] for there in found.values() for one in there), default=1)
        figure = Figure(figsize=(8, 3.6 + 0.2 * len(found)), dpi=150, layout="constrained")
        for axes, key in zip(figure.subplots(1, 2, sharey=True), ("public", "unseen"), strict=True):
            for (name, there), colour in zip(found.items(), itertools.cycle(_COLOURS), strict=False):
                seconds, values = [one["gpu_seconds"] for one in there], [one[key] for one in there]
                middle = statistics.median(values)
                axes.scatter(seconds, values, color=colour, s=28, label=_named(name, there))
                axes.hlines(middle, min(seconds) - 3, max(seconds) + 3, color=colour, linewidth=1.5)
            axes.set(xlabel="GPU-seconds of trials", title=f"{key} examples", xlim=(0, longest * 1.15))
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", frameon=False)
        figure.axes[0].set_ylabel("perplexity of the sweep's best")
        figure.savefig(path)


def _named(name: str, there: Sequence[Mapping[str, Any]]) -> str:
    public, unseen = (statistics.median(one[key] for one in there) for key in ("public", "unseen"))
    return f"{name}: median {public:.3f}, unseen {unseen:.3f}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="where homes are kept between runs")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--public", type=Path, required=True)
    parser.add_argument("--unseen", type=Path, required=True, help="examples that nothing is chosen on")
    parser.add_argument("--train-examples", type=int, help="only the first so many")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["asha", "stages"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    both = [Budget.of("105:6:1+1+1,1+1+3"), Budget.of("52.5:3:1+1+1,1+1+3")]
    budgets = "GPU-seconds of a sweep; trials of `stages` that they are enough for, and their epochs"
    parser.add_argument(
        "--budgets",
        nargs="+",
        type=Budget.of,
        default=both,
        metavar="SECONDS:TRIALS:EPOCHS[,EPOCHS]",
        help=budgets,
    )
    parser.add_argument("--gpus", type=int, default=1, help="lanes, one a GPU")
    parser.add_argument("--overlap", type=float, help="seconds behind a budget after which the next begins")
    parser.add_argument("--picture", type=Path, help="file for a plot of what was found")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no sweep later than that")
    return parser.parse_args()


if __name__ == "__main__":
    main()
