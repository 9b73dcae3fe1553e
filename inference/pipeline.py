"""Owns the Ray Data pipeline: row numbers -> rows -> prompts -> a pool of engines -> results as they are done.

Only windows of row numbers are in the plan. A window's text is fetched from the driver's node when its turn comes, tokenised
by a task, ordered by length and handed to the pool in batches: no process holds all rows. Refuses to know the output.
"""

import logging
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray.data import ActorPoolStrategy, DataContext, from_items
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from inference.engine import ServedModel, load_engine
from inference.rows import RowStore
from qlora.base.model import load_tokenizer
from qlora.config import DecodingSettings, InputError
from qlora.data.prompts import Prompt, encode_prompt
from qlora.lora.peft_folder import ADAPTER_FILES

_WINDOW_ROWS = 4096
_FEWEST_ROWS, _MOST_ROWS = {"cpu": 8, "gpu": 128}, {"cpu": 64, "gpu": 512}  # of a batch
# of a worker, so that a small job too shows where it stands and can go on from there
_BATCHES = 4
Result = tuple[int, str | None, str | None]  # row number, text, error


@dataclass(frozen=True)
class Work:
    """What a job does with every row. A prompt over `max_prompt_tokens` fails its row."""

    served: ServedModel
    prompt: Prompt
    decoding: DecodingSettings
    max_prompt_tokens: int


@dataclass(frozen=True)
class Report:
    """One batch's results, the tokens that were generated for it, by which engine, and how long that took."""

    results: list[Result]
    num_tokens: int
    engine: str
    seconds: float


class RowReader:
    """Serves windows of a RowStore from the node where its file is."""

    def __init__(self, rows: RowStore):
        self.rows = rows

    def instructions(self, numbers: list[int]) -> list[str]:
        """Instructions of rows, given in ascending order."""
        found = self.rows.read(numbers[0], numbers[-1] + 1)
        return [found[number - numbers[0]].instruction for number in numbers]


