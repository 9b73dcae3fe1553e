"""Owns the GPU kernel that computes the values of weights in NF4, in Triton, to the last bit as bitsandbytes.

One program computes the values of some blocks: it looks up their scale, which is quantised itself, and what
each half of a byte stands for. bitsandbytes launches three kernels: for scales, for their mean, for values.

Refuses to know layers.

Source: QLoRA, https://arxiv.org/abs/2305.14314, and bitsandbytes' format
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCKS = 64  # of a program


def supports(packed: Tensor, state: Any) -> bool:
    """Tell whether the kernel knows the format of a weight: its bytes and bitsandbytes' state of them."""
    size = state.blocksize
    is_known = packed.dtype == torch.uint8 and state.quant_type == "nf4" and len(state.shape) == 2
    return is_known and size >= 32 and size & (size - 1) == 0


def dequantise(packed: Tensor, state: Any) -> Tensor:
    """Compute the values [OUT, IN], in the dtype that they had, of bytes that hold two of them each."""
    out = torch.empty(state.shape, dtype=state.dtype, device=packed.device)
    scales, inner = state.absmax, state.state2 if state.nested else None
    num_blocks = triton.cdiv(out.numel(), state.blocksize)
    _dequantise[(triton.cdiv(num_blocks, _BLOCKS),)](
        packed,
        scales,
        scales if inner is None else inner.code,
        scales if inner is None else inner.absmax,
        scales if inner is None else state.offset,
        state.code,
        out,
        num_blocks,
        packed.numel(),
        out.numel(),
        BLOCKS=_BLOCKS,
        SIZE=state.blocksize,
        INNER_SIZE=0 if inner is None else inner.blocksize,
        num_warps=4,
        enable_fp_fusion=False,  # a product and a sum are rounded one after the other
    )
    return out


@triton.jit
def _dequantise(  # type: ignore[no-untyped-def]
    packed,
    scales,
    inner_code,
    inner_scales,
    offset,
    code,
    out,
    num_blocks,
    num_bytes,
    num_values,
    BLOCKS: tl.constexpr,
    SIZE: tl.constexpr,
    INNER_SIZE: tl.constexpr,
):
    """Compute the values of some blocks; INNER_SIZE: scales in a block of their own, 0 if they are plain."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    is_block = block < num_blocks
    scale = tl.load(scales + block, mask=is_block, other=0)
    if INNER_SIZE > 0:
        scale = tl.load(inner_code + scale.to(tl.int32))
        scale *= tl.load(inner_scales + block // INNER_SIZE, mask=is_block, other=0.0)
        scale += tl.load(offset)
    place = block[:, None] * (SIZE // 2) + tl.arange(0, SIZE // 2)[None, :]
    pair = tl.load(packed + place, mask=place < num_bytes, other=0).to(tl.int32)
    first, second = tl.load(code + (pair >> 4)), tl.load(code + (pair & 15))
    values = tl.interleave(first * scale[:, None], second * scale[:, None])
    place = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out + place, values.to(out.dtype.element_ty), mask=place < num_values)
