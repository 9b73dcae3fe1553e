"""Owns the Ray Data pipeline: from row numbers to prompts, a pool of engines, and results as they are done.

    numbers of rows --> Tokenise --> blocks of batch_rows prompts --> EngineActor (a pool) --> Report
         a window       one actor                                     on GPUs or CPUs          to the driver

Only windows of row numbers are in the plan. The text of a window's rows is fetched from the driver's node
when its turn comes, tokenised, ordered by length and handed to the pool in batches: no process holds all
rows. Ray Data runs the stages at the same time, and runs a batch again if its worker dies; what is then to
be done otherwise is said by `attempts`.

Refuses to know the output.

Source: https://docs.ray.io/en/latest/data/batch_inference.html
"""

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch
from ray.data import ActorPoolStrategy, DataContext, Dataset, from_items
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from inference.attempts import EnginesDiedError, Witness, Witnessed
from inference.engine import ServedModel, load_engine
from inference.failures import generate_each, is_sound
from inference.rows import RowReader, RowStore
from qlora.base.model import load_tokenizer
from qlora.config import DecodingSettings, InputError, first_line
from qlora.data.prompts import AnyPrompt, too_long_problem
from qlora.lora.peft_folder import AdapterFiles

_WINDOW_ROWS = 4096
_FEWEST_ROWS = {"cpu": 8, "gpu": 256}  # of a batch
_MOST_ROWS = {"cpu": 64, "gpu": 512}  # of a batch
_BATCHES = 4  # of a worker, so that a job shows its progress and can go on from there
_TOKENIZER, _ENGINE = "tokenizer", "engine"  # pools, as error lines name them
Result = tuple[int, str | None, str | None]  # row number, text, error


@dataclass(frozen=True)
class Work:
    """The work of a job on every row.

    A prompt of more than `max_prompt_tokens` fails its row. end_tokens: what ends answers under the prompt,
    besides the tokenizer's EOS.
    """

    served: ServedModel
    prompt: AnyPrompt
    decoding: DecodingSettings
    max_prompt_tokens: int
    end_tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Report:
    """One batch's results, the number of tokens generated for it, the engine's name, and the time it took."""

    results: list[Result]
    num_tokens: int
    engine: str
    seconds: float


