"""Owns the GPU kernel that joins attentions of the same queries over different keys to one, in Triton.

Refuses to know where the keys lie.

Source: https://arxiv.org/abs/2205.14135, whose blocks of keys are joined in the same way
Shapes: S queries, H heads, D numbers of a head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_NUMBERS = 8192  # of a program


def join(out: Tensor, lse_HS: Tensor, other_out: Tensor, other_lse_HS: Tensor) -> tuple[Tensor, Tensor]:
    """Join two attentions, out [S, H, D] and log-sum-exp [H, S] in float32; returns those over all keys.

    Where a log-sum-exp is minus infinity its attention, of finite numbers, counts for nothing; it is not so
    in both. What is returned is contiguous.
    """
    num_queries, num_heads, width = out.shape
    out = out.contiguous()  # FlashAttention gives it the strides of its queries
    lse_HS = lse_HS.contiguous()
    joined, lse = torch.empty_like(out), torch.empty_like(lse_HS)
    block = triton.next_power_of_2(width)
    rows = max(1, _NUMBERS // block)
    _join[(triton.cdiv(num_queries * num_heads, rows),)](
        out,
        lse_HS,
        other_out.contiguous(),
        other_lse_HS.contiguous(),
        joined,
        lse,
        num_queries,
        num_heads,
        D=width,
        BLOCK_D=block,
        ROWS=rows,
        num_warps=4,
    )
    return joined, lse


@triton.jit
def _join(  # type: ignore[no-untyped-def]
    out,
    lse,
    other_out,
    other_lse,
    joined,
    joined_lse,
    S,
    H,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Join some rows of D numbers: a row is a query's, at one head."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    query, head, is_row = row // H, row % H, row < S * H
    at = head * S + query
    first = tl.load(lse + at, mask=is_row, other=0.0)
    second = tl.load(other_lse + at, mask=is_row, other=0.0)
    most = tl.maximum(first, second)
    whole = most + tl.log(tl.exp(first - most) + tl.exp(second - most))
    tl.store(joined_lse + at, whole, mask=is_row)
    d = tl.arange(0, BLOCK_D)
    place, inside = row.to(tl.int64)[:, None] * D + d[None, :], is_row[:, None] & (d < D)[None, :]
    share = tl.exp(second - whole)[:, None]
    one = tl.load(out + place, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(other_out + place, mask=inside, other=0.0).to(tl.float32)
    one += share * (other - one)
    tl.store(joined + place, one.to(joined.dtype.element_ty), mask=inside)
