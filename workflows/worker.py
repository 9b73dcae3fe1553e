"""Owns work of single models on the device of a trial, away from the driver: training a stage, perplexity, texts."""

import gc
import importlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from qlora.config import BaseModelSettings, DecodingSettings, TrialSettings
from qlora.data.prompts import EncodedExample
from qlora.lora.peft_folder import ADAPTER_FILES
from qlora.perplexity import mean_perplexity
from tracking.registry import fetch_adapter
from tuning.host_directory import my_device

_TOLERANCES = {"float32": 1e-3, "bfloat16": 1e-2}  # merged weights are rounded to the dtype
Files = dict[str, bytes]  # of a PEFT folder, by name; none for the bare base


class Worker:
    """A process for one piece of work after another where Ray has such shares: what it imported stays, what it loaded goes. It starts
    at once and ends with its last reference."""

    def __init__(self, shares: dict[str, float]):
        self._actor: Any = ray.remote(num_cpus=shares["CPU"], num_gpus=shares["GPU"])(_WorkerProcess).remote()

    def do(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """The result of `work`."""
        return ray.get(self._actor.do.remote(work, *arguments))


class _WorkerProcess:
    def __init__(self) -> None:
        import torch

        torch.set_num_threads(my_device()[2])  # Ray has set those of its share
        # most of what any work needs, before there is some
        importlib.import_module("qlora.served")

    def do(self, work: Callable[..., Any], *arguments: Any) -> Any:
        import torch

        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            return work(*arguments)
        finally:
            gc.collect()
            torch.cuda.empty_cache()


def adapter_files(folder: Path) -> Files:
    """What makes the adapter of a PEFT folder."""
    return {name: (folder / name).read_bytes() for name in ADAPTER_FILES}


def train_stage(
    base: BaseModelSettings, start: Files, examples: list[EncodedExample], settings: TrialSettings
) -> tuple[Files, float, float]:
    """Train the last stage of a schedule from an adapter that has done those before: (the adapter, mean training loss of its last epoch,
    seconds)."""
    from qlora.base.model import default_token_budget
    from qlora.lora.bank import load_bank
    from qlora.training import Training

    training = Training(load_bank(base), examples, settings)
    per_epoch, stages = training.timetable.steps_per_epoch, training.timetable.stages
    if start:
        with _folder(start) as folder:
            training.bank.load(training.adapter, folder)
        training.begin_at(per_epoch * sum(stages[:-1]))
    losses, started = [], time.monotonic()
    while not training.finished:
        losses.append(training.advance(default_token_budget()).loss)
    seconds = time.monotonic() - started
    with tempfile.TemporaryDirectory() as folder:
        training.bank.save(training.adapter, Path(folder))
        return adapter_files(Path(folder)), sum(losses[-per_epoch:]) / per_epoch, seconds


def measure_perplexities(
    base: BaseModelSettings, files: Files, examples: list[EncodedExample]
) -> tuple[list[float], str]:
    """(perplexity of each example, the dtype of the weights) under a base and an adapter as they are served."""
    from qlora.base.model import default_token_budget
    from qlora.packed.attention import use_packed_attention
    from qlora.perplexity import example_perplexities
    from qlora.served import load_served

    _wait_for_memory()
    with _folder(files) as folder:
        model: Any = load_served(base, str(folder) if files else None)
    use_packed_attention(model)
    return example_perplexities(model, examples, default_token_budget()), str(model.dtype).removeprefix(
        "torch."
    )


def prove(
    worker: Worker, model_uri: str, base: BaseModelSettings, public: Sequence[EncodedExample], expected: float
) -> None:
    """Raise RuntimeError unless the adapter at `model_uri` on `base` gives the expected public perplexity in the worker's process."""
    values, dtype = worker.do(
        measure_perplexities, base, adapter_files(fetch_adapter(model_uri).folder), list(public)
    )
    found = mean_perplexity(values)
    if abs(found / expected - 1) > _TOLERANCES[dtype]:
        raise RuntimeError(
            f"{model_uri} gives public perplexity {found:.5g} when it is loaded back, not the reported {expected:.5g}; "
            "it is not registered"
        )


def generate_texts(
    base: BaseModelSettings, files: Files, prompts: Sequence[tuple[int, ...]], decoding: DecodingSettings
) -> dict[str, Any]:
    """Texts in the prompts' order, new tokens, seconds of generating alone, the GPU's peak memory (0 on a CPU), the engine's name."""
    import torch

    from inference.engine import ServedModel, load_engine

    with _folder(files) as folder:
        engine = load_engine(ServedModel(base, str(folder) if files else None), decoding)
    started, texts, num_tokens = time.monotonic(), [""] * len(prompts), 0
    for index, text, count in engine.generate(prompts):
        texts[index] = text
        num_tokens += count
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    return {
        "texts": texts,
        "num_tokens": num_tokens,
        "seconds": time.monotonic() - started,
        "peak_memory_gib": peak,
        "engine": engine.name,
    }


@contextmanager
def _folder(files: Files) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        yield Path(folder)


def _wait_for_memory() -> None:
    """Until a sweep's hosts, which have just ended, have given all of the GPU's memory back."""
    import torch

    free = -1
    while torch.cuda.is_available() and (now := torch.cuda.mem_get_info()[0]) > free:
        free = now
        time.sleep(1)
