"""Owns the work of single models on the device of a trial, away from the driver.

Training a stage, perplexity, texts, and the proof of a registered adapter.
"""

import gc
import importlib
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray

from qlora.config import BaseModelSettings, DecodingSettings, TrialSettings
from qlora.data.prompts import EncodedExample
from qlora.lora.peft_folder import AdapterFiles
from qlora.perplexity import mean_perplexity
from tracking.registry import fetch_adapter
from tuning.placement import Seat, my_device, near, on_node, options
from workflows.session import FailedError

_SECONDS_OF_NO_CHANGE, _SECONDS_TO_END = 0.5, 3.0  # of memory that is free, and of hosts that hold much of it
_MOST_RESTARTS = 2  # work that kills its process again and again is to be told
_TOLERANCES = {"float32": 1e-3, "bfloat16": 1e-2}  # merged weights are rounded to the dtype


class Spare:
    """A process that loads libraries while others work, and has no share of a device until a Worker lends it.

    It is on a node that could hold such shares. It ends with its last reference.
    """

    def __init__(self, shares: dict[str, float], node: str):
        # A device has to be shown or hidden before libraries are loaded; most nodes have one.
        self.place = node, "0" if shares["GPU"] else "cpu"
        actor = ray.remote(_WorkerProcess).options(num_cpus=0, scheduling_strategy=on_node(node))
        self.actor: Any = actor.remote(self.place[1])


