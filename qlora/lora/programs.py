"""Owns the LoRA products of many adapters as Triton programs: what one of them does with its tile of tokens.

A program works on a tile of tokens of one part, finds that part's weights through a table of addresses
(qlora.lora.tables), and makes dropout masks itself, from a hash of the token's key, the layer and the column.
So there is no loop over adapters and no stored mask, as in Punica's grouped kernels.

Refuses to know how they are launched (qlora.lora.kernels).

Source: Punica, https://arxiv.org/abs/2310.18547
Shapes: T stream tokens, K columns of a wide tensor, N adapters, R the largest rank, as a power of two.
"""

import triton
import triton.language as tl

# These are slices of larger tensors: how one pass's are aligned says nothing of the next one's.
_TABLES = ["weights", "gradients", "tiles", "bounds", "ranks", "scales", "keys", "limits", "factors"]


@triton.jit
def _hash(x):  # type: ignore[no-untyped-def]
    """Hash by MurmurHash3's finaliser (public domain): an input bit flips an output bit half of the time."""
    x ^= x >> 16
    x *= 0x85EBCA6B
    x ^= x >> 13
    x *= 0xC2B2AE35
    x ^= x >> 16
    return x


@triton.jit
def _is_kept(keys, salt, columns, limit):  # type: ignore[no-untyped-def]
    """Tell which elements dropout keeps: [tokens, columns] bool.

    Tokens and columns are hashed by the whole finaliser, once each; their pairs by half of it, since these
    operations are what a kernel spends its time on.
    """
    x = _hash(keys ^ salt.to(tl.uint32))[:, None] ^ _hash(columns.to(tl.uint32) + 0x9E3779B9)[None, :]
    x *= 0x85EBCA6B
    x ^= x >> 15
    return x * 0xC2B2AE35 >= limit


