"""Owns attention of rows behind a shared prefix by torch's FlashAttention kernels: no padding, no masks, no copied prefix.

A row's queries attend causally to their own row and fully to the prefix; the two softmaxes are joined by their
log-sum-exps. The backward of both parts is FlashAttention's own, given the joined output and log-sum-exp, which are what a single
kernel over all keys would have kept: so both are exact. Source: FlashAttention-2, https://arxiv.org/abs/2307.08691, section 3.1.

Shapes: S tokens of all rows, P prefix, H heads, K key-value heads, D head width.
"""

from typing import Any

import torch
from torch import Tensor

from qlora.packing import Rows

_MAX_HEAD_WIDTH = 256


def supports(q_SHD: Tensor, rows: Rows, sliding_window: int | None, softcap: float | None) -> bool:
    """Whether the kernels compute this: 16-bit numbers on a GPU since Ampere, scores that are not capped, no window that hides anything."""
    width = q_SHD.shape[-1]
    return (q_SHD.is_cuda and q_SHD.dtype in (torch.bfloat16, torch.float16) and width % 8 == 0 and width <= _MAX_HEAD_WIDTH
            and torch.cuda.get_device_capability(q_SHD.device) >= (8, 0) and softcap is None
            and (sliding_window is None or sliding_window >= rows.prefix_length + rows.longest))


def flash_attend(q_SHD: Tensor, k_SKD: Tensor, v_SKD: Tensor, k_PKD: Tensor, v_PKD: Tensor, rows: Rows, scale: float) -> Tensor:
    """Attention [S, H, D] of rows behind a prefix (P may be 0), differentiable in all five tensors."""
    return _FlashRows.apply(q_SHD, k_SKD, v_SKD, k_PKD, v_PKD, rows, scale)  # type: ignore[no-any-return]


class _FlashRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, k_prefix: Tensor, v_prefix: Tensor, rows: Rows, scale: float) -> Tensor:
        out, lse_HS = _forward(q, k, v, (rows.bounds, rows.bounds), (rows.longest, rows.longest), True, scale)
        if rows.prefix_length:
            prefix_out, prefix_lse_HS = _forward(q, k_prefix, v_prefix, rows.outer_bounds, (rows.num_tokens, rows.prefix_length),
                                                 False, scale)
            share_SH1 = (prefix_lse_HS - lse_HS).sigmoid().t()[..., None]
            out, lse_HS = out.lerp(prefix_out, share_SH1.to(out.dtype)), torch.logaddexp(lse_HS, prefix_lse_HS)
        ctx.save_for_backward(q, k, v, k_prefix, v_prefix, out, lse_HS)
        ctx.rows, ctx.scale = rows, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, k_prefix, v_prefix, out, lse_HS = ctx.saved_tensors
        rows, scale = ctx.rows, ctx.scale
        dq, dk, dv = _backward(grad, q, k, v, out, lse_HS, (rows.bounds, rows.bounds), (rows.longest, rows.longest), True, scale)
        dk_prefix, dv_prefix = torch.zeros_like(k_prefix), torch.zeros_like(v_prefix)
        if rows.prefix_length:
            dq_prefix, dk_prefix, dv_prefix = _backward(grad, q, k_prefix, v_prefix, out, lse_HS, rows.outer_bounds,
                                                        (rows.num_tokens, rows.prefix_length), False, scale)
            dq = dq + dq_prefix
        return dq, dk, dv, dk_prefix, dv_prefix, None, None


def _forward(q: Tensor, k: Tensor, v: Tensor, bounds: tuple[Tensor, Tensor], longest: tuple[int, int], causal: bool,
             scale: float) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp [H, S])."""
    out, lse_HS, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *bounds, *longest, 0.0, causal, False, scale=scale)
    return out, lse_HS


def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse_HS: Tensor, bounds: tuple[Tensor, Tensor],
              longest: tuple[int, int], causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
    return torch.ops.aten._flash_attention_backward(  # type: ignore[no-any-return]
        grad.contiguous(), q, k, v, out, lse_HS, *bounds, *longest, 0.0, causal, no_dropout, no_dropout, scale=scale)
