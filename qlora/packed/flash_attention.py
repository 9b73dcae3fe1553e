"""Owns attention of rows behind a shared prefix by FlashAttention: no padding, no masks, no copied prefix.

A token attends causally to its own row and fully to its part's prefix. These are two calls of the kernel,
over different keys. A softmax over all keys follows from the two: FlashAttention also returns the log-sum-exp
of the scores, and the outputs are averaged in proportion to the exponentials of their log-sum-exps. The
backward of both calls is FlashAttention's own, given the joined output and log-sum-exp. Those are what a
single kernel over all keys would have kept, so gradients are exact too.

Refuses to know models.

Source: FlashAttention-2, https://arxiv.org/abs/2307.08691, section 3.1.
Shapes: T tokens of a stream, S tokens of rows, P prefix tokens, H heads, K key-value heads, D head width.
"""

from typing import Any

import torch
from torch import Tensor

from qlora.base.device import triton_module
from qlora.packed.stream import Rows, Stretches

join_kernel = triton_module("qlora.packed.join_kernel")
_MAX_HEAD_WIDTH = 256


def supports(q_SHD: Tensor, longest: int, sliding_window: int | None, softcap: float | None) -> bool:
    """Tell whether the kernels compute this attention.

    They take 16-bit numbers, on GPUs since Ampere, and know neither soft-capped scores nor a window. So a
    window must hide nothing: `longest` is the number of tokens of the longest row with its prefix.
    """
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
    """Attend from rows behind one prefix that is stored apart (P may be 0): [S, H, D], without gradients."""
    out, lse_HS = _forward(
        q_SHD,
        k_SKD,
        v_SKD,
        queries=rows.bounds,
        keys=rows.bounds,
        most_queries=rows.longest,
        most_keys=rows.longest,
        causal=True,
        scale=scale,
    )
    if not rows.prefix_length:
        return out
    prefix_out, prefix_lse_HS = _forward(
        q_SHD,
        k_PKD,
        v_PKD,
        queries=rows.as_one.bounds,
        keys=rows.prefix_row.bounds,
        most_queries=rows.as_one.longest,
        most_keys=rows.prefix_row.longest,
        causal=False,
        scale=scale,
    )
    out, _ = _joined(out, lse_HS, prefix_out, prefix_lse_HS)
    return out


@torch.no_grad()
def attend_prefix(q_SHD: Tensor, k_KPD: Tensor, v_KPD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attend from all rows to one prefix: output [S, H, D], contiguous, and log-sum-exp [H, S] in float32."""
    k, v = k_KPD.transpose(0, 1)[None], v_KPD.transpose(0, 1)[None]
    out, lse_1HS, *_ = torch.ops.aten._flash_attention_forward(
        q_SHD[None], k, v, None, None, len(q_SHD), k.shape[1], 0.0, False, False, scale=scale
    )
    return out[0].contiguous(), lse_1HS[0]


def flash_attend_stream(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, stretches: Stretches, scale: float
) -> Tensor:
    """Attend over a packed stream: [T, H, D], differentiable."""
    return _FlashStream.apply(q_THD, k_TKD, v_TKD, stretches, scale)  # type: ignore[no-any-return]


class _FlashStream(torch.autograd.Function):
    """Attention over a stream, with its gradient.

    All tokens of a part query its prefix, which is simplest for the kernel. Tokens that must not look at it
    are shielded: there the scores' log-sum-exp counts as minus infinity in the forward, which gives the
    prefix no weight, and as infinity in the backward, which makes gradients zero.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, at: Stretches, scale: float) -> Tensor:
        out, lse_HT = _forward(
            q,
            k,
            v,
            queries=at.rows,
            keys=at.rows,
            most_queries=at.longest_row,
            most_keys=at.longest_row,
            causal=True,
            scale=scale,
        )
        if at.longest_prefix:
            prefix_out, prefix_lse_HT = _forward(
                q,
                k.index_select(0, at.prefix_places_P),
                v.index_select(0, at.prefix_places_P),
                queries=at.parts,
                keys=at.prefixes,
                most_queries=at.longest_part,
                most_keys=at.longest_prefix,
                causal=False,
                scale=scale,
            )
            prefix_lse_HT.masked_fill_(at.alone_T, -torch.inf)
            out, lse_HT = _joined(out, lse_HT, prefix_out, prefix_lse_HT)
        ctx.save_for_backward(q, k, v, out, lse_HT)
        ctx.at = at
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse_HT = ctx.saved_tensors
        at: Stretches = ctx.at
        grad = grad.contiguous()
        dq, dk, dv = _backward(
            grad,
            q,
            k,
            v,
            out,
            lse_HT,
            queries=at.rows,
            keys=at.rows,
            most_queries=at.longest_row,
            most_keys=at.longest_row,
            causal=True,
            scale=ctx.scale,
        )
        if at.longest_prefix:
            places = at.prefix_places_P
            prefix_dq, prefix_dk, prefix_dv = _backward(
                grad,
                q,
                k.index_select(0, places),
                v.index_select(0, places),
                out,
                lse_HT.masked_fill(at.alone_T, torch.inf),
                queries=at.parts,
                keys=at.prefixes,
                most_queries=at.longest_part,
                most_keys=at.longest_prefix,
                causal=False,
                scale=ctx.scale,
            )
            dq.add_(prefix_dq)
            for whole, more in ((dk, prefix_dk), (dv, prefix_dv)):
                # Places differ from each other; index_add_, which can't know that, would add atomically.
                whole.index_copy_(0, places, whole.index_select(0, places).add_(more))
        return dq, dk, dv, None, None


def _joined(out: Tensor, lse_HS: Tensor, other_out: Tensor, other_lse_HS: Tensor) -> tuple[Tensor, Tensor]:
    """Join attentions of the same queries over different keys to one over all keys: output, log-sum-exp."""
    if join_kernel is not None:
        return join_kernel.join(out, lse_HS, other_out, other_lse_HS)  # type: ignore[no-any-return]
    share_SH1 = (other_lse_HS - lse_HS).sigmoid().t()[..., None]
    return out.lerp(other_out, share_SH1.to(out.dtype)), torch.logaddexp(lse_HS, other_lse_HS)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    queries: Tensor,
    keys: Tensor,
    most_queries: int,
    most_keys: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend from each stretch of queries to its stretch of keys; return output and log-sum-exp [H, S].

    `queries` and `keys` are the stretches' bounds, `most_queries` and `most_keys` the lengths of the longest.
    """
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
    *,
    queries: Tensor,
    keys: Tensor,
    most_queries: int,
    most_keys: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `_forward` for queries, keys and values."""
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
