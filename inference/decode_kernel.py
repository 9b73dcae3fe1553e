"""Owns the GPU kernel of a decode step's attention, in Triton.

One program for each example and key-value head reads every cached key once, for all beams. The sums are those
that `inference.cached_attention.DecodePass` computes in plain torch, without its masked columns: each example
reads what it has. Its columns are three stretches (the prefix, the example's own prompt tokens, and what its
beams were fed), which are joined by the online softmax of FlashAttention.

Refuses to know the search.

Shapes: as in inference.cached_attention; M = K * G query rows, rounded up to a power of two, at least 16.
Source: FlashAttention, https://arxiv.org/abs/2205.14135
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS, _WARPS, _STAGES = 32, 4, 3


def supports(q_THD: Tensor) -> bool:
    """Tell whether the kernel takes such queries: on a GPU, with a head width that is a power of two."""
    return q_THD.is_cuda and q_THD.shape[-1] in (16, 32, 64, 128, 256)


def decode_attention(
    q_THD: Tensor,
    k_TJD: Tensor,
    v_TJD: Tensor,
    prefix: Tensor,
    prompts: Tensor,
    fed: Tensor,
    own_E: Tensor,
    steps_E: Tensor,
    ancestry_EKT: Tensor,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attend from every beam's new token at one layer: [T, H, D].

    First, the new keys and values are written to `fed` at each example's step. prefix [2, J, P, D], prompts
    [2, E, J, L, D] and fed [2, E, J, T, K, D] are one layer's views of the stores.
    """
    e, k, t = ancestry_EKT.shape
    j = k_TJD.shape[1]
    h, d = q_THD.shape[1:]
    q, k_new, v_new = q_THD.contiguous(), k_TJD.contiguous(), v_TJD.contiguous()
    out = torch.empty_like(q)
    rows = k * h // j
    _decode[(e, j)](
        q,
        k_new,
        v_new,
        prefix,
        prompts,
        fed,
        own_E,
        steps_E,
        ancestry_EKT,
        out,
        scale,
        softcap or 0.0,
        prefix.shape[2],
        prompts.shape[3],
        t,
        prefix.stride(0),
        prompts.stride(0),
        fed.stride(0),
        J=j,
        K=k,
        G=h // j,
        D=d,
        M=max(16, triton.next_power_of_2(rows)),
        KP=triton.next_power_of_2(k),
        WINDOW=sliding_window or 0,
        CAPPED=softcap is not None,
        C=_COLUMNS,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=_WARPS,
        num_stages=_STAGES,
    )
    return out


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    q,
    keys_ptr,
    values_ptr,
    row_beam,
    row_live,
    ancestry_ptr,
    num_columns,
    place,
    own,
    query_place,
    most,
    total,
    acc,
    scale,
    softcap,
    steps_stride,
    IS_FED: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add columns to the running softmax (most, total, acc); `place` is the first column's position."""
    channel = tl.arange(0, D)
    for start in range(0, num_columns, C):
        column = start + tl.arange(0, C)
        live = column < num_columns
        if IS_FED:
            step = column // K
            owner = tl.load(
                ancestry_ptr + row_beam[:, None] * steps_stride + step[None, :],
                mask=row_live[:, None] & live[None, :],
                other=-1,
            )
            seen = owner == (column % K)[None, :]
        else:
            step = column
            seen = row_live[:, None] & live[None, :]
        if WINDOW > 0:
            seen = seen & ((query_place - (place + step)) < WINDOW)[None, :]
        if IS_FED:  # most old rows are no beam's ancestors any more, and are not even read
            live = tl.max(seen.to(tl.int32), 0) > 0
        keys = tl.load(keys_ptr + column[:, None] * D + channel[None, :], mask=live[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale
        if CAPPED:
            scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(scores - safe[:, None])
        shrink = tl.exp(most - safe)
        total = total * shrink + tl.sum(weights, 1)
        values = tl.load(values_ptr + column[:, None] * D + channel[None, :], mask=live[:, None], other=0.0)
        acc = acc * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
        most = higher
    return most, total, acc


@triton.jit
def _decode(  # type: ignore[no-untyped-def]
    q_ptr,
    k_new_ptr,
    v_new_ptr,
    prefix_ptr,
    prompts_ptr,
    fed_ptr,
    own_ptr,
    steps_ptr,
    ancestry_ptr,
    out_ptr,
    scale,
    softcap,
    num_prefix,
    max_own,
    max_steps,
    prefix_kv,
    prompts_kv,
    fed_kv,
    J: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    KP: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    example = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    own = tl.load(own_ptr + example)
    step = tl.minimum(tl.load(steps_ptr + example), max_steps - 1)
    channel = tl.arange(0, D)

    # Every beam's new key and value, into the row of this step.
    beam = tl.arange(0, KP)
    fed_base = (example * J + head) * max_steps * K * D
    source = ((example * K + beam) * J + head)[:, None] * D + channel[None, :]
    target = fed_base + (step * K + beam)[:, None] * D + channel[None, :]
    tl.store(
        fed_ptr + target,
        tl.load(k_new_ptr + source, mask=(beam < K)[:, None], other=0.0),
        mask=(beam < K)[:, None],
    )
    tl.store(
        fed_ptr + fed_kv + target,
        tl.load(v_new_ptr + source, mask=(beam < K)[:, None], other=0.0),
        mask=(beam < K)[:, None],
    )
    tl.debug_barrier()

    row = tl.arange(0, M)
    row_live = row < K * G
    row_beam = example * K + row // G
    q_offset = (row_beam * J * G + head * G + row % G)[:, None] * D + channel[None, :]
    q = tl.load(q_ptr + q_offset, mask=row_live[:, None], other=0.0)
    most = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, D), tl.float32)
    query_place = num_prefix + own + step
    prefix_base = head * num_prefix * D
    prompt_base = (example * J + head) * max_own * D
    most, total, acc = _attend(
        q,
        prefix_ptr + prefix_base,
        prefix_ptr + prefix_kv + prefix_base,
        row_beam,
        row_live,
        ancestry_ptr,
        num_prefix,
        0,
        own,
        query_place,
        most,
        total,
        acc,
        scale,
        softcap,
        max_steps,
        False,
        K,
        D,
        WINDOW,
        CAPPED,
        C,
        PRECISION,
    )
    most, total, acc = _attend(
        q,
        prompts_ptr + prompt_base,
        prompts_ptr + prompts_kv + prompt_base,
        row_beam,
        row_live,
        ancestry_ptr,
        own,
        num_prefix,
        own,
        query_place,
        most,
        total,
        acc,
        scale,
        softcap,
        max_steps,
        False,
        K,
        D,
        WINDOW,
        CAPPED,
        C,
        PRECISION,
    )
    most, total, acc = _attend(
        q,
        fed_ptr + fed_base,
        fed_ptr + fed_kv + fed_base,
        row_beam,
        row_live,
        ancestry_ptr,
        (step + 1) * K,
        num_prefix + own,
        own,
        query_place,
        most,
        total,
        acc,
        scale,
        softcap,
        max_steps,
        True,
        K,
        D,
        WINDOW,
        CAPPED,
        C,
        PRECISION,
    )
    tl.store(
        out_ptr + q_offset, (acc / tl.maximum(total, 1e-38)[:, None]).to(q.dtype), mask=row_live[:, None]
    )
