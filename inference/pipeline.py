"""Owns the Ray Data pipeline: encoded prompts -> a pool of engines -> (row, text) pairs as they are done.

Rows go in sorted by length, so that a batch holds rows of like length; each carries its index. Refuses to know files.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
import torch
from ray.data import ActorPoolStrategy, DataContext, from_items

from inference.engine import ServedModel, load_engine
from qlora.config import DecodingSettings

_BATCH_ROWS = {"cpu": 16, "gpu": 256}


class EngineActor:
    """A worker of the pool: one engine, loaded once."""

    def __init__(self, served: ServedModel, decoding: DecodingSettings, num_threads: int):
        torch.set_num_threads(num_threads)
        self.engine = load_engine(served, decoding)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Columns `index` and `prompt` (token ids) -> `index` and `text`."""
        prompts = [[int(token) for token in prompt] for prompt in batch["prompt"]]
        texts = dict(self.engine.generate(prompts))
        return {"index": batch["index"], "text": [texts[row] for row in range(len(prompts))]}


def default_workers() -> int:
    """One worker a GPU of the cluster; one in all if it has none."""
    return max(1, int(ray.cluster_resources().get("GPU", 0)))


def generate_texts(served: ServedModel, decoding: DecodingSettings, prompts: Mapping[int, Sequence[int]],
                   num_workers: int) -> Iterator[tuple[int, str]]:
    """(index, text) for each indexed prompt, in the order in which they are done. Needs a connected Ray."""
    DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    resources = ray.cluster_resources()
    on_gpu = resources.get("GPU", 0) >= 1
    batch_rows = _BATCH_ROWS["gpu" if on_gpu else "cpu"]
    rows = [{"index": index, "prompt": list(prompts[index])} for index in sorted(prompts, key=lambda index: (-len(prompts[index]), index))]
    num_threads = max(1, int(resources.get("CPU", 1)) // num_workers)
    dataset = from_items(rows, override_num_blocks=-(-len(rows) // batch_rows)).map_batches(
        EngineActor, fn_constructor_args=(served, decoding, num_threads), batch_size=batch_rows,
        compute=ActorPoolStrategy(size=num_workers), num_cpus=1, num_gpus=1 if on_gpu else 0)
    for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0):
        yield from zip(map(int, batch["index"]), map(str, batch["text"]), strict=True)
