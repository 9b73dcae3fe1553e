"""Owns what the LoRA kernels (qlora.lora.kernels) look up: where the parts of a pass lie, and each layer's adapters by address.

Plain NumPy and torch, so that it is made and tested on any machine.

Shapes: T stream tokens, L layers, N adapters.
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
_LEAST_RANK = 16  # of a matrix product on tensor cores
_PROGRAMS = 1056  # eight for each of an H100's processors
_MOST_SPLITS = 4  # pieces that a sum over columns is cut into


@dataclass(frozen=True)
class PassTables:
    """What kernels need to know of a pass.

    tiles: (part, first token, end) of each. bounds: (first token, end) of each part. keys_T: of each token, for
    dropout. drop_limits: a hash below a part's is dropped. keep_factors: 1 / (1 - p) of each part.
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
    """One layer's adapters: addresses of A, B and their gradients, rank (0 where a layer is left alone), scale."""

    a: Tensor
    b: Tensor
    a_grad: Tensor
    b_grad: Tensor
    ranks: Tensor
    scales: Tensor
    max_rank: int


@dataclass(frozen=True)
class BankTables:
    """All layers' tables: the four addresses, ranks, scales, and each layer's largest rank."""

    addresses_L4N: Tensor
    ranks_LN: Tensor
    scales_LN: Tensor
    max_ranks: tuple[int, ...]

    @cached_property
    def layers(self) -> tuple[LayerTables, ...]:
        """Split the tables by layer."""
        found = []
        for layer, rank in enumerate(self.max_ranks):
            a, b, a_grad, b_grad = self.addresses_L4N[layer].unbind(0)
            tables = LayerTables(a, b, a_grad, b_grad, self.ranks_LN[layer], self.scales_LN[layer], rank)
            found.append(tables)
        return tuple(found)

    def copy_(self, other: "BankTables") -> None:
        """Take over another's addresses, ranks and scales, in place."""
        self.addresses_L4N.copy_(other.addresses_L4N)
        self.ranks_LN.copy_(other.ranks_LN)
        self.scales_LN.copy_(other.scales_LN)


def make_pass_tables(
    device: torch.device, bounds: Sequence[tuple[int, int]], dropouts: Sequence[Dropout | None]
) -> PassTables:
    """Make the tables of one pass, moved to the device in two copies."""
    *integers, factors = pass_arrays(bounds, dropouts)
    whole = torch.from_numpy(np.concatenate(integers))
    if device.type == "cuda":
        whole = whole.pin_memory()
    tiles, in_parts, limits, keys = whole.to(device, non_blocking=True).split([len(one) for one in integers])
    return PassTables(
        num_tiles=len(tiles) // 3,
        num_parts=len(bounds),
        tiles=tiles,
        bounds=in_parts,
        keys_T=keys,
        drop_limits=limits,
        keep_factors=torch.from_numpy(factors).to(device),
        has_dropout=any(dropout is not None for dropout in dropouts),
    )


def pass_arrays(
    bounds: Sequence[tuple[int, int]], dropouts: Sequence[Dropout | None]
) -> tuple[np.ndarray, ...]:
    """Return (tiles, bounds, drop limits, token keys) int64 and keep factors float32, as PassTables has them."""
    tiles = [
        (part, start, end)
        for part, (first, end) in enumerate(bounds)
        for start in range(first, end, TILE_TOKENS)
    ]
    keys = [
        np.zeros(end - first, np.int64) if dropout is None else dropout.token_keys().astype(np.int64)
        for (first, end), dropout in zip(bounds, dropouts, strict=True)
    ]
    limits = [0 if dropout is None else round(dropout.p * 2**32) for dropout in dropouts]
    factors = [1.0 if dropout is None else 1 / (1 - dropout.p) for dropout in dropouts]
    return (
        np.array(tiles, np.int64).flatten(),
        np.array(bounds, np.int64).flatten(),
        np.array(limits, np.int64),
        np.concatenate(keys),
        np.array(factors, np.float32),
    )


def make_bank_tables(
    layers: Sequence[Sequence[LayerPart | None]], device: torch.device, least_rank: int = 1
) -> BankTables:
    """Make the tables of all layers, each with an entry an adapter, None where it leaves the layer alone.

    Kernels calculate with `least_rank` at least.
    """
    addresses = [
        [[0 if part is None else getattr(part, name).data_ptr() for part in parts] for name in _MATRICES]
        for parts in layers
    ]
    ranks = [[0 if part is None else part.a.shape[0] for part in parts] for parts in layers]
    scales = [[0.0 if part is None else part.scale for part in parts] for parts in layers]
    return BankTables(
        torch.tensor(addresses, device=device),
        torch.tensor(ranks, device=device),
        torch.tensor(scales, device=device),
        tuple(max(*one, least_rank) for one in ranks),
    )


def num_splits(num_tiles: int) -> int:
    """Return the pieces that a sum over columns is cut into, so that there is work for all processors."""
    return min(_MOST_SPLITS, max(1, _PROGRAMS // num_tiles))


def padded_rank(rank: int) -> int:
    """Return the rank that kernels calculate with: a power of two."""
    return max(_LEAST_RANK, 1 << max(0, rank - 1).bit_length())