class Tokenise:
    """A window of row numbers -> prompts, longest first, or errors."""

    def __init__(self, work: Work, reader: Any):
        self.work, self.reader = work, reader
        self.tokenizer = load_tokenizer(work.served.base.name)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Column `numbers` (one window a row) -> columns `index`, `prompt` (token ids, empty for a failed row), `error`."""
        found = []
        for window in batch["numbers"]:
            numbers = [int(number) for number in window]
            for number, instruction in zip(
                numbers, ray.get(self.reader.instructions.remote(numbers)), strict=True
            ):
                prompt = encode_prompt(self.tokenizer, self.work.prompt.render(instruction))
                room = self.work.max_prompt_tokens
                error = (
                    ""
                    if len(prompt) <= room
                    else (
                        f"the prompt has {len(prompt)} tokens, but the model has room for {room} "
                        "before the new ones; shorten it or lower --max-new-tokens"
                    )
                )
                found.append((number, [] if error else list(prompt), error))
        found.sort(key=lambda row: (-len(row[1]), row[0]))
        return {
            name: list(column)
            for name, column in zip(("index", "prompt", "error"), zip(*found, strict=True), strict=True)
        }


class EngineActor:
    """A worker of the pool: one engine, loaded once. A model that can't be had comes back as the error of rows that no engine made:
    raised here, it would reach people as a worker's death."""

    def __init__(self, work: Work, on_gpu: bool, engines_per_node: int, adapter_files: Any):
        if not on_gpu:
            # torch looks at it when it is first asked for a GPU
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        torch.set_num_threads(max(1, _cpus_of_this_node() // engines_per_node))
        self.refusal = ""
        try:
            with _local_adapter(work.served, adapter_files) as served:
                self.engine = load_engine(served, work.decoding)
        except InputError as error:
            self.refusal = str(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Columns of Tokenise -> `index`, `text`, `error`, `num_tokens`, `engine`, `seconds`."""
        started, count = time.monotonic(), len(batch["index"])
        if self.refusal:
            return {
                "index": batch["index"],
                "text": [""] * count,
                "error": [self.refusal] * count,
                "num_tokens": [0] * count,
                "engine": [""] * count,
                "seconds": [0.0] * count,
            }
        errors = [str(error) for error in batch["error"]]
        rows = [row for row, error in enumerate(errors) if not error]
        outputs = self._generate([[int(token) for token in batch["prompt"][row]] for row in rows])
        texts, num_tokens = [""] * len(errors), [0] * len(errors)
        for row, (text, count, error) in zip(rows, outputs, strict=True):
            texts[row], num_tokens[row], errors[row] = text, count, error
        return {
            "index": batch["index"],
            "text": texts,
            "error": errors,
            "num_tokens": num_tokens,
            "engine": [self.engine.name] * len(errors),
            "seconds": [time.monotonic() - started] * len(errors),
        }

    def _generate(self, prompts: list[list[int]]) -> list[tuple[str, int, str]]:
        """(text, tokens, error) of each prompt. If the batch fails, its prompts are tried one by one, so that only what fails
        alone is lost. Raises the error if that is all of them, or if the GPU is out of order: then nothing here is the rows' fault,
        and the job stops with what is done kept.
        """
        if not prompts:
            return []
        try:
            found = {index: (text, count, "") for index, text, count in self.engine.generate(prompts)}
            return [found[index] for index in range(len(prompts))]
        except (RuntimeError, ValueError) as error:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # raises again what no later call can get over
            if len(prompts) == 1:
                return [
                    (
                        "",
                        0,
                        f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}",
                    )
                ]
            found_alone = [self._generate([prompt])[0] for prompt in prompts]
            if all(failure for *_, failure in found_alone):
                raise
            return found_alone


def _adapter_files(served: ServedModel) -> Any:
    """A reference to the adapter's files by name, for engines on nodes that don't have its folder; None without an adapter."""
    if served.adapter is None:
        return None
    return ray.put({name: (Path(served.adapter) / name).read_bytes() for name in ADAPTER_FILES})


@contextmanager
def _local_adapter(served: ServedModel, files: Any) -> Iterator[ServedModel]:
    """What to load on this node, from files that `_adapter_files` refers to. Errors name the folder that people know."""
    if served.adapter is None:
        yield served
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, content in ray.get(files).items():
            (Path(folder) / name).write_bytes(content)
        try:
            yield replace(served, adapter=folder)
        except InputError as error:
            raise InputError(str(error.where).replace(folder, served.adapter), error.problem) from error


@dataclass(frozen=True)
class Pool:
    """How many engines, each on a GPU of its own or on a share of a node's CPUs."""

    num_workers: int
    on_gpu: bool


def plan_pool(local: dict[str, float], num_workers: int | None = None, device: str | None = None) -> Pool:
    """One engine a GPU of the connected Ray, or one a node if there are no GPUs, unless told otherwise. `local`: what a Ray that
    can't grow has; {} for a cluster. `device`: "cpu" or "gpu".

    A cluster without any CPU to work on is one whose nodes are still to come, as an autoscaler's: engines ask for a GPU there.
    Raises InputError for a GPU that will never come.
    """
    resources = ray.cluster_resources()
    num_gpus = int(resources.get("GPU", 0))
    on_gpu = device == "gpu" if device else num_gpus > 0 or resources.get("CPU", 0) < 1
    if local and on_gpu and not num_gpus:
        raise InputError(
            "--device",
            "gpu was asked for, but this machine has none; leave it out, or name a cluster in RAY_ADDRESS",
        )
    return Pool(num_workers or max(1, num_gpus if on_gpu else len(_cpus_of_nodes())), on_gpu)


def _cpus_of_nodes() -> dict[str, int]:
    """Whole CPUs of each node that has any."""
    cpus = {node["NodeID"]: int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]}
    return {node: count for node, count in cpus.items() if count}


def _cpus_of_this_node() -> int:
    return _cpus_of_nodes().get(ray.get_runtime_context().get_node_id(), 1)


def generate_rows(work: Work, rows: RowStore, numbers: Sequence[int], pool: Pool) -> Iterator[Report]:
    """Results of the rows with these numbers (ascending), batch by batch, as they are done. Needs a connected Ray. Raises InputError if
    the model can't be had."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    reader = (
        ray.remote(RowReader).options(num_cpus=0, scheduling_strategy=here, max_concurrency=4).remote(rows)
    )
    window = min(_WINDOW_ROWS, -(-len(numbers) // pool.num_workers))
    windows = [{"numbers": list(numbers[start : start + window])} for start in range(0, len(numbers), window)]
    device = "gpu" if pool.on_gpu else "cpu"
    batch_rows = min(_MOST_ROWS[device], max(_FEWEST_ROWS[device], -(-window // _BATCHES)))
    engines_per_node = -(-pool.num_workers // max(1, len(_cpus_of_nodes())))
    # Small CPU requests: on one core, all operators must fit side by side.
    dataset = from_items(windows, override_num_blocks=len(windows)).map_batches(
        Tokenise,
        fn_constructor_args=(work, reader),
        batch_size=1,
        compute=ActorPoolStrategy(size=1),
        num_cpus=0.25,
    )
    # A block is one task of the pool: what comes back when it is done, and what is done again when a worker dies.
    dataset = dataset.repartition(target_num_rows_per_block=batch_rows)
    # Ray has no argument for this, and nodes of one CPU have no whole one left.
    dataset._logical_plan.dag.ray_remote_args["num_cpus"] = 0.25  # type: ignore[attr-defined]
    dataset = dataset.map_batches(
        EngineActor,
        fn_constructor_args=(work, pool.on_gpu, engines_per_node, _adapter_files(work.served)),
        batch_size=batch_rows,
        compute=ActorPoolStrategy(size=pool.num_workers),
        num_cpus=0.25,
        num_gpus=int(pool.on_gpu),
    )
    for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0):
        if not batch["engine"][0]:
            raise InputError(*str(batch["error"][0]).split(": ", 1))
        columns = (batch["index"].tolist(), batch["text"].tolist(), batch["error"].tolist())
        results = [
            (index, None if error else text, error or None)
            for index, text, error in zip(*columns, strict=True)
        ]
        yield Report(
            results, int(batch["num_tokens"].sum()), str(batch["engine"][0]), float(batch["seconds"].max())
        )
