"""Owns the base that a worker process keeps: loaded once, then lent to one trial after another.

Ray reuses a worker for its next trial, so a sweep loads the base once a worker and not once a trial.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

from peft import PeftModel
from transformers import PreTrainedModel

from qlora.adapters import attach_adapter, detach_adapter
from qlora.attention import use_packed_attention
from qlora.base_model import load_base
from qlora.config import BaseModelSettings, TrialSettings
from qlora.norms import fuse_norms


@lru_cache(maxsize=1)
def resident_base(settings: BaseModelSettings) -> PreTrainedModel:
    """This process's base on its device, with packed attention. Loads on the first call."""
    model = load_base(settings)
    use_packed_attention(model)
    if model.device.type == "cuda":
        fuse_norms(model)
    return model


@contextmanager
def lent_base(base: BaseModelSettings, settings: TrialSettings) -> Iterator[PeftModel]:
    """The resident base with a fresh adapter of a trial; the adapter is taken off again at the end, however that comes."""
    _return_free_memory()
    adapted = attach_adapter(resident_base(base), settings, base.name)
    try:
        yield adapted
    finally:
        detach_adapter(adapted)


def _return_free_memory() -> None:
    """Give the memory that earlier trials freed back to the system.

    Ray runs each trial in a new thread, glibc gives each thread a heap of its own, and freed activations (gigabytes on a CPU)
    would stay in the old heaps: a worker would grow by a trial's peak with every trial.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
