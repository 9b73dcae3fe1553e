"""Owns the LoRA products of many adapters over one stream as three Triton kernels, for GPUs.

The mathematics is that of qlora.lora.products. A program works on a tile of tokens of one part, finds that
part's weights through a table of addresses (qlora.lora.tables), and makes dropout masks itself, from a hash
of the token's key, the layer and the column. So there is no loop over adapters and no stored mask, as in
Punica's grouped kernels.

Refuses to know models.

Source: Punica, https://arxiv.org/abs/2310.18547
Shapes: T stream tokens, I and O a layer's widths, K columns of a wide tensor (I or O), R the largest rank, as
a power of two.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora.lora.tables import TILE_TOKENS, LayerTables, PassTables, num_splits, padded_rank

# These are slices of larger tensors: how one pass's are aligned says nothing of the next one's.
_TABLES = ["weights", "gradients", "tiles", "bounds", "ranks", "scales", "keys", "limits", "factors"]


def add_lora(
    x_TI: Tensor, y_TO: Tensor, tables: PassTables, layer: LayerTables, salt: int, *, is_new: bool = False
) -> Tensor:
    """Add every part's LoRA product to y in place; return low [T, R] for `lora_backward`.

    If y `is_new`, it is unwritten memory: products are written to it, and zeros where an adapter leaves the
    layer alone.
    """
    at = (tables, layer, salt)
    low_TR = _down(x_TI, layer.a, *at, along_rows=True, dropout=tables.has_dropout)
    _up(y_TO, low_TR, layer.b, *at, along_rows=False, dropout=False, is_new=is_new)
    return low_TR


def lora_backward(
    x_TI: Tensor,
    dy_TO: Tensor,
    dx_TI: Tensor | None,
    low_TR: Tensor,
    tables: PassTables,
    layer: LayerTables,
    salt: int,
    *,
    is_new: bool = False,
) -> None:
    """Add to the gradients of every part's A and B, and to dx if it is given, in place.

    If dx `is_new`, it is unwritten memory: the gradient of x is written to it.
    """
    at = (tables, layer, salt)
    dlow_TR = _down(dy_TO, layer.b, *at, along_rows=False, dropout=False)
    _grad(dy_TO, low_TR, layer.b_grad, *at, along_rows=False, dropout=False)
    _grad(x_TI, dlow_TR, layer.a_grad, *at, along_rows=True, dropout=tables.has_dropout)
    if dx_TI is not None:
        _up(dx_TI, dlow_TR, layer.a, *at, along_rows=True, dropout=tables.has_dropout, is_new=is_new)


def _down(
    wide_TK: Tensor,
    weights: Tensor,
    tables: PassTables,
    layer: LayerTables,
    salt: int,
    *,
    along_rows: bool,
    dropout: bool,
) -> Tensor:
    """Return scale * dropped(wide) times weights, [T, R]; the weights are [r, K] along rows, else [K, r]."""
    num_tokens, num_columns = wide_TK.shape
    rank = padded_rank(layer.max_rank)
    splits = num_splits(tables.num_tiles)
    dtype = torch.float32 if splits > 1 else wide_TK.dtype
    low_STR = torch.empty(splits, num_tokens, rank, dtype=dtype, device=wide_TK.device)
    _down_kernel[(tables.num_tiles, splits)](
        wide_TK,
        weights,
        low_STR,
        tables.tiles,
        layer.ranks,
        layer.scales,
        *_dropout_inputs(tables, salt),
        num_columns,
        num_tokens,
        **_options(wide_TK, rank, along_rows, dropout),
        BLOCK_K=64,
        SPLITS=splits,
        num_stages=4 if rank <= 64 else 3,
    )
    return low_STR[0] if splits == 1 else low_STR.sum(0).to(wide_TK.dtype)


def _up(
    wide_TK: Tensor,
    low_TR: Tensor,
    weights: Tensor,
    tables: PassTables,
    layer: LayerTables,
    salt: int,
    *,
    along_rows: bool,
    dropout: bool,
    is_new: bool,
) -> None:
    """Add dropped(low times weights) to wide in place, or write it there if wide `is_new`."""
    num_columns = wide_TK.shape[1]
    rank = low_TR.shape[1]
    block = 128 if rank <= 128 else 64
    _up_kernel[(triton.cdiv(num_columns, block), tables.num_tiles)](
        wide_TK,
        weights,
        low_TR,
        tables.tiles,
        layer.ranks,
        *_dropout_inputs(tables, salt),
        num_columns,
        **_options(wide_TK, rank, along_rows, dropout),
        BLOCK_K=block,
        IS_NEW=is_new,
    )


def _grad(
    wide_TK: Tensor,
    low_TR: Tensor,
    gradients: Tensor,
    tables: PassTables,
    layer: LayerTables,
    salt: int,
    *,
    along_rows: bool,
    dropout: bool,
) -> None:
    """Add low' times dropped(wide) to the gradients, part by part."""
    num_columns = wide_TK.shape[1]
    rank = low_TR.shape[1]
    block = 64 if rank <= 64 and tables.num_parts > 1 else 32
    _grad_kernel[(triton.cdiv(num_columns, block), tables.num_parts)](
        wide_TK,
        low_TR,
        gradients,
        tables.bounds,
        layer.ranks,
        *_dropout_inputs(tables, salt),
        num_columns,
        **_options(wide_TK, rank, along_rows, dropout),
        BLOCK_K=block,
        num_stages=3,
    )


