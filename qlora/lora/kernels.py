"""Owns the LoRA products of many adapters over one stream as launches of Triton kernels, for GPUs.

The mathematics is that of qlora.lora.products; the kernels' programs are in qlora.lora.programs and
qlora.lora.gradient_programs. Layers that read the same input share launches, MOST_SIBLINGS at a time.

Refuses to know models.

Shapes: T stream tokens, I and O a layer's widths, K columns of a wide tensor (I or O), N layers, S pieces of
a sum, R the largest rank, as a power of two.
"""

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
import triton
from torch import Tensor

from qlora.lora.gradient_programs import grad_kernel, input_kernel
from qlora.lora.programs import down_kernel, up_kernel
from qlora.lora.tables import (
    FULL_PROGRAMS,
    MOST_SIBLINGS,
    PROGRAMS,
    TILE_TOKENS,
    LayerTables,
    PassTables,
    adds_pieces_later,
    num_splits,
    padded_rank,
)

_MOST_STAGES = 4  # tiles that a kernel loads before it needs them
_MOST_TOGETHER = 64  # the largest rank at which a program of `_input` computes several layers
_INPUT_COLUMNS = 32  # of a program of `_input`; half as many for large ranks in float32
_WEIGHT_BYTES = 32 * 2**10  # of B in a program of `_up`
_SHARED_BYTES = 99 * 2**10  # of a program, where a GPU does not say
_SPARED_BYTES = 4 * 2**10  # for what the compiler needs besides


def add_lora(
    x_TI: Tensor,
    ys: Sequence[Tensor],
    tables: PassTables,
    layers: Sequence[LayerTables],
    *,
    is_new: bool = False,
) -> list[Tensor]:
    """Add every part's LoRA products at layers that read x to y [T, O] of each, in place.

    Returns low [N, T, R] of each MOST_SIBLINGS layers, for `lora_backward`. If the ys are `is_new`, they are
    unwritten memory: products are written to them, and zeros where an adapter leaves a layer alone.
    """
    kept = []
    for here in _launches(layers):
        kept.append(_down([x_TI] * len(layers[here]), tables, layers[here], from_a=True))
        _up(ys[here], kept[-1][:, None], tables, layers[here], is_new=is_new)
    return kept


def write_lora(x_TI: Tensor, ys: Sequence[Tensor], tables: PassTables, layers: Sequence[LayerTables]) -> None:
    """Write what `add_lora` adds to unwritten memory, y [T, O] of each layer; keep nothing for a backward."""
    for here in _launches(layers):
        low_NSTR = _down_pieces([x_TI] * len(layers[here]), tables, layers[here], from_a=True)
        if not adds_pieces_later(tables.num_tiles):
            low_NSTR = _sum(low_NSTR, x_TI.dtype)[:, None]
        _up(ys[here], low_NSTR, tables, layers[here], is_new=True)


def lora_backward(
    x_TI: Tensor,
    dys: Sequence[Tensor],
    dx_TI: Tensor | None,
    kept: Sequence[Tensor],
    tables: PassTables,
    layers: Sequence[LayerTables],
) -> None:
    """Add to the gradients of every part's A and B at layers that read x, in place; write dx if it is given.

    `dys`: the gradient of each layer's y [T, O]. `kept` is what `add_lora` returned. dx, what the products
    add to the gradient of x, is unwritten memory.
    """
    for here, low_NTR in zip(_launches(layers), kept, strict=True):
        dlow_NTR = _down(dys[here], tables, layers[here], from_a=False)
        _grad(dys[here], low_NTR, tables, layers[here])
        step = len(dlow_NTR) if low_NTR.shape[2] <= _MOST_TOGETHER else 1
        for i in range(0, len(dlow_NTR), step):
            group = layers[here][i : i + step]
            _input(x_TI, dx_TI, dlow_NTR[i : i + step], tables, group, is_new=here.start + i == 0)


def _launches(layers: Sequence[LayerTables]) -> list[slice]:
    """Return which layers share launches."""
    return [slice(first, first + MOST_SIBLINGS) for first in range(0, len(layers), MOST_SIBLINGS)]


