"""Owns what the LoRA kernels look up: where the parts of a pass lie, and each layer's adapters by address.

A grouped kernel gives each of its programs a tile of tokens, and the program finds in tables whose tokens
they are and where that adapter's matrices are in memory: no copy gathers the adapters, whatever their ranks.
This is the grouped matrix product of Triton's tutorial
(https://triton-lang.org/main/getting-started/tutorials/08-grouped-gemm.html).

Plain NumPy and torch, so that tables can be made and tested on any machine. Refuses to know the kernels
(qlora.lora.kernels).

Shapes: T stream tokens, L layers, N adapters, 4 the matrices A, B and their gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from qlora.lora.products import Dropout, LayerPart

TILE_TOKENS = 64
_MATRICES = ("a", "b", "a_grad", "b_grad")
_LEAST_RANK = 16  # what a matrix product on tensor cores takes
PROGRAMS = 528  # four for each of an H100's processors
_FEW_TILES = 8
_MOST_SPLITS = 4  # pieces that a sum over columns is cut into
MOST_SIBLINGS = 3  # layers that one launch computes
# Programs from which on it is better that each goes through all tokens of its part than that they share them.
FULL_PROGRAMS = 64


@dataclass(frozen=True)
class PassTables:
    """A pass as kernels see it.

    tiles: (part, first token, end) of each tile of tokens. bounds: (first token, end) of each part, and of
    what is behind them, if anything is; num_parts doesn't count that, and no adapter is there. keys_T: a
    number for each token, which dropout hashes. drop_limits: a part drops hashes below its limit.
    keep_factors: 1 / (1 - p) of each part.
    """

    num_tiles: int
    num_parts: int
    tiles: Tensor
    bounds: Tensor
    keys_T: Tensor
    drop_limits: Tensor
    keep_factors: Tensor
    has_dropout: bool


@dataclass(frozen=True)
class LayerTables:
    """One layer's adapters: addresses of A, B and their gradients, ranks and scales.

    An adapter's rank is 0 where it leaves the layer alone. even_ranks: kernels may count on it that all are
    multiples of 8, so that B's rows begin where vector loads may. index: the layer's number. For N adapters,
    the next layer's addresses lie 4 N entries behind these, its ranks and scales N.
    """

    a: Tensor
    b: Tensor
    a_grad: Tensor
    b_grad: Tensor
    ranks: Tensor
    scales: Tensor
    max_rank: int
    even_ranks: bool
    index: int


@dataclass(frozen=True)
class BankTables:
    """All layers' tables: the four addresses, ranks and scales, and what kernels are compiled for."""

    addresses_L4N: Tensor
    ranks_LN: Tensor
    scales_LN: Tensor
    max_ranks: tuple[int, ...]
    even_ranks: bool

    @cached_property
    def layers(self) -> tuple[LayerTables, ...]:
        """Split the tables by layer."""
        found = []
        for layer, max_rank in enumerate(self.max_ranks):
            a, b, a_grad, b_grad = self.addresses_L4N[layer].unbind(0)
            tables = LayerTables(
                a=a,
                b=b,
                a_grad=a_grad,
                b_grad=b_grad,
                ranks=self.ranks_LN[layer],
                scales=self.scales_LN[layer],
                max_rank=max_rank,
                even_ranks=self.even_ranks,
                index=layer,
            )
            found.append(tables)
        return tuple(found)

    def copy_(self, other: "BankTables") -> None:
        """Copy the addresses, ranks and scales of other tables of the same shape into these, in place.

        What kernels were compiled for must hold for the others, too.
        """
        assert other.even_ranks or not self.even_ranks
        assert all(
            padded_rank(mine) >= theirs for mine, theirs in zip(self.max_ranks, other.max_ranks, strict=True)
        )
        self.addresses_L4N.copy_(other.addresses_L4N)
        self.ranks_LN.copy_(other.ranks_LN)
        self.scales_LN.copy_(other.scales_LN)


