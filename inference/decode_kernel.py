"""Owns the GPU kernel of a decode step's attention, in Triton.

One program for each example and key-value head reads the cached keys once for all beams. The sums are those
that `inference.cached_attention.DecodePass` computes in plain torch, without its masked columns: each example
reads what it has. Which of the fed columns any beam sees is listed once for all layers. The prefix is read by
FlashAttention's own kernel where that can: once for all rows.

Refuses to know the search.

Shapes: as in inference.cached_attention; W = T * K fed columns.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from inference.decode_programs import decode, list_seen
from qlora.packed import flash_attention

_MOST_BEAMS = 31  # bits of a sign-free int32
_LISTED = 256  # columns at once
# Columns read at once, warps and stages: of rows on tensor cores, and of one row alone.
_TOGETHER, _ALONE = (64, 4, 2), (8, 1, 3)


@dataclass(frozen=True)
class SeenColumns:
    """The fed columns that any beam sees: [E, W] int32, of which the first `counts_E` of an example count.

    beams_EW: the beams that see each column, as bits. With one beam they are not listed: it sees all.
    """

    columns_EW: Tensor
    beams_EW: Tensor
    counts_E: Tensor


def supports(q_THD: Tensor, num_beams: int) -> bool:
    """Tell whether the kernel takes such queries: on a GPU, with a head width that is a power of two."""
    return q_THD.is_cuda and q_THD.shape[-1] in (16, 32, 64, 128, 256) and num_beams <= _MOST_BEAMS


def seen_columns(ancestry_EKT: Tensor, fed_E: Tensor) -> SeenColumns:
    """List the columns that beams see in a step, which all its layers share."""
    e, k, t = ancestry_EKT.shape
    columns_EW = torch.empty(e, t * k, dtype=torch.int32, device=fed_E.device)
    seen = SeenColumns(columns_EW, torch.empty_like(columns_EW), columns_EW.new_empty(e))
    if k > 1:
        list_seen[(e,)](
            ancestry_EKT.contiguous(), fed_E, seen.columns_EW, seen.beams_EW, seen.counts_E, t, K=k, W=_LISTED
        )
    return seen


def decode_attention(
    q_THD: Tensor,
    k_TJD: Tensor,
    v_TJD: Tensor,
    prefix: Tensor,
    prompts: Tensor,
    fed: Tensor,
    own_E: Tensor,
    fed_E: Tensor,
    seen: SeenColumns,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attend from every beam's new token at one layer: [T, H, D].

    First, the new keys and values are written to `fed`, behind the tokens that each example was fed before,
    fed_E [E]. prefix [2, J, P, D], prompts [2, E, J, L, D] and fed [2, E, J, T, K, D] are one layer's views
    of the stores.
    """
    max_steps, k = fed.shape[3:5]
    j = k_TJD.shape[1]
    h, d = q_THD.shape[1:]
    q, k_new, v_new = q_THD.contiguous(), k_TJD.contiguous(), v_TJD.contiguous()
    longest = prefix.shape[2] + prompts.shape[3] + max_steps
    is_started = prefix.shape[2] > 0 and flash_attention.supports(q, longest, sliding_window, softcap)
    out, lse_HT = (
        flash_attention.attend_prefix(q, prefix[0], prefix[1], scale)
        if is_started
        else (torch.empty_like(q), q)
    )
    rows = k * h // j
    columns, warps, stages = _TOGETHER if rows > 1 else _ALONE
    decode[(len(own_E), j)](
        q,
        k_new,
        v_new,
        prefix,
        prompts,
        fed,
        own_E,
        fed_E,
        seen.columns_EW,
        seen.beams_EW,
        seen.counts_E,
        out,
        lse_HT,
        scale,
        softcap or 0.0,
        prefix.shape[2],
        prompts.shape[3],
        max_steps,
        prefix.stride(0),
        prompts.stride(0),
        fed.stride(0),
        J=j,
        K=k,
        G=h // j,
        D=d,
        M=max(16, triton.next_power_of_2(rows)),
        KP=triton.next_power_of_2(k),
        STARTED=is_started,
        WINDOW=sliding_window or 0,
        CAPPED=softcap is not None,
        C=columns,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=warps,
        num_stages=stages,
    )
    return out
