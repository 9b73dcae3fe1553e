"""Owns the LoRA products of many adapters over one stream as three Triton kernels, for GPUs.

The mathematics is that of qlora.lora.products; the kernels' programs are in qlora.lora.programs.

Refuses to know models.

Shapes: T stream tokens, I and O a layer's widths, K columns of a wide tensor (I or O), R the largest rank, as
a power of two.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from qlora.lora.programs import down_kernel, grad_kernel, up_kernel
from qlora.lora.tables import TILE_TOKENS, LayerTables, PassTables, adds_pieces_later, num_splits, padded_rank

MOST_SIBLINGS = 3  # layers that one launch computes


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


def write_lora(
    x_TI: Tensor, ys: Sequence[Tensor], tables: PassTables, layers: Sequence[LayerTables], salt: int
) -> None:
    """Write every part's LoRA products at several layers to unwritten memory, y [T, O] of each layer.

    The layers, at most MOST_SIBLINGS, read the same x and follow each other in the bank; `salt` is the first
    one's. They share their launches, and nothing is kept for a backward.
    """
    rank = max(layer.max_rank for layer in layers)
    first = replace(layers[0], max_rank=rank)
    low_NSTR = _down_pieces(
        x_TI, first.a, tables, first, salt, along_rows=True, dropout=tables.has_dropout, num_layers=len(ys)
    )
    if low_NSTR.shape[1] > 1 and not adds_pieces_later(tables.num_tiles):
        low_NSTR = low_NSTR.sum(1, keepdim=True).to(x_TI.dtype)
    _up_all(ys, low_NSTR, first.b, tables, first, salt, along_rows=False, dropout=False, is_new=True)


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
    options = {"along_rows": along_rows, "dropout": dropout}
    low_STR = _down_pieces(wide_TK, weights, tables, layer, salt, **options)[0]
    return low_STR[0] if len(low_STR) == 1 else low_STR.sum(0).to(wide_TK.dtype)


def _down_pieces(
    wide_TK: Tensor,
    weights: Tensor,
    tables: PassTables,
    layer: LayerTables,
    salt: int,
    *,
    along_rows: bool,
    dropout: bool,
    num_layers: int = 1,
) -> Tensor:
    """Return what `_down` adds up, of a layer and those that follow it: [N layers, S pieces, T, R].

    Pieces are in float32 if there are several.
    """
    num_tokens, num_columns = wide_TK.shape
    rank = padded_rank(layer.max_rank)
    splits = num_splits(tables.num_tiles)
    dtype = torch.float32 if splits > 1 else wide_TK.dtype
    low_NSTR = torch.empty(num_layers, splits, num_tokens, rank, dtype=dtype, device=wide_TK.device)
    down_kernel[(tables.num_tiles, splits, num_layers)](
        wide_TK,
        weights,
        low_NSTR,
        tables.tiles,
        layer.ranks,
        layer.scales,
        *_dropout_inputs(tables, salt),
        num_columns,
        num_tokens,
        len(layer.ranks),
        **_options(wide_TK, rank, along_rows, dropout),
        BLOCK_K=64,
        SPLITS=splits,
        num_stages=4 if rank <= 64 else 3,
    )
    return low_NSTR


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
    options = {"along_rows": along_rows, "dropout": dropout, "is_new": is_new}
    _up_all([wide_TK], low_TR[None, None], weights, tables, layer, salt, **options)


def _up_all(
    wides: Sequence[Tensor],
    low_NSTR: Tensor,
    weights: Tensor,
    tables: PassTables,
    layer: LayerTables,
    salt: int,
    *,
    along_rows: bool,
    dropout: bool,
    is_new: bool,
) -> None:
    """Do what `_up` does at a layer and those that follow it; the pieces of low are added up first."""
    widths = [wide_TK.shape[1] for wide_TK in wides]
    num_layers, splits, num_tokens, rank = low_NSTR.shape
    block = 128 if rank <= 128 else 64
    # The kernel takes as many as there may be; what is beyond the layers is not read.
    firsts = [*wides, *[wides[0]] * (MOST_SIBLINGS - num_layers)]
    num_columns = [*widths, *[widths[0]] * (MOST_SIBLINGS - num_layers)]
    up_kernel[(triton.cdiv(max(widths), block), tables.num_tiles, num_layers)](
        *firsts,
        weights,
        low_NSTR,
        tables.tiles,
        layer.ranks,
        *_dropout_inputs(tables, salt),
        *num_columns,
        num_tokens,
        len(layer.ranks),
        **_options(wides[0], rank, along_rows, dropout),
        BLOCK_K=block,
        IS_NEW=is_new,
        NUM_LAYERS=num_layers,
        SPLITS=splits,
        ALIGNED=all(width % 16 == 0 for width in widths),
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
    grad_kernel[(triton.cdiv(num_columns, block), tables.num_parts)](
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
