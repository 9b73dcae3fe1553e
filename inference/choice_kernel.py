"""Owns the GPU kernels that find the likeliest tokens of many rows, in Triton.

A row's logits are read once: for its log-sum-exp and for the greatest of each chunk of neighbours. What is
chosen then is looked for in one chunk at a time. Sorting and log-probabilities of a whole vocabulary, as
torch's `topk` and `log_softmax` make them, would read it several times.

Refuses to know beams and scores.

Shapes: X rows, V vocabulary, C tokens chosen of each row, B blocks and H chunks of a row.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHUNK = 128
_BLOCK = 4096


def supports(logits_XV: Tensor) -> bool:
    """Tell whether the kernels take such logits: on a GPU, each row in one piece."""
    return logits_XV.is_cuda and logits_XV.stride(1) == 1


def likeliest(
    logits_XV: Tensor, num_chosen: int, banned: tuple[int, ...] = (), banned_X: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Find each row's likeliest tokens, best first, of equal ones the first.

    `banned`: tokens that are not to be chosen in the rows where banned_X [X] is true; there they have
    log-probability -inf, and count in the others' as ever. Returns log-probabilities [X, C] in float32 and
    tokens [X, C] int64, C being at most V.
    """
    x, v = logits_XV.shape
    device = logits_XV.device
    num_blocks, num_chunks = triton.cdiv(v, _BLOCK), triton.cdiv(v, _BLOCK) * (_BLOCK // _CHUNK)
    floats: dict[str, Any] = {"dtype": torch.float32, "device": device}
    maxima_XH = torch.empty(x, num_chunks, **floats)
    greatest_XB, sums_XB = torch.empty(x, num_blocks, **floats), torch.empty(x, num_blocks, **floats)
    log_probs_XC = torch.empty(x, num_chosen, **floats)
    tokens_XC = torch.empty(x, num_chosen, dtype=torch.int64, device=device)
    flags_X = tokens_XC if banned_X is None else banned_X.to(torch.int8)
    options: dict[str, Any] = {"BANNED": () if banned_X is None else banned, "CHUNK": _CHUNK}
    _look[(x, num_blocks)](
        logits_XV,
        logits_XV.stride(0),
        v,
        flags_X,
        maxima_XH,
        greatest_XB,
        sums_XB,
        BLOCK=_BLOCK,
        num_warps=8,
        **options,
    )
    _choose[(x,)](
        logits_XV,
        logits_XV.stride(0),
        v,
        flags_X,
        maxima_XH,
        greatest_XB,
        sums_XB,
        log_probs_XC,
        tokens_XC,
        num_chosen,
        num_blocks,
        num_chunks,
        CHUNKS=triton.next_power_of_2(num_chunks),
        BLOCKS=triton.next_power_of_2(num_blocks),
        num_warps=4,
        **options,
    )
    return log_probs_XC, tokens_XC


@triton.jit
def _may_choose(x, token, v, is_banned, BANNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return logits as they are chosen by: banned tokens, and what is no number, come last."""
    x = tl.where(x == x, x, float("-inf"))
    for number in tl.static_range(len(BANNED)):
        x = tl.where(is_banned & (token == BANNED[number]), float("-inf"), x)
    return tl.where(token < v, x, float("-inf"))


@triton.jit
def _look(  # type: ignore[no-untyped-def]
    logits_ptr,
    row_stride,
    v,
    flags_ptr,
    maxima_ptr,
    greatest_ptr,
    sums_ptr,
    BANNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Look at a block of a row: its greatest logit, its exponentials' sum, and the greatest of each chunk."""
    row, block, num_blocks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * row_stride + token, mask=token < v, other=float("-inf")).to(tl.float32)
    greatest = tl.max(x, 0)
    shift = tl.where(greatest == float("-inf"), 0.0, greatest)
    tl.store(greatest_ptr + row * num_blocks + block, greatest)
    tl.store(sums_ptr + row * num_blocks + block, tl.sum(tl.exp(x - shift), 0))
    is_banned = tl.load(flags_ptr + row) != 0 if len(BANNED) > 0 else False
    chosen_by = _may_choose(x, token, v, is_banned, BANNED)
    maxima = tl.max(tl.reshape(chosen_by, (BLOCK // CHUNK, CHUNK)), 1)
    first = (row * num_blocks + block) * (BLOCK // CHUNK)
    tl.store(maxima_ptr + first + tl.arange(0, BLOCK // CHUNK), maxima)


@triton.jit
def _choose(  # type: ignore[no-untyped-def]
    logits_ptr,
    row_stride,
    v,
    flags_ptr,
    maxima_ptr,
    greatest_ptr,
    sums_ptr,
    log_probs_ptr,
    chosen_ptr,
    num_chosen,
    num_blocks,
    num_chunks,
    BANNED: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Choose a row's likeliest tokens one after another, each the first behind the one before it in order."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    is_block = block < num_blocks
    greatest = tl.load(greatest_ptr + row * num_blocks + block, mask=is_block, other=float("-inf"))
    sums = tl.load(sums_ptr + row * num_blocks + block, mask=is_block, other=0.0)
    most = tl.max(greatest, 0)
    normaliser = most + tl.log(tl.sum(sums * tl.exp(greatest - most), 0))
    is_banned = tl.load(flags_ptr + row) != 0 if len(BANNED) > 0 else False
    chunk = tl.arange(0, CHUNKS)
    has_more = chunk < tl.cdiv(v, CHUNK)
    maxima = tl.load(maxima_ptr + row * num_chunks + chunk, mask=has_more, other=float("-inf"))
    last, last_token = float("inf"), -1
    for place in range(num_chosen):
        best = tl.max(tl.where(has_more, maxima, float("-inf")), 0)
        first = tl.min(tl.where(has_more & (maxima == best), chunk, CHUNKS - 1), 0)
        token = first * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(logits_ptr + row * row_stride + token, mask=token < v, other=float("-inf"))
        x = _may_choose(x.to(tl.float32), token, v, is_banned, BANNED)
        is_left = (token < v) & ((x < last) | ((x == last) & (token > last_token)))
        last = tl.max(tl.where(is_left, x, float("-inf")), 0)
        last_token = tl.min(tl.where(is_left & (x == last), token, CHUNK * CHUNKS), 0)
        tl.store(log_probs_ptr + row * num_chosen + place, last - normaliser)
        tl.store(chosen_ptr + row * num_chosen + place, tl.minimum(last_token, v - 1).to(tl.int64))
        is_left = is_left & ((x < last) | ((x == last) & (token > last_token)))
        maxima = tl.where(chunk == first, tl.max(tl.where(is_left, x, float("-inf")), 0), maxima)
        has_more = has_more & ((chunk != first) | (tl.max(is_left.to(tl.int32), 0) > 0))
