"""Time from start to end of 16 fixed configurations: this project's sweep against two ways with PEFT.

    python benchmarks/makespan.py [--base-model BASE] [--train FILE] [--public FILE] \\
        [--train-examples 256] [--side-by-side 4]
        [--unsloth TOKENS_PER_SECOND]

The sweep is ray_jobs/tune.py, run whole in a process of its own, once without early stopping and once with
ASHA: its time includes Ray's start, loading the base, evaluations, checkpoints, and registration. PEFT's
times are those of its optimizer steps alone, from measured throughput: (a) one trial after another, (b) as
many Ray tasks side by side as the sweep has trials on a device, each with a base of its own, and, with
--unsloth, (c) those of unsloth at a throughput measured elsewhere. So the comparison leans to their side.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.commands import ROOT, run_sweep_command
from benchmarks.coresident import measure_peft
from benchmarks.report import print_report
from qlora.base.model import load_base, load_tokenizer
from qlora.config import DEFAULT_BASE, BaseModelSettings, TrialSettings
from qlora.data.examples import load_examples
from qlora.data.prompts import encode_examples, load_prompt

_RANKS, _RATES = [16, 64], [1e-5, 3e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base-model", default=DEFAULT_BASE)
    parser.add_argument("--train", default="data/sample/train.json")
    parser.add_argument("--public", default="data/sample/public_test.json")
    parser.add_argument("--train-examples", type=int, default=256)
    parser.add_argument("--side-by-side", type=int, default=4, help="trials on a device")
    parser.add_argument("--peft-steps", type=int, default=3)
    parser.add_argument(
        "--unsloth", type=float, help="unsloth's tokens/s on this base and hardware, measured elsewhere"
    )
    arguments = parser.parse_args()
    num_tokens = sum(example.num_tokens for example in _examples(arguments))
    alone, together = (_peft_side_by_side(arguments, count) for count in (1, arguments.side_by_side))
    num_trials = len(_RANKS) * len(_RATES)
    sweeps = {
        name: _sweep_seconds(arguments, scheduler)
        for name, scheduler in (
            ("sweep", {"type": "fifo"}),
            ("sweep with ASHA", {"type": "asha", "grace_period": 12.5, "reduction_factor": 2}),
        )
    }
    found = {
        "one after another": num_trials * num_tokens / alone,
        "side by side": num_trials * num_tokens / together,
        **(
            {"unsloth, one after another": num_trials * num_tokens / arguments.unsloth}
            if arguments.unsloth
            else {}
        ),
        **{name: run["whole command"] for name, run in sweeps.items()},
    }
    print_report(
        "makespan",
        found["sweep"],
        found["one after another"],
        "seconds",
        {
            **vars(arguments),
            "trials": num_trials,
            "seconds": {name: round(seconds, 1) for name, seconds in found.items()},
            "sweeps": {
                name: {part: round(seconds, 1) for part, seconds in run.items()}
                for name, run in sweeps.items()
            },
            "peft_tokens_per_second": {"alone": alone, "side by side": together},
        },
        higher_is_better=False,
    )


def _examples(arguments: argparse.Namespace) -> list[Any]:
    rows = load_examples(arguments.train, need_output=True)[: arguments.train_examples]
    return encode_examples(load_tokenizer(arguments.base_model), load_prompt(), rows, arguments.train)


def _peft_throughput(arguments: argparse.Namespace) -> float:
    """Measure effective tokens/s of PEFT's optimizer steps on a base of its own."""
    settings = TrialSettings(lora_r=max(_RANKS), schedule="constant")
    return measure_peft(
        load_base(BaseModelSettings(name=arguments.base_model)),
        _examples(arguments),
        settings,
        arguments.peft_steps,
    )["tokens_per_second"]


def _peft_side_by_side(arguments: argparse.Namespace, count: int) -> float:
    """Measure PEFT in so many Ray tasks that share the device, each a process of its own, added up."""
    import ray

    on_gpu = torch.cuda.is_available()
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        num_cpus=max(count, os.cpu_count() or 1),
        runtime_env={
            "env_vars": {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        },
    )

    def measure() -> float:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
        if on_gpu:  # else the first takes what others need; contexts have the rest
            torch.cuda.set_per_process_memory_fraction(0.9 / count)
        return _peft_throughput(arguments)

    try:
        task = ray.remote(num_cpus=1, num_gpus=1 / count if on_gpu else 0)(measure)
        found = sum(ray.get([task.remote() for _ in range(count)]))
        print(f"PEFT, {count} side by side: {found:.0f} tokens/s", file=sys.stderr, flush=True)
        return found
    finally:
        ray.shutdown()


def _sweep_seconds(arguments: argparse.Namespace, scheduler: dict[str, Any]) -> dict[str, float]:
    """Return the wall clock of the whole command, of its trials, and of what was before them."""
    resources = {"trials_per_gpu": arguments.side_by_side} if torch.cuda.is_available() else {}
    space = {
        "base_model": {"name": arguments.base_model},
        "data": {
            "train": arguments.train,
            "public": arguments.public,
            "train_examples": arguments.train_examples,
        },
        "search": {"lora_r": {"grid_search": _RANKS}, "learning_rate": {"grid_search": _RATES}},
        "num_samples": 1,
        "scheduler": scheduler,
        "resources_per_trial": {"cpu": min(1, (os.cpu_count() or 1) / arguments.side_by_side)},
        **resources,
    }
    run = run_sweep_command(space, f"makespan-{scheduler['type']}")
    assert len(run.records) == len(_RANKS) * len(_RATES)
    found = {
        "whole command": run.command.seconds,
        "trials": run.trial_seconds,
        "start": run.start_up_seconds,
        **run.host_seconds,
    }
    print(f"{scheduler['type']}: {found}", file=sys.stderr, flush=True)
    return found


if __name__ == "__main__":
    main()