class Tokenise:
    """A task from windows of row numbers to prompts, longest first, or errors."""

    def __init__(self, work: Work, reader: Any, witness: Any):
        self.work = work
        self.reader = reader
        self.witnessed = Witnessed(witness, _TOKENIZER)
        if self.witnessed.stop:
            return
        try:
            with self.witnessed.loading():
                self.tokenizer = load_tokenizer(work.served.base.name)
        except InputError as error:
            self.witnessed.stop = f"{error}; mend that, then run the same command with --resume"

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Turn column `numbers`, a window a row, into `index`, `prompt`, `error` and `stop`.

        A prompt is token ids, none for a row that failed; an error is empty for any other row. `stop` says
        why the job has to stop, with all rows undone, or is empty.
        """
        numbers = [int(number) for window in batch["numbers"] for number in window]
        prompts: dict[int, list[int]] = {}
        errors: dict[int, str] = {}
        for piece in [] if self.witnessed.stop else self.witnessed.pieces(numbers, errors):
            asked = ray.get(self.reader.turns.remote(sorted(piece)))
            for number, turns in zip(sorted(piece), asked, strict=True):
                try:
                    prompt = self.work.prompt.ids(self.tokenizer, turns)
                except Exception as error_of_row:
                    errors[number] = f"{type(error_of_row).__name__}: {first_line(error_of_row)}"
                    continue
                if error := too_long_problem(len(prompt), self.work.max_prompt_tokens):
                    errors[number] = error
                else:
                    prompts[number] = list(prompt)
        numbers.sort(key=lambda number: (-len(prompts.get(number, [])), number))
        return {
            "index": numbers,
            "prompt": [prompts.get(number, []) for number in numbers],
            "error": [errors.get(number, "") for number in numbers],
            "stop": [self.witnessed.stop] * len(numbers),
        }


class EngineActor:
    """A worker of the pool: one engine, loaded once.

    An InputError on loading it comes back in columns of its own (`is_refused`, `refused_where`,
    `refused_problem`), and so does that the job has to stop (`stop`): raised here, they would reach people
    as a worker's death.
    """

    def __init__(
        self, work: Work, on_gpu: bool, engines_per_node: int, files: AdapterFiles | None, witness: Any
    ):
        if not on_gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # torch looks at it when it is first asked for a GPU
        torch.set_num_threads(max(1, _cpus_of_this_node() // engines_per_node))
        self.refusal: InputError | None = None
        self.broken = ""  # why the job has to stop, if the engine fails whatever it is given
        self.witnessed = Witnessed(witness, _ENGINE)
        if self.witnessed.stop:
            return
        try:
            with self.witnessed.loading(), _local_adapter(work.served, files) as served:
                self.engine = load_engine(served, work.decoding, work.end_tokens)
        except InputError as error:
            self.refusal = error

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Turn columns of Tokenise into `index`, `text`, `error`, `num_tokens` and what all rows share.

        They share `engine`, `seconds`, the refusal and `stop`.
        """
        started = time.monotonic()
        numbers = [int(number) for number in batch["index"]]
        count = len(numbers)
        stop = self.witnessed.stop or str(batch["stop"][0])
        is_idle = bool(stop) or self.refusal is not None
        done = {} if is_idle else self._generate_all(numbers, batch["prompt"], batch["error"])
        stop = stop or self.broken
        texts, num_tokens, errors = zip(*(done.get(number, ("", 0, "")) for number in numbers), strict=True)
        name = "" if is_idle else self.engine.name
        where = str(self.refusal.where) if self.refusal else ""
        problem = self.refusal.problem if self.refusal else ""
        return {
            "index": numbers,
            "text": list(texts),
            "error": list(errors),
            "num_tokens": list(num_tokens),
            "engine": [name] * count,
            "seconds": [time.monotonic() - started] * count,
            "is_refused": [self.refusal is not None] * count,
            "refused_where": [where] * count,
            "refused_problem": [problem] * count,
            "stop": [stop] * count,
        }

    def _generate_all(self, numbers: list[int], prompts: Any, errors: Any) -> dict[int, tuple[str, int, str]]:
        """Return (text, number of new tokens, error) of each row, by its number, without a row's death.

        `prompts` and `errors` are columns of Tokenise.
        """
        failed = {number: str(error) for number, error in zip(numbers, errors, strict=True) if error}
        prompt_of = dict(zip(numbers, prompts, strict=True))
        done: dict[int, tuple[str, int, str]] = {}
        sound = [number for number in numbers if number not in failed]
        for piece in self.witnessed.pieces(sound, failed):
            outputs = generate_each(
                self.engine, [[int(token) for token in prompt_of[number]] for number in piece]
            )
            if piece and all(error for *_, error in outputs) and not is_sound(self.engine):
                self.broken = (
                    f"engines fail at every prompt ({outputs[0][2]}); what is done is kept: "
                    "mend that, then run the same command with --resume"
                )
                return {}
            done.update(zip(piece, outputs, strict=True))
        return {**done, **{number: ("", 0, error) for number, error in failed.items()}}


@contextmanager
def _local_adapter(served: ServedModel, files: AdapterFiles | None) -> Iterator[ServedModel]:
    """Provide the model to load on this node, within, with its adapter in a folder of this node.

    An InputError that is raised within names the adapter's own folder, which users know.
    """
    if served.adapter is None or files is None:
        yield served
        return
    with files.in_folder() as folder:
        try:
            yield replace(served, adapter=str(folder))
        except InputError as error:
            where = str(error.where).replace(str(folder), served.adapter)
            raise InputError(where, error.problem) from error


@dataclass(frozen=True)
class Pool:
    """A number of engines, each on a GPU of its own or on a share of a node's CPUs."""

    num_workers: int
    on_gpu: bool


