"""Owns gradients of LoRA matrices and of their input as Triton programs, for many adapters over one stream.

A program works on some columns of one part and goes through all its tokens, so that what it adds up stays
with it, in a fixed order. Layers that read the same x can have A's gradients computed together, and with them
the gradient of x: then x is read once, and its gradient written once.

Refuses to know how they are launched (qlora.lora.kernels).

Shapes: T stream tokens, K columns of a wide tensor, N adapters, R the largest rank, as a power of two.
"""

import triton
import triton.language as tl

from qlora.lora.programs import NUMBERS, TABLES, is_kept, matrix_of, one_of, rank_of


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=TABLES)
def grad_kernel(  # type: ignore[no-untyped-def]
    wide,
    wide_1,
    wide_2,
    low,
    gradients,
    bounds,
    ranks,
    second,
    third,
    K,
    K_1,
    K_2,
    T,
    N,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN_RANKS: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    """Add a part's products of low and wide, over all its tokens, to some columns of B's gradient."""
    part, layer = tl.program_id(1), tl.program_id(2)
    wide, K, skip = one_of(layer, wide, wide_1, wide_2, K, K_1, K_2, second, third, ALIGNED)
    gradients, ranks, low = gradients + 4 * N * skip, ranks + N * skip, low + layer * T * BLOCK_R
    first, end = tl.load(bounds + 2 * part).to(tl.int32), tl.load(bounds + 2 * part + 1).to(tl.int32)
    rank, n = rank_of(ranks, part, EVEN_RANKS), tl.arange(0, BLOCK_R)
    begin = tl.program_id(0) * BLOCK_K
    k = begin + tl.arange(0, BLOCK_K)
    if (rank > 0) & (begin < K):
        acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
        for start in range(first, end, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            live = t < end
            narrow = tl.load(low + t[None, :] * BLOCK_R + n[:, None], mask=live[None, :], other=0.0)
            x = tl.load(wide + t[:, None] * K + k[None, :], mask=live[:, None] & (k < K)[None, :], other=0.0)
            acc = tl.dot(narrow, x, acc, input_precision=PRECISION)
        target = matrix_of(gradients, part, tl.float32) + k[None, :] * rank + n[:, None]
        inside = (n < rank)[:, None] & (k < K)[None, :]
        tl.store(target, tl.load(target, mask=inside, other=0.0) + acc, mask=inside)


@triton.jit
def _input_products(  # type: ignore[no-untyped-def]
    acc,
    more,
    x,
    low,
    w,
    t,
    live,
    n,
    k,
    key,
    salt,
    limit,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    DROPOUT: tl.constexpr,
    WITH_A: tl.constexpr,
    WITH_X: tl.constexpr,
):
    """Add a layer's part of A's gradient, from a tile of tokens, and of that tile's gradient of x."""
    narrow = tl.load(low + t[:, None] * BLOCK_R + n[None, :], mask=live[:, None], other=0.0)
    if DROPOUT:
        kept = is_kept(key, salt, k, limit)
    if WITH_X:
        own = tl.dot(narrow, w, input_precision=PRECISION)
        if DROPOUT:
            own = tl.where(kept, own, 0.0)
        more += own
    if WITH_A:
        if DROPOUT:
            x = tl.where(kept, x, 0.0)
        acc = tl.dot(tl.trans(narrow), x, acc, input_precision=PRECISION)
    return acc, more


@triton.jit
def _columns_of(weights, part, rank, n, k, K, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load some columns of a part's A: [R, K]."""
    inside = (n < rank)[:, None] & (k < K)[None, :]
    return tl.load(matrix_of(weights, part, dtype) + n[:, None] * K + k[None, :], mask=inside, other=0.0)


@triton.jit
def _add_gradient(gradients, part, rank, acc, n, k, K):  # type: ignore[no-untyped-def]
    """Add to some columns of the gradient of a part's A."""
    target = matrix_of(gradients, part, tl.float32) + n[:, None] * K + k[None, :]
    inside = (n < rank)[:, None] & (k < K)[None, :]
    tl.store(target, tl.load(target, mask=inside, other=0.0) + acc, mask=inside)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=TABLES)
def input_kernel(  # type: ignore[no-untyped-def]
    wide,
    out,
    low,
    weights,
    gradients,
    bounds,
    ranks,
    keys,
    limits,
    factors,
    salt,
    second,
    third,
    K,
    T,
    N,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN_RANKS: tl.constexpr,
    DROPOUT: tl.constexpr,
    WITH_A: tl.constexpr,
    WITH_X: tl.constexpr,
    IS_NEW: tl.constexpr,
    NUM_LAYERS: tl.constexpr,
) -> None:
    """Compute what layers' A and their x get of a part's tokens, for some columns.

    WITH_A: products of low and x are added to the gradients of A; then one program goes through all tokens.
    WITH_X: the gradient of x is written, or added to if it is not IS_NEW; zeros where no adapter is.
    """
    part, piece = tl.program_id(1), tl.program_id(2)
    first, last = tl.load(bounds + 2 * part).to(tl.int32), tl.load(bounds + 2 * part + 1).to(tl.int32)
    span = tl.cdiv(tl.cdiv(last - first, tl.num_programs(2)), BLOCK_T) * BLOCK_T
    first += span * piece
    end = tl.minimum(first + span, last)
    n, k = tl.arange(0, BLOCK_R), tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    dtype = wide.dtype.element_ty
    rank = tl.load(ranks + part).to(tl.int32)
    rank_1, rank_2 = rank * 0, rank * 0
    if NUM_LAYERS > 1:
        rank_1 = tl.load(ranks + N * second + part).to(tl.int32)
    if NUM_LAYERS > 2:
        rank_2 = tl.load(ranks + N * third + part).to(tl.int32)
    if rank + rank_1 + rank_2 > 0:
        factor, limit = 1.0, 0
        if DROPOUT:
            factor, limit = tl.load(factors + part), tl.load(limits + part).to(tl.uint32)
        w = _columns_of(weights, part, rank, n, k, K, dtype)
        acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
        w_1, w_2, acc_1, acc_2 = w, w, acc, acc
        if NUM_LAYERS > 1:
            w_1 = _columns_of(weights + 4 * N * second, part, rank_1, n, k, K, dtype)
        if NUM_LAYERS > 2:
            w_2 = _columns_of(weights + 4 * N * third, part, rank_2, n, k, K, dtype)
        for start in range(first, end, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            live = t < end
            inside = live[:, None] & (k < K)[None, :]
            place = t[:, None] * K + k[None, :]
            more = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
            x, key = more, t
            if WITH_A:
                x = tl.load(wide + place, mask=inside, other=0.0)
            if DROPOUT:
                key = tl.load(keys + t, mask=live, other=0).to(tl.uint32)
            acc, more = _input_products(
                *(acc, more, x, low, w, t, live, n, k, key, salt, limit),
                *(BLOCK_R, PRECISION, DROPOUT, WITH_A, WITH_X),
            )
            if NUM_LAYERS > 1:
                acc_1, more = _input_products(
                    *(acc_1, more, x, low + T * BLOCK_R, w_1, t, live, n, k, key, salt + second, limit),
                    *(BLOCK_R, PRECISION, DROPOUT, WITH_A, WITH_X),
                )
            if NUM_LAYERS > 2:
                acc_2, more = _input_products(
                    *(acc_2, more, x, low + 2 * T * BLOCK_R, w_2, t, live, n, k, key, salt + third, limit),
                    *(BLOCK_R, PRECISION, DROPOUT, WITH_A, WITH_X),
                )
            if WITH_X:
                more *= factor
                if not IS_NEW:
                    more += tl.load(out + place, mask=inside, other=0.0)
                tl.store(out + place, more.to(dtype), mask=inside)
        if WITH_A:
            _add_gradient(gradients, part, rank, acc * factor, n, k, K)
            if NUM_LAYERS > 1:
                _add_gradient(gradients + 4 * N * second, part, rank_1, acc_1 * factor, n, k, K)
            if NUM_LAYERS > 2:
                _add_gradient(gradients + 4 * N * third, part, rank_2, acc_2 * factor, n, k, K)
    elif WITH_X and IS_NEW:
        for start in range(first, end, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            inside = (t < end)[:, None] & (k < K)[None, :]
            tl.store(out + t[:, None] * K + k[None, :], tl.zeros((BLOCK_T, BLOCK_K), dtype), mask=inside)
