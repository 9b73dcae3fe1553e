"""Owns how weights that stay in NF4 are dequantised when they are needed: by the faster one of two kernels.

They are bitsandbytes' and this project's (qlora.base.nf4_kernel). A card's first such base decides: the
project's is taken if it gives the same values to the last bit, and in less time. In inference bitsandbytes
multiplies by weights that it dequantises on the way; from how many rows on it is faster to dequantise them
first is measured, too.

Refuses to know passes and adapters.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora.base.device import triton_module

_kernel = triton_module("qlora.base.nf4_kernel")
_log = logging.getLogger(__name__)
_WARM_UP, _RUNS = 3, 10
_ROWS = (16, 64, 256, 1024)
_are_ours = dict[torch.device, bool]()  # whether a device's weights are dequantised by the project's kernel


def dequantise(weight: Any) -> Tensor:
    """Compute the values [OUT, IN] of a weight of bitsandbytes', in the dtype that it was quantised from."""
    if _are_ours.get(weight.device) and _kernel.supports(weight.data, weight.quant_state):
        found: Tensor = _kernel.dequantise(weight.data, weight.quant_state)
        return found
    return _by_bitsandbytes(weight)


def choose_kernel(model: nn.Module) -> None:
    """Find out which kernel is the faster one for a model's weights in NF4, if it is on a GPU.

    The largest weight is dequantised by both.
    """
    weights: list[Any] = [one for one in model.parameters() if one.is_cuda and hasattr(one, "quant_state")]
    known = [one for one in weights if _kernel is not None and _kernel.supports(one.data, one.quant_state)]
    if not known or known[0].device in _are_ours:
        return
    weight = max(known, key=torch.numel)
    _are_ours[weight.device] = _is_better(weight)


def quicken_layers(model: nn.Module) -> int | None:
    """Let layers in NF4 multiply many rows by weights that are dequantised first, where that is faster.

    Their gradients stay bitsandbytes'. Returns from how many rows on they do; None if they never do.
    """
    from bitsandbytes.nn import Linear4bit

    choose_kernel(model)
    layers: list[Any] = [one for one in model.modules() if isinstance(one, Linear4bit)]
    if not layers:
        return None
    largest = max(layers, key=lambda one: one.in_features * one.out_features)
    try:
        least = _least_rows(largest)
    except Exception as error:  # memory that is short, or a shape that a version of it does not fit
        _log.warning("layers in NF4 multiply in bitsandbytes' way: %s", error)
        return None
    if least is not None:
        for layer in layers:
            layer.forward = partial(_multiply, layer, layer.forward, least)
    return least


def _multiply(layer: Any, own: Callable[[Tensor], Tensor], least_rows: int, x: Tensor) -> Tensor:
    """Multiply x [..., IN] -> [..., OUT] by a layer, in its own way or by dequantised weights."""
    is_own_dtype = layer.compute_dtype in (None, x.dtype)
    if x.numel() < least_rows * x.shape[-1] or torch.is_grad_enabled() or not is_own_dtype:
        return own(x)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.linear(x, dequantise(layer.weight).to(x.dtype), bias)


@torch.no_grad()
def _least_rows(layer: Any) -> int | None:
    """Measure from how many rows on dequantising first is faster, for all that were tried."""
    least = None
    dtype = layer.compute_dtype or layer.weight.quant_state.dtype
    for rows in reversed(_ROWS):
        x = torch.zeros(rows, layer.in_features, dtype=dtype, device=layer.weight.device)
        ways = (partial(_multiply, layer, layer.forward, 0, x), partial(layer.forward, x))
        first, own = (_milliseconds(way) for way in ways)
        _log.info("%d rows take %.3f ms, in bitsandbytes' way %.3f", rows, first, own)
        if first >= own:
            break
        least = rows
    return least


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