def _down(
    wides: Sequence[Tensor], tables: PassTables, layers: Sequence[LayerTables], *, from_a: bool
) -> Tensor:
    """Return scale * dropped(wide) times A' of each layer, or without dropout times B: [N, T, R]."""
    return _sum(_down_pieces(wides, tables, layers, from_a=from_a), wides[0].dtype)


def _sum(low_NSTR: Tensor, dtype: torch.dtype) -> Tensor:
    """Add up the pieces of low products: [N, T, R]."""
    return low_NSTR[:, 0] if low_NSTR.shape[1] == 1 else low_NSTR.sum(1).to(dtype)


def _down_pieces(
    wides: Sequence[Tensor], tables: PassTables, layers: Sequence[LayerTables], *, from_a: bool
) -> Tensor:
    """Return what `_down` adds up: [N, S, T, R]. Pieces are in float32 if there are several."""
    num_tokens, rank, wide = len(wides[0]), _rank_of(layers), wides[0]
    dropout = from_a and tables.has_dropout
    splits = num_splits(tables.num_tiles, len(layers), dropout)
    dtype = torch.float32 if splits > 1 else wide.dtype
    low_NSTR = torch.empty(len(layers), splits, num_tokens, rank, dtype=dtype, device=wide.device)
    down_kernel[(tables.num_tiles, splits, len(layers))](
        *_three(wides),
        layers[0].a if from_a else layers[0].b,
        low_NSTR,
        tables.tiles,
        layers[0].ranks,
        layers[0].scales,
        *_dropout_inputs(tables, layers),
        *_three([one.shape[1] for one in wides]),
        num_tokens,
        len(layers[0].ranks),
        **_options(wide, rank, layers),
        **_siblings(wides),
        ALONG_ROWS=from_a,
        DROPOUT=dropout,
        BLOCK_K=64,
        num_stages=_stages(wide, 64 * (TILE_TOKENS + rank), most=3 if dropout else 4),
    )
    return low_NSTR