def _dropout_inputs(tables: PassTables, salt: int) -> tuple[Any, ...]:
    """Return what masks are made from, as the kernels take it: keys, limits, factors, salt."""
    return tables.keys_T, tables.drop_limits, tables.keep_factors, salt


def _options(wide_TK: Tensor, rank: int, along_rows: bool, dropout: bool) -> dict[str, Any]:
    """Return the options that all three kernels are compiled with."""
    return {
        "PRECISION": "ieee" if wide_TK.dtype == torch.float32 else "tf32",
        "BLOCK_T": TILE_TOKENS,
        "BLOCK_R": rank,
        "ALONG_ROWS": along_rows,
        "DROPOUT": dropout,
        "num_warps": 4,
    }


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


@triton.jit(do_not_specialize=["salt", "T"], do_not_specialize_on_alignment=_TABLES)
def _down_kernel(  # type: ignore[no-untyped-def]
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
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ALONG_ROWS: tl.constexpr,
    DROPOUT: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    tile, split = tl.program_id(0), tl.program_id(1)
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
                x = tl.where(_is_kept(key, salt, k, limit), x, 0.0)
            places = n[None, :] * K + k[:, None] if ALONG_ROWS else k[:, None] * rank + n[None, :]
            w = tl.load(source + places, mask=(k < K)[:, None] & (n < rank)[None, :], other=0.0)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
    tl.store(
        low + (split * T + t)[:, None] * BLOCK_R + n[None, :],
        (acc * factor).to(low.dtype.element_ty),
        mask=live[:, None],
    )


@triton.jit(do_not_specialize=["salt", "T"], do_not_specialize_on_alignment=_TABLES)
def _up_kernel(  # type: ignore[no-untyped-def]
    wide,
    weights,
    low,
    tiles,
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
    IS_NEW: tl.constexpr,
) -> None:
    tile = tl.program_id(1)
    part = tl.load(tiles + 3 * tile)
    t = tl.load(tiles + 3 * tile + 1).to(tl.int32) + tl.arange(0, BLOCK_T)
    live = t < tl.load(tiles + 3 * tile + 2)
    rank, n = tl.load(ranks + part).to(tl.int32), tl.arange(0, BLOCK_R)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    place, inside = wide + t[:, None] * K + k[None, :], live[:, None] & (k < K)[None, :]
    if rank > 0:
        source = tl.load(weights + part).to(tl.pointer_type(wide.dtype.element_ty))
        places = n[:, None] * K + k[None, :] if ALONG_ROWS else k[None, :] * rank + n[:, None]
        w = tl.load(source + places, mask=(n < rank)[:, None] & (k < K)[None, :], other=0.0)
        narrow = tl.load(low + t[:, None] * BLOCK_R + n[None, :], mask=live[:, None], other=0.0)
        more = tl.dot(narrow, w, input_precision=PRECISION)
        if DROPOUT:
            key, limit = (
                tl.load(keys + t, mask=live, other=0).to(tl.uint32),
                tl.load(limits + part).to(tl.uint32),
            )
            more = tl.where(_is_kept(key, salt, k, limit), more * tl.load(factors + part), 0.0)
        if not IS_NEW:
            more += tl.load(place, mask=inside, other=0.0)
        tl.store(place, more.to(wide.dtype.element_ty), mask=inside)
    elif IS_NEW:
        tl.store(place, tl.zeros((BLOCK_T, BLOCK_K), wide.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["salt", "T"], do_not_specialize_on_alignment=_TABLES)
def _grad_kernel(  # type: ignore[no-untyped-def]
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
