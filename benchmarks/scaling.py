"""The same sweep, or the same batch inference, on more and more GPUs of one host, as whole commands.

Prints one JSON line a number of GPUs.

    python benchmarks/scaling.py sweep [--devices 1 2 4 8] [--base-model BASE] [--train FILE] \\
        [--public FILE] [--trials-per-device 4]
    python benchmarks/scaling.py infer [--devices 1 2 4 8] [--base-model BASE] [--input FILE] \\
        [--rows-per-device 64]

The sweep is a fixed one, of as many trials as the most GPUs hold, without early stopping: effective tokens/s
and examples/s from the first trial's start to the last one's end. Batch inference has rows in proportion to
GPUs: rows/s while engines generate. `ratio` is to the first number of GPUs; `efficiency` is the ratio for
each GPU. Without a GPU, a device is a Ray node on this machine, with its share of the cores. --shape writes a
base of random weights of a size to --base-model, a folder, if it isn't there.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.commands import ROOT, CommandRun, run_inference_command, run_sweep_command
from benchmarks.models import SHAPES, write_base
from benchmarks.report import print_report
from qlora.base.model import load_tokenizer
from qlora.config import DEFAULT_BASE
from qlora.data.examples import load_examples
from qlora.data.prompts import encode_examples, load_prompt

_LEARNING_RATES = (1e-4, 3e-4)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("job", choices=("sweep", "infer"))
    parser.add_argument(
        "--devices", type=int, nargs="+", default=[1, 2], help="numbers of GPUs, the baseline first"
    )
    parser.add_argument("--base-model", default=DEFAULT_BASE)
    parser.add_argument("--quantization", default="nf4")
    parser.add_argument("--shape", choices=SHAPES, help="size of a base to write to --base-model")
    parser.add_argument("--tokenizer", default=DEFAULT_BASE, help="of the base to write")
    parser.add_argument("--train", default="data/sample/train.json")
    parser.add_argument("--public", default="data/sample/public_test.json")
    parser.add_argument(
        "--train-examples", type=int, default=256, help="of the sweep; at most what the file has"
    )
    parser.add_argument("--trials-per-device", type=int, default=4)
    parser.add_argument("--lora-r", type=int, default=64)
    parser.add_argument("--input", default="data/sample/private_test.json")
    parser.add_argument("--rows-per-device", type=int, default=64, help="rows of the input, over and over")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--num-beams", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.shape and not (Path(arguments.base_model) / "config.json").exists():
        write_base(arguments.shape, arguments.tokenizer, Path(arguments.base_model))
    measure, unit = (_sweep, "effective tokens/s") if arguments.job == "sweep" else (_inference, "rows/s")
    first: float | None = None
    for devices in arguments.devices:
        with _only(devices, max(arguments.devices)) as environment, _gpu_load() as load:
            found = measure(arguments, devices, environment, load)
        first = found["speed"] if first is None else first
        efficiency = found["speed"] / first * arguments.devices[0] / devices
        print_report(
            f"scaling {arguments.job}",
            found.pop("speed"),
            first,
            unit,
            {**vars(arguments), "devices": devices, "efficiency": round(efficiency, 3), **found},
            higher_is_better=True,
        )
        sys.stdout.flush()


def _sweep(
    arguments: argparse.Namespace, devices: int, environment: dict[str, str], load: Path
) -> dict[str, Any]:
    """Run the fixed sweep on some devices."""
    num_trials = arguments.trials_per_device * max(arguments.devices)
    rows = load_examples(arguments.train, need_output=True)[: arguments.train_examples]
    examples = encode_examples(load_tokenizer(arguments.base_model), load_prompt(), rows, arguments.train)
    on_gpu = torch.cuda.is_available()
    cpus = 1.0 if on_gpu else _cores(max(arguments.devices)) / arguments.trials_per_device
    run = run_sweep_command(
        {
            "base_model": {"name": arguments.base_model, "quantization": arguments.quantization},
            "data": {"train": arguments.train, "public": arguments.public, "train_examples": len(rows)},
            "trial": {"lora_r": arguments.lora_r, "lora_dropout": 0.1},
            "search": {
                "learning_rate": {"choice": list(_LEARNING_RATES)},
                "seed": {"grid_search": list(range(num_trials))},
            },
            "num_samples": 1,
            "scheduler": {"type": "fifo"},
            "resources_per_trial": {"cpu": cpus},
            **({"trials_per_gpu": arguments.trials_per_device} if on_gpu else {}),
        },
        f"scaling-{devices}",
        environment,
    )
    assert len(run.records) == num_trials and all(record.status == "finished" for record in run.records), (
        "a trial failed"
    )
    epochs = num_trials / run.trial_seconds
    return {
        "speed": epochs * sum(example.num_tokens for example in examples),
        "examples_per_second": round(epochs * len(rows), 2),
        "trials": num_trials,
        "trial_seconds": round(run.trial_seconds, 1),
        "start_up_seconds": round(run.start_up_seconds, 1),
        "peak_memory_gib": round(max(record.peak_memory_gib for record in run.records), 1),
        **_driver(run.command),
        "host_seconds": {work: round(seconds, 1) for work, seconds in run.host_seconds.items()},
        "gpu_load": _mean_load(load, run.first_start, run.first_start + run.trial_seconds),
    }


def _inference(
    arguments: argparse.Namespace, devices: int, environment: dict[str, str], load: Path
) -> dict[str, Any]:
    """Run batch inference on rows in proportion to devices."""
    data = load_examples(arguments.input, need_output=False)
    rows = [
        {"id": str(n), "instruction": data[n % len(data)].instruction}
        for n in range(arguments.rows_per_device * devices)
    ]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        file.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        options = {
            "base-model": arguments.base_model,
            "quantization": arguments.quantization,
            "input": file,
            "workers": devices,
            "num-beams": arguments.num_beams,
            "max-new-tokens": arguments.new_tokens,
            "min-new-tokens": arguments.new_tokens,
        }
        run, meta = run_inference_command(
            [f"--{name}={value}" for name, value in options.items()], environment
        )
    return {
        "speed": meta["rows_per_second_generating"],
        "rows": len(rows),
        "rows_per_second_in_all": meta["rows_per_second"],
        "seconds_generating": meta["seconds_generating"],
        "start_up_seconds": round(run.seconds - meta["seconds_generating"], 1),
        **_driver(run),
        "gpu_load": _mean_load(load, run.ended_at - meta["seconds_generating"], run.ended_at),
    }


def _driver(run: CommandRun) -> dict[str, float]:
    return {
        "seconds": round(run.seconds, 1),
        "driver_cpu_seconds": round(run.cpu_seconds, 1),
        "driver_memory_gib": round(run.memory_gib, 2),
    }


@contextmanager
def _only(devices: int, most: int) -> Iterator[dict[str, str]]:
    """Make the environment of a command that sees so many GPUs.

    Without GPUs, a Ray cluster of so many nodes that share the machine's cores.
    """
    if torch.cuda.is_available():
        seen = os.environ.get(
            "CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))
        ).split(",")
        if devices > len(seen):
            sys.exit(f"error: --devices: {devices}, but this host has {len(seen)} GPUs")
        yield {"CUDA_VISIBLE_DEVICES": ",".join(seen[:devices])}
        return
    from ray.cluster_utils import Cluster

    # nodes' workers inherit it
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        for _ in range(devices):
            cluster.add_node(num_cpus=_cores(most))
        yield {"RAY_ADDRESS": cluster.address}
    finally:
        cluster.shutdown()


def _cores(most: int) -> int:
    return max(1, (os.cpu_count() or 1) // most)


@contextmanager
def _gpu_load() -> Iterator[Path]:
    """Write each GPU's load to a file once a second; it stays empty without a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "load.csv"
        with file.open("w") as target:
            command = [
                "nvidia-smi",
                "--query-gpu=timestamp,index,utilization.gpu",
                "--format=csv,noheader,nounits",
                "-l",
                "1",
            ]
            process = subprocess.Popen(command, stdout=target) if torch.cuda.is_available() else None
            try:
                yield file
            finally:
                if process is not None:
                    process.terminate()
                    process.wait()


def _mean_load(file: Path, start: float, end: float) -> dict[str, float]:
    """Return the percent of the time between two times (seconds since 1970) that each GPU had work."""
    seen: dict[str, list[float]] = {}
    for line in file.read_text().splitlines():
        stamp, *rest = line.split(", ")
        if len(rest) == 2 and start <= time.mktime(time.strptime(stamp[:19], "%Y/%m/%d %H:%M:%S")) <= end:
            seen.setdefault(rest[0], []).append(float(rest[1]))
    return {index: round(sum(values) / len(values)) for index, values in seen.items()}


if __name__ == "__main__":
    main()