def _up(
    wides: Sequence[Tensor],
    low_NSTR: Tensor,
    tables: PassTables,
    layers: Sequence[LayerTables],
    *,
    is_new: bool,
) -> None:
    """Add low times B' to each layer's wide in place, or write it there; pieces of low are added up first."""
    rank = low_NSTR.shape[3]
    widths = [one.shape[1] for one in wides]
    block = min(128, _WEIGHT_BYTES // (rank * wides[0].element_size()))
    up_kernel[(triton.cdiv(max(widths), block), tables.num_tiles, len(layers))](
        *_three(wides),
        layers[0].b,
        low_NSTR,
        tables.tiles,
        layers[0].ranks,
        *_places(layers),
        *_three(widths),
        low_NSTR.shape[2],
        len(layers[0].ranks),
        **_options(wides[0], rank, layers),
        **_siblings(wides),
        BLOCK_K=block,
        IS_NEW=is_new,
        SPLITS=low_NSTR.shape[1],
    )


def _grad(
    wides: Sequence[Tensor], low_NTR: Tensor, tables: PassTables, layers: Sequence[LayerTables]
) -> None:
    """Add low' times wide to the gradients of B, part by part."""
    rank = low_NTR.shape[2]
    widths = [one.shape[1] for one in wides]
    block = 64 if rank <= 64 and tables.num_parts > 1 else 32
    grad_kernel[(triton.cdiv(max(widths), block), tables.num_parts, len(layers))](
        *_three(wides),
        low_NTR,
        layers[0].b_grad,
        tables.bounds,
        layers[0].ranks,
        *_places(layers),
        *_three(widths),
        low_NTR.shape[1],
        len(layers[0].ranks),
        **_options(wides[0], rank, layers),
        **_siblings(wides),
        BLOCK_K=block,
        num_stages=_stages(wides[0], TILE_TOKENS * (block + rank)),
    )


def _input(
    x_TI: Tensor,
    dx_TI: Tensor | None,
    dlow_NTR: Tensor,
    tables: PassTables,
    layers: Sequence[LayerTables],
    *,
    is_new: bool,
) -> None:
    """Add dlow' times dropped(x) to the gradients of A, and write or add dropped(dlow times A) to dx.

    That is one launch if its programs are enough for a GPU. Else dx has a launch of its own, in which several
    programs share a part's tokens.
    """
    block = _INPUT_COLUMNS if dlow_NTR.shape[2] * x_TI.element_size() <= 512 else _INPUT_COLUMNS // 2
    programs = triton.cdiv(x_TI.shape[1], block) * tables.num_parts
    launch = partial(_launch_input, x_TI, dx_TI, dlow_NTR, tables, layers, block=block, is_new=is_new)
    if dx_TI is None or programs >= FULL_PROGRAMS:
        launch(with_a=True, with_x=dx_TI is not None, pieces=1)
        return
    launch(with_a=True, with_x=False, pieces=1)
    launch(with_a=False, with_x=True, pieces=max(1, min(tables.num_tiles, PROGRAMS // programs)))


def _launch_input(
    x_TI: Tensor,
    dx_TI: Tensor | None,
    dlow_NTR: Tensor,
    tables: PassTables,
    layers: Sequence[LayerTables],
    *,
    block: int,
    is_new: bool,
    with_a: bool,
    with_x: bool,
    pieces: int,
) -> None:
    num_layers, num_tokens, rank = dlow_NTR.shape
    tile = TILE_TOKENS * (block + num_layers * rank)
    # Where no adapter is, x gets no gradient: the kernel writes that as well.
    num_bounds = len(tables.bounds) // 2 if with_x else tables.num_parts
    input_kernel[(triton.cdiv(x_TI.shape[1], block), num_bounds, pieces)](
        x_TI,
        x_TI if dx_TI is None else dx_TI,
        dlow_NTR,
        layers[0].a,
        layers[0].a_grad,
        tables.bounds,
        layers[0].ranks,
        *_dropout_inputs(tables, layers),
        x_TI.shape[1],
        num_tokens,
        len(layers[0].ranks),
        **_options(x_TI, rank, layers),
        DROPOUT=tables.has_dropout,
        WITH_A=with_a,
        WITH_X=with_x,
        IS_NEW=is_new,
        NUM_LAYERS=num_layers,
        BLOCK_K=block,
        num_stages=_stages(x_TI, tile, besides=num_layers * rank * block, most=3),
    )


def _rank_of(layers: Sequence[LayerTables]) -> int:
    """Return the rank that kernels calculate with at these layers."""
    return padded_rank(max(layer.max_rank for layer in layers))


def _three(items: Sequence[Any]) -> list[Any]:
    """Return as many items as kernels take: what is beyond the layers is not read."""
    return [*items, *[items[0]] * (MOST_SIBLINGS - len(items))]


def _places(layers: Sequence[LayerTables]) -> list[int]:
    """Return how far behind the first layer's tables those of the second and third layer lie."""
    return _three([layer.index - layers[0].index for layer in layers])[1:]


def _dropout_inputs(tables: PassTables, layers: Sequence[LayerTables]) -> tuple[Any, ...]:
    """Return what masks are made from, as the kernels take it: keys, limits, factors, salt, and `_places`."""
    return tables.keys_T, tables.drop_limits, tables.keep_factors, layers[0].index, *_places(layers)


def _siblings(wides: Sequence[Tensor]) -> dict[str, Any]:
    """Return the option of kernels that choose a layer."""
    return {"ALIGNED": all(one.shape[1] % 16 == 0 and one.data_ptr() % 16 == 0 for one in wides)}


def _options(wide: Tensor, rank: int, layers: Sequence[LayerTables]) -> dict[str, Any]:
    """Return the options that all kernels are compiled with."""
    return {
        "PRECISION": "ieee" if wide.dtype == torch.float32 else "tf32",
        "BLOCK_T": TILE_TOKENS,
        "BLOCK_R": rank,
        "EVEN_RANKS": all(layer.even_ranks for layer in layers),
        "num_warps": 4,
    }


def _stages(wide: Tensor, tile: int, besides: int = 0, most: int = _MOST_STAGES) -> int:
    """Return how many tiles, of so many numbers, a kernel loads ahead: as many as shared memory holds.

    `besides`: numbers that lie there, too.
    """
    room = _shared_bytes(wide.device) // wide.element_size() - besides
    return max(1, min(most, room // tile))


@cache
def _shared_bytes(device: torch.device) -> int:
    """Return the bytes of shared memory that a program may take."""
    if device.type != "cuda":
        return _SHARED_BYTES
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", _SHARED_BYTES) - _SPARED_BYTES
