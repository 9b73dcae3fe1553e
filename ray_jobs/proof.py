"""Owns the proof that a registered adapter is the one that was measured: what the tracking server gives back is loaded in a new
process, where a trial would run, and must give the reported perplexity."""

from collections.abc import Sequence

from qlora.config import BaseModelSettings
from qlora.perplexity import mean_perplexity
from qlora.prompts import EncodedExample
from ray_jobs.device_work import Worker, adapter_files, measure_perplexities
from tracking.registry import fetch_adapter

_TOLERANCES = {"float32": 1e-3, "bfloat16": 1e-2}  # merged weights are rounded to the dtype


def prove(worker: Worker, model_uri: str, base: BaseModelSettings, public: Sequence[EncodedExample], expected: float) -> None:
    """Raise RuntimeError unless the adapter at `model_uri` on `base` gives the expected public perplexity in the worker's process."""
    values, dtype = worker.do(measure_perplexities, base, adapter_files(fetch_adapter(model_uri).folder), list(public))
    found = mean_perplexity(values)
    if abs(found / expected - 1) > _TOLERANCES[dtype]:
        raise RuntimeError(f"{model_uri} gives public perplexity {found:.5g} when it is loaded back, not the reported {expected:.5g}; "
                           "it is not registered")