@triton.jit(do_not_specialize=["salt", "T", "N"], do_not_specialize_on_alignment=_TABLES)
def down_kernel(  # type: ignore[no-untyped-def]
    wide,
    weights,
    low,
    tiles,
    ranks,
    scales,
    keys,
    limits,
    factors,
    salt,
    K,
    T,
    N,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ALONG_ROWS: tl.constexpr,
    DROPOUT: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    """Multiply a piece of a tile's columns by a part's weights, for one of the layers that read it."""
    tile, split, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    weights, ranks, scales = weights + 4 * N * layer, ranks + N * layer, scales + N * layer
    part = tl.load(tiles + 3 * tile)
    t = tl.load(tiles + 3 * tile + 1).to(tl.int32) + tl.arange(0, BLOCK_T)
    live = t < tl.load(tiles + 3 * tile + 2)
    rank, n = tl.load(ranks + part).to(tl.int32), tl.arange(0, BLOCK_R)
    source = tl.load(weights + part).to(tl.pointer_type(wide.dtype.element_ty))
    factor = tl.load(scales + part)
    acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    if DROPOUT:
        key, limit = tl.load(keys + t, mask=live, other=0).to(tl.uint32), tl.load(limits + part).to(tl.uint32)
        factor *= tl.load(factors + part)
    if rank > 0:
        span = tl.cdiv(tl.cdiv(K, SPLITS), BLOCK_K) * BLOCK_K
        for start in range(span * split, span * (split + 1), BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            x = tl.load(wide + t[:, None] * K + k[None, :], mask=live[:, None] & (k < K)[None, :], other=0.0)
            if DROPOUT:
                x = tl.where(_is_kept(key, salt + layer, k, limit), x, 0.0)
            places = n[None, :] * K + k[:, None] if ALONG_ROWS else k[:, None] * rank + n[None, :]
            w = tl.load(source + places, mask=(k < K)[:, None] & (n < rank)[None, :], other=0.0)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
    tl.store(
        low + ((layer * SPLITS + split) * T + t)[:, None] * BLOCK_R + n[None, :],
        (acc * factor).to(low.dtype.element_ty),
        mask=live[:, None],
    )


@triton.jit(do_not_specialize=["salt", "T", "N"], do_not_specialize_on_alignment=_TABLES)
def up_kernel(  # type: ignore[no-untyped-def]
    wide,
    wide_1,
    wide_2,
    weights,
    low,
    tiles,
    ranks,
    keys,
    limits,
    factors,
    salt,
    K,
    K_1,
    K_2,
    T,
    N,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ALONG_ROWS: tl.constexpr,
    DROPOUT: tl.constexpr,
    IS_NEW: tl.constexpr,
    NUM_LAYERS: tl.constexpr,
    SPLITS: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    """Add up a tile's low products and multiply them by a part's weights, for some columns of one layer."""
    tile, layer = tl.program_id(1), tl.program_id(2)
    if NUM_LAYERS > 1:
        if layer == 1:
            wide, K = wide_1, K_1
        elif layer == 2:
            wide, K = wide_2, K_2
        if ALIGNED:  # what is known of an argument is lost where it is chosen
            K = tl.multiple_of(K, 16)
        weights, ranks, low = weights + 4 * N * layer, ranks + N * layer, low + layer * SPLITS * T * BLOCK_R
    part = tl.load(tiles + 3 * tile)
    t = tl.load(tiles + 3 * tile + 1).to(tl.int32) + tl.arange(0, BLOCK_T)
    live = t < tl.load(tiles + 3 * tile + 2)
    rank, n = tl.load(ranks + part).to(tl.int32), tl.arange(0, BLOCK_R)
    start = tl.program_id(0) * BLOCK_K
    rank, k = tl.where(start < K, rank, 0), start + tl.arange(0, BLOCK_K)
    place, inside = wide + t[:, None] * K + k[None, :], live[:, None] & (k < K)[None, :]
    if rank > 0:
        source = tl.load(weights + part).to(tl.pointer_type(wide.dtype.element_ty))
        places = n[:, None] * K + k[None, :] if ALONG_ROWS else k[None, :] * rank + n[:, None]
        w = tl.load(source + places, mask=(n < rank)[:, None] & (k < K)[None, :], other=0.0)
        narrow = tl.load(low + t[:, None] * BLOCK_R + n[None, :], mask=live[:, None], other=0.0)
        for split in tl.static_range(1, SPLITS):
            narrow += tl.load(
                low + (split * T + t)[:, None] * BLOCK_R + n[None, :], mask=live[:, None], other=0.0
            )
        narrow = narrow.to(wide.dtype.element_ty)
        more = tl.dot(narrow, w, input_precision=PRECISION)
        if DROPOUT:
            key, limit = (
                tl.load(keys + t, mask=live, other=0).to(tl.uint32),
                tl.load(limits + part).to(tl.uint32),
            )
            more = tl.where(_is_kept(key, salt + layer, k, limit), more * tl.load(factors + part), 0.0)
        if not IS_NEW:
            more += tl.load(place, mask=inside, other=0.0)
        tl.store(place, more.to(wide.dtype.element_ty), mask=inside)
    elif IS_NEW:
        tl.store(place, tl.zeros((BLOCK_T, BLOCK_K), wide.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["salt", "T"], do_not_specialize_on_alignment=_TABLES)
def grad_kernel(  # type: ignore[no-untyped-def]
    wide,
    low,
    gradients,
    bounds,
    ranks,
    keys,
    limits,
    factors,
    salt,
    K,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ALONG_ROWS: tl.constexpr,
    DROPOUT: tl.constexpr,
) -> None:
    """Add a part's products of low and wide, over all its tokens, to some columns of a gradient."""
    part = tl.program_id(1)
    first, end = tl.load(bounds + 2 * part).to(tl.int32), tl.load(bounds + 2 * part + 1).to(tl.int32)
    rank, n = tl.load(ranks + part).to(tl.int32), tl.arange(0, BLOCK_R)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    if rank > 0:
        acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
        for start in range(first, end, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            live = t < end
            narrow = tl.load(low + t[None, :] * BLOCK_R + n[:, None], mask=live[None, :], other=0.0)
            x = tl.load(wide + t[:, None] * K + k[None, :], mask=live[:, None] & (k < K)[None, :], other=0.0)
            if DROPOUT:
                key = tl.load(keys + t, mask=live, other=0).to(tl.uint32)
                x = tl.where(_is_kept(key, salt, k, tl.load(limits + part).to(tl.uint32)), x, 0.0)
            acc = tl.dot(narrow, x, acc, input_precision=PRECISION)
        if DROPOUT:
            acc *= tl.load(factors + part)
        target = tl.load(gradients + part).to(tl.pointer_type(tl.float32))
        places = n[:, None] * K + k[None, :] if ALONG_ROWS else k[None, :] * rank + n[:, None]
        inside = (n < rank)[:, None] & (k < K)[None, :]
        tl.store(target + places, tl.load(target + places, mask=inside, other=0.0) + acc, mask=inside)
