"""The driver's own work at scale: a sweep of trials that do nothing, and a job whose engine does nothing.

    python benchmarks/driver.py trials [--trials 1000]
    python benchmarks/driver.py rows [--rows 1000000]

trials: CPU milliseconds of the driver a trial, and the most memory that it held, for the ledger, early
stopping and the screen around Ray Tune. The baseline is Ray Tune alone with its own ASHA and the same trials.

rows: rows a second through the pipeline (read, tokenised, ordered, handed out, kept, written), and the
driver's memory. The baseline is Ray Data alone: read_json, the same tokenizer, a pool of one, write_json; it
keeps nothing that a job could go on from, and its rows come in any order.
"""

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler

import tuning.sweep
from benchmarks.commands import ROOT
from benchmarks.report import print_report
from qlora.config import DEFAULT_BASE, BaseModelSettings, DecodingSettings
from tuning.host_directory import start_hosts
from tuning.objective import METRIC
from tuning.orders import Orders
from tuning.space import Space

_POINTS = 4
_SIDES = ("ours", "baseline")


def main() -> None:
    """Measure both sides, each in a process of its own, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("job", choices=("trials", "rows"))
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--base-model", default=DEFAULT_BASE, help="whose tokenizer is used")
    parser.add_argument("--side", choices=_SIDES, help="measure this one here, and print its figures")
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(_measure(arguments)), flush=True)
        return
    found = {side: _in_a_process(side) for side in _SIDES}
    figure, unit = ("cpu_ms_a_trial", "ms") if arguments.job == "trials" else ("rows_per_second", "rows/s")
    print_report(
        f"driver, {arguments.job}",
        found["ours"][figure],
        found["baseline"][figure],
        unit,
        {arguments.job: getattr(arguments, arguments.job), **found},
        higher_is_better=arguments.job == "rows",
    )


def _in_a_process(side: str) -> dict[str, float]:
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{side}: {found}", file=sys.stderr, flush=True)
    return found


def _measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Run one side; returns its figures."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )
    sides = {
        ("trials", "ours"): _our_trials,
        ("trials", "baseline"): _plain_trials,
        ("rows", "ours"): _our_rows,
        ("rows", "baseline"): _plain_rows,
    }
    count = getattr(arguments, arguments.job)
    with tempfile.TemporaryDirectory() as folder:
        try:
            cpu, began = _cpu_seconds(), time.monotonic()
            sides[arguments.job, arguments.side](count, Path(folder), arguments.base_model)
            seconds, spent = time.monotonic() - began, _cpu_seconds() - cpu
        finally:
            ray.shutdown()
    most_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    figures = {"seconds": round(seconds, 1), "cpu_seconds": round(spent, 1), "driver_gib": round(most_gib, 3)}
    if arguments.job == "trials":
        return {**figures, "cpu_ms_a_trial": round(1000 * spent / count, 2)}
    return {**figures, "rows_per_second": round(count / seconds, 1)}


def _cpu_seconds() -> float:
    spent = resource.getrusage(resource.RUSAGE_SELF)
    return spent.ru_utime + spent.ru_stime


def idle_trial(config: dict[str, Any], hosts: object = None, shares: object = None) -> None:
    """Report the points of a curve, and do nothing for them."""
    for number in range(1, _POINTS + 1):
        tune.report(
            {
                "step": number,
                "epoch": number / _POINTS,
                "schedule_percent": 100 * number / _POINTS,
                "public_perplexity": 20 * config["learning_rate"] / number,
                METRIC: 20 * config["learning_rate"] / number,
                "training_loss": 1.0,
                "learning_rate": config["learning_rate"],
                "tokens_per_second": 1.0,
                "peak_memory_gib": 0.0,
                "perplexities": [1.0] * 250,
            }
        )


class _Nobody:
    """An observer that is told and does nothing."""

    def trial_changed(self, record: object) -> None:
        """Take in a change."""


def _our_trials(count: int, folder: Path, _: str) -> None:
    space = Space.model_validate(
        {
            "data": {"train": "data/sample/train.json", "public": "data/sample/public_test.json"},
            "search": {"learning_rate": {"loguniform": [1e-5, 1e-2]}},
            "num_samples": count,
            "scheduler": {"type": "asha", "grace_period": 25, "reduction_factor": 2},
        }
    )
    tuning.sweep.run_trial = idle_trial
    sys.stdout = sys.stderr
    try:
        nobody = start_hosts()  # no trial asks for one
        known = tuning.sweep.KnownBase(zero_shot={"default": 1e3}, width=576)
        orders = Orders(str(folder))
        records = tuning.sweep.run_sweep(
            space, nobody, {"CPU": 1}, folder, str(folder), orders, known, 1, _Nobody()
        )
    finally:
        sys.stdout = sys.__stdout__
    assert len(records) == count and all(record.has_ended for record in records)


def _plain_trials(count: int, folder: Path, _: str) -> None:
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    tuner = tune.Tuner(
        tune.with_resources(idle_trial, {"CPU": 1}),
        param_space={"learning_rate": tune.loguniform(1e-5, 1e-2)},
        tune_config=tune.TuneConfig(
            metric="public_perplexity",
            mode="min",
            num_samples=count,
            scheduler=ASHAScheduler(
                time_attr="schedule_percent", max_t=100, grace_period=25, reduction_factor=2
            ),
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(storage_path=str(folder), verbose=0),
    )
    assert len(tuner.fit()) == count


def _write_rows(count: int, path: Path) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            row = {"id": f"r{number}", "instruction": f"翻譯成文言文：第{number}句話說的是春夏秋冬。"}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


class _IdleEngine:
    """An engine that answers at once."""

    name = "idle"

    def generate(self, prompts: list[list[int]]) -> Any:
        """Yield an answer for each prompt."""
        return ((number, "譯文", 1) for number in range(len(prompts)))


def _load_idle(*_: object) -> _IdleEngine:
    return _IdleEngine()


def _our_rows(count: int, folder: Path, base: str) -> None:
    from inference import pipeline as module
    from inference.engine import ServedModel
    from inference.job import open_job, run_job
    from qlora.data.prompts import load_prompt

    pipeline: Any = module  # two of whose names are replaced

    class IdleActor:
        """The pool's worker around an engine that does nothing."""

        def __init__(self, *arguments: Any):
            pipeline.load_engine = _load_idle
            self._worker = pipeline.EngineActor(*arguments)

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            return self._worker(batch)  # type: ignore[no-any-return]

    pipeline.EngineActor = IdleActor
    _write_rows(count, source := folder / "in.jsonl")
    served = ServedModel(BaseModelSettings(name=base))
    work = pipeline.Work(served, load_prompt(), DecodingSettings(), 2000)
    with open_job(str(source), folder / "out.jsonl") as rows:
        result = run_job(work, rows, folder / "out.jsonl", {}, lambda: pipeline.Pool(1, False), resume=False)
    assert result.num_rows == count and not result.num_failed


def _plain_rows(count: int, folder: Path, base: str) -> None:
    from qlora.base.model import load_tokenizer
    from qlora.data.prompts import load_prompt
    from qlora.data.row_shapes import Turn

    class Tokenise:
        """The same prompts by the same tokenizer."""

        def __init__(self) -> None:
            self.tokenizer, self.prompt = load_tokenizer(base), load_prompt()

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            turns = [[Turn("user", str(text))] for text in batch["instruction"]]
            prompts = [self.prompt.ids(self.tokenizer, one) for one in turns]
            return {"id": batch["id"], "prompt": [list(prompt) for prompt in prompts]}

    class Idle:
        """An engine that does nothing."""

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            return {"id": batch["id"], "output": ["譯文"] * len(batch["id"])}

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    _write_rows(count, source := folder / "in.jsonl")
    one: Callable[..., Any] = ray.data.ActorPoolStrategy
    rows = ray.data.read_json(str(source))
    rows = rows.map_batches(Tokenise, compute=one(size=1), num_cpus=0.25)
    rows = rows.map_batches(Idle, compute=one(size=1), num_cpus=0.25, batch_size=64)
    rows.write_json(str(folder / "out"))


if __name__ == "__main__":
    main()
