"""Owns attention of rows behind a shared prefix by torch's FlashAttention kernels: no padding, no masks, no copied prefix.

A token attends causally to its own row and fully to its part's prefix; the two softmaxes are joined by their log-sum-exps.
The backward of both is FlashAttention's own, given the joined output and log-sum-exp, which are what a single kernel over
all keys would have kept: so both are exact. Source: FlashAttention-2, https://arxiv.org/abs/2307.08691, section 3.1.

Shapes: T tokens of a stream, S tokens of rows, P prefix, H heads, K key-value heads, D head width.
"""

from typing import Any

import torch
from torch import Tensor

from qlora.packing import PackedBatch, Rows

_MAX_HEAD_WIDTH = 256


def supports(q_SHD: Tensor, longest: int, sliding_window: int | None, softcap: float | None) -> bool:
    """Whether the kernels compute this: 16-bit numbers on a GPU since Ampere, scores that are not capped, no window that hides
    anything of the longest row with its prefix (in tokens)."""
    width = q_SHD.shape[-1]
    return (q_SHD.is_cuda and q_SHD.dtype in (torch.bfloat16, torch.float16) and width % 8 == 0 and width <= _MAX_HEAD_WIDTH
            and torch.cuda.get_device_capability(q_SHD.device) >= (8, 0) and softcap is None
            and (sliding_window is None or sliding_window >= longest))


@torch.no_grad()
def flash_attend(q_SHD: Tensor, k_SKD: Tensor, v_SKD: Tensor, k_PKD: Tensor, v_PKD: Tensor, rows: Rows, scale: float) -> Tensor:
    """Attention [S, H, D] of rows behind one prefix that is stored apart (P may be 0). Without gradients."""
    out, lse_HS = _forward(q_SHD, k_SKD, v_SKD, rows, rows, True, scale)
    if not rows.prefix_length:
        return out
    return _joined(out, lse_HS, *_forward(q_SHD, k_PKD, v_PKD, rows.as_one, rows.prefix_row, False, scale))[0]


def flash_attend_packed(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, packed: PackedBatch, scale: float) -> Tensor:
    """Attention [T, H, D] over a PackedBatch, differentiable."""
    return _FlashPacked.apply(q_THD, k_TKD, v_TKD, packed, scale)  # type: ignore[no-any-return]


class _FlashPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, packed: PackedBatch, scale: float) -> Tensor:
        out, lse_HT = _forward(q, k, v, packed.rows, packed.rows, True, scale)
        if any(part.prefix.num_tokens for part in packed.parts):
            suffix, prefix = packed.prefixed.suffix_places, packed.prefixed.prefix_places
            behind = _forward(_take(q, suffix), _take(k, prefix), _take(v, prefix), packed.prefixed.suffixes, packed.prefixed.prefixes,
                              False, scale)
            joined, lse_HS = _joined(_take(out, suffix), _take(lse_HT, suffix, dim=1), *behind)
            _put(out, suffix, joined)
            _put(lse_HT, suffix, lse_HS, dim=1)
        ctx.save_for_backward(q, k, v, out, lse_HT)
        ctx.packed, ctx.scale = packed, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse_HT = ctx.saved_tensors
        packed, scale, grad = ctx.packed, ctx.scale, grad.contiguous()
        dq, dk, dv = _backward(grad, q, k, v, out, lse_HT, packed.rows, packed.rows, True, scale)
        if any(part.prefix.num_tokens for part in packed.parts):
            suffix, prefix = packed.prefixed.suffix_places, packed.prefixed.prefix_places
            more = _backward(_take(grad, suffix), _take(q, suffix), _take(k, prefix), _take(v, prefix), _take(out, suffix),
                             _take(lse_HT, suffix, dim=1).contiguous(), packed.prefixed.suffixes, packed.prefixed.prefixes, False, scale)
            for whole, places, part in zip((dq, dk, dv), (suffix, prefix, prefix), more, strict=True):
                _add(whole, places, part)
        return dq, dk, dv, None, None


def _joined(out: Tensor, lse_HS: Tensor, other_out: Tensor, other_lse_HS: Tensor) -> tuple[Tensor, Tensor]:
    """Two attentions of the same queries over different keys as one over all keys."""
    share_SH1 = (other_lse_HS - lse_HS).sigmoid().t()[..., None]
    return out.lerp(other_out, share_SH1.to(out.dtype)), torch.logaddexp(lse_HS, other_lse_HS)


def _take(tensor: Tensor, places: Tensor | slice, dim: int = 0) -> Tensor:
    return tensor.narrow(dim, places.start, places.stop - places.start) if isinstance(places, slice) else tensor.index_select(dim, places)


def _put(tensor: Tensor, places: Tensor | slice, values: Tensor, dim: int = 0) -> None:
    if isinstance(places, slice):
        _take(tensor, places, dim).copy_(values)
    else:
        tensor.index_copy_(dim, places, values)


def _add(tensor: Tensor, places: Tensor | slice, values: Tensor) -> None:
    if isinstance(places, slice):
        _take(tensor, places).add_(values)
    else:
        tensor.index_copy_(0, places, tensor.index_select(0, places).add_(values))  # index_add_ would accumulate atomically


def _forward(q: Tensor, k: Tensor, v: Tensor, queries: Rows, keys: Rows, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp [H, S]) of each row of queries over its row of keys."""
    out, lse_HS, *_ = torch.ops.aten._flash_attention_forward(q, k, v, queries.bounds, keys.bounds, queries.longest, keys.longest, 0.0,
                                                              causal, False, scale=scale)
    return out, lse_HS


def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse_HS: Tensor, queries: Rows, keys: Rows, causal: bool,
              scale: float) -> tuple[Tensor, Tensor, Tensor]:
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
    return torch.ops.aten._flash_attention_backward(  # type: ignore[no-any-return]
        grad, q, k, v, out, lse_HS, queries.bounds, keys.bounds, queries.longest, keys.longest, 0.0, causal, no_dropout, no_dropout,
        scale=scale)
