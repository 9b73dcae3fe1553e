"""Owns the LoRA products of many adapters as Triton programs: what one of them does with its tile of tokens.

A program works on a tile of tokens of one part, finds that part's weights through a table of addresses
(qlora.lora.tables), and makes dropout masks itself, from a hash of the token's key, the layer and the column.
So there is no loop over adapters and no stored mask, as in Punica's grouped kernels. Up to three layers that
read the same input share a launch.

Every matrix begins where vector loads may. The compiler has to be told: it knows nothing of an address that
comes out of a table, and would load number by number.

Refuses to know how they are launched (qlora.lora.kernels).

Source: Punica, https://arxiv.org/abs/2310.18547
Shapes: T stream tokens, K columns of a wide tensor, N adapters, R the largest rank, as a power of two.
"""

import triton
import triton.language as tl

# These are slices of larger tensors: how one pass's are aligned says nothing of the next one's.
TABLES = ["weights", "gradients", "tiles", "bounds", "ranks", "scales", "keys", "limits", "factors"]
NUMBERS = ["salt", "T", "N", "second", "third"]


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
def is_kept(keys, salt, columns, limit):  # type: ignore[no-untyped-def]
    """Tell which elements dropout keeps: [tokens, columns] bool.

    Tokens are hashed by the whole finaliser, columns by a product, once each; their pairs by half of the
    finaliser, since these operations are what a kernel spends its time on.
    """
    x = _hash(keys ^ salt.to(tl.uint32))[:, None] ^ (columns.to(tl.uint32) * 0x9E3779B9)[None, :]
    x *= 0x85EBCA6B
    x ^= x >> 15
    return x * 0xC2B2AE35 >= limit


@triton.jit
def matrix_of(addresses, part, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load where a part's matrix begins."""
    return tl.multiple_of(tl.load(addresses + part).to(tl.pointer_type(dtype)), 16)


@triton.jit
def rank_of(ranks, part, EVEN_RANKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load the rank of a part's adapter."""
    rank = tl.load(ranks + part).to(tl.int32)
    if EVEN_RANKS:
        rank = tl.multiple_of(rank, 8)
    return rank


@triton.jit
def one_of(  # type: ignore[no-untyped-def]
    layer, wide, wide_1, wide_2, K, K_1, K_2, second, third, ALIGNED: tl.constexpr
):
    """Choose a layer's wide tensor, its columns, and how far behind the first layer's its tables lie."""
    skip = 0
    if layer == 1:
        wide, K, skip = wide_1, K_1, second
    elif layer == 2:
        wide, K, skip = wide_2, K_2, third
    if ALIGNED:  # what is known of an argument is lost where it is chosen
        wide, K = tl.multiple_of(wide, 16), tl.multiple_of(K, 16)
    return wide, K, skip


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=TABLES)
def down_kernel(  # type: ignore[no-untyped-def]
    wide,
    wide_1,
    wide_2,
    weights,
    low,
    tiles,
    ranks,
    scales,
    keys,
    limits,
    factors,
    salt,
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
    ALONG_ROWS: tl.constexpr,
    EVEN_RANKS: tl.constexpr,
    DROPOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    """Multiply a piece of a tile's columns by a part's weights, at one of some layers."""
    tile, split, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    wide, K, skip = one_of(layer, wide, wide_1, wide_2, K, K_1, K_2, second, third, ALIGNED)
    weights, ranks, scales, salt = weights + 4 * N * skip, ranks + N * skip, scales + N * skip, salt + skip
    part = tl.load(tiles + 3 * tile)
    t = tl.load(tiles + 3 * tile + 1).to(tl.int32) + tl.arange(0, BLOCK_T)
    live = t < tl.load(tiles + 3 * tile + 2)
    rank, n = rank_of(ranks, part, EVEN_RANKS), tl.arange(0, BLOCK_R)
    source = matrix_of(weights, part, wide.dtype.element_ty)
    factor = tl.load(scales + part)
    acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    if DROPOUT:
        key, limit = tl.load(keys + t, mask=live, other=0).to(tl.uint32), tl.load(limits + part).to(tl.uint32)
        factor *= tl.load(factors + part)
    if rank > 0:
        span = tl.cdiv(tl.cdiv(K, tl.num_programs(1)), BLOCK_K) * BLOCK_K
        for start in range(span * split, span * (split + 1), BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            x = tl.load(wide + t[:, None] * K + k[None, :], mask=live[:, None] & (k < K)[None, :], other=0.0)
            if DROPOUT:
                x = tl.where(is_kept(key, salt, k, limit), x, 0.0)
            places = n[None, :] * K + k[:, None] if ALONG_ROWS else k[:, None] * rank + n[None, :]
            w = tl.load(source + places, mask=(k < K)[:, None] & (n < rank)[None, :], other=0.0)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
    place = low + ((layer * tl.num_programs(1) + split) * T + t)[:, None] * BLOCK_R + n[None, :]
    tl.store(place, (acc * factor).to(low.dtype.element_ty), mask=live[:, None])


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=TABLES)
def up_kernel(  # type: ignore[no-untyped-def]
    wide,
    wide_1,
    wide_2,
    weights,
    low,
    tiles,
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
    IS_NEW: tl.constexpr,
    SPLITS: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    """Add up a tile's low products and multiply them by a part's weights, for some columns of one layer."""
    tile, layer = tl.program_id(1), tl.program_id(2)
    wide, K, skip = one_of(layer, wide, wide_1, wide_2, K, K_1, K_2, second, third, ALIGNED)
    weights, ranks, low = weights + 4 * N * skip, ranks + N * skip, low + layer * SPLITS * T * BLOCK_R
    part = tl.load(tiles + 3 * tile)
    t = tl.load(tiles + 3 * tile + 1).to(tl.int32) + tl.arange(0, BLOCK_T)
    live, n = t < tl.load(tiles + 3 * tile + 2), tl.arange(0, BLOCK_R)
    rank = rank_of(ranks, part, EVEN_RANKS)
    start = tl.program_id(0) * BLOCK_K
    k = start + tl.arange(0, BLOCK_K)
    place, inside = wide + t[:, None] * K + k[None, :], live[:, None] & (k < K)[None, :]
    if (rank > 0) & (start < K):
        source = matrix_of(weights, part, wide.dtype.element_ty)
        w = tl.load(
            source + k[None, :] * rank + n[:, None], mask=(n < rank)[:, None] & (k < K)[None, :], other=0.0
        )
        narrow = tl.load(low + t[:, None] * BLOCK_R + n[None, :], mask=live[:, None], other=0.0)
        for split in tl.static_range(1, SPLITS):
            narrow += tl.load(
                low + (split * T + t)[:, None] * BLOCK_R + n[None, :], mask=live[:, None], other=0.0
            )
        more = tl.dot(narrow.to(wide.dtype.element_ty), w, input_precision=PRECISION)
        if not IS_NEW:
            more += tl.load(place, mask=inside, other=0.0)
        tl.store(place, more.to(wide.dtype.element_ty), mask=inside)
    elif IS_NEW:
        tl.store(place, tl.zeros((BLOCK_T, BLOCK_K), wide.dtype.element_ty), mask=inside)