class Worker:
    """A process for one piece of work after another, placed where Ray has such shares.

    What it imported stays, what it loaded goes. It starts at once and ends with its last reference. If its
    process or node goes away, another takes its place and does the work from its beginning, but not for ever.
    spare: does the work, if the shares that the worker is given are of the spare's device. home: the node
    that it is to be on, if not any.
    """

    def __init__(self, shares: dict[str, float], spare: Spare | None = None, home: str | None = None):
        self._spare = spare
        self._options = options(shares) | ({} if home is None else {"scheduling_strategy": near(home)})
        self._actor: Any = self._start() if spare is None else None
        self._seat: Any = None if spare is None else ray.remote(Seat).options(**self._options).remote()

    def do(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Carry out `work` there and return its result."""
        if self._spare is not None:
            try:
                *place, num_threads = ray.get(self._seat.device.remote())
                if tuple(place) == self._spare.place:
                    return ray.get(self._spare.actor.do.remote(work, *arguments, num_threads=num_threads))
            except ray.exceptions.RayTaskError:
                raise  # the work itself
            except ray.exceptions.RayError:  # the seat's node has gone, or the spare
                pass
            self._seat, self._spare = None, None
            self._actor = self._start()
        return ray.get(self._actor.do.remote(work, *arguments))

    def _start(self) -> Any:
        again = {"max_restarts": _MOST_RESTARTS, "max_task_retries": _MOST_RESTARTS}
        return ray.remote(**(self._options | again))(_WorkerProcess).remote()


class _WorkerProcess:
    """The process of a worker or of a spare. device: a GPU's number or "cpu", for one that holds no share."""

    def __init__(self, device: str | None = None) -> None:
        if device is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = "" if device == "cpu" else device  # Ray's books give it none
        served = importlib.import_module("qlora.served")  # most of what any work needs, before there is some
        served.load_libraries()

    def do(self, work: Callable[..., Any], *arguments: Any, num_threads: int | None = None) -> Any:
        import torch

        torch.set_num_threads(num_threads or my_device()[2])  # Ray has set those of its share
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            return work(*arguments)
        finally:
            gc.collect()
            torch.cuda.empty_cache()


def train_stage(
    base: BaseModelSettings,
    start: AdapterFiles | None,
    examples: list[EncodedExample],
    settings: TrialSettings,
) -> tuple[AdapterFiles, float, float]:
    """Train the last stage of a schedule from an adapter that has done those before.

    Returns the adapter, the mean training loss of its last epoch, and the seconds that training took. Raises
    FailedError if it diverges.
    """
    from qlora.base.device import default_token_budget
    from qlora.lora.bank import load_bank
    from qlora.training import DivergedError, Training

    training = Training(load_bank(base), examples, settings)
    per_epoch, stages = training.timetable.steps_per_epoch, training.timetable.stages
    if start is not None:
        with start.in_folder() as folder:
            training.bank.load(training.adapter, folder)
        training.begin_at(per_epoch * sum(stages[:-1]))
    losses, started = [], time.monotonic()
    try:
        while not training.finished:
            losses.append(training.advance(default_token_budget()).loss)
    except DivergedError as error:
        raise FailedError(f"stages {settings.epochs}: {error}") from error
    seconds = time.monotonic() - started
    with tempfile.TemporaryDirectory() as name:
        training.bank.save(training.adapter, Path(name))
        return AdapterFiles.read(name), sum(losses[-per_epoch:]) / per_epoch, seconds


def measure_perplexities(
    base: BaseModelSettings, adapter: AdapterFiles | None, examples: list[EncodedExample]
) -> tuple[list[float], str]:
    """Measure the perplexity of each example as a base and an adapter are served.

    Returns the values and the dtype of the weights.
    """
    from qlora.base.device import default_token_budget
    from qlora.packed.agreement import pack_attention
    from qlora.perplexity import example_perplexities
    from qlora.served import load_served

    _wait_for_memory()
    model = _with_adapter(adapter, lambda folder: load_served(base, folder))
    pack_attention(model, base.name)
    values = example_perplexities(model, examples, default_token_budget())
    return values, str(model.dtype).removeprefix("torch.")


def generate_texts(
    base: BaseModelSettings,
    adapter: AdapterFiles | None,
    prompts: Sequence[Sequence[int]],
    decoding: DecodingSettings,
    end_tokens: Sequence[int] = (),
) -> dict[str, Any]:
    """Generate a text for each prompt; `end_tokens` end them, as in `load_engine`.

    Returns `texts` in the prompts' order, `num_tokens` (new ones), `seconds` of generating alone, the GPU's
    `peak_memory_gib` (0 on a CPU) and the `engine`'s name.
    """
    import torch

    from inference.engine import ServedModel, load_engine

    engine = _with_adapter(
        adapter, lambda folder: load_engine(ServedModel(base, folder), decoding, end_tokens)
    )
    started, texts, num_tokens = time.monotonic(), [""] * len(prompts), 0
    for index, text, count in engine.generate(prompts):
        texts[index] = text
        num_tokens += count
    return {
        "texts": texts,
        "num_tokens": num_tokens,
        "seconds": time.monotonic() - started,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0,
        "engine": engine.name,
    }


def prove(
    worker: Worker, model_uri: str, base: BaseModelSettings, public: Sequence[EncodedExample], expected: float
) -> None:
    """Prove that a logged adapter is the one that was measured.

    What the tracking server gives back is loaded in the worker's process and must give the reported
    perplexity. Raises FailedError if it does not.
    """
    files = AdapterFiles.read(fetch_adapter(model_uri).folder)
    values, dtype = worker.do(measure_perplexities, base, files, list(public))
    found = mean_perplexity(values)
    if not (math.isfinite(found) and math.isclose(found, expected, rel_tol=_TOLERANCES[dtype])):
        raise FailedError(
            f"{model_uri} gives public perplexity {found:.5g} when it is loaded back, not the reported "
            f"{expected:.5g}; it is not registered"
        )


def _with_adapter(adapter: AdapterFiles | None, load: Callable[[str | None], Any]) -> Any:
    if adapter is None:
        return load(None)
    with adapter.in_folder() as folder:
        return load(str(folder))


def _wait_for_memory() -> None:
    """Wait until a sweep's hosts, which have just ended, have given all of the GPU's memory back."""
    import torch

    before, since = -1, time.monotonic()
    while torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        if free > before:
            before, since = free, time.monotonic()
        elif time.monotonic() - since > (_SECONDS_OF_NO_CHANGE if 2 * free > total else _SECONDS_TO_END):
            return
        time.sleep(0.1)
