"""Owns the proof that a registered adapter is the one that was measured: what the tracking server gives back is loaded in a new
process, where a trial would run, and must give the reported perplexity."""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from qlora.adapters import ADAPTER_FILES
from qlora.config import BaseModelSettings
from qlora.perplexity import mean_perplexity
from qlora.prompts import EncodedExample
from tracking.registry import fetch_adapter

_TOLERANCES = {"float32": 1e-3, "bfloat16": 1e-2}  # merged weights are rounded to the dtype


def prove(model_uri: str, base: BaseModelSettings, public: Sequence[EncodedExample], expected: float, shares: dict[str, float]) -> None:
    """Raise RuntimeError unless the adapter at `model_uri` on `base` gives the expected public perplexity. `shares`: of CPUs and GPUs,
    as a trial asks for."""
    folder = fetch_adapter(model_uri).folder
    files = {name: (folder / name).read_bytes() for name in ADAPTER_FILES}
    task = ray.remote(num_cpus=shares["CPU"], num_gpus=shares["GPU"], max_calls=1)(_measure)
    found, dtype = ray.get(task.remote(files, base, list(public)))
    if abs(found / expected - 1) > _TOLERANCES[dtype]:
        raise RuntimeError(f"{model_uri} gives public perplexity {found:.5g} when it is loaded back, not the reported {expected:.5g}; "
                           "it is not registered")


def _measure(files: dict[str, bytes], base: BaseModelSettings, public: list[EncodedExample]) -> tuple[float, str]:
    """(public perplexity of an adapter given by its files, the dtype it was served in)."""
    from qlora.attention import use_packed_attention
    from qlora.base_model import default_token_budget
    from qlora.perplexity import example_perplexities
    from qlora.serving import load_served
    _wait_for_memory()
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        model: Any = load_served(base, folder)
    use_packed_attention(model)
    values = example_perplexities(model, public, default_token_budget())
    return mean_perplexity(values), str(model.dtype).removeprefix("torch.")


def _wait_for_memory() -> None:
    """Until the sweep's hosts, which have just ended, have given all of the GPU's memory back."""
    import torch
    free = -1
    while torch.cuda.is_available() and (now := torch.cuda.mem_get_info()[0]) > free:
        free = now
        time.sleep(1)
