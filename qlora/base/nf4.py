"""Owns how weights that stay in NF4 are dequantised when they are needed: by the faster one of two kernels.

They are bitsandbytes' and this project's (qlora.base.nf4_kernel). A card's first such base decides: the
project's is taken if it gives the same values to the last bit, and in less time.

Refuses to know passes and adapters.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qlora.base.device import triton_module

_kernel = triton_module("qlora.base.nf4_kernel")
_log = logging.getLogger(__name__)
_WARM_UP, _RUNS = 3, 10
_are_ours = dict[torch.device, bool]()  # whether a device's weights are dequantised by the project's kernel


def dequantise(weight: Any) -> Tensor:
    """Compute the values [OUT, IN] of a weight of bitsandbytes', in the dtype that it was quantised from."""
    if _are_ours.get(weight.device) and _kernel.supports(weight.quant_state):
        found: Tensor = _kernel.dequantise(weight.data, weight.quant_state)
        return found
    return _by_bitsandbytes(weight)


def choose_kernel(model: nn.Module) -> None:
    """Find out which kernel is the faster one for a model's weights in NF4, if it is on a GPU.

    The largest weight is dequantised by both.
    """
    weights: list[Any] = [one for one in model.parameters() if one.is_cuda and hasattr(one, "quant_state")]
    known = [one for one in weights if _kernel is not None and _kernel.supports(one.quant_state)]
    if not known or known[0].device in _are_ours:
        return
    weight = max(known, key=torch.numel)
    _are_ours[weight.device] = _is_better(weight)


def _is_better(weight: Any) -> bool:
    """Tell whether the project's kernel computes what bitsandbytes' does, in less time."""

    def ours() -> Tensor:
        found: Tensor = _kernel.dequantise(weight.data, weight.quant_state)
        return found

    def theirs() -> Tensor:
        return _by_bitsandbytes(weight)

    try:
        is_same = torch.equal(ours(), theirs())
        taken, before = (_milliseconds(one) for one in (ours, theirs))
    except Exception as error:  # whatever a version of Triton makes of a card that it does not fit
        _log.warning("bitsandbytes dequantises NF4: %s", error)
        return False
    shape = tuple(weight.quant_state.shape)
    _log.info("dequantising %s takes %.3f ms, by bitsandbytes %.3f; same: %s", shape, taken, before, is_same)
    return is_same and taken < before


def _milliseconds(call: Callable[[], Tensor]) -> float:
    """Measure what a call takes of the GPU's time."""
    for _ in range(_WARM_UP):
        call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(_RUNS):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / _RUNS


def _by_bitsandbytes(weight: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    found: Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return found
