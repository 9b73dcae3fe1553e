"""Owns attention of rows behind a shared prefix by torch's FlashAttention kernels: no padding, no masks, no copied prefix.

A token attends causally to its own row and fully to its part's prefix; the two softmaxes are joined by their log-sum-exps.
The backward of both is FlashAttention's own, given the joined output and log-sum-exp, which are what a single kernel over
all keys would have kept: so both are exact. Source: FlashAttention-2, https://arxiv.org/abs/2307.08691, section 3.1.

Shapes: T tokens of a stream, S tokens of rows, P prefix, H heads, K key-value heads, D head width.
"""

from typing import Any

import torch
from torch import Tensor

from qlora.packed.stream import Rows, Stretches

_MAX_HEAD_WIDTH = 256


def supports(q_SHD: Tensor, longest: int, sliding_window: int | None, softcap: float | None) -> bool:
    """Whether the kernels compute this: 16-bit numbers on a GPU since Ampere, scores that are not capped, no window that hides
    anything of the longest row with its prefix (in tokens)."""
    width = q_SHD.shape[-1]
    return (
        q_SHD.is_cuda
        and q_SHD.dtype in (torch.bfloat16, torch.float16)
        and width % 8 == 0
        and width <= _MAX_HEAD_WIDTH
        and torch.cuda.get_device_capability(q_SHD.device) >= (8, 0)
        and softcap is None
        and (sliding_window is None or sliding_window >= longest)
    )


@torch.no_grad()
def flash_attend(
    q_SHD: Tensor, k_SKD: Tensor, v_SKD: Tensor, k_PKD: Tensor, v_PKD: Tensor, rows: Rows, scale: float
) -> Tensor:
    """Attention [S, H, D] of rows behind one prefix that is stored apart (P may be 0). Without gradients."""
    out, lse_HS = _forward(
        q_SHD, k_SKD, v_SKD, rows.bounds, rows.bounds, rows.longest, rows.longest, True, scale
    )
    if not rows.prefix_length:
        return out
    one, prefix = rows.as_one, rows.prefix_row
    behind = _forward(
        q_SHD, k_PKD, v_PKD, one.bounds, prefix.bounds, one.longest, prefix.longest, False, scale
    )
    return _joined(out, lse_HS, *behind)[0]


def flash_attend_stream(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, stretches: Stretches, scale: float
) -> Tensor:
    """Attention [T, H, D] over a packed stream, differentiable."""
    return _FlashStream.apply(q_THD, k_TKD, v_TKD, stretches, scale)  # type: ignore[no-any-return]


class _FlashStream(torch.autograd.Function):
    """Tokens that look at no prefix are shielded: their scores there count as minus infinity, and their gradients as nothing."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, at: Stretches, scale: float) -> Tensor:
        out, lse_HT = _forward(q, k, v, at.rows, at.rows, at.longest_row, at.longest_row, True, scale)
        if at.longest_prefix:
            places = at.prefix_places_P
            behind, lse_behind_HT = _forward(
                q,
                k.index_select(0, places),
                v.index_select(0, places),
                at.parts,
                at.prefixes,
                at.longest_part,
                at.longest_prefix,
                False,
                scale,
            )
            out, lse_HT = _joined(out, lse_HT, behind, lse_behind_HT.masked_fill_(at.alone_T, -torch.inf))
        ctx.save_for_backward(q, k, v, out, lse_HT)
        ctx.at, ctx.scale = at, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse_HT = ctx.saved_tensors
        at, scale, grad = ctx.at, ctx.scale, grad.contiguous()
        dq, dk, dv = _backward(
            grad, q, k, v, out, lse_HT, at.rows, at.rows, at.longest_row, at.longest_row, True, scale
        )
        if at.longest_prefix:
            places = at.prefix_places_P
            more_q, *more = _backward(
                grad,
                q,
                k.index_select(0, places),
                v.index_select(0, places),
                out,
                lse_HT.masked_fill(at.alone_T, torch.inf),
                at.parts,
                at.prefixes,
                at.longest_part,
                at.longest_prefix,
                False,
                scale,
            )
            dq.add_(more_q)
            for whole, part in zip((dk, dv), more, strict=True):
                # index_add_ would accumulate atomically
                whole.index_copy_(0, places, whole.index_select(0, places).add_(part))
        return dq, dk, dv, None, None


def _joined(out: Tensor, lse_HS: Tensor, other_out: Tensor, other_lse_HS: Tensor) -> tuple[Tensor, Tensor]:
    """Two attentions of the same queries over different keys as one over all keys."""
    share_SH1 = (other_lse_HS - lse_HS).sigmoid().t()[..., None]
    return out.lerp(other_out, share_SH1.to(out.dtype)), torch.logaddexp(lse_HS, other_lse_HS)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Tensor,
    keys: Tensor,
    most_queries: int,
    most_keys: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp [H, S]) of each stretch of queries over its stretch of keys, given by their bounds."""
    out, lse_HS, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, queries, keys, most_queries, most_keys, 0.0, causal, False, scale=scale
    )
    return out, lse_HS


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse_HS: Tensor,
    queries: Tensor,
    keys: Tensor,
    most_queries: int,
    most_keys: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
    return torch.ops.aten._flash_attention_backward(  # type: ignore[no-any-return]
        grad,
        q,
        k,
        v,
        out,
        lse_HS,
        queries,
        keys,
        most_queries,
        most_keys,
        0.0,
        causal,
        no_dropout,
        no_dropout,
        scale=scale,
    )