def gpus_there(pool: Pool) -> int:
    """Count the GPUs that engines of a pool hold on the nodes that there are now."""
    return min(pool.num_workers, int(ray.cluster_resources().get("GPU", 0))) if pool.on_gpu else 0


def _cpus_of_nodes() -> dict[str, int]:
    """Return the whole CPUs of each node that has any, by the node's id."""
    cpus = {node["NodeID"]: int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]}
    return {node: count for node, count in cpus.items() if count}


def _cpus_of_this_node() -> int:
    """Return the whole CPUs of this process's node, at least one."""
    return _cpus_of_nodes().get(ray.get_runtime_context().get_node_id(), 1)


def generate_rows(work: Work, rows: RowStore, numbers: Sequence[int], pool: Pool) -> Iterator[Report]:
    """Generate for the rows with these numbers, which ascend; yield the report of each batch as it is done.

    Needs a connected Ray. Raises InputError if the model can't be loaded, and EnginesDiedError if processes
    die again and again without a finished row.
    """
    context = DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    window = min(_WINDOW_ROWS, -(-len(numbers) // pool.num_workers))
    windows = [{"numbers": list(numbers[start : start + window])} for start in range(0, len(numbers), window)]
    kept = ray.put(rows)  # held until the end: an actor that is made again is given it anew
    batches = _dataset(work, kept, windows, pool).iter_batches(batch_size=None, prefetch_batches=0)
    for batch in batches:
        if batch["stop"][0]:
            raise EnginesDiedError(batch["stop"][0])
        if batch["is_refused"][0]:
            raise InputError(batch["refused_where"][0], batch["refused_problem"][0])
        columns = (batch["index"].tolist(), batch["text"].tolist(), batch["error"].tolist())
        results: list[Result] = [
            (index, None, error) if error else (index, text, None)
            for index, text, error in zip(*columns, strict=True)
        ]
        yield Report(
            results=results,
            num_tokens=int(batch["num_tokens"].sum()),
            engine=str(batch["engine"][0]),
            seconds=float(batch["seconds"].max()),
        )


def _dataset(work: Work, rows: Any, windows: list[dict[str, Any]], pool: Pool) -> Dataset:
    """Plan the pipeline. `rows`: a reference to the RowStore.

    Its operators ask for small shares of a CPU: on one core, all must run side by side.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote: Any = ray.remote  # whose stubs know no options of classes
    servers: dict[str, Any] = {
        "num_cpus": 0,
        "scheduling_strategy": here,
        "max_restarts": -1,
        "max_task_retries": -1,
    }
    reader = remote(RowReader).options(**servers, max_concurrency=4).remote(rows)
    witness = remote(Witness).options(**servers).remote(_TOKENIZER, _ENGINE)
    dataset = from_items(windows, override_num_blocks=len(windows)).map_batches(
        Tokenise,
        fn_constructor_args=(work, reader, witness),
        batch_size=1,
        compute=ActorPoolStrategy(size=1),
        num_cpus=0.25,
    )
    # A block is one task of the pool: what comes back when it is done, and is done again when a worker dies.
    device = "gpu" if pool.on_gpu else "cpu"
    batch_rows = -(-len(windows[0]["numbers"]) // _BATCHES)
    batch_rows = min(_MOST_ROWS[device], max(_FEWEST_ROWS[device], batch_rows))
    dataset = dataset.repartition(target_num_rows_per_block=batch_rows)
    # Ray has no argument for this, and nodes of one CPU have no whole one left.
    dataset._logical_plan.dag.ray_remote_args["num_cpus"] = 0.25  # type: ignore[attr-defined]
    files = None if work.served.adapter is None else AdapterFiles.read(work.served.adapter)
    engines_per_node = -(-pool.num_workers // max(1, len(_cpus_of_nodes())))
    return dataset.map_batches(
        EngineActor,
        fn_constructor_args=(work, pool.on_gpu, engines_per_node, files, witness),
        batch_size=batch_rows,
        compute=ActorPoolStrategy(size=pool.num_workers),
        num_cpus=0.25,
        num_gpus=int(pool.on_gpu),
    )