def make_pass_tables(
    device: torch.device, bounds: Sequence[tuple[int, int]], dropouts: Sequence[Dropout | None]
) -> PassTables:
    """Make the tables of one pass, moved to the device in two copies.

    `bounds` is (first token, end) of each part, `dropouts` the dropout of each part, if any.
    """
    *integers, factors = pass_arrays(bounds, dropouts)
    whole = torch.from_numpy(np.concatenate(integers))
    if device.type == "cuda":
        whole = whole.pin_memory()
    moved = whole.to(device, non_blocking=True)
    tiles, part_bounds, limits, keys_T = moved.split([len(one) for one in integers])
    return PassTables(
        num_tiles=len(tiles) // 3,
        num_parts=len(bounds),
        tiles=tiles,
        bounds=part_bounds,
        keys_T=keys_T,
        drop_limits=limits,
        keep_factors=torch.from_numpy(factors).to(device),
        has_dropout=any(dropout is not None for dropout in dropouts),
    )


def pass_arrays(
    bounds: Sequence[tuple[int, int]], dropouts: Sequence[Dropout | None]
) -> tuple[np.ndarray, ...]:
    """Return the arrays of PassTables: tiles, bounds, drop limits and token keys, then keep factors.

    All are int64 but the keep factors, which are float32.
    """
    tiles: list[tuple[int, int, int]] = []
    for part, (first, end) in enumerate(bounds):
        tiles += [(part, start, end) for start in range(first, end, TILE_TOKENS)]
    keys, limits, factors = [], [], []
    for (first, end), dropout in zip(bounds, dropouts, strict=True):
        if dropout is None:
            keys.append(np.zeros(end - first, np.int64))
            limits.append(0)
            factors.append(1.0)
        else:
            keys.append(dropout.token_keys().astype(np.int64))
            limits.append(round(dropout.p * 2**32))
            factors.append(1 / (1 - dropout.p))
    return (
        np.array(tiles, np.int64).flatten(),
        np.array(bounds, np.int64).flatten(),
        np.array(limits, np.int64),
        np.concatenate(keys),
        np.array(factors, np.float32),
    )


def make_bank_tables(
    layers: Sequence[Sequence[LayerPart | None]],
    device: torch.device,
    least_rank: int = 1,
    odd_ranks: bool = False,
) -> BankTables:
    """Make the tables of all layers.

    Each layer has an entry for each adapter, None where the adapter leaves the layer alone. `least_rank` is
    the least that kernels calculate with, whatever the adapters' ranks; with `odd_ranks` they don't count on
    multiples of 8.
    """
    addresses, ranks, scales = [], [], []
    for parts in layers:
        addresses.append([[_address(part, name) for part in parts] for name in _MATRICES])
        ranks.append([0 if part is None else part.a.shape[0] for part in parts])
        scales.append([0.0 if part is None else part.scale for part in parts])
    return BankTables(
        addresses_L4N=torch.tensor(addresses, device=device),
        ranks_LN=torch.tensor(ranks, device=device),
        scales_LN=torch.tensor(scales, device=device),
        max_ranks=tuple(max(*of_layer, least_rank) for of_layer in ranks),
        even_ranks=not odd_ranks and not any(has_odd_ranks(of_layer) for of_layer in ranks),
    )


def has_odd_ranks(ranks: Sequence[int]) -> bool:
    """Tell whether not all ranks are multiples of 8, which vector loads of B need."""
    return any(rank % 8 for rank in ranks)


def num_splits(num_tiles: int, num_layers: int, has_dropout: bool) -> int:
    """Return the number of pieces that a sum over columns is cut into, so that all processors have work.

    It is a power of two. With dropout a program calculates longer than it loads: then there are more pieces.
    """
    programs = 2 * PROGRAMS if has_dropout else PROGRAMS
    pieces = max(1, programs // (num_tiles * num_layers))
    return min(_MOST_SPLITS, 1 << (pieces.bit_length() - 1))


def adds_pieces_later(num_tiles: int) -> bool:
    """Tell whether who reads a sum adds up its pieces: for few tiles, that is cheaper than two launches."""
    return num_tiles <= _FEW_TILES


def padded_rank(rank: int) -> int:
    """Round a rank up to what kernels calculate with: a power of two, at least 16."""
    return max(_LEAST_RANK, 1 << max(0, rank - 1).bit_length())


def _address(part: LayerPart | None, name: str) -> int:
    """Return where a matrix of an adapter is in memory; 0 if the adapter leaves the layer alone."""
    if part is None:
        return 0
    matrix: Tensor = getattr(part, name)
    assert matrix.data_ptr() % 16 == 0, "kernels load 16 bytes at a time"
    return matrix.data_ptr()
